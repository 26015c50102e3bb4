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

use std::{collections::VecDeque, sync::Arc};

use forebay_kv_index::{IndexLimits, KvIndex};
use forebay_proto::v1;
use forebay_types::{Incarnation, KvEvent, KvEventBatch, RankId};

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

#[derive(Debug)]
struct Rank {
    /// What it holds now: an index of one rank, because it gives chains in order.
    mirror: KvIndex,
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

/// The rank, as its mirror calls it.
const MIRRORED: RankId = RankId { incarnation: Incarnation(0), dp_rank: 0 };

impl Default for Rank {
    fn default() -> Self {
        // The observer bounds what is followed; nothing is left out here.
        let mirror = KvIndex::new(IndexLimits { bytes_max: usize::MAX / 2, ranks_max: 1 });
        let _ = mirror.reset(MIRRORED, 0, []); // one rank of one
        Self { mirror, sequence_next: 0, log: VecDeque::new(), log_hashes: 0, epoch: 0, gap: false }
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
        /// Events that would make it from nothing.
        contents: Vec<KvEvent>,
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
        self.ranks
            .get(usize::from(dp_rank))
            .map_or(0, |rank| rank.mirror.rank(MIRRORED).map_or(0, |known| known.blocks as usize))
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
    pub fn reset(&mut self, dp_rank: u16, sequence_next: u64, contents: Vec<KvEvent>) {
        let Some(rank) = self.ranks.get_mut(usize::from(dp_rank)) else {
            return;
        };
        let _ = rank.mirror.reset(MIRRORED, sequence_next, contents); // one rank of one
        while rank.mirror.tidy() {}
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
                        contents: rank.mirror.contents(MIRRORED).unwrap_or_default(),
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
        let dp_rank = batch.rank.dp_rank;
        let hashes = batch.events.iter().map(hashes_in).sum();
        let batch = KvEventBatch { rank: MIRRORED, ..batch };
        let _ = self.mirror.apply(&batch); // in order: checked by the caller
        let batch = KvEventBatch { rank: RankId { dp_rank, ..MIRRORED }, ..batch };
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

fn hashes_in(event: &KvEvent) -> usize {
    match event {
        KvEvent::Stored { hashes, .. } | KvEvent::Removed { hashes, .. } => hashes.len(),
        KvEvent::Groups(_) | KvEvent::Cleared => 0,
    }
}

#[cfg(test)]
mod tests;
