//! The doubles, seen from outside: HTTP, event sockets, pairs, faults, and the suite run against them.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod binary;
mod common;
mod openai;
mod sglang;
mod suite;
mod tokenizer;
mod vllm_events;
mod vllm_faults;
mod vllm_http;
mod vllm_pd;
