#![doc = include_str!("../README.md")]
// Vector intrinsics and KV blocks in memory shared with other processes need it. It is confined to `kernels` (each
// instruction set's file) and `pool`; every block says why it is sound.
#![allow(unsafe_code)]

mod error;
mod forward;
mod gguf;
mod hash;
mod kernels;
mod load;
mod model;
mod pool;
mod quant;
mod random;
mod sampler;

pub use error::ModelError;
pub use forward::{ChunkInput, Executor, Logits};
pub use gguf::{GgufMetadata, GgufTokenizer};
pub use kernels::InstructionSet;
pub use model::{ModelConfig, Weights};
pub use pool::{KvPool, VecPool, copy_block};
pub use sampler::{SampleParams, sample};
