//! What a client sees of a refusal, in OpenAI's shape: `{"error":{"message","type","param","code"}}`.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};

use crate::service::{Kind, Refused};

/// The table.
pub(super) fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::NotFound | Kind::NoPath => StatusCode::NOT_FOUND,
        Kind::Exists | Kind::Conflict | Kind::Gap => StatusCode::CONFLICT,
        Kind::Full => StatusCode::TOO_MANY_REQUESTS,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::TooSlow => StatusCode::REQUEST_TIMEOUT,
        Kind::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
    }
}

pub(super) fn response(refused: &Refused) -> Response {
    let Refused { kind, code, message, param } = refused;
    let whose = if *kind == Kind::Full { "rate_limit_error" } else { "invalid_request_error" };
    let error = serde_json::json!({ "message": message, "type": whose, "param": param, "code": code });
    let body = serde_json::json!({ "error": error }).to_string();
    (status(*kind), [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
