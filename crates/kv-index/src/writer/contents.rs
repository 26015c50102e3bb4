//! All that one rank holds, as the events that would make it from nothing.

use forebay_types::{BlockHash, KvEvent};

use super::{Shared, Writer};
use crate::{
    segment::{ALL_TIERS, SEGMENT_BLOCKS, Segment, bits},
    sync::Ordering::Relaxed,
};

impl Writer {
    /// Chains that `slot` holds, each after what it goes on from as far as that is recorded.
    pub(crate) fn contents(&self, shared: &Shared, slot: u16) -> Vec<KvEvent> {
        let mut events = Vec::new();
        let groups = shared.slots.read(&self.key).groups(slot, &self.key);
        if let Some(groups) = groups {
            events.push(KvEvent::Groups(groups.collect()));
        }
        let mut done = vec![0_u64; (self.segments.numbers() as usize).div_ceil(64)];
        let mut path = Vec::new();
        for number in 0..self.segments.numbers() {
            let mut next = Some(number);
            while let Some(number) = next {
                let (word, bit) = (&mut done[number as usize / 64], 1 << (number % 64));
                let Some(segment) = shared.segments.get(number, &self.key).filter(|_| *word & bit == 0)
                else {
                    break;
                };
                *word |= bit;
                path.push(segment);
                next = segment.parent();
            }
            while let Some(segment) = path.pop() {
                self.add_chains(segment, slot, &mut events);
            }
        }
        events
    }

    /// Adds what `slot` holds of one segment.
    fn add_chains(&self, segment: Segment<'_>, slot: u16, events: &mut Vec<KvEvent>) {
        for (holder, mask) in segment.holders(&self.key).filter(|(holder, _)| holder.slot == slot) {
            let (tier, group) = (ALL_TIERS[holder.plane.tier()], holder.plane.group());
            let mut held = mask.load(Relaxed);
            while held != 0 {
                let start = held.trailing_zeros() as usize;
                let run = (held >> start).trailing_ones() as usize;
                let hash = |word: &crate::sync::AtomicU64| BlockHash(word.load(Relaxed));
                let hashes: Vec<_> = segment.hashes()[start..start + run].iter().map(hash).collect();
                let parent = match start.checked_sub(1) {
                    Some(before) => Some(hash(&segment.hashes()[before])),
                    None => segment.after(),
                };
                let goes_on = matches!(events.last(), Some(KvEvent::Stored { hashes, tier: last, group: of, .. })
                    if (*last, *of) == (tier, group) && parent.is_some() && hashes.last().copied() == parent);
                match events.last_mut() {
                    Some(KvEvent::Stored { hashes: before, .. }) if goes_on => before.extend(hashes),
                    _ => events.push(KvEvent::Stored { parent, hashes, tier, group }),
                }
                held &= !bits(start, run.min(SEGMENT_BLOCKS - start));
            }
        }
    }
}
