//! A served engine as its clients see it: over HTTP, ZMQ and the side channel.

mod events;
mod hand_over;
mod http;
mod lifetimes;
mod support;
