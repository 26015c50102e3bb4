//! What a client sees when something fails: one table from [`RouteError`] to status, code and wait, and the words for
//! requests that never got that far.
//!
//! The shape is OpenAI's: `{"error":{"message","type","param","code"}}`. Codes are stable; messages are not.

use std::borrow::Cow;

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::{metrics::Outcome, orchestrator::api::RouteError};

/// `error.type`: whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorType {
    /// The request must change.
    InvalidRequestError,
    /// No key, or an unknown one.
    AuthenticationError,
    /// The same request may succeed later.
    RateLimitError,
    /// The server failed.
    ServerError,
}

/// One error as a client sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// HTTP status, if no byte was sent yet.
    pub status: StatusCode,
    /// Whose fault it is.
    pub kind: ErrorType,
    /// Stable, for programs.
    pub code: &'static str,
    /// What is wrong and what to do, for people.
    pub message: String,
    /// The field at fault, as a path: `messages[2].content`.
    pub param: Option<Cow<'static, str>>,
    /// Seconds after which another try makes sense.
    pub retry_after_seconds: Option<u64>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: ErrorType,
    param: Option<&'a str>,
    code: &'static str,
}

impl ApiError {
    /// A request that must change, 400.
    pub(crate) fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: ErrorType::InvalidRequestError,
            code,
            message: message.into(),
            param: None,
            retry_after_seconds: None,
        }
    }

    /// A value that cannot be, 400.
    pub(crate) fn invalid_value(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::invalid("invalid_value", message).at(param)
    }

    /// A value that OpenAI knows and Forebay cannot honour, 400: better than an answer that silently ignores it.
    pub(crate) fn unsupported(param: &'static str, message: impl Into<String>) -> Self {
        Self::invalid("unsupported_parameter", message).at(param)
    }

    /// Names the field at fault.
    pub(crate) fn at(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Replaces the status.
    pub(crate) fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// No key, or an unknown one, 401.
    pub(crate) fn unauthenticated() -> Self {
        Self {
            kind: ErrorType::AuthenticationError,
            ..Self::invalid(
                "invalid_api_key",
                "missing or unknown API key; send one that this server knows as `Authorization: Bearer KEY`",
            )
        }
        .with_status(StatusCode::UNAUTHORIZED)
    }

    /// A model that is not served, 404.
    pub(crate) fn unknown_model<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Self {
        let mut known: Vec<String> = known.map(|id| format!("`{id}`")).collect();
        known.sort_unstable();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let message = format!("the model `{}` is not served here; served models: {known}", abridged(name));
        Self::invalid("model_not_found", message).at("model").with_status(StatusCode::NOT_FOUND)
    }

    /// How metrics count it.
    pub(crate) fn outcome(&self) -> Outcome {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Outcome::Refused,
            status if status.is_client_error() => Outcome::ClientError,
            _ => Outcome::ServerError,
        }
    }

    /// The body, or the data of an SSE `error` event.
    pub(crate) fn to_json(&self) -> String {
        let error =
            Inner { message: &self.message, kind: self.kind, param: self.param.as_deref(), code: self.code };
        serde_json::to_string(&Envelope { error }).expect("strings always serialise")
    }

    /// The table. `prompt_param` is what this endpoint calls its prompt.
    pub(crate) fn from_route(error: &RouteError, prompt_param: &'static str) -> Self {
        use ErrorType::{InvalidRequestError, RateLimitError, ServerError};
        let (status, kind, code, wait_seconds) = match error {
            RouteError::Saturated { retry_after_seconds, .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                RateLimitError,
                "engines_saturated",
                Some(*retry_after_seconds),
            ),
            RouteError::TooManyInFlight { retry_after_seconds, .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                RateLimitError,
                "too_many_requests",
                Some(*retry_after_seconds),
            ),
            // An engine takes seconds to minutes to start; 5 s neither hammers it nor wastes its first ones.
            RouteError::NoEngine { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, "no_engine", Some(5.0))
            }
            RouteError::TooLong { .. } => {
                (StatusCode::BAD_REQUEST, InvalidRequestError, "context_length_exceeded", None)
            }
            RouteError::LostUnanswered { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, "engine_lost", Some(1.0))
            }
            RouteError::LostMidStream { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, "engine_lost_mid_stream", Some(1.0))
            }
            RouteError::Rejected { status, .. } => (
                StatusCode::from_u16(*status)
                    .ok()
                    .filter(|status| status.is_client_error())
                    .unwrap_or(StatusCode::BAD_REQUEST),
                InvalidRequestError,
                "engine_rejected",
                None,
            ),
            RouteError::Quarantined { retry_after_seconds, .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                InvalidRequestError,
                "request_quarantined",
                Some(*retry_after_seconds),
            ),
            RouteError::DeadlineExceeded { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, ServerError, "deadline_exceeded", None)
            }
            RouteError::ShuttingDown => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, "shutting_down", Some(1.0))
            }
            RouteError::Internal { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, ServerError, "internal_error", None)
            }
        };
        Self {
            status,
            kind,
            code,
            message: error.to_string(),
            param: (code == "context_length_exceeded").then_some(Cow::Borrowed(prompt_param)),
            retry_after_seconds: wait_seconds.map(whole_seconds),
        }
    }
}

/// At least one second, at most an hour, rounded up: `Retry-After` has no fractions.
fn whole_seconds(seconds: f64) -> u64 {
    seconds.ceil().clamp(1.0, 3_600.0) as u64
}

/// A client's own words in a message, bounded.
pub(crate) fn abridged(text: &str) -> Cow<'_, str> {
    const CHARS_MAX: usize = 200;
    match text.char_indices().nth(CHARS_MAX) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_error_has_status_code_and_wait() {
        let every = [
            RouteError::Saturated { serving: 4, retry_after_seconds: 2.3 },
            RouteError::TooManyInFlight { limit: 512, retry_after_seconds: 0.0 },
            RouteError::NoEngine { model: "m".into(), detail: "embedded-0 is starting".into() },
            RouteError::TooLong { prompt_tokens: 9_000, context_tokens_max: 8_192 },
            RouteError::LostUnanswered { attempts: 3 },
            RouteError::LostMidStream { tokens_sent: 17 },
            RouteError::Rejected { status: 413, message: "prompt too large".into() },
            RouteError::Quarantined { deaths: 2, retry_after_seconds: 599.5 },
            RouteError::DeadlineExceeded { limit_seconds: 600.0 },
            RouteError::ShuttingDown,
            RouteError::Internal { detail: "a \"quoted\" thing".into() },
        ];
        let rows: Vec<String> = every
            .iter()
            .map(|error| {
                let api = ApiError::from_route(error, "prompt");
                let wait = api.retry_after_seconds.map_or("-".to_owned(), |seconds| seconds.to_string());
                format!("{} {wait} {}", api.status.as_u16(), api.to_json())
            })
            .collect();
        insta::assert_snapshot!(rows.join("\n"));
    }

    #[test]
    fn a_clients_words_are_bounded() {
        assert_eq!(abridged("é".repeat(200).as_str()), "é".repeat(200));
        assert_eq!(abridged("é".repeat(201).as_str()), format!("{}…", "é".repeat(200)));
    }
}
