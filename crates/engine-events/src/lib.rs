#![doc = include_str!("../README.md")]

mod decode;
pub mod encode;
mod event;
pub mod frames;
mod rank;
mod sequence;

pub use decode::{DecodeError, EVENTS_MAX, HASHES_MAX, PAYLOAD_BYTES_MAX, Problem, TOKENS_MAX, decode};
pub use event::{EngineEvent, EngineHash, EventBatch, ExtraKey, GroupKind, Removed, Stored};
pub use rank::{Applied, BLOCKS_MAX_DEFAULT, Fault, History, RankCache, RankSettings, RankStats};
pub use sequence::{Observed, Sequence, Via};
