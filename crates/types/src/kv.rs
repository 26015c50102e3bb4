//! What engines announce about their KV caches.

use serde::{Deserialize, Serialize};

use crate::{BlockHash, RankId};

/// A place for KV, ordered by the cost of reaching it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// The engine's own pool, from which it computes.
    Device,
    /// Host memory beside the engine.
    Host,
    /// A file or local disk.
    Disk,
    /// Another host or an object store.
    Remote,
}

/// One change of what a rank caches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvEvent {
    /// Full blocks became reusable: a chain, first block first.
    Stored {
        /// The block before `hashes[0]`; `None` when that is the first block of a prompt.
        parent: Option<BlockHash>,
        /// The chain that was stored, in order.
        hashes: Vec<BlockHash>,
        /// Where.
        tier: Tier,
    },
    /// Blocks can no longer be reused, in any order.
    Removed {
        /// The blocks that went.
        hashes: Vec<BlockHash>,
        /// From where.
        tier: Tier,
    },
    /// Nothing is cached any more.
    Cleared,
}

/// The events of one scheduler step of one rank, numbered without gaps from 0 within an incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvEventBatch {
    /// Whose cache changed.
    pub rank: RankId,
    /// Position in the rank's event stream; a gap means that events were lost.
    pub sequence: u64,
    /// In the order in which they happened.
    pub events: Vec<KvEvent>,
}
