//! Errors before they are worded, and as vLLM's server words them.
//!
//! Evidence: the shape `{"error": {message, type, param, code}}` is `ErrorResponse` in
//! `fixtures/vllm/http/openapi.json`; which type goes with which cause is read in vLLM 0.32's
//! `serve/exception_handling`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An answer that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: u16,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

impl ApiError {
    /// A value that is refused after parsing (`VLLMValidationError`).
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: None }
    }

    /// A body that does not parse: what pydantic says, under FastAPI's phrase.
    pub(crate) fn malformed(param: &str, kind: &str, message: &str) -> Self {
        let message =
            format!("1 validation error:\n  {{'type': '{kind}', 'loc': '{param}', 'msg': '{message}'}}");
        Self { status: 400, kind: "Bad Request", message, param: Some(param.to_owned()) }
    }

    /// A validator's refusal while parsing; it names the field.
    pub(crate) fn refused(param: &str, message: &str) -> Self {
        let text = format!(
            "1 validation error:\n  {{'type': 'value_error', 'loc': 'body', 'msg': 'Value error, {message} (parameter={param})'}}"
        );
        Self { status: 400, kind: "Bad Request", message: text, param: Some(param.to_owned()) }
    }

    pub(crate) fn unknown_model(asked: &str, served: &str) -> Self {
        Self {
            status: 404,
            kind: "NotFoundError",
            message: format!("The model `{asked}` does not exist. Valid aliases: {served}."),
            param: Some("model".to_owned()),
        }
    }

    /// A request that failed inside the engine, which lives on.
    pub(crate) fn failed(message: &str) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.to_owned(), param: None }
    }

    /// `EngineDeadError`.
    pub(crate) fn engine_dead() -> Self {
        Self::failed("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    }

    /// FastAPI's own answers: 404, 405.
    pub(crate) fn framework(status: StatusCode) -> Self {
        let phrase = status.canonical_reason().unwrap_or("Error");
        Self { status: status.as_u16(), kind: phrase, message: phrase.to_owned(), param: None }
    }

    pub(crate) fn with_param(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.body())).into_response()
    }
}
