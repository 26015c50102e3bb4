//! What no honest client sends, over real sockets: bounded time and memory, the right status, other clients unharmed.
//!
//! Nothing here waits for a time to pass: limits are milliseconds where one must be met, and an hour where another one
//! must be met before it.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod bodies;
mod heads;
#[path = "../http_support/mod.rs"]
mod http_support;
mod json;
mod silence;
mod text;

use std::{sync::Arc, time::Duration};

use forebay_engines::Reply;
use forebay_gateway::{
    http::HttpLimits,
    orchestrator::api::{ResponseEvent, Usage},
};
use http_support::{sockets::*, *};

const HOUR: Duration = Duration::from_secs(3_600);

/// Limits that nothing meets but what a test sets.
fn patient() -> HttpLimits {
    HttpLimits {
        body_bytes_max: 64 << 20,
        header_read_timeout: HOUR,
        body_read_timeout: HOUR,
        write_stall_timeout: HOUR,
        ..HttpLimits::default()
    }
}

/// A fleet whose engines take requests as they come and answer `{}`.
fn passing() -> Arc<Fake> {
    let fake = Fake::saying(|_| {
        let head = Reply::Head { status: 200, content_type: "application/json".into() };
        vec![
            ResponseEvent::Reply(head),
            ResponseEvent::Reply(Reply::Data("{}".into())),
            ResponseEvent::Done(Usage { prompt_tokens: 1, cached_tokens: 0, output_tokens: 1 }),
        ]
    });
    fake.takes_bodies.store(true, std::sync::atomic::Ordering::Relaxed);
    fake
}
