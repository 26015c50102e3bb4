//! What engines announce about their KV caches.

use std::num::NonZeroU32;

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

/// Groups of layers that a rank may have.
pub const KV_GROUPS_MAX: usize = 16;

/// What layers that cache alike need of a prefix before they can go on after it. Models with one kind of attention have
/// one group; those that mix full attention with sliding windows or state spaces have more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvGroup {
    /// How many of the prefix's last blocks must be cached: a sliding window; 1 for state space layers, whose state is
    /// cached at a block's end. `None`: all of them, as full attention needs.
    pub window_blocks: Option<NonZeroU32>,
    /// Prefixes can be reused whose length is a multiple of so many blocks: the engine's block size for these layers.
    pub step_blocks: NonZeroU32,
}

impl KvGroup {
    /// Full attention in blocks of the fleet's size: what a rank has that says nothing else.
    pub const FULL: Self = Self { window_blocks: None, step_blocks: NonZeroU32::MIN };
}

/// One change of what a rank caches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvEvent {
    /// The rank's groups of layers, from here on; at most [`KV_GROUPS_MAX`]. A prefix is cached as far as every group can
    /// serve it. Until it is said, and after an empty list, there is [`KvGroup::FULL`] alone.
    Groups(Vec<KvGroup>),
    /// Full blocks became reusable: a chain, first block first.
    Stored {
        /// The block before `hashes[0]`; `None` when that is the first block of a prompt.
        parent: Option<BlockHash>,
        /// The chain that was stored, in order.
        hashes: Vec<BlockHash>,
        /// Where.
        tier: Tier,
        /// For which layers: a place in the rank's groups.
        group: u8,
    },
    /// Blocks can no longer be reused, in any order.
    Removed {
        /// The blocks that went.
        hashes: Vec<BlockHash>,
        /// From where.
        tier: Tier,
        /// Of which layers.
        group: u8,
    },
    /// Nothing is cached any more, in any group.
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

/// The blocks that events which make a cache from nothing store on the device, for the first group.
pub fn device_blocks(contents: &[KvEvent]) -> impl Iterator<Item = BlockHash> + '_ {
    let hashes = contents.iter().filter_map(|event| match event {
        KvEvent::Stored { hashes, tier: Tier::Device, group: 0, .. } => Some(hashes),
        _ => None,
    });
    hashes.flatten().copied()
}
