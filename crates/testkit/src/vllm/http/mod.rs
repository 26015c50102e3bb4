//! The HTTP surface of a vLLM server.
//!
//! In: requests. Out: answers. Routes are in [`router`]; [`ask`] reads bodies, [`submit`] gives them to the engine,
//! [`shapes`] words the answers, [`admin`] has everything that generates nothing.

mod admin;
mod ask;
mod shapes;
mod submit;

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use self::ask::Kind;
use super::options::VllmVersion;
use super::{Vllm, side_channel};
use crate::api::error::ApiError;
use crate::api::{Ask, header, read_body, stream};
use crate::double::fault::Fault;
use crate::engine::nixl::truthy;
use crate::kv::mix;

/// Paths that `--api-key` guards (vLLM 0.32's `middleware/authenticate.py`); all others are open.
const GUARDED: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];

/// All routes of a double.
pub(super) fn router(vllm: &Arc<Vllm>) -> Router {
    let mut router = Router::new()
        .route("/health", get(admin::health))
        .route("/ping", get(admin::health).post(admin::health))
        .route("/version", get(admin::version))
        .route("/metrics", get(admin::metrics))
        .route("/load", get(admin::load))
        .route("/tokenize", post(admin::tokenize))
        .route("/detokenize", post(admin::detokenize))
        .route("/v1/models", get(admin::models))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/inference/v1/generate", post(generate));
    if vllm.options.version != VllmVersion::V0_25 {
        router = router.route("/inference/v1/abort_requests", post(admin::abort_scale_out));
    }
    if vllm.options.version >= VllmVersion::V0_32 {
        router = router.route("/kv_event_sources", get(admin::kv_event_sources));
    }
    if vllm.options.dev_mode {
        router = router
            .route("/reset_prefix_cache", post(admin::reset_prefix_cache))
            .route("/server_info", get(admin::server_info))
            .route("/sleep", post(admin::sleep))
            .route("/wake_up", post(admin::wake_up))
            .route("/is_sleeping", get(admin::is_sleeping))
            .route("/pause", post(admin::pause))
            .route("/resume", post(admin::resume))
            .route("/is_paused", get(admin::is_paused))
            .route("/abort_requests", post(admin::abort_all));
    }
    router
        .fallback(|| async { ApiError::framework(StatusCode::NOT_FOUND) })
        .method_not_allowed_fallback(|| async { ApiError::framework(StatusCode::METHOD_NOT_ALLOWED) })
        .layer(middleware::from_fn_with_state(vllm.clone(), authenticate))
        .with_state(vllm.clone())
}

type Shared = State<Arc<Vllm>>;

/// `--api-key`. The refusal's body is a plain string under `error`, unlike all others.
async fn authenticate(State(vllm): Shared, request: Request, next: Next) -> Response {
    let Some(key) = &vllm.options.api_key else { return next.run(request).await };
    let guarded = GUARDED.iter().any(|prefix| request.uri().path().starts_with(prefix));
    let given =
        request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (scheme, token) = given.split_once(' ').unwrap_or_default();
    let right = scheme.eq_ignore_ascii_case("bearer") && token == key.0;
    if guarded && request.method() != Method::OPTIONS && !right {
        return (StatusCode::UNAUTHORIZED, axum::Json(json!({"error": "Unauthorized"}))).into_response();
    }
    next.run(request).await
}

/// Reads a JSON body. vLLM wants it called that.
async fn read(vllm: &Vllm, uri: &Uri, headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    let parsed = read_body(&vllm.body, uri, headers, body).await;
    let content_type = header(headers, "content-type").unwrap_or_default();
    if content_type
        .split(';')
        .next()
        .is_none_or(|media| !media.trim().eq_ignore_ascii_case("application/json"))
    {
        let message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed";
        return Err(ApiError { status: 400, kind: "Bad Request", message: message.into(), param: None });
    }
    parsed
}

async fn completions(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let result = read(&vllm, &uri, &headers, body).await;
    let asked = parse(&vllm, result, |body| ask::completion(body, &vllm.options)).await;
    match asked {
        Ok(ask) => {
            let shape = shapes::Completion { common: common(&vllm), begun: Vec::new() };
            answer(&vllm, Kind::Completion, ask, &headers, shape).await
        }
        Err(error) => error.into_response(),
    }
}

async fn chat(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let result = read(&vllm, &uri, &headers, body).await;
    let asked = parse(&vllm, result, |body| ask::chat(body, &vllm.options)).await;
    match asked {
        Ok(ask) => answer(&vllm, Kind::Chat, ask, &headers, shapes::Chat { common: common(&vllm) }).await,
        Err(error) => error.into_response(),
    }
}

async fn generate(State(vllm): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let result = read(&vllm, &uri, &headers, body).await;
    if !vllm.options.scale_out && vllm.options.version != VllmVersion::V0_25 {
        return scale_out_disabled().into_response();
    }
    let asked = result.and_then(|body| ask::tokens(&body, &vllm.options)).and_then(|ask| alive(&vllm, ask));
    match asked {
        Ok(ask) => {
            let shape = shapes::Tokens { common: common(&vllm), counts: Vec::new() };
            answer(&vllm, Kind::Tokens, ask, &headers, shape).await
        }
        Err(error) => error.into_response(),
    }
}

/// Runs a request; `--enable-request-id-headers` echoes its id, on whole answers and streams.
async fn answer(
    vllm: &Arc<Vllm>,
    kind: Kind,
    ask: Ask,
    headers: &HeaderMap,
    shape: impl stream::Shape,
) -> Response {
    let start = {
        let (vllm, headers) = (vllm.clone(), headers.clone());
        let stream = ask.stream;
        (stream, move || submit::start(&vllm, kind, ask, &headers))
    };
    let mut response = stream::answer(&vllm.body, start.0, shape, start.1).await;
    if vllm.options.request_id_headers {
        let id = header(headers, "x-request-id")
            .map_or_else(|| format!("{:032x}", vllm.body.unique()), str::to_owned);
        if let Ok(id) = id.parse() {
            response.headers_mut().insert("x-request-id", id);
        }
    }
    response
}

fn scale_out_disabled() -> ApiError {
    let message =
        "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.";
    ApiError { status: 403, kind: "PermissionDeniedError", message: message.into(), param: None }
}

/// Parses a body. A request that is refused after parsing, and names a prefill engine that holds blocks for it, lets
/// them be freed (vLLM 0.32; earlier ones left them to the lease).
async fn parse(
    vllm: &Vllm,
    body: Result<Value, ApiError>,
    parse: impl FnOnce(&Value) -> Result<Ask, ApiError>,
) -> Result<Ask, ApiError> {
    let body = body?;
    let result = parse(&body).and_then(|ask| alive(vllm, ask));
    if let Err(error) = &result
        && error.kind != "Bad Request"
        && vllm.options.connector.is_some()
        && vllm.options.version >= VllmVersion::V0_32
        && let Some(params) = body.get("kv_transfer_params").and_then(Value::as_object)
        && truthy(params.get("do_remote_prefill"))
    {
        side_channel::reject(params).await;
    }
    result
}

/// A dead engine answers before a response is begun.
fn alive(vllm: &Vllm, ask: Ask) -> Result<Ask, ApiError> {
    match vllm.body.life() {
        Some(life) if !life.dead() => Ok(ask),
        _ => Err(ApiError::engine_dead()),
    }
}

fn common(vllm: &Vllm) -> shapes::Common {
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let fingerprint =
        format!("vllm-{}-{:08x}", vllm.options.version.name(), mix(vllm.options.model_seed, 7) as u32);
    shapes::Common { created, fingerprint, details: vllm.options.prompt_tokens_details }
}

/// The name under which the model is shown.
fn shown_model(vllm: &Vllm) -> String {
    match vllm.body.fault() {
        Some(Fault::WrongModel { name }) => name,
        _ => vllm.options.model.clone(),
    }
}
