//! What one engine caches, kept so that any number of gateways can follow it at their own pace.
//!
//! In: the numbered batches and whole caches that the engine's observer reports. Out, for each gateway: the batches after
//! its place, or a whole cache if it is too far behind. Start at [`Feed::apply`] and [`Feed::next`].
//!
//! One log of batches serves all gateways; each has only a [`Cursor`], so a slow one costs nothing. The log is bounded:
//! a gateway whose place has left it gets a snapshot instead, made from a mirror of the cache that the batches keep up to
//! date. Numbers are the observer's own.
//!
//! Invariants: snapshot and batches that a cursor was given, applied in order, are the mirror; no batch is given twice or
//! left out without a snapshot; while events are known to be missing (a gap), nothing is given.

use std::{
    collections::{HashSet, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use forebay_proto::v1;
use forebay_types::{BlockHash, KvEvent, KvEventBatch, Tier};

/// Bounds of the log of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedLimits {
    /// Batches kept.
    pub batches_max: usize,
    /// Hashes in them.
    pub hashes_max: usize,
}

impl Default for FeedLimits {
    fn default() -> Self {
        // A busy engine has some 100 steps a second: most of a minute, 8 MiB.
        Self { batches_max: 4_096, hashes_max: 1 << 20 }
    }
}

/// The caches of all ranks of one life of an engine.
#[derive(Debug)]
pub struct Feed {
    limits: FeedLimits,
    ranks: Vec<Rank>,
}

#[derive(Debug, Default)]
struct Rank {
    /// What the device holds now.
    blocks: HashSet<BlockHash, BuildHasherDefault<Keyed>>,
    /// Number of the next batch.
    sequence_next: u64,
    log: VecDeque<Entry>,
    /// Hashes in `log`.
    log_hashes: usize,
    /// Rises when the cache was replaced: places of before are void.
    epoch: u64,
    /// Events are missing: only a whole cache helps.
    gap: bool,
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    hashes: usize,
    delta: Arc<v1::KvDelta>,
}

/// Block hashes are keyed hashes already.
#[derive(Debug, Default, Clone)]
struct Keyed(u64);

impl Hasher for Keyed {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // Spread, in case a test or a foreign key uses small numbers.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is in.
    Applied,
    /// It was in already.
    Repeated,
    /// Batches before it are missing: ask the observer for the rank's whole cache. Said once for each gap.
    Gap,
    /// A gap is known and the whole cache has not come yet.
    Waiting,
    /// The engine has no such rank.
    NoRank,
}

/// How far one gateway is, on every rank.
#[derive(Debug, Clone, Default)]
pub struct Cursor {
    /// Epoch and number of the next batch; `None`: it knows nothing.
    places: Vec<Option<(u64, u64)>>,
}

impl Cursor {
    /// The gateway lost what it knew of a rank.
    pub fn forget(&mut self, dp_rank: u16) {
        if let Some(place) = self.places.get_mut(usize::from(dp_rank)) {
            *place = None;
        }
    }
}

/// What to tell a gateway next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// All that a rank caches.
    Snapshot {
        /// Which.
        dp_rank: u16,
        /// Number of the batch after it.
        sequence_next: u64,
        /// In any order.
        blocks: Vec<BlockHash>,
    },
    /// What changed, in order.
    Deltas(Vec<Arc<v1::KvDelta>>),
}

impl Feed {
    /// Empty caches, numbered from 0.
    pub fn new(dp_ranks: u16, limits: FeedLimits) -> Self {
        Self { limits, ranks: (0..dp_ranks).map(|_| Rank::default()).collect() }
    }

    /// Blocks that a rank caches on its device.
    pub fn blocks(&self, dp_rank: u16) -> usize {
        self.ranks.get(usize::from(dp_rank)).map_or(0, |rank| rank.blocks.len())
    }

    /// Takes a batch.
    pub fn apply(&mut self, batch: KvEventBatch) -> Taken {
        let limits = self.limits;
        let Some(rank) = self.ranks.get_mut(usize::from(batch.rank.dp_rank)) else {
            return Taken::NoRank;
        };
        if rank.gap {
            return Taken::Waiting;
        }
        if batch.sequence < rank.sequence_next {
            return Taken::Repeated;
        }
        if batch.sequence > rank.sequence_next {
            rank.gap = true;
            return Taken::Gap;
        }
        rank.apply(batch, limits);
        Taken::Applied
    }

    /// Ranks of which events are missing.
    pub fn gaps(&self) -> impl Iterator<Item = u16> {
        (0u16..).zip(&self.ranks).filter(|(_, rank)| rank.gap).map(|(dp_rank, _)| dp_rank)
    }

    /// Takes the whole cache of a rank.
    pub fn reset(&mut self, dp_rank: u16, sequence_next: u64, blocks: impl IntoIterator<Item = BlockHash>) {
        let Some(rank) = self.ranks.get_mut(usize::from(dp_rank)) else {
            return;
        };
        rank.blocks = blocks.into_iter().collect();
        rank.sequence_next = sequence_next;
        rank.gap = false;
        rank.forget_log();
    }

    /// What the gateway at `cursor` is to be told next, and moves it there; at most `hashes_max` hashes of deltas, but at
    /// least one batch. `None` if it is up to date.
    pub fn next(&self, cursor: &mut Cursor, hashes_max: usize) -> Option<Next> {
        cursor.places.resize(self.ranks.len(), None);
        for (dp_rank, rank) in self.ranks.iter().enumerate() {
            let place = &mut cursor.places[dp_rank];
            if rank.gap {
                continue;
            }
            let now = (rank.epoch, rank.sequence_next);
            match *place {
                Some(place) if place == now => {}
                Some((epoch, next)) if epoch == rank.epoch && next >= rank.log_begins() => {
                    let (next, deltas) = rank.deltas(next, hashes_max);
                    *place = Some((epoch, next));
                    return Some(Next::Deltas(deltas));
                }
                _ => {
                    *place = Some(now);
                    return Some(Next::Snapshot {
                        dp_rank: dp_rank as u16,
                        sequence_next: rank.sequence_next,
                        blocks: rank.blocks.iter().copied().collect(),
                    });
                }
            }
        }
        None
    }

    /// Whether [`Feed::next`] would give something.
    pub fn has_news(&self, cursor: &Cursor) -> bool {
        let place = |dp_rank| cursor.places.get(dp_rank).copied().flatten();
        self.ranks
            .iter()
            .enumerate()
            .any(|(dp_rank, rank)| !rank.gap && place(dp_rank) != Some((rank.epoch, rank.sequence_next)))
    }
}

impl Rank {
    fn apply(&mut self, batch: KvEventBatch, limits: FeedLimits) {
        let mut hashes = 0;
        for event in &batch.events {
            hashes += self.mirror(event);
        }
        let sequence = batch.sequence;
        self.sequence_next = sequence + 1;
        match v1::KvDelta::try_from(batch) {
            Ok(delta) => self.log.push_back(Entry { sequence, hashes, delta: Arc::new(delta) }),
            // Too large for a message: everybody gets the whole.
            Err(_) => return self.forget_log(),
        }
        self.log_hashes += hashes;
        while self.log.len() > limits.batches_max || self.log_hashes > limits.hashes_max {
            let Some(oldest) = self.log.pop_front() else {
                break;
            };
            self.log_hashes -= oldest.hashes;
        }
    }

    /// Applies one event to the mirror; gives how many hashes are in it.
    fn mirror(&mut self, event: &KvEvent) -> usize {
        match event {
            KvEvent::Stored { parent: _, hashes, tier } => {
                if *tier == Tier::Device {
                    self.blocks.extend(hashes);
                }
                hashes.len()
            }
            KvEvent::Removed { hashes, tier } => {
                if *tier == Tier::Device {
                    for hash in hashes {
                        self.blocks.remove(hash);
                    }
                }
                hashes.len()
            }
            KvEvent::Cleared => {
                self.blocks.clear();
                0
            }
        }
    }

    fn forget_log(&mut self) {
        self.log.clear();
        self.log_hashes = 0;
        self.epoch += 1;
    }

    fn log_begins(&self) -> u64 {
        self.log.front().map_or(self.sequence_next, |entry| entry.sequence)
    }

    fn deltas(&self, from: u64, hashes_max: usize) -> (u64, Vec<Arc<v1::KvDelta>>) {
        let skip = (from - self.log_begins()) as usize;
        let (mut next, mut hashes, mut deltas) = (from, 0, Vec::new());
        for entry in self.log.iter().skip(skip) {
            hashes += entry.hashes;
            if !deltas.is_empty() && hashes > hashes_max {
                break;
            }
            next = entry.sequence + 1;
            deltas.push(entry.delta.clone());
        }
        (next, deltas)
    }
}

#[cfg(test)]
mod tests;
