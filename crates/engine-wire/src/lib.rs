#![doc = include_str!("../README.md")]

pub mod answer;
pub mod body;
pub mod compat;
pub mod discovery;
pub mod metrics;
pub mod object;
pub mod sse;
pub mod transfer;
