#![doc = include_str!("../README.md")]

mod agent;
mod board;
pub mod command;
mod entropy;
pub mod feed;
mod gateways;
pub mod incarnation;
mod keys;
mod link;
pub mod logs;
mod options;
pub mod ports;
pub mod process;
mod procfs;
pub mod progress;
pub mod restart;
pub mod signals;
pub mod state;
mod stop;
mod tokenizer;
mod watcher;

pub use agent::{AgentError, Command, Exit, Status, run, run_with_status};
pub use gateways::LinkStates;
pub use link::LinkState;
pub use options::{Limits, Options};
pub use stop::{StopError, Stopped, read_log, stop_engine};
