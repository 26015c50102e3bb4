//! KV events as engines publish them.
//!
//! In: what a block pool did ([`KvEvent`]). Out: the payloads of vLLM and SGLang ([`wire`]), published on a ZMQ PUB
//! socket and replayed from a ROUTER socket ([`publisher`]).

pub(crate) mod publisher;
pub(crate) mod wire;

use crate::tokenizer::Token;

/// One change of a prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KvEvent {
    Stored(Stored),
    Removed { hash: u64 },
    Cleared,
}

/// Blocks that entered a cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) hashes: Vec<u64>,
    pub(crate) parent: Option<u64>,
    /// Of all the blocks, one after another.
    pub(crate) tokens: Vec<Token>,
    pub(crate) block_size: usize,
    pub(crate) adapter: Option<String>,
    pub(crate) salt: Option<String>,
    /// What besides tokens went into each block's hash: adapter, then (first block only) salt.
    pub(crate) extra_keys: Vec<Vec<String>>,
    pub(crate) session: Option<String>,
}

/// A batch: what one scheduler step did.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Batch {
    /// Unix time in seconds.
    pub(crate) time: f64,
    pub(crate) events: Vec<KvEvent>,
    pub(crate) rank: u32,
}
