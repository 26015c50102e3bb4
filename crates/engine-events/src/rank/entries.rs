//! What an engine's hashes stand for, in as little memory as each needs.
//!
//! Nearly every engine block is stored once, on the device, and completes one block of ours: such a one is three words in a
//! table. What is stored more often or elsewhere, or completes none or several, has an [`Entry`] to itself.

use std::collections::HashMap;

use forebay_types::{BlockHash, Tier};

use super::{
    chain::{Chain, Identity},
    held::{Keyed, ONCE, TIERS, place},
};
use crate::event::EngineHash;

/// What one engine hash is and how often it is stored.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stored: [u32; TIERS],
    /// Our block before those that it completes.
    pub(super) before: Option<BlockHash>,
    pub(super) identity: Identity,
}

/// Stored once on the device, and completes `own`.
#[derive(Debug, Clone, Copy)]
struct Plain {
    own: BlockHash,
    /// 0 where it begins a prompt.
    before: BlockHash,
}

const NONE: BlockHash = BlockHash(0);

impl Plain {
    fn of(entry: &Entry) -> Option<Self> {
        match entry {
            // A hash of ours that is 0 is none that could be told from none.
            Entry { stored: ONCE, before, identity: Identity::One(own) } if *before != Some(NONE) => {
                Some(Self { own: *own, before: before.unwrap_or(NONE) })
            }
            _ => None,
        }
    }

    fn before(self) -> Option<BlockHash> {
        (self.before != NONE).then_some(self.before)
    }
}

/// The entries of one group of layers.
#[derive(Debug)]
pub(super) struct Entries {
    plain: HashMap<EngineHash, Plain, Keyed>,
    /// Those that are not.
    other: HashMap<EngineHash, Entry, Keyed>,
}

impl Entries {
    pub(super) fn new(keyed: Keyed) -> Self {
        Self { plain: HashMap::with_hasher(keyed.clone()), other: HashMap::with_hasher(keyed) }
    }

    pub(super) fn len(&self) -> usize {
        self.plain.len() + self.other.len()
    }

    pub(super) fn clear(&mut self) {
        self.plain.clear();
        self.other.clear();
    }

    /// Takes a hash's entry out, to be changed and put back.
    pub(super) fn take(&mut self, hash: EngineHash) -> Option<Entry> {
        if let Some(plain) = self.plain.remove(&hash) {
            let (before, identity) = (plain.before(), Identity::One(plain.own));
            return Some(Entry { stored: ONCE, before, identity });
        }
        if self.other.is_empty() { None } else { self.other.remove(&hash) }
    }

    /// The entry of a hash that has none.
    pub(super) fn put(&mut self, hash: EngineHash, entry: Entry) {
        match Plain::of(&entry) {
            Some(plain) => drop(self.plain.insert(hash, plain)),
            None => drop(self.other.insert(hash, entry)),
        }
    }

    /// Where a chain stands after a hash; `None` if that is not known.
    pub(super) fn chain(&self, hash: EngineHash) -> Option<Chain> {
        match self.plain.get(&hash) {
            Some(plain) => Identity::One(plain.own).chain(),
            None => self.other.get(&hash)?.identity.chain(),
        }
    }

    /// Our blocks that are completed by what is stored on `tier`, each with the one before it.
    pub(super) fn blocks(&self, tier: Tier) -> impl Iterator<Item = (BlockHash, Option<BlockHash>)> + '_ {
        let plain = self.plain.values().filter(move |_| ONCE[place(tier)] > 0);
        let other = self.other.values().filter(move |entry| entry.stored[place(tier)] > 0);
        let other = other.flat_map(|entry| {
            let own = entry.identity.own();
            let parents = std::iter::once(entry.before).chain(own.iter().copied().map(Some));
            own.iter().copied().zip(parents)
        });
        plain.map(|plain| (plain.own, plain.before())).chain(other)
    }

    /// Stores beyond the device.
    pub(super) fn stored_elsewhere(&self) -> u64 {
        let elsewhere = self.other.values().flat_map(|entry| entry.stored.iter().skip(1));
        elsewhere.map(|&times| u64::from(times)).sum()
    }
}
