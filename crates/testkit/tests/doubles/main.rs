//! The doubles, seen from outside: HTTP, event sockets, pairs, faults.

mod common;
mod vllm_events;
mod vllm_faults;
mod vllm_http;
mod vllm_pd;
