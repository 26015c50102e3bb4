//! Taking out: what ranks do not hold any more, and the segments and names that nobody does.

use forebay_types::BlockHash;

use super::{Shared, Writer};
use crate::{
    reclaim::WriterKey,
    segment::{Holder, Place, SEGMENT_BLOCKS, bits, clear},
    sync::Ordering::Relaxed,
};

impl Writer {
    /// Records that `holder` does not hold `hashes` any more, in any order.
    pub(crate) fn remove(&mut self, shared: &Shared, holder: Holder, hashes: &[BlockHash]) {
        // What was found in the last segment, as long as it is the same.
        let mut found: Option<(u32, u64)> = None;
        let mut rest = hashes;
        while let Some(&hash) = rest.first() {
            let Some(place) = self.find(shared, hash) else {
                self.counts.removals_unknown += 1;
                rest = &rest[1..];
                continue;
            };
            let segment = shared.segments.get(place.segment, &self.key).expect("found");
            let position = place.position as usize;
            // Engines evict tails first; what is dropped as a whole may come in either order.
            let down = segment.common_down(position, rest.iter().map(|hash| hash.0));
            let up = if down > 1 { 1 } else { segment.common(position, rest.iter().map(|hash| hash.0)) };
            let run = bits(position + 1 - down, down) | bits(position, up);
            found = match found {
                Some((number, bits)) if number == place.segment => Some((number, bits | run)),
                _ => {
                    if let Some((number, bits)) = found {
                        self.release(shared, holder, number, bits);
                    }
                    Some((place.segment, run))
                }
            };
            rest = &rest[down.max(up)..];
        }
        if let Some((number, bits)) = found {
            self.release(shared, holder, number, bits);
        }
    }

    /// Clears `bits` of `holder` in a segment.
    pub(super) fn release(&mut self, shared: &Shared, holder: Holder, number: u32, bits: u64) {
        // A segment of which nothing was held goes with the last one that continued it: perhaps a moment ago.
        let segment = shared.segments.get(number, &self.key);
        let mask = segment.and_then(|segment| segment.mask(holder, &self.key));
        let held = mask.map_or(0, |mask| mask.load(Relaxed)) & bits;
        self.counts.removals_unknown += u64::from((bits & !held).count_ones());
        if let Some(mask) = mask.filter(|_| held != 0) {
            clear(mask, held);
            self.ranks.count(holder, -i64::from(held.count_ones()));
            self.bury(shared, number, held);
        }
    }

    /// Clears all that holders of some kind hold in a segment. Returns how many blocks nobody holds any more.
    pub(super) fn release_all(
        &mut self,
        shared: &Shared,
        number: u32,
        mut of: impl FnMut(Holder, &WriterKey) -> bool,
    ) -> u64 {
        let Some(segment) = shared.segments.get(number, &self.key) else { return 0 };
        let mut released = 0;
        for (holder, mask) in segment.holders(&self.key).filter(|&(holder, _)| of(holder, &self.key)) {
            let held = mask.load(Relaxed);
            if held != 0 {
                clear(mask, held);
                self.ranks.count(holder, -i64::from(held.count_ones()));
                released |= held;
            }
        }
        if released == 0 { 0 } else { self.bury(shared, number, released) }
    }

    /// Counts those of `released` that nobody holds, and gives the segment's memory back if only its front or nothing of it
    /// is held. Returns how many those were.
    pub(super) fn bury(&mut self, shared: &Shared, number: u32, released: u64) -> u64 {
        let segment = shared.segments.get(number, &self.key).expect("a segment that is held");
        let held = segment.held(&self.key);
        let dead = u64::from((released & !held).count_ones());
        self.blocks -= dead;
        let len = SEGMENT_BLOCKS - held.leading_zeros() as usize;
        if len == 0 {
            self.free(shared, number);
        } else if segment.capacity() >= 16 && len * 2 <= segment.capacity() {
            self.forget(shared, number, len);
            let segment = shared.segments.get(number, &self.key).expect("found above");
            let copy = segment.copy(len.max(4).next_multiple_of(2), len, &mut self.heap, &self.key);
            shared.segments.replace(number, copy, &mut self.heap);
        }
        dead
    }

    /// Frees a segment of which nothing is held unless others continue it, and then those before it.
    pub(super) fn free(&mut self, shared: &Shared, number: u32) {
        let mut next = Some(number);
        while let Some(number) = next {
            let Some(segment) = shared.segments.get(number, &self.key) else { return };
            if Some(number) == self.keep || segment.has_children() || segment.held(&self.key) != 0 {
                return;
            }
            next = segment.parent();
            self.forget(shared, number, 0);
            shared.segments.remove(number, &mut self.segments, &mut self.heap, &self.key);
            if let Some(parent) = next.and_then(|parent| shared.segments.get(parent, &self.key)) {
                parent.remove_child();
            }
        }
    }

    /// Takes the positions of a segment from `from` on out of the tables.
    pub(super) fn forget(&mut self, shared: &Shared, number: u32, from: usize) {
        let Some(segment) = shared.segments.get(number, &self.key) else { return };
        let Some(hashes) = segment.hashes().get(from..) else { return };
        let first = Place { segment: number, position: from as u32 };
        // Readers find a segment by its first hash.
        if let Some(hash) = hashes.first().filter(|_| from == 0) {
            let hash = hash.load(Relaxed);
            if shared.heads.remove(hash, first.to_word(), &mut self.heads, &mut self.heap, &self.key)
                && segment.parent().is_none()
            {
                self.filter.remove(&shared.filter, hash);
            }
        }
        self.names.remove_run(first.to_word(), hashes.iter().map(|hash| hash.load(Relaxed)));
    }
}
