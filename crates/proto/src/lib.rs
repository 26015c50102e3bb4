#![doc = include_str!("../README.md")]

mod engine;
mod error;
mod files;
mod kv;
pub mod limits;
mod load;
mod news;
mod secret;
mod service;
mod snapshot;
mod text;
pub mod tls;
mod version;

/// Generated from `proto/forebay/fleet/v1/fleet.proto`, which documents it.
#[allow(missing_docs, clippy::all, reason = "generated; its documentation is the proto file's")]
pub mod v1 {
    tonic::include_proto!("forebay.fleet.v1");
}

/// Generated from `proto/forebay/index/v1/index.proto`, which documents it. `forebay-index-server` checks it.
#[allow(missing_docs, clippy::all, reason = "generated; its documentation is the proto file's")]
pub mod index_v1 {
    tonic::include_proto!("forebay.index.v1");
}

pub use engine::{
    Accepts, CacheSight, DataPlane, Dialect, EngineFacts, EngineState, Hello, KvAbilities, Progress, Ready,
};
pub use error::WireError;
pub use files::{TokenizerFile, TokenizerReader, tokenizer_chunks, tokenizer_unavailable};
pub use kv::{Life, pack_deltas};
pub use load::{LoadReport, StepsReport};
pub use news::{Died, HashKey, Notice, Welcome, died, logs};
pub use secret::Secret;
pub use service::{fleet_client, fleet_server};
pub use snapshot::{Snapshot, SnapshotReader, snapshot_chunks};
pub use text::clip;
pub use version::{VersionError, WIRE_VERSION, agree};
