//! Checks that a server must pass to be called vLLM: the doubles are held against them, and so is a real vLLM.
//!
//! In: a [`Target`]. Out: an [`Outcome`] for each of [`vllm`]'s checks. They use nothing but HTTP and the event
//! sockets, bring their own prompts, and leave nothing behind. What a server was not started for is skipped, with the
//! reason.

mod events;
mod generation;
mod pair;
mod surface;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::client::{self, Answer, Open};
use crate::vllm::ApiKey;

/// How often a state that is waited for is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The server that is checked.
#[derive(Debug)]
pub struct Target {
    /// `http://host:port`.
    pub url: String,
    /// A decode server; then `url` is its prefill server.
    pub decode_url: Option<String>,
    /// The servers' API key.
    pub api_key: Option<ApiKey>,
    /// How long one answer may take. A real vLLM on a busy CPU needs a minute.
    pub timeout: Duration,
    fresh: AtomicU64,
}

impl Target {
    /// A server by its URL, with 60 s for each answer.
    pub fn new(url: impl Into<String>) -> Self {
        let start = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            url: url.into(),
            decode_url: None,
            api_key: None,
            timeout: Duration::from_secs(60),
            fresh: AtomicU64::new(start.as_nanos() as u64),
        }
    }

    /// A text of about `words` words that no earlier call returned, so that nothing of it is cached.
    fn fresh_text(&self, words: usize) -> String {
        let start = self.fresh.fetch_add(0x9E37_79B9, Ordering::Relaxed);
        let words: Vec<String> =
            (0..words).map(|word| format!("{:x}", start.rotate_left(word as u32 * 7) & 0xFFFF)).collect();
        words.join(" ")
    }

    async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Result<Answer, String> {
        let key = self.api_key.as_ref().map(|key| format!("Bearer {}", key.0));
        let mut all: Vec<(&str, &str)> = headers.to_vec();
        all.extend(key.as_ref().map(|key| ("authorization", key.as_str())));
        client::send(method, url, &all, body, self.timeout).await.map_err(|error| format!("{url}: {error}"))
    }

    async fn get(&self, path: &str) -> Result<Answer, String> {
        self.send(Method::GET, &format!("{}{path}", self.url), &[], &Value::Null).await
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Answer, String> {
        self.send(Method::POST, &format!("{}{path}", self.url), &[], body).await
    }

    async fn open(&self, path: &str, body: &Value) -> Result<Open, String> {
        let key = self.api_key.as_ref().map(|key| format!("Bearer {}", key.0));
        let headers: Vec<(&str, &str)> =
            key.as_ref().map(|key| ("authorization", key.as_str())).into_iter().collect();
        let url = format!("{}{path}", self.url);
        let opened = client::open(Method::POST, &url, &headers, body);
        let opened = tokio::time::timeout(self.timeout, opened)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        opened.map_err(|error| error.to_string())
    }

    /// A greedy completion of `prompt` (text or ids) by `url`; its token ids.
    async fn complete(&self, url: &str, prompt: Value, extra: Value) -> Result<Value, String> {
        let mut body = json!({"prompt": prompt, "temperature": 0, "return_token_ids": true, "max_tokens": 8});
        if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
            body.extend(extra);
        }
        let answer = self.send(Method::POST, &format!("{url}/v1/completions"), &[], &body).await?;
        ensure(answer.status == 200, || format!("status {}: {}", answer.status, answer.text()))?;
        Ok(answer.json())
    }

    /// The sum of a metric's series whose labels contain `label`, at `url`.
    async fn metric(&self, url: &str, name: &str, label: &str) -> Result<f64, String> {
        let text = self.send(Method::GET, &format!("{url}/metrics"), &[], &Value::Null).await?.text();
        let series = text.lines().filter(|line| {
            line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']) && line.contains(label)
        });
        let values: Vec<f64> = series.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        ensure(!values.is_empty(), || format!("no metric {name} with {label}"))?;
        Ok(values.iter().sum())
    }

    /// Waits until `look` says so.
    async fn wait<F: Future<Output = Result<bool, String>>>(
        &self,
        what: &str,
        mut look: impl FnMut() -> F,
    ) -> Result<(), String> {
        let until = Instant::now() + self.timeout;
        while !look().await? {
            ensure(Instant::now() < until, || format!("waited {:?} for {what}", self.timeout))?;
            tokio::time::sleep_until(Instant::now() + LOOK_AGAIN).await;
        }
        Ok(())
    }
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server does it.
    Passed,
    /// The server was not started for it.
    Skipped(String),
    /// The server does something else.
    Failed(String),
}

type Run = Box<dyn Fn(Arc<Target>) -> BoxFuture<'static, Result<Outcome, String>> + Send + Sync>;

/// One check.
pub struct Check {
    /// What is true if it passes.
    pub name: &'static str,
    run: Run,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Check {
    fn new<F>(name: &'static str, run: fn(Arc<Target>) -> F) -> Self
    where
        F: Future<Output = Result<Outcome, String>> + Send + 'static,
    {
        Self { name, run: Box::new(move |target| run(target).boxed()) }
    }

    /// Runs it.
    pub async fn run(&self, target: &Arc<Target>) -> Outcome {
        (self.run)(target.clone()).await.unwrap_or_else(Outcome::Failed)
    }
}

/// The checks of a vLLM server, in the order in which they are best run.
pub fn vllm() -> Vec<Check> {
    let mut checks = surface::checks();
    checks.extend(generation::checks());
    checks.extend(events::checks());
    checks.extend(pair::checks());
    checks
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, left: T, right: T) -> Result<(), String> {
    ensure(left == right, || format!("{what}: {left:?} is not {right:?}"))
}

fn skipped(reason: &str) -> Result<Outcome, String> {
    Ok(Outcome::Skipped(reason.to_owned()))
}

/// The token ids of an answer's first choice.
fn token_ids(answer: &Value) -> Result<Vec<u32>, String> {
    serde_json::from_value(answer["choices"][0]["token_ids"].clone())
        .map_err(|_| format!("no token ids in {answer}"))
}

/// The events of a stream as JSON, without `[DONE]`, which must be the last.
fn events(answer: &Answer) -> Result<Vec<Value>, String> {
    let mut events = answer.events();
    equal("the last event", events.pop().as_deref(), Some("[DONE]"))?;
    let parse = |event: &String| serde_json::from_str(event).map_err(|error| format!("{error} in {event}"));
    events.iter().map(parse).collect()
}
