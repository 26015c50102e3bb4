//! Answers: whole, or as a stream of events, and what faults make of the stream.
//!
//! In: a [`Generation`] and a [`Shape`] that words it. Out: an HTTP response. Start at [`answer`].
//!
//! Evidence: `fixtures/vllm/nixl_pd/tito_4_decode_stream.txt` for framing, usage chunk and `[DONE]`. In vLLM 0.32 the
//! status line of a stream leaves before the engine has seen the request, so what the engine refuses arrives as an
//! event under status 200, followed by `[DONE]` (`completion/serving.py`).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use super::error::ApiError;
use super::generation::{Delta, Finish, Generation};
use crate::double::Body;
use crate::double::fault::Fault;
use crate::engine::request::Sampled;

const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";
/// Bytes of each piece of a line that never ends.
const ENDLESS_PIECE: usize = 16 << 10;

/// One choice, complete.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) finish: Option<Finish>,
}

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) completion: usize,
    pub(crate) cached: usize,
    /// Tokens of the prompt that this request put into the cache.
    pub(crate) created: usize,
}

/// How one of the APIs words an answer.
pub(crate) trait Shape: Send + 'static {
    /// Events before the first token.
    fn head(&mut self, generation: &Generation) -> Vec<Value>;
    /// The events for what is new of a choice.
    fn delta(&mut self, generation: &Generation, delta: &Delta, usage: Option<Usage>) -> Vec<Value>;
    /// The last event, if usage was asked for.
    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value;
    /// An error, as a body or as an event.
    fn error(&self, error: &ApiError, _streaming: bool) -> Value {
        error.body()
    }
    /// The status of such an error, if nothing was sent yet.
    fn status(&self, error: &ApiError) -> u16 {
        error.status
    }
    /// The whole answer.
    fn whole(
        &mut self,
        generation: &Generation,
        choices: &[Whole],
        usage: Usage,
        transfer_params: Value,
    ) -> Value;
}

/// Runs a request to its answer. `start` is called once, after the faults that answer without the engine.
pub(crate) async fn answer(
    body: &Arc<Body>,
    stream: bool,
    mut shape: impl Shape,
    start: impl FnOnce() -> Result<Generation, ApiError>,
) -> Response {
    let fault = body.fault();
    let internal = ApiError::failed("Internal server error");
    match fault {
        Some(Fault::InternalError) => return refusal(&shape, &internal),
        Some(Fault::ErrorBody) => return Json(shape.error(&internal, stream)).into_response(),
        _ => {}
    }
    let load = Load::begin(body);
    let started = start();
    if stream {
        return events(body, started, shape, fault, load);
    }
    match started {
        Ok(mut generation) => collect(body, &mut generation, &mut shape, fault.as_ref()).await,
        Err(error) => refusal(&shape, &error),
    }
}

/// An error with its status.
pub(crate) fn refusal(shape: &impl Shape, error: &ApiError) -> Response {
    let status = StatusCode::from_u16(shape.status(error)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(shape.error(error, false))).into_response()
}

/// An error as the only event of a stream, under status 200.
pub(crate) fn refused_stream(shape: &impl Shape, error: &ApiError) -> Response {
    let body = format!("data: {}\n\ndata: [DONE]\n\n", shape.error(error, true));
    ([(header::CONTENT_TYPE, EVENT_STREAM)], body).into_response()
}

async fn collect(
    body: &Body,
    generation: &mut Generation,
    shape: &mut impl Shape,
    fault: Option<&Fault>,
) -> Response {
    let count = generation.ask.choices * generation.ask.prompts.len();
    let mut choices: Vec<Whole> = (0..count).map(|_| Whole::default()).collect();
    let mut counter = Counter::new(body, generation);
    let mut transfer_params = Value::Null;
    loop {
        match generation.next().await {
            Ok(Some(deltas)) => {
                for delta in deltas {
                    counter.add(&delta);
                    let whole = &mut choices[delta.choice];
                    whole.text.push_str(&delta.text);
                    whole.tokens.extend(&delta.tokens);
                    whole.finish = delta.finish.or(whole.finish.take());
                    if let Some(params) = delta.transfer_params {
                        transfer_params = params;
                    }
                }
            }
            Ok(None) => break,
            Err(error) => return refusal(shape, &error),
        }
        match fault {
            Some(Fault::StallAfter { tokens }) if counter.usage.completion >= *tokens => {
                std::future::pending().await
            }
            Some(Fault::CloseAfter { tokens }) if counter.usage.completion >= *tokens => return broken(),
            _ => {}
        }
    }
    Json(shape.whole(generation, &choices, counter.usage, transfer_params)).into_response()
}

/// Headers, half of a body, then the connection breaks.
fn broken() -> Response {
    let pieces: [io::Result<Bytes>; 2] =
        [Ok(Bytes::from_static(b"{\"id\":")), Err(io::ErrorKind::ConnectionReset.into())];
    let body = HttpBody::from_stream(futures::stream::iter(pieces));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Counts a request that is being answered.
struct Load(Arc<Body>);

impl Load {
    fn begin(body: &Arc<Body>) -> Self {
        body.answering.fetch_add(1, Ordering::Relaxed);
        Self(body.clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds up an answer's usage.
struct Counter {
    usage: Usage,
    block_size: usize,
}

impl Counter {
    fn new(body: &Body, generation: &Generation) -> Self {
        let prompt = generation.ask.prompts.iter().map(Vec::len).sum();
        Self { usage: Usage { prompt, ..Usage::default() }, block_size: body.block_size }
    }

    fn add(&mut self, delta: &Delta) {
        self.usage.completion += delta.tokens.len();
        self.usage.cached = delta.cached_tokens;
        let full = self.usage.prompt / self.block_size * self.block_size;
        self.usage.created = full.saturating_sub(delta.cached_tokens);
    }
}

struct Events<S> {
    generation: Result<Generation, ApiError>,
    shape: S,
    counter: Option<Counter>,
    queue: VecDeque<Bytes>,
    /// The head was sent.
    begun: bool,
    /// `[DONE]` is in the queue.
    done: bool,
    fault: Option<Fault>,
    sent: usize,
    _load: Load,
}

fn events(
    body: &Arc<Body>,
    generation: Result<Generation, ApiError>,
    shape: impl Shape,
    fault: Option<Fault>,
    load: Load,
) -> Response {
    let counter = generation.as_ref().ok().map(|generation| Counter::new(body, generation));
    let queue = VecDeque::new();
    let state =
        Events { generation, shape, counter, queue, begun: false, done: false, fault, sent: 0, _load: load };
    let stream =
        futures::stream::unfold(state, |mut state| async { state.next().await.map(|piece| (piece, state)) });
    let headers = [(header::CONTENT_TYPE, EVENT_STREAM)];
    (StatusCode::OK, headers, HttpBody::from_stream(stream)).into_response()
}

impl<S: Shape> Events<S> {
    async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        match &self.fault {
            Some(Fault::EndlessLine) => return Some(Ok(self.endless())),
            Some(Fault::InvalidUtf8) if self.sent == 0 => {
                self.sent = 1;
                return Some(Ok(Bytes::from_static(b"data: {\"choices\":[{\"text\":\"\xFF\xC0\"}]}\n\n")));
            }
            _ => {}
        }
        while self.queue.is_empty() {
            if self.done {
                return None;
            }
            let tokens = self.counter.as_ref().map_or(0, |counter| counter.usage.completion);
            match &self.fault {
                Some(Fault::StallAfter { tokens: limit }) if tokens >= *limit => std::future::pending().await,
                Some(Fault::CloseAfter { tokens: limit }) if tokens >= *limit => {
                    return Some(Err(io::ErrorKind::ConnectionReset.into()));
                }
                _ => {}
            }
            self.fill().await;
        }
        self.queue.pop_front().map(Ok)
    }

    fn endless(&mut self) -> Bytes {
        let first = self.sent == 0;
        self.sent += 1;
        if first { Bytes::from_static(b"data: {\"text\":\"") } else { Bytes::from(vec![b'a'; ENDLESS_PIECE]) }
    }

    async fn fill(&mut self) {
        let result = match &mut self.generation {
            Ok(generation) => generation.next().await,
            Err(error) => Err(error.clone()),
        };
        match result {
            Ok(Some(deltas)) => self.add(&deltas),
            Ok(None) => {
                if let (Ok(generation), Some(counter)) = (&self.generation, &self.counter)
                    && generation.ask.include_usage
                {
                    let usage = self.shape.usage(generation, counter.usage);
                    self.queue.push_back(event(&usage));
                }
                self.finish();
            }
            Err(error) => {
                self.queue.push_back(event(&self.shape.error(&error, true)));
                self.finish();
            }
        }
    }

    fn add(&mut self, deltas: &[Delta]) {
        let (Ok(generation), Some(counter)) = (&self.generation, &mut self.counter) else { return };
        if !self.begun {
            self.begun = true;
            self.queue.extend(self.shape.head(generation).iter().map(event));
        }
        for delta in deltas {
            counter.add(delta);
            let usage = generation.ask.continuous_usage.then_some(counter.usage);
            self.queue.extend(self.shape.delta(generation, delta, usage).iter().map(event));
        }
    }

    fn finish(&mut self) {
        self.queue.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.done = true;
    }
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// Usage as it stands in whole answers.
pub(crate) fn usage_object(usage: Usage, details: Value) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.prompt + usage.completion,
        "completion_tokens": usage.completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": null,
    })
}

/// Usage as it stands in streams, where absent fields are left out.
pub(crate) fn stream_usage(usage: Usage, details: Option<Value>) -> Value {
    let mut object = json!({
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.prompt + usage.completion,
        "completion_tokens": usage.completion,
    });
    if let Some(details) = details {
        object["prompt_tokens_details"] = details;
    }
    object
}
