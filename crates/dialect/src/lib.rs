#![doc = include_str!("../README.md")]

mod answer;
mod app;
mod engine;
mod errors;
mod events;
mod generate;
mod hand_over;
mod legs;
mod metrics;
mod options;
mod request;
mod server;
mod tokenize;

pub use engine::{EngineModel, EngineOptions, EngineProcess, StartFailure, run};
pub use hand_over::KvConnector;
pub use options::{ApiKey, ConnectorOptions, EventOptions, HttpLimits, KvRole, LoadFailurePolicy, ModelText};
pub use server::{Addresses, BindError, DialectParts, DialectServer, Ended};
