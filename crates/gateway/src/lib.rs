#![doc = include_str!("../README.md")]

pub mod decisions;
pub mod http;
pub mod metrics;
pub mod orchestrator;
