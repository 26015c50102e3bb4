//! Reading a request's body within its bounds.

use std::{future::Future, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header::CONTENT_LENGTH},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use super::{
    errors::{ApiError, ErrorType},
    limits::HttpLimits,
};

/// A body of up to so many bytes is copied out of the connection's buffer of 8 KiB, which it would keep from being used again
/// for as long as its answer takes.
const COPIED_BYTES_MAX: usize = 4096;

/// Reads all of `body`.
///
/// A body beyond the bound is read on and thrown away, up to as much again: a client that is still sending when its
/// connection closes would never see the answer that tells it why.
///
/// # Errors
/// 413 beyond `body_bytes_max`, 408 beyond `body_read_timeout`, 400 if the client breaks off.
pub(crate) async fn read(headers: &HeaderMap, body: Body, limits: &HttpLimits) -> Result<Bytes, ApiError> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let declared = declared.and_then(|length| usize::try_from(length).ok());
    within(limits.body_read_timeout, read_bounded(body, declared, limits.body_bytes_max)).await
}

async fn within<T>(
    limit: Duration,
    reading: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| {
        let message = format!("the body did not arrive within {} s", limit.as_secs_f64());
        Err(ApiError::invalid("body_timeout", message).with_status(StatusCode::REQUEST_TIMEOUT))
    })
}

async fn read_bounded(mut body: Body, declared: Option<usize>, bytes_max: usize) -> Result<Bytes, ApiError> {
    let discarded_max = bytes_max.saturating_mul(2);
    if declared.is_some_and(|length| length > discarded_max) {
        return Err(too_large(bytes_max));
    }
    let (mut first, mut joined, mut received) = (Bytes::new(), BytesMut::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::invalid("incomplete_body", format!("the body could not be read to its end: {error}"))
        })?;
        let Ok(data) = frame.into_data() else { continue };
        received = received.saturating_add(data.len());
        if received > discarded_max {
            break;
        }
        if received > bytes_max {
            continue;
        }
        // Most bodies come in one piece, which is then used as it is.
        if first.is_empty() && joined.is_empty() {
            first = data;
            continue;
        }
        if joined.is_empty() {
            joined.reserve(declared.unwrap_or(received).clamp(received, bytes_max));
            joined.extend_from_slice(&first);
        }
        joined.extend_from_slice(&data);
    }
    match (received > bytes_max, joined.is_empty()) {
        (true, _) => Err(too_large(bytes_max)),
        (false, true) if first.len() <= COPIED_BYTES_MAX => Ok(Bytes::copy_from_slice(&first)),
        (false, true) => Ok(first),
        (false, false) => Ok(joined.freeze()),
    }
}

fn too_large(bytes_max: usize) -> ApiError {
    ApiError {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        kind: ErrorType::InvalidRequestError,
        code: "body_too_large",
        message: format!("the body has more than {bytes_max} bytes, the limit `body_bytes_max`; send less"),
        param: None,
        retry_after_seconds: None,
    }
}
