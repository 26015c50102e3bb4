#![doc = include_str!("../README.md")]

mod follow;
mod grpc;
mod http;
mod listen;
mod metrics;
mod server;
pub mod service;

pub use listen::{Ended, Limits as ListenLimits};
pub use server::{IndexServer, serve_grpc, serve_http};
