//! A record of the requests that a double received, for tests of what is sent to engines.

use std::collections::{BTreeMap, VecDeque};

use http::HeaderMap;
use parking_lot::Mutex;
use serde_json::Value;

/// Requests that are remembered.
const REQUESTS_MAX: usize = 1024;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenRequest {
    /// Path without the query.
    pub path: String,
    /// Headers by lower-case name; `authorization` is left out.
    pub headers: BTreeMap<String, String>,
    /// The body as JSON; null if it is none.
    pub body: Value,
}

/// The newest requests.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    requests: Mutex<VecDeque<SeenRequest>>,
}

impl Seen {
    pub(crate) fn add(&self, path: &str, headers: &HeaderMap, body: &Value) {
        let headers = headers
            .iter()
            .filter(|(name, _)| *name != http::header::AUTHORIZATION)
            .map(|(name, value)| {
                (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            })
            .collect();
        let mut requests = self.requests.lock();
        if requests.len() >= REQUESTS_MAX {
            requests.pop_front();
        }
        requests.push_back(SeenRequest { path: path.to_owned(), headers, body: body.clone() });
    }

    pub(crate) fn list(&self) -> Vec<SeenRequest> {
        self.requests.lock().iter().cloned().collect()
    }
}
