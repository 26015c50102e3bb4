#![doc = include_str!("../README.md")]

pub mod cluster;
pub mod decisions;
pub mod http;
pub mod metrics;
pub mod orchestrator;
