//! Reading a body within its bounds.

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, header::CONTENT_LENGTH},
};
use bytes::BytesMut;
use http_body_util::BodyExt as _;
use tokio::time::timeout;

use crate::{
    listen::Limits,
    service::{Kind, Refused},
};

pub(super) async fn read(headers: &HeaderMap, body: Body, limits: &Limits) -> Result<Bytes, Refused> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let reading = read_bounded(body, declared, limits.body_bytes_max);
    timeout(limits.body_read_timeout, reading).await.unwrap_or_else(|_| {
        let seconds = limits.body_read_timeout.as_secs_f64();
        let message = format!("the body did not arrive within {seconds} s");
        Err(Refused::new(Kind::TooSlow, "body_timeout", message))
    })
}

/// A body beyond the bound is read on and thrown away, up to as much again: a client that is still sending when its
/// connection closes would never see the answer that tells it why.
async fn read_bounded(mut body: Body, declared: Option<u64>, bytes_max: usize) -> Result<Bytes, Refused> {
    let discarded_max = bytes_max.saturating_mul(2);
    if declared.is_some_and(|length| length > discarded_max as u64) {
        return Err(too_large(bytes_max));
    }
    let (mut read, mut received) = (BytesMut::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let message = format!("the body could not be read to its end: {error}");
            Refused::new(Kind::Invalid, "incomplete_body", message)
        })?;
        let Ok(data) = frame.into_data() else { continue };
        received = received.saturating_add(data.len());
        if received > discarded_max {
            break;
        }
        if received <= bytes_max {
            read.extend_from_slice(&data);
        }
    }
    if received > bytes_max { Err(too_large(bytes_max)) } else { Ok(read.freeze()) }
}

fn too_large(bytes_max: usize) -> Refused {
    let message = format!("the body has more than {bytes_max} bytes, the limit; send it in parts");
    Refused::new(Kind::TooLarge, "body_too_large", message)
}
