//! A served engine as its clients see it: over HTTP, ZMQ and the side channel.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod events;
mod hand_over;
mod http;
mod lifetimes;
mod support;
