//! What the tests of doubles share.

use std::time::Duration;

use forebay_testkit::client::{self, Answer};
use http::Method;
use serde_json::Value;

/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(10);

pub(crate) async fn get(base: &str, path: &str) -> Answer {
    client::send(Method::GET, &format!("{base}{path}"), &[], &Value::Null, LONG).await.unwrap()
}

pub(crate) async fn post(base: &str, path: &str, body: &Value) -> Answer {
    post_with(base, path, &[], body).await
}

pub(crate) async fn post_with(base: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    client::send(Method::POST, &format!("{base}{path}"), headers, body, LONG).await.unwrap()
}

/// The value of a series whose name and labels all occur in its line.
pub(crate) async fn metric(base: &str, parts: &[&str]) -> f64 {
    let text = get(base, "/metrics").await.text();
    let line =
        text.lines().find(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part)));
    let line = line.unwrap_or_else(|| panic!("no series {parts:?}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// The token ids of a whole answer's first choice.
pub(crate) fn token_ids(answer: &Value) -> Vec<u32> {
    serde_json::from_value(answer["choices"][0]["token_ids"].clone()).unwrap()
}
