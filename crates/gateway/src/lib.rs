#![doc = include_str!("../README.md")]

pub mod arrivals;
pub mod cluster;
pub mod decisions;
pub mod http;
mod lines;
pub mod metrics;
pub mod orchestrator;
