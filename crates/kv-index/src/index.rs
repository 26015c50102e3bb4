//! The index itself: events in, overlaps out.

use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};
use smallvec::SmallVec;

use crate::{
    holders::WORD_RANKS,
    overlaps::Overlaps,
    ranks::{RankStats, Ranks},
    table::{Inserted, Table},
};

/// Bounds of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexLimits {
    /// Bytes that blocks may take. A growing table briefly takes up to two thirds more while it copies.
    pub bytes_max: usize,
    /// Ranks that may be followed at a time.
    pub ranks_max: u16,
}

impl Default for IndexLimits {
    /// 256 MiB: some nine million distinct blocks, 140 million tokens at 16 a block. 4,096 ranks.
    fn default() -> Self {
        Self { bytes_max: 256 << 20, ranks_max: 4096 }
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a gap needs a snapshot"]
pub enum Applied {
    /// Applied.
    Ok,
    /// Its number was seen before; nothing changed.
    Duplicate,
    /// Batches from `expected` on were lost. The rank counts as empty until [`KvIndex::reset`]; this and later batches
    /// are not applied. Ask the rank for a snapshot.
    Gap {
        /// The number that should have come.
        expected: u64,
    },
    /// `ranks_max` other ranks are followed: this one never has an overlap. Raise the limit.
    TooManyRanks,
}

/// Figures for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexStats {
    /// Distinct blocks.
    pub blocks: u64,
    /// Pairs of a block and a rank that holds it.
    pub entries: u64,
    /// Bytes allocated.
    pub bytes: u64,
    /// Ranks followed.
    pub ranks: u64,
    /// Ranks among them that await a snapshot.
    pub ranks_stale: u64,
    /// Blocks that were not recorded for lack of room, since the start.
    pub refused: u64,
    /// Gaps in event streams, since the start.
    pub gaps: u64,
    /// Batches that came twice, since the start.
    pub duplicates: u64,
}

/// Which rank holds which prefix. See the crate's documentation for what always holds.
#[derive(Debug)]
pub struct KvIndex {
    limits: IndexLimits,
    table: Table,
    ranks: Ranks,
    refused: u64,
    gaps: u64,
    duplicates: u64,
}

impl KvIndex {
    /// An empty index.
    pub fn new(limits: IndexLimits) -> Self {
        Self { limits, table: Table::default(), ranks: Ranks::default(), refused: 0, gaps: 0, duplicates: 0 }
    }

    /// Applies the events of one step of one rank. A rank is known from its batch 0 or its first
    /// [`reset`](Self::reset) on; a late batch of a removed one therefore leaves no trace.
    pub fn apply(&mut self, batch: &KvEventBatch) -> Applied {
        let slot = match self.ranks.find(batch.rank) {
            Some(slot) => slot,
            None if batch.sequence > 0 => {
                self.gaps += 1;
                return Applied::Gap { expected: 0 };
            }
            None => match self.ranks.intern(batch.rank, self.limits.ranks_max) {
                Some(slot) => slot,
                None => return Applied::TooManyRanks,
            },
        };
        let RankStats { sequence_next, stale, .. } = self.ranks.get(slot).stats;
        if batch.sequence < sequence_next {
            self.duplicates += 1;
            return Applied::Duplicate;
        }
        if stale {
            return Applied::Gap { expected: sequence_next };
        }
        if batch.sequence > sequence_next {
            self.gaps += 1;
            self.clear(slot);
            self.ranks.stats_mut(slot).stale = true;
            return Applied::Gap { expected: sequence_next };
        }
        self.ranks.stats_mut(slot).sequence_next += 1;
        for event in &batch.events {
            self.apply_event(slot, event);
        }
        Applied::Ok
    }

    fn apply_event(&mut self, slot: u16, event: &KvEvent) {
        match event {
            KvEvent::Stored { parent: _, hashes, tier: Tier::Device } => {
                self.store(slot, hashes.iter().copied())
            }
            KvEvent::Removed { hashes, tier: Tier::Device } => {
                for &hash in hashes {
                    let removed = self.table.remove(hash, slot);
                    self.ranks.stats_mut(slot).blocks -= u64::from(removed);
                }
            }
            // Only what is on the device is an overlap.
            KvEvent::Stored { .. } | KvEvent::Removed { .. } => {}
            KvEvent::Cleared => self.clear(slot),
        }
    }

    /// Stores a chain until room ends. What follows a refused block could not be matched before it, so it is refused too
    /// rather than given the room of something useful.
    fn store(&mut self, slot: u16, chain: impl Iterator<Item = BlockHash>) {
        let mut has_room = true;
        for hash in chain {
            let held = |table: &Table| table.get(hash).is_some_and(|holders| holders.contains(slot));
            if !has_room {
                self.refused += u64::from(!held(&self.table));
                continue;
            }
            match self.table.insert(hash, slot, self.limits.bytes_max) {
                Inserted::New => self.ranks.stats_mut(slot).blocks += 1,
                Inserted::Already => {}
                Inserted::NoRoom => {
                    has_room = false;
                    self.refused += 1;
                }
            }
        }
    }

    fn clear(&mut self, slot: u16) {
        let stats = self.ranks.stats_mut(slot);
        if std::mem::take(&mut stats.blocks) > 0 {
            self.table.remove_rank(slot);
        }
    }

    /// Replaces all that is known of `rank` by a snapshot, `blocks` in any order, taken before its batch number
    /// `sequence_next`. The rank is no longer stale. Says [`Applied::TooManyRanks`] if there is no place for it.
    pub fn reset(
        &mut self,
        rank: RankId,
        sequence_next: u64,
        blocks: impl IntoIterator<Item = BlockHash>,
    ) -> Applied {
        let Some(slot) = self.ranks.intern(rank, self.limits.ranks_max) else {
            return Applied::TooManyRanks;
        };
        self.clear(slot);
        *self.ranks.stats_mut(slot) = RankStats { sequence_next, blocks: 0, stale: false };
        // A snapshot is no chain: one block without room says nothing about the next.
        for hash in blocks {
            self.store(slot, std::iter::once(hash));
        }
        Applied::Ok
    }

    /// Forgets `rank`: it left. Its memory is freed.
    pub fn remove_rank(&mut self, rank: RankId) {
        if let Some(slot) = self.ranks.find(rank) {
            self.clear(slot);
            self.ranks.free(slot);
        }
    }

    /// Forgets every rank of an incarnation: its engine died or its lease lapsed.
    pub fn remove_incarnation(&mut self, incarnation: Incarnation) {
        let ranks: Vec<RankId> =
            self.ranks.iter().map(|rank| rank.id).filter(|id| id.incarnation == incarnation).collect();
        for rank in ranks {
            self.remove_rank(rank);
        }
    }

    /// Leading blocks of `chain` that each rank holds on its device, into `out`, which is cleared first. Ranks with none,
    /// stale ones among them, are left out.
    pub fn overlaps(&self, chain: &[BlockHash], out: &mut Overlaps) {
        out.0.clear();
        // Ranks that held every block so far, 64 a word. Four words are on the stack; more only in fleets beyond that.
        let mut alive: SmallVec<[u64; 4]> =
            SmallVec::from_elem(u64::MAX, self.ranks.slots().div_ceil(WORD_RANKS));
        for (depth, &hash) in chain.iter().enumerate() {
            let holders = self.table.get(hash);
            let mut any = 0;
            for (index, word) in alive.iter_mut().enumerate() {
                let held = *word & holders.map_or(0, |holders| holders.word(index));
                if depth > 0 {
                    self.push(*word & !held, index, depth, out);
                }
                *word = held;
                any |= held;
            }
            if any == 0 {
                break;
            }
        }
        if !chain.is_empty() {
            for (index, &word) in alive.iter().enumerate() {
                self.push(word, index, chain.len(), out);
            }
        }
        out.0.sort_unstable_by_key(|&(rank, _)| rank);
    }

    /// Lists the ranks of the bits of `word` with `depth` blocks.
    fn push(&self, mut word: u64, index: usize, depth: usize, out: &mut Overlaps) {
        while word != 0 {
            let slot = index * WORD_RANKS + word.trailing_zeros() as usize;
            out.0.push((self.ranks.get(slot as u16).id, depth as u32));
            word &= word - 1;
        }
    }

    /// What is known of one rank; `None` if it is not followed.
    pub fn rank(&self, rank: RankId) -> Option<RankStats> {
        self.ranks.find(rank).map(|slot| self.ranks.get(slot).stats)
    }

    /// Ranks that await a snapshot, in order of their ids.
    pub fn stale_ranks(&self) -> impl Iterator<Item = RankId> + '_ {
        self.ranks.iter().filter(|rank| rank.stats.stale).map(|rank| rank.id)
    }

    /// Figures for metrics. Walks the ranks, not the blocks.
    pub fn stats(&self) -> IndexStats {
        IndexStats {
            blocks: self.table.len() as u64,
            entries: self.ranks.iter().map(|rank| rank.stats.blocks).sum(),
            bytes: (self.table.bytes() + self.ranks.bytes()) as u64,
            ranks: self.ranks.iter().count() as u64,
            ranks_stale: self.stale_ranks().count() as u64,
            refused: self.refused,
            gaps: self.gaps,
            duplicates: self.duplicates,
        }
    }
}

#[cfg(test)]
mod tests;
