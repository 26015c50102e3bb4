//! The HTTP surface of an SGLang server.
//!
//! In: requests. Out: answers. Routes are in [`router`]; [`ask`] reads bodies, [`submit`] gives them to the engine,
//! [`shapes`] words the answers, [`admin`] has everything that generates nothing.

mod admin;
mod ask;
mod shapes;
mod submit;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use self::ask::Asked;
use super::Sglang;
use crate::api::error::ApiError;
use crate::api::{header, read_body, stream};

/// Paths that are open whatever the key (SGLang 0.5.23's `utils/auth.py`).
const OPEN: [&str; 3] = ["/health", "/ready", "/metrics"];

/// All routes of a double.
pub(super) fn router(sglang: &Arc<Sglang>) -> Router {
    let mut router = Router::new()
        .route("/health", get(admin::health))
        .route("/health_generate", get(admin::health))
        .route("/ready", get(admin::health))
        .route("/model_info", get(admin::model_info))
        .route("/get_model_info", get(admin::model_info))
        .route("/server_info", get(admin::server_info))
        .route("/get_server_info", get(admin::server_info))
        .route("/v1/models", get(admin::models))
        .route("/v1/loads", get(admin::loads))
        .route("/flush_cache", get(admin::flush_cache).post(admin::flush_cache))
        .route("/abort_request", post(admin::abort_request))
        .route("/tokenize", post(admin::tokenize))
        .route("/v1/tokenize", post(admin::tokenize))
        .route("/detokenize", post(admin::detokenize))
        .route("/v1/detokenize", post(admin::detokenize))
        .route("/generate", post(generate).put(generate))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat));
    if sglang.options.metrics {
        router = router.route("/metrics", get(admin::metrics));
    }
    router
        .fallback(|| async { (StatusCode::NOT_FOUND, axum::Json(json!({"detail": "Not Found"}))) })
        .layer(middleware::from_fn_with_state(sglang.clone(), authenticate))
        .with_state(sglang.clone())
}

type Shared = State<Arc<Sglang>>;

async fn authenticate(State(sglang): Shared, request: Request, next: Next) -> Response {
    let Some(key) = &sglang.options.api_key else { return next.run(request).await };
    let open = OPEN.iter().any(|prefix| request.uri().path().starts_with(prefix));
    let given = header(request.headers(), "authorization").unwrap_or_default();
    let (scheme, token) = given.split_once(' ').unwrap_or_default();
    let right = scheme.eq_ignore_ascii_case("bearer") && token == key.0;
    if !open && request.method() != Method::OPTIONS && !right {
        return (StatusCode::UNAUTHORIZED, axum::Json(json!({"error": "Unauthorized"}))).into_response();
    }
    next.run(request).await
}

async fn generate(State(sglang): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let body = read(&sglang, &uri, &headers, body).await;
    let streams = body.as_ref().is_ok_and(|body| body["stream"] == true);
    let shape = shapes::Native::new(&sglang);
    match body.and_then(|body| ask::native(&body, &headers, &sglang.options)) {
        // What the tokenizer manager refuses arrives inside of a stream, whose status has left by then.
        Err(error) if streams && error.kind == "BadRequestError" => stream::refused_stream(&shape, &error),
        asked => answer(&sglang, asked, shape).await,
    }
}

async fn completions(State(sglang): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let asked = read(&sglang, &uri, &headers, body).await;
    let asked = asked.and_then(|body| ask::completion(&body, &headers, &sglang.options));
    answer(&sglang, asked, shapes::Completion::default()).await
}

async fn chat(State(sglang): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let asked = read(&sglang, &uri, &headers, body).await;
    let asked = asked.and_then(|body| ask::chat(&body, &headers, &sglang.options));
    answer(&sglang, asked, shapes::Chat::default()).await
}

async fn read(sglang: &Sglang, uri: &Uri, headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    read_body(&sglang.body, uri, headers, body).await
}

async fn answer(sglang: &Arc<Sglang>, asked: Result<Asked, ApiError>, shape: impl stream::Shape) -> Response {
    let asked = match asked {
        Ok(asked) => asked,
        Err(error) => return stream::refusal(&shape, &error),
    };
    if submit::kills(sglang, &asked) {
        sglang.died();
        return std::future::pending().await; // the connection breaks with the process
    }
    let started = sglang.clone();
    stream::answer(&sglang.body, asked.ask.stream, shape, move || submit::start(&started, asked)).await
}
