//! What all connections share, and the routes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use forebay_engines::{Driver, EngineFacts};
use forebay_kv_hash::BlockHasher;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{
    errors::{ApiError, json_response},
    events::EventPorts,
    generate,
    hand_over::Exchange,
    legs::Legs,
    metrics::{Facts, Metrics, render},
    options::{ApiKey, EventOptions, HttpLimits, ModelText},
    tokenize,
};

/// What vLLM calls itself where this dialect was learnt, and a mark that this is not it.
const VERSION: &str = "0.32.0+forebay";
/// Paths that need the key, as vLLM has it.
const GUARDED: [&str; 2] = ["/v1", "/inference"];
/// Longest id that is taken from a request's header.
const REQUEST_ID_BYTES_MAX: usize = 128;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// See the module.
pub(crate) struct App {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) hasher: BlockHasher,
    pub(crate) text: ModelText,
    pub(crate) legs: Arc<Legs>,
    pub(crate) limits: HttpLimits,
    /// Hand-over of KV, where the engine has a connector.
    pub(crate) exchange: Option<Exchange>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) api_key: Option<ApiKey>,
    /// What `/kv_event_sources` says.
    pub(crate) events: Option<(EventOptions, EventPorts)>,
    /// Why the engine died, once it has.
    pub(crate) death: watch::Receiver<Option<Arc<str>>>,
    /// Unix time.
    pub(crate) started_seconds: f64,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) load: Arc<AtomicU64>,
}

impl App {
    pub(crate) fn facts(&self) -> &EngineFacts {
        self.driver.facts()
    }

    /// A place for a request that generates.
    ///
    /// # Errors
    /// 500 if the engine is dead, 503 if there is no room.
    pub(crate) fn admit(&self) -> Result<Admitted, ApiError> {
        if let Some(reason) = self.death.borrow().as_deref() {
            return Err(ApiError::engine_dead(reason));
        }
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            self.metrics.update(|counters| counters.rejected += 1);
            return Err(ApiError::busy());
        };
        self.load.fetch_add(1, Relaxed);
        Ok(Admitted { load: self.load.clone(), _slot: slot })
    }
}

/// A request that generates, while it lives.
pub(crate) struct Admitted {
    load: Arc<AtomicU64>,
    _slot: OwnedSemaphorePermit,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Relaxed);
    }
}

pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/version", get(version))
        .route("/load", get(load))
        .route("/metrics", get(metrics))
        .route("/kv_event_sources", get(kv_event_sources))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/inference/v1/generate", post(scale_out))
        .route("/inference/v1/abort_requests", post(scale_out))
        .fallback(|| async { json_response(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#) })
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// Checks the key, and puts the request's id on every answer.
async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let guarded = GUARDED.iter().any(|prefix| path.starts_with(prefix));
    if guarded && !app.api_key.as_ref().is_none_or(|key| presents(request.headers(), key)) {
        return json_response(StatusCode::UNAUTHORIZED, r#"{"error":"Unauthorized"}"#);
    }
    let id = request.headers().get(&REQUEST_ID).filter(|id| is_usable(id)).cloned();
    let id = id.unwrap_or_else(|| {
        HeaderValue::from_str(&random_hex(16)).expect("hexadecimal digits are a header's value")
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn presents(headers: &HeaderMap, key: &ApiKey) -> bool {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    value
        .and_then(|value| value.split_once(' '))
        .is_some_and(|(scheme, presented)| scheme.eq_ignore_ascii_case("bearer") && key.is(presented))
}

fn is_usable(id: &HeaderValue) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// The id that [`guard`] made sure of.
pub(crate) fn request_id(headers: &HeaderMap) -> String {
    headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned()
}

/// `bytes` random bytes in hexadecimal.
///
/// # Panics
/// If the system has no entropy, which Linux excludes after its start.
pub(crate) fn random_hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).expect("the system gives entropy");
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads all of a body.
///
/// # Errors
/// 413, 408, or 400 if the client breaks off.
pub(crate) async fn read_body(body: Body, limits: &HttpLimits) -> Result<Bytes, ApiError> {
    let reading = Limited::new(body, limits.body_bytes_max).collect();
    let Ok(read) = tokio::time::timeout(limits.body_read_timeout, reading).await else {
        let message = format!("the body did not arrive within {:?}", limits.body_read_timeout);
        return Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, message));
    };
    match read {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body has more than {} bytes", limits.body_bytes_max);
            Err(ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Err(error) => Err(ApiError::bad(format!("the body could not be read to its end: {error}"))),
    }
}

async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.death.borrow().is_some() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

fn document(value: &Value) -> Response {
    json_response(StatusCode::OK, value.to_string())
}

async fn version() -> Response {
    document(&json!({"version": VERSION, "server": concat!("forebay-dialect ", env!("CARGO_PKG_VERSION"))}))
}

async fn load(State(app): State<Arc<App>>) -> Response {
    document(&json!({"server_load": app.load.load(Relaxed)}))
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let EngineFacts { model, context_tokens_max, .. } = app.facts();
    let created = app.started_seconds as u64;
    document(&json!({"object": "list", "data": [{
        "id": model, "object": "model", "created": created, "owned_by": "forebay", "root": model, "parent": null,
        "max_model_len": context_tokens_max,
    }]}))
}

/// With `*` as host, for both sockets are bound: vLLM would *connect* to a host that is named.
async fn kv_event_sources(State(app): State<Arc<App>>) -> Response {
    document(&match &app.events {
        None => json!({"0": {"enable_kv_cache_events": false, "publisher": "null"}}),
        Some((EventOptions { topic, buffer_steps, .. }, EventPorts { publish, replay })) => json!({"0": {
            "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": format!("tcp://*:{publish}"),
            "replay_endpoint": format!("tcp://*:{replay}"), "buffer_steps": buffer_steps, "topic": topic,
        }}),
    })
}

/// Behind `--enable-scale-out`, which this server does not have: `/v1/completions` takes token ids.
async fn scale_out() -> Response {
    ApiError::with_status(StatusCode::FORBIDDEN, "this server has no scale-out routes").into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let EngineFacts { model, block_size_tokens, blocks_total, .. } = app.facts();
    let facts = Facts {
        model,
        block_size_tokens: *block_size_tokens,
        blocks_total: *blocks_total,
        started_seconds: app.started_seconds,
        transfers: app.exchange.as_ref().map(Exchange::transfers),
        legs: app.legs.running(),
        consumes: app.exchange.as_ref().is_some_and(|exchange| exchange.options.role.consumes()),
    };
    let mut response = Response::new(Body::from(render(&facts, &app.metrics.read())));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Unix time.
pub(crate) fn unix_time() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}
