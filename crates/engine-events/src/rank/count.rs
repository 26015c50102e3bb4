//! One engine block more or less: where it stands among ours, and what that changes for the index.
//!
//! Most complete one block of ours, which has their hash beside it. The others have an [`Entry`] each: those that complete
//! several blocks or end within one, whose block has another hash already, or that stand for nothing.

use forebay_types::KvEvent;

use super::{
    Applied, Fault, RankCache,
    chain::{Chain, Identity, Own},
    group::Group,
    held::{ALL_TIERS, At, TIERS, tier_place},
    runs::{self, Holder, Place},
};
use crate::event::EngineHash;

/// What one engine hash is and how often it is stored, if it does not stand beside the one block of ours that it completes.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stored: [u32; TIERS],
    /// Where our chain stands after it: the last block, which it pins.
    last: Option<Place>,
    identity: Identity,
}

/// Where a chain of an event stands among the blocks that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Before a prompt's first block.
    Root,
    /// After this block.
    At(Place),
    /// After blocks for which there was no room.
    NotKept,
}

impl End {
    pub(super) fn after(last: Option<Place>) -> Self {
        last.map_or(Self::Root, Self::At)
    }

    pub(super) fn place(self) -> Option<Place> {
        match self {
            Self::At(place) => Some(place),
            Self::Root | Self::NotKept => None,
        }
    }
}

/// A chain before and after one of an event's blocks.
pub(super) struct Computed<'a> {
    pub(super) end: End,
    pub(super) chain: &'a Chain,
    /// Our blocks that it completes.
    pub(super) own: &'a Own,
    /// Blocks of the event that follow.
    pub(super) following: usize,
}

/// What became of one stored hash.
pub(super) enum Stores {
    /// It is followed; the chain stands there.
    Counted(End),
    /// There was no room.
    LeftOut,
    /// Its prefix is not known.
    Unknown,
}

impl RankCache {
    /// Where a chain stands after the block that `hash` stands for in a group.
    pub(super) fn known(&self, hash: EngineHash, group: u8) -> Option<(Chain, End)> {
        if let Some(entry) = self.groups[usize::from(group)].others.get(&hash) {
            return Some((entry.identity.chain()?, End::after(entry.last)));
        }
        let place = self.named(hash, group)?;
        Some((Chain::after_block(self.held.runs.own(place)), End::At(place)))
    }

    /// The block of ours that `hash` names, if it is held under it in a group.
    pub(super) fn named(&self, hash: EngineHash, group: u8) -> Option<Place> {
        let runs = &self.held.runs;
        runs.find(hash)
            .filter(|&place| runs.is_held(place, |holder| holder.is_named() && holder.at().group == group))
    }

    /// Counts one store of `hash`. `computed` is `None` if its prefix is not known.
    pub(super) fn store_one(
        &mut self,
        hash: EngineHash,
        at: At,
        computed: Option<Computed<'_>>,
        applied: &mut Applied,
    ) -> Stores {
        let events = &mut applied.events;
        let group = usize::from(at.group);
        let is_other = self.groups[group].others.contains_key(&hash);
        let named = if is_other { None } else { self.named(hash, at.group) };
        if let Some(place) = named {
            let own = self.held.runs.own(place);
            if computed.as_ref().is_none_or(|computed| computed.chain.completes_one(computed.own, own)) {
                self.hold_named(place, at, events);
                return Stores::Counted(End::At(place));
            }
            let stored = ALL_TIERS.map(|tier| self.held.times(place, Holder::Named(At { tier, ..at })));
            for (tier, times) in ALL_TIERS.into_iter().zip(stored) {
                (0..times).for_each(|_| self.release_named(place, At { tier, ..at }, events));
            }
            let ambiguous = Entry { stored, last: None, identity: Identity::Ambiguous };
            self.groups[group].others.insert(hash, ambiguous);
            self.note_ambiguous(hash, applied);
        } else if !is_other {
            let Some(computed) = computed else { return Stores::Unknown };
            return self.store_new(hash, at, &computed, applied);
        } else if let Some(entry) = self.groups[group].others.get_mut(&hash)
            && computed.as_ref().is_some_and(|computed| !entry.identity.agrees(computed.own, computed.chain))
        {
            let identity = std::mem::replace(&mut entry.identity, Identity::Ambiguous);
            let (last, stored) = (entry.last.take(), entry.stored);
            for tier in ALL_TIERS.into_iter().filter(|&tier| stored[tier_place(tier)] > 0) {
                self.release_others(last, identity.own().len(), At { tier, ..at }, events);
            }
            if let Some(last) = last {
                self.held.runs.unpin(last);
            }
            self.note_ambiguous(hash, applied);
        }
        let entry = self.groups[group].others.get_mut(&hash).expect("it is one of the others by now");
        let (last, blocks) = (entry.last, entry.identity.own().len());
        let is_ambiguous = matches!(entry.identity, Identity::Ambiguous);
        let times = &mut entry.stored[tier_place(at.tier)];
        *times = times.saturating_add(1);
        if *times == 1 {
            self.hold_others(last, blocks, at, &mut applied.events);
        }
        match computed {
            // The chain is what its tokens say, whatever the hash is worth.
            Some(computed) if is_ambiguous => Stores::Counted(self.go_on(&computed)),
            _ => Stores::Counted(End::after(last)),
        }
    }

    /// Counts the first store of `hash` in a group.
    fn store_new(
        &mut self,
        hash: EngineHash,
        at: At,
        computed: &Computed<'_>,
        applied: &mut Applied,
    ) -> Stores {
        let blocks_max = self.settings.blocks_max;
        let engine_blocks: u64 = self.groups.iter().map(Group::engine_blocks).sum();
        let held: u64 = self.groups.iter().map(|group| group.counts.anywhere).sum();
        let is_full =
            engine_blocks >= blocks_max as u64 || held + computed.own.len() as u64 > blocks_max as u64;
        let end = if is_full { End::NotKept } else { self.go_on(computed) };
        if end == End::NotKept {
            self.stats.refused += 1;
            Fault::NoRoom { blocks_max, blocks: 1 }.add_to(&mut applied.faults);
            return Stores::LeftOut;
        }
        let runs = &mut self.held.runs;
        let identity = Identity::new(computed.own, computed.chain);
        if let (Identity::One(_), End::At(place)) = (&identity, end) {
            let (named, name) = (runs.find(hash), runs.name(place));
            if named.is_none() && name.is_none() {
                runs.set_name(place, hash);
            }
            if named == Some(place) || named.is_none() && name.is_none() {
                self.hold_named(place, at, &mut applied.events);
                return Stores::Counted(end);
            }
        }
        let mut stored = [0; TIERS];
        stored[tier_place(at.tier)] = 1;
        let last = end.place();
        if let Some(last) = last {
            runs.pin(last);
        }
        self.hold_others(last, identity.own().len(), at, &mut applied.events);
        self.groups[usize::from(at.group)].others.insert(hash, Entry { stored, last, identity });
        Stores::Counted(end)
    }

    fn note_ambiguous(&mut self, hash: EngineHash, applied: &mut Applied) {
        self.stats.ambiguous += 1;
        Fault::AmbiguousHash { hash, blocks: 1 }.add_to(&mut applied.faults);
    }

    /// The end of a chain after the blocks that were computed, which have a place from now on.
    fn go_on(&mut self, computed: &Computed<'_>) -> End {
        // What nothing holds is kept for what goes on from it: bounded, if less tightly.
        let kept_max = self.settings.blocks_max.saturating_mul(4).min(runs::BLOCKS_MAX);
        let runs = &mut self.held.runs;
        if computed.end == End::NotKept || runs.len() + computed.own.len() > kept_max {
            return End::NotKept;
        }
        computed.own.iter().fold(computed.end, |end, &own| {
            End::At(runs.place(end.place(), own, computed.following * computed.own.len()))
        })
    }

    fn hold_named(&mut self, place: Place, at: At, events: &mut Vec<KvEvent>) {
        let group = &mut self.groups[usize::from(at.group)];
        let in_group = |holder: Holder| holder.is_named() && holder.at().group == at.group;
        group.named += u64::from(!self.held.runs.is_held(place, in_group));
        self.held.hold(place, Holder::Named(at), &mut group.counts, events);
    }

    fn release_named(&mut self, place: Place, at: At, events: &mut Vec<KvEvent>) {
        let group = &mut self.groups[usize::from(at.group)];
        let in_group =
            |holder: Holder| holder.is_named() && holder.at().group == at.group && holder.at() != at;
        let elsewhere = self.held.runs.is_held(place, in_group);
        let was_last = self.held.release(place, Holder::Named(at), &mut group.counts, events);
        group.named -= u64::from(was_last && !elsewhere);
    }

    /// Holds the `blocks` that end with `last`, in their order.
    fn hold_others(&mut self, last: Option<Place>, blocks: usize, at: At, events: &mut Vec<KvEvent>) {
        let counts = &mut self.groups[usize::from(at.group)].counts;
        for place in self.held.leading_to(last, blocks) {
            self.held.hold(place, Holder::Others(at), counts, events);
        }
    }

    fn release_others(&mut self, last: Option<Place>, blocks: usize, at: At, events: &mut Vec<KvEvent>) {
        let counts = &mut self.groups[usize::from(at.group)].counts;
        for place in self.held.leading_to(last, blocks) {
            self.held.release(place, Holder::Others(at), counts, events);
        }
    }

    /// Counts one removal of `hash`. Says whether it was stored there.
    pub(super) fn remove_one(&mut self, hash: EngineHash, at: At, events: &mut Vec<KvEvent>) -> bool {
        let Some(entry) = self.groups[usize::from(at.group)].others.get_mut(&hash) else {
            let Some(place) = self.named(hash, at.group) else { return false };
            if !self.held.runs.is_held(place, |holder| holder == Holder::Named(at)) {
                return false;
            }
            self.release_named(place, at, events);
            return true;
        };
        let times = &mut entry.stored[tier_place(at.tier)];
        let Some(left) = times.checked_sub(1) else { return false };
        *times = left;
        if left == 0 {
            let (last, blocks) = (entry.last, entry.identity.own().len());
            let is_gone = entry.stored == [0; TIERS];
            self.release_others(last, blocks, at, events);
            if is_gone {
                self.groups[usize::from(at.group)].others.remove(&hash);
                if let Some(last) = last {
                    self.held.runs.unpin(last);
                }
            }
        }
        true
    }
}
