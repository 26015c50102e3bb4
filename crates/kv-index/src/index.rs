//! The index itself: events in, overlaps out.

use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId};

use crate::{
    overlaps::Overlaps,
    ranks::RankStats,
    sync::{Mutex, MutexGuard},
    writer::{Shared, Writer},
};

/// Bounds of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexLimits {
    /// Bytes that it may take. Beyond them the coldest blocks that end a chain go.
    pub bytes_max: usize,
    /// Ranks that may be followed at a time; at most 32,768.
    pub ranks_max: u16,
}

/// The least that `bytes_max` can be: room to grow a table by, and some blocks.
pub const BYTES_MIN: usize = 1 << 20;

impl Default for IndexLimits {
    /// 256 MiB: some eleven million distinct blocks, 180 million tokens at 16 a block. 4,096 ranks.
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
    /// Pairs of a block and a place where a rank holds it.
    pub entries: u64,
    /// Runs of blocks that they are kept in.
    pub segments: u64,
    /// Bytes allocated.
    pub bytes: u64,
    /// Ranks followed.
    pub ranks: u64,
    /// Ranks among them that await a snapshot.
    pub ranks_stale: u64,
    /// Blocks that were not recorded for lack of room, since the start.
    pub refused: u64,
    /// Blocks that were dropped for lack of room, since the start.
    pub evicted: u64,
    /// Removals of what was not recorded, since the start.
    pub removals_unknown: u64,
    /// Gaps in event streams, since the start.
    pub gaps: u64,
    /// Batches that came twice, since the start.
    pub duplicates: u64,
}

/// Which rank holds which prefix. See the crate's documentation for what always holds.
///
/// All methods take `&self`: look-ups run at any time, on any thread, and wait for nothing; changes wait for each other.
#[derive(Debug)]
pub struct KvIndex {
    limits: IndexLimits,
    pub(crate) shared: Shared,
    changes: Mutex<Changes>,
}

/// What changes need.
#[derive(Debug)]
struct Changes {
    writer: Writer,
    gaps: u64,
    duplicates: u64,
}

impl KvIndex {
    /// An empty index. A budget below [`BYTES_MIN`] is taken as that.
    pub fn new(limits: IndexLimits) -> Self {
        let limits = IndexLimits {
            bytes_max: limits.bytes_max.max(BYTES_MIN),
            // As many slots again are for ranks that are being taken out.
            ranks_max: limits.ranks_max.min(1 << 15),
        };
        Self::unchecked(limits)
    }

    fn unchecked(limits: IndexLimits) -> Self {
        Self {
            limits,
            shared: Shared::default(),
            changes: Mutex::new(Changes { writer: Writer::new(limits.bytes_max), gaps: 0, duplicates: 0 }),
        }
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        // A panic within a change is a defect; what it left is still sound to read, and claims less.
        self.changes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Applies the events of one step of one rank. A rank is known from its batch 0 or its first
    /// [`reset`](Self::reset) on; a late batch of a removed one therefore leaves no trace.
    pub fn apply(&self, batch: &KvEventBatch) -> Applied {
        let mut changes = self.changes();
        let Changes { writer, gaps, duplicates } = &mut *changes;
        if writer.ranks.find_mut(batch.rank).is_none() {
            if batch.sequence > 0 {
                *gaps += 1;
                return Applied::Gap { expected: 0 };
            }
            if !writer.add_rank(batch.rank, &self.shared, self.limits.ranks_max) {
                return Applied::TooManyRanks;
            }
        }
        let rank = writer.ranks.find_mut(batch.rank).expect("added above");
        let expected = rank.sequence_next;
        if batch.sequence < expected {
            *duplicates += 1;
            return Applied::Duplicate;
        }
        if rank.stale {
            return Applied::Gap { expected };
        }
        if batch.sequence > expected {
            *gaps += 1;
            rank.stale = true;
            writer.clear_rank(batch.rank, &self.shared);
            return Applied::Gap { expected };
        }
        rank.sequence_next += 1;
        let mut slot = rank.slot;
        for (index, event) in batch.events.iter().enumerate() {
            if let Some(ahead) = batch.events.get(index + EVENTS_AHEAD) {
                writer.fetch(ahead);
            }
            slot = writer.apply(&self.shared, batch.rank, slot, event);
        }
        writer.after_change(&self.shared);
        Applied::Ok
    }

    /// Replaces all that is known of `rank` by a snapshot taken before its batch number `sequence_next`: events that would
    /// make what it holds from nothing. The rank is no longer stale. Says [`Applied::TooManyRanks`] if there is no place
    /// for it.
    ///
    /// Chains in any order are right; those after the ones that they go on from make an index that evicts better.
    pub fn reset(
        &self,
        rank: RankId,
        sequence_next: u64,
        contents: impl IntoIterator<Item = KvEvent>,
    ) -> Applied {
        let mut contents = contents.into_iter();
        let mut slot = {
            let mut changes = self.changes();
            let writer = &mut changes.writer;
            if !writer.add_rank(rank, &self.shared, self.limits.ranks_max) {
                return Applied::TooManyRanks;
            }
            let slot = writer.clear_rank(rank, &self.shared);
            writer.set_groups(slot, &[], &self.shared);
            let rank = writer.ranks.find_mut(rank).expect("added above");
            (rank.sequence_next, rank.stale) = (sequence_next, false);
            slot
        };
        // In pieces, so that other ranks' events get their turns.
        let mut event = contents.next();
        while event.is_some() {
            let mut changes = self.changes();
            let writer = &mut changes.writer;
            // It may have been removed meanwhile, or reset again.
            if writer.ranks.find(rank).is_none_or(|rank| rank.slot != slot) {
                return Applied::Ok;
            }
            let mut blocks = 0;
            while let Some(next) = event.take_if(|_| blocks < RESET_PIECE_BLOCKS) {
                blocks += match &next {
                    KvEvent::Stored { hashes, .. } | KvEvent::Removed { hashes, .. } => hashes.len().max(1),
                    KvEvent::Groups(_) | KvEvent::Cleared => 1,
                };
                slot = writer.apply(&self.shared, rank, slot, &next);
                event = contents.next();
            }
            writer.after_change(&self.shared);
        }
        Applied::Ok
    }

    /// Forgets `rank`: it left. From now on it has no overlap; its memory is freed bit by bit, with each change and by
    /// [`tidy`](Self::tidy).
    pub fn remove_rank(&self, rank: RankId) {
        self.changes().writer.remove_rank(rank, &self.shared);
    }

    /// Forgets every rank of an incarnation: its engine died or its lease lapsed.
    pub fn remove_incarnation(&self, incarnation: Incarnation) {
        let writer = &mut self.changes().writer;
        let first = RankId { incarnation, dp_rank: 0 };
        let last = RankId { incarnation, dp_rank: u16::MAX };
        for rank in writer.ranks.between(first, last) {
            writer.remove_rank(rank, &self.shared);
        }
    }

    /// Does some of the work that removed ranks left behind, at most some tens of microseconds of it. True if more is
    /// left. Changes do the same by the way; call it where there are none, or to have memory back sooner.
    pub fn tidy(&self) -> bool {
        self.changes().writer.tidy(&self.shared)
    }

    /// What is known of one rank; `None` if it is not followed.
    pub fn rank(&self, rank: RankId) -> Option<RankStats> {
        let changes = self.changes();
        let ranks = &changes.writer.ranks;
        ranks.find(rank).map(|rank| ranks.stats(rank))
    }

    /// All that `rank` holds, as the events that would make it from nothing: what [`reset`](Self::reset) of another index
    /// takes. `None` if the rank is not followed.
    ///
    /// Walks the whole index, and other changes wait for it: some 30 ms for a million blocks.
    pub fn contents(&self, rank: RankId) -> Option<Vec<KvEvent>> {
        let changes = self.changes();
        let slot = changes.writer.ranks.find(rank)?.slot;
        Some(changes.writer.contents(&self.shared, slot))
    }

    /// Ranks that await a snapshot, in order of their ids.
    pub fn stale_ranks(&self) -> Vec<RankId> {
        let changes = self.changes();
        changes.writer.ranks.iter().filter(|(_, rank)| rank.stale).map(|(id, _)| id).collect()
    }

    /// Figures for metrics. Walks the ranks, not the blocks.
    pub fn stats(&self) -> IndexStats {
        let changes = self.changes();
        let Changes { writer, gaps, duplicates } = &*changes;
        IndexStats {
            blocks: writer.blocks(),
            entries: writer.ranks.entries(),
            segments: u64::from(writer.segments()),
            bytes: writer.bytes() as u64,
            ranks: writer.ranks.len() as u64,
            ranks_stale: writer.ranks.iter().filter(|(_, rank)| rank.stale).count() as u64,
            refused: writer.counts.refused,
            evicted: writer.counts.evicted,
            removals_unknown: writer.counts.removals_unknown,
            gaps: *gaps,
            duplicates: *duplicates,
        }
    }

    /// Of [`IndexStats::bytes`], those of the table in which changes find every block. Look-ups do without it.
    pub fn bytes_of_names(&self) -> u64 {
        self.changes().writer.names_bytes() as u64
    }

    /// Leading blocks of `chain`, from a prompt's first block on, that each rank can reuse, into `out`, which is cleared
    /// first: those that it holds or, where its layers are of several groups, the longest prefix that every group can
    /// serve. Ranks with none, stale ones among them, are left out.
    ///
    /// Never waits. O(segments of the chain x ranks that hold them).
    pub fn overlaps(&self, chain: &[BlockHash], out: &mut Overlaps) {
        crate::lookup::overlaps(&self.shared, chain, out);
    }
}

/// Events whose places are fetched ahead: a step of decoding stores a block in each of many sequences.
const EVENTS_AHEAD: usize = 4;

/// Blocks of a snapshot that are stored at a time: under a millisecond.
const RESET_PIECE_BLOCKS: usize = 8192;

impl Drop for KvIndex {
    fn drop(&mut self) {
        self.changes.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).writer.clear(&self.shared);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
