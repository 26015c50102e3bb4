//! HTTP in, engines out: the shell around text, placement and lifecycle.

pub mod decisions;
pub mod http;
pub mod metrics;
pub mod orchestrator;
