//! Room: what goes when the budget is spent, and what ranks that left behind goes bit by bit.

use super::{Shared, Writer};
use crate::{
    reclaim::WriterKey,
    segment::{Holder, SEGMENT_BLOCKS, segment_words},
};

/// Segments among which the coldest is looked for, at each eviction.
const CANDIDATES: usize = 16;
/// Segments and dead blocks after which a step of a sweep ends: some tens of microseconds.
const SWEEP_SEGMENTS: u32 = 256;
const SWEEP_BLOCKS: u64 = 2048;

/// A walk over all segments that takes slots out of them.
#[derive(Debug)]
pub(super) struct Sweep {
    slots: Vec<u16>,
    next: u32,
}

impl Writer {
    /// Makes sure that what a step may allocate fits: by ending what is being swept, and then by dropping the coldest
    /// segments that no other continues. `keep` is not freed, but may be emptied and cut. False if that is not enough.
    #[inline]
    pub(super) fn make_room(&mut self, shared: &Shared, keep: Option<u32>) -> bool {
        if self.bytes() + self.step_bytes(shared) <= self.bytes_max {
            return true;
        }
        self.keep = keep;
        let fits = self.evict(shared);
        self.keep = None;
        if let Some(keep) = keep.filter(|_| !fits) {
            self.free(shared, keep);
        }
        fits
    }

    /// The most that one step may allocate.
    pub(super) fn step_bytes(&self, shared: &Shared) -> usize {
        self.names.growth_bytes()
            + shared.heads.growth_bytes(&self.key)
            + 2 * 8 * segment_words(SEGMENT_BLOCKS)
    }

    #[cold]
    pub(super) fn evict(&mut self, shared: &Shared) -> bool {
        loop {
            self.collect(shared);
            // What only waits for readers is as good as free, within reason: a reader that was suspended must not cost
            // the whole index, nor may memory grow without end behind it.
            let retired = self.heap.retired_bytes();
            if self.bytes() - retired + self.step_bytes(shared) <= self.bytes_max {
                return retired <= self.bytes_max / 4;
            }
            // Nothing is evicted for what ranks left behind, or for empty pages.
            if self.sweep_step(shared) || self.names.tidy() {
                continue;
            }
            let Some(coldest) = self.coldest(shared) else { return false };
            self.counts.evicted += self.release_all(shared, coldest, |_, _| true);
        }
    }

    /// The coldest of the next few segments that no other continues.
    pub(super) fn coldest(&mut self, shared: &Shared) -> Option<u32> {
        let numbers = self.segments.numbers();
        let mut coldest: Option<(u64, u32)> = None;
        let mut candidates = 0;
        for _ in 0..numbers {
            self.hand = if self.hand + 1 >= numbers { 0 } else { self.hand + 1 };
            let Some(segment) = shared.segments.get(self.hand, &self.key) else { continue };
            if segment.has_children() || Some(self.hand) == self.keep || segment.held(&self.key) == 0 {
                continue;
            }
            let candidate = (segment.stamp(), self.hand);
            coldest = Some(coldest.map_or(candidate, |coldest| coldest.min(candidate)));
            candidates += 1;
            if candidates == CANDIDATES {
                break;
            }
        }
        coldest.map(|(_, number)| number)
    }

    /// Goes on with taking out what ranks left behind, and with freeing. False if nothing is left to do.
    pub(crate) fn tidy(&mut self, shared: &Shared) -> bool {
        let swept = self.sweep_step(shared);
        let tidied = self.names.tidy();
        self.collect(shared);
        swept || tidied || self.heap.has_retired()
    }

    /// What is due after a change.
    pub(crate) fn after_change(&mut self, shared: &Shared) {
        if self.sweep.is_some() || !self.ranks.leaving().is_empty() {
            self.sweep_step(shared);
        }
        if self.heap.wants_collecting() {
            self.collect(shared);
        }
    }

    pub(super) fn collect(&mut self, shared: &Shared) {
        self.heap.collect(&shared.epochs, &mut self.key, |slot| self.ranks.reuse(slot));
    }

    /// One step of a sweep; false if there is nothing to sweep.
    pub(super) fn sweep_step(&mut self, shared: &Shared) -> bool {
        let Some(mut sweep) = self.sweep.take().or_else(|| {
            let slots = self.ranks.take_leaving();
            (!slots.is_empty()).then_some(Sweep { slots, next: 0 })
        }) else {
            return false;
        };
        let end = self.segments.numbers().min(sweep.next + SWEEP_SEGMENTS);
        let mut dead = 0;
        while sweep.next < end && dead < SWEEP_BLOCKS {
            let gone = |holder: Holder, key: &WriterKey| shared.slots.read(key).rank(holder.slot).is_none();
            dead += self.release_all(shared, sweep.next, gone);
            sweep.next += 1;
        }
        if sweep.next < self.segments.numbers() {
            self.sweep = Some(sweep);
        } else {
            sweep.slots.into_iter().for_each(|slot| self.heap.retire_slot(slot));
        }
        true
    }
}
