//! Our blocks that are held, by tier, and the events that come of changes.

use std::{
    collections::{HashMap, hash_map},
    hash::BuildHasher,
};

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, KvEvent, Tier};
use siphasher::sip::SipHasher13;
use smallvec::SmallVec;

use super::runs::{Holder, Place, Runs};

/// Tiers, as places in an array.
pub(super) const TIERS: usize = 4;
pub(super) const ALL_TIERS: [Tier; TIERS] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];

pub(super) fn tier_place(tier: Tier) -> usize {
    match tier {
        Tier::Device => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
        Tier::Remote => 3,
    }
}

/// Which blocks one rank holds, and by how many stores and engine blocks.
///
/// A block of ours is mostly held by one engine block that was stored once: a bit in a mask says so. Anything beyond is in
/// `more`.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) runs: Runs,
    /// How often more a holder was [added](Self::add) to a block.
    more: HashMap<(Place, Holder), u32>,
}

impl Held {
    pub(super) fn new(keyed: Keyed) -> Self {
        Self { runs: Runs::new(keyed), more: HashMap::new() }
    }

    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.more = HashMap::new();
    }

    #[cfg(test)]
    pub(super) fn has_more(&self) -> bool {
        !self.more.is_empty()
    }

    /// How often `holder` was added to the block at `place`, less how often it was taken off.
    pub(super) fn times(&self, place: Place, holder: Holder) -> u32 {
        match self.runs.is_held(place, |other| other == holder) {
            true => self.more.get(&(place, holder)).map_or(1, |more| more.saturating_add(1)),
            false => 0,
        }
    }

    /// Blocks that holders of those were added to, each as often as it was.
    pub(super) fn times_all(&self, of: impl Fn(Holder) -> bool) -> u64 {
        let more = self.more.iter().filter(|((_, holder), _)| of(*holder));
        more.map(|(_, &more)| u64::from(more)).sum::<u64>() + self.runs.count(of)
    }

    /// Counts one more of `holder` at `place`. Says whether it is the first.
    fn add(&mut self, place: Place, holder: Holder) -> bool {
        if !self.runs.is_held(place, |other| other == holder) {
            self.runs.set(place, holder);
            return true;
        }
        // No engine holds one block four billion times; one that says so has its removals believed too early.
        let more = self.more.entry((place, holder)).or_default();
        *more = more.saturating_add(1);
        false
    }

    /// Counts one less of `holder` at `place`, where it is. Says whether it was the last.
    fn take(&mut self, place: Place, holder: Holder) -> bool {
        match self.more.entry((place, holder)) {
            hash_map::Entry::Occupied(mut more) if *more.get() > 1 => *more.get_mut() -= 1,
            hash_map::Entry::Occupied(more) => drop(more.remove()),
            hash_map::Entry::Vacant(_) => {
                self.runs.unset(place, holder);
                return true;
            }
        }
        false
    }

    /// Counts one more of `holder` at `place`. Says whether it is the first there.
    pub(super) fn hold(
        &mut self,
        place: Place,
        holder: Holder,
        counts: &mut Counts,
        events: &mut Vec<KvEvent>,
    ) -> bool {
        let at = holder.at();
        let (was_here, was_anywhere) = (self.is_held(place, at), self.is_held_by(place, at.group));
        let first = self.add(place, holder);
        counts.anywhere += u64::from(!was_anywhere);
        if !was_here {
            counts.blocks[tier_place(at.tier)] += 1;
            let parent = self.runs.before(place).map(|before| self.runs.own(before));
            stored(parent, self.runs.own(place), at, events);
        }
        first
    }

    /// Counts one less, where it is. Says whether it was the last there.
    pub(super) fn release(
        &mut self,
        place: Place,
        holder: Holder,
        counts: &mut Counts,
        events: &mut Vec<KvEvent>,
    ) -> bool {
        let at = holder.at();
        let own = self.runs.own(place);
        // What nothing holds any more has no place.
        self.runs.pin(place);
        let last = self.take(place, holder);
        let (is_here, is_anywhere) = (self.is_held(place, at), self.is_held_by(place, at.group));
        self.runs.unpin(place);
        counts.anywhere -= u64::from(!is_anywhere);
        if !is_here {
            counts.blocks[tier_place(at.tier)] -= 1;
            removed(own, at, events);
        }
        last
    }

    /// The `blocks` that end with `last`, in their order.
    pub(super) fn leading_to(&self, last: Option<Place>, blocks: usize) -> SmallVec<[Place; 4]> {
        let mut places: SmallVec<[Place; 4]> =
            std::iter::successors(last, |&place| self.runs.before(place)).take(blocks).collect();
        places.reverse();
        places
    }

    /// Whether anything holds the block at `place` in that tier, for those layers.
    fn is_held(&self, place: Place, at: At) -> bool {
        self.runs.is_held(place, |holder| holder.at() == at)
    }

    fn is_held_by(&self, place: Place, group: u8) -> bool {
        self.runs.is_held(place, |holder| holder.at().group == group)
    }
}

/// Distinct blocks that a group holds.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    /// By tier.
    pub(super) blocks: [u64; TIERS],
    /// Each once.
    pub(super) anywhere: u64,
}

/// Where blocks are, and for which layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct At {
    pub(super) tier: Tier,
    pub(super) group: u8,
}

/// Says that `block` after `parent` was stored, as a link of the chain that was being said if it is one.
fn stored(parent: Option<BlockHash>, block: BlockHash, at: At, events: &mut Vec<KvEvent>) {
    let At { tier, group } = at;
    if let Some(KvEvent::Stored { hashes, tier: last_tier, group: last_group, .. }) = events.last_mut()
        && (*last_tier, *last_group) == (tier, group)
        && parent.is_some()
        && hashes.last() == parent.as_ref()
    {
        hashes.push(block);
        return;
    }
    events.push(KvEvent::Stored { parent, hashes: vec![block], tier, group });
}

fn removed(block: BlockHash, at: At, events: &mut Vec<KvEvent>) {
    let At { tier, group } = at;
    match events.last_mut() {
        Some(KvEvent::Removed { hashes, tier: last_tier, group: last_group })
            if (*last_tier, *last_group) == (tier, group) =>
        {
            hashes.push(block);
        }
        _ => events.push(KvEvent::Removed { hashes: vec![block], tier, group }),
    }
}

/// Spreads engines' hashes over a table: under a key of the fleet's, or an engine that lies could choose hashes that all
/// fall into one place.
#[derive(Debug, Clone)]
pub(super) struct Keyed(SipHasher13);

impl Keyed {
    pub(super) fn new(hasher: &BlockHasher) -> Self {
        let half = |salt| hasher.root("\0forebay/engine-events/1 table", salt).0;
        Self(SipHasher13::new_with_keys(half("0"), half("1")))
    }
}

impl BuildHasher for Keyed {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        self.0
    }
}
