//! Errors in vLLM's shape: `{"error":{"message","type","param","code"}}`, `code` being the status.

use axum::response::{IntoResponse, Response};
use forebay_engines::StartError;
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

/// One error as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None }
    }

    /// The request must change, 400.
    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message)
    }

    /// A field must change, 400.
    pub(crate) fn field(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad(message) }
    }

    /// Another model than the one served, 404.
    pub(crate) fn unknown_model(name: &str) -> Self {
        let name: String = name.chars().take(NAME_CHARS_MAX).collect();
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", format!("The model `{name}` does not exist."))
    }

    /// No room, 503.
    pub(crate) fn busy() -> Self {
        let message = "the engine is busy and takes no new requests; try again later or elsewhere";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable", message)
    }

    /// The engine's life is over, 500.
    pub(crate) fn engine_dead(reason: &str) -> Self {
        let message = format!("EngineDeadError: the engine has ended: {reason}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// KV could not be loaded and may not be recomputed, 500.
    pub(crate) fn kv_load_failed() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", "Internal server error")
    }

    /// Anything else that is our fault, 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// The request took too long, 504.
    pub(crate) fn timed_out() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "InternalServerError", "the request took too long")
    }

    pub(crate) fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "BadRequestError", message)
    }

    /// Why the engine did not take a leg.
    pub(crate) fn of_start(error: &StartError) -> Self {
        match error {
            StartError::QueueFull { .. } => Self::busy(),
            StartError::TooLong { needed_tokens, context_tokens_max } => {
                too_long(*context_tokens_max, *needed_tokens)
            }
            StartError::Gone => Self::engine_dead("it is gone"),
            StartError::Rejected { message, .. } => Self::bad(&**message),
            StartError::Malformed { .. }
            | StartError::ForeignKv
            | StartError::Failed { .. }
            | StartError::WrongForm => Self::internal(error.to_string()),
        }
    }

    /// The body, or the data of an SSE event.
    pub(crate) fn to_json(&self) -> String {
        let Self { status, kind, message, param } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": status.as_u16()}})
            .to_string()
    }
}

/// Of a client's own words, what a message repeats.
const NAME_CHARS_MAX: usize = 200;

/// Prompt and output do not fit.
pub(crate) fn too_long(context_tokens_max: u32, needed_tokens: u32) -> ApiError {
    ApiError::bad(format!(
        "This model's maximum context length is {context_tokens_max} tokens; prompt and output of this request need \
         {needed_tokens}. Shorten the prompt or ask for fewer tokens."
    ))
}

/// An answer of JSON.
pub(crate) fn json_response(status: StatusCode, body: impl Into<axum::body::Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        json_response(self.status, self.to_json())
    }
}
