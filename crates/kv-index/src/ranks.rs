//! The ranks of an index: slots for their ids, and how far their events were followed.
//!
//! A slot stands for a rank in masks' keys. A rank that is cleared or leaves gives its slot up at once and with it all that
//! it held; the slot is used again when nothing in the index names it and no reader can have seen it.

use std::{collections::BTreeMap, num::NonZeroU32};

use forebay_types::{Incarnation, KvGroup, RankId};

use crate::{
    reclaim::{Heap, Pinned, WriterKey, follow},
    segment::{Holder, Plane},
    sync::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// What the index knows of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankStats {
    /// Number of the next batch expected.
    pub sequence_next: u64,
    /// Blocks recorded on its device.
    pub blocks: u64,
    /// Events were lost: it counts as empty until a snapshot resets it.
    pub stale: bool,
}

/// Slots there can be: those of ranks, and those that are being given up.
pub(crate) const SLOTS_MAX: usize = 1 << 16;

const IN_USE: u64 = 1 << 16;
/// Look-ups note what it holds and sum it up at the end: it has, or had, blocks elsewhere than on its device, or it has
/// groups of layers that need different things of a prefix.
const NOTED: u64 = 1 << 17;
/// No group of its needs a prefix from its beginning on.
const GAPPED: u64 = 1 << 18;
/// It has said of what groups its layers are: what one of them holds is no answer.
const GROUPED: u64 = 1 << 19;

/// What readers see of the ranks: a link to a block with two words a slot, the incarnation, and the DP rank with
/// flags such as [`IN_USE`]. The first pair is the block's length, and how many slots are noted.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    link: AtomicU64,
    /// A block with a link for each slot to the block of its groups, where it has said any. One word of that block is one group.
    groups: AtomicU64,
    /// How often a slot was given up.
    given_up: AtomicU64,
    /// Slots that are gapped.
    gapped: AtomicU64,
}

/// The slots, as they are while a look-up runs: the first pair, and those of slots.
#[derive(Clone, Copy)]
pub(crate) struct SlotsRead<'a>(Option<(&'a [AtomicU64; 2], &'a [[AtomicU64; 2]])>, &'a [AtomicU64]);

impl Slots {
    #[inline]
    pub(crate) fn read<'a>(&self, pinned: &'a impl Pinned) -> SlotsRead<'a> {
        let slots = follow(&self.link, pinned).and_then(|words| words.as_chunks().0.split_first());
        SlotsRead(slots, follow(&self.groups, pinned).unwrap_or_default())
    }

    /// Whether any rank may have what follows a prefix without having its beginning.
    pub(crate) fn any_gapped(&self) -> bool {
        self.gapped.load(SeqCst) > 0
    }

    /// Changes whenever a rank gives up its slot: a look-up that meets two values may have met a rank in two slots.
    #[inline]
    pub(crate) fn given_up(&self) -> u64 {
        self.given_up.load(SeqCst)
    }
}

impl<'a> SlotsRead<'a> {
    #[inline]
    fn pair(self, slot: u16) -> Option<&'a [AtomicU64; 2]> {
        self.0?.1.get(usize::from(slot))
    }

    /// Whose slot it is; `None` if it was given up.
    #[inline]
    pub(crate) fn rank(self, slot: u16) -> Option<RankId> {
        let [incarnation, rank] = self.pair(slot)?;
        let rank = rank.load(SeqCst);
        let incarnation = Incarnation(incarnation.load(Relaxed));
        (rank & IN_USE != 0).then_some(RankId { incarnation, dp_rank: rank as u16 })
    }

    /// The same, unless the rank has groups of layers.
    #[inline]
    pub(crate) fn ungrouped(self, slot: u16) -> Option<RankId> {
        let [incarnation, rank] = self.pair(slot)?;
        let rank = rank.load(SeqCst);
        let incarnation = Incarnation(incarnation.load(Relaxed));
        (rank & (IN_USE | GROUPED) == IN_USE).then_some(RankId { incarnation, dp_rank: rank as u16 })
    }

    /// Whether what the rank holds is noted and summed at the end.
    pub(crate) fn is_noted(self, slot: u16) -> bool {
        self.pair(slot).is_some_and(|[_, rank]| rank.load(SeqCst) & NOTED != 0)
    }

    /// Whether any rank's is.
    #[inline]
    pub(crate) fn any_noted(self) -> bool {
        self.0.is_some_and(|([_, noted], _)| noted.load(SeqCst) > 0)
    }

    /// The rank's groups, if it has said any.
    pub(crate) fn groups(
        self,
        slot: u16,
        pinned: &'a impl Pinned,
    ) -> Option<impl ExactSizeIterator<Item = KvGroup> + 'a> {
        let words = follow(self.1.get(1 + usize::from(slot))?, pinned)?;
        Some(words[1..].iter().map(|word| group_from_word(word.load(Relaxed))))
    }

    /// One more than the highest slot there is.
    #[inline]
    pub(crate) fn len(self) -> usize {
        self.0.map_or(0, |(_, slots)| slots.len())
    }
}

/// One rank, under its id.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) slot: u16,
    pub(crate) sequence_next: u64,
    pub(crate) stale: bool,
}

/// What is recorded under one slot.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    /// Blocks on the device.
    device: u64,
    /// Pairs of a block and a plane, those on the device among them.
    all: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Ranks {
    by_id: BTreeMap<RankId, Rank>,
    held: Vec<Held>,
    free: Vec<u16>,
    /// Given up, and not yet taken out of the index.
    leaving: Vec<u16>,
}

impl Ranks {
    pub(crate) fn find(&self, id: RankId) -> Option<&Rank> {
        self.by_id.get(&id)
    }

    pub(crate) fn find_mut(&mut self, id: RankId) -> Option<&mut Rank> {
        self.by_id.get_mut(&id)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn stats(&self, rank: &Rank) -> RankStats {
        RankStats {
            sequence_next: rank.sequence_next,
            blocks: self.held[usize::from(rank.slot)].device,
            stale: rank.stale,
        }
    }

    /// In order of their ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RankId, &Rank)> {
        self.by_id.iter().map(|(&id, rank)| (id, rank))
    }

    /// Those with ids from `first` to `last`.
    pub(crate) fn between(&self, first: RankId, last: RankId) -> Vec<RankId> {
        self.by_id.range(first..=last).map(|(&id, _)| id).collect()
    }

    /// Makes `id` known; a rank that is known already stays as it is. False if there is no slot.
    pub(crate) fn add(&mut self, id: RankId, slots: &Slots, heap: &mut Heap, key: &WriterKey) -> bool {
        if self.by_id.contains_key(&id) {
            return true;
        }
        let Some(slot) = self.take_slot(id, slots, heap, key) else { return false };
        self.by_id.insert(id, Rank { slot, sequence_next: 0, stale: false });
        true
    }

    /// Whether any slot is given up and still named in the index.
    pub(crate) fn leaving(&self) -> &[u16] {
        &self.leaving
    }

    /// Says which groups the rank of a slot has; none for what all have that say nothing.
    pub(crate) fn set_groups(
        &self,
        slot: u16,
        groups: &[KvGroup],
        slots: &Slots,
        heap: &mut Heap,
        key: &WriterKey,
    ) {
        let is_plain = groups.is_empty() || groups == [KvGroup::FULL];
        let at = 1 + usize::from(slot);
        let links = follow(&slots.groups, key).unwrap_or_default();
        if is_plain && links.get(at).is_none_or(|link| link.load(Relaxed) == 0) {
            return;
        }
        if at >= links.len() {
            let block = heap.alloc(1 + (at + 1).next_power_of_two().max(8), 0);
            for (to, from) in block.words().iter().zip(links).skip(1) {
                to.store(from.load(Relaxed), Relaxed);
            }
            heap.relink(&slots.groups, Some(block));
        }
        let block = (!is_plain).then(|| {
            let block = heap.alloc(1 + groups.len(), 0);
            for (word, group) in block.words()[1..].iter().zip(groups) {
                word.store(group_to_word(*group), Relaxed);
            }
            block
        });
        heap.relink(&follow(&slots.groups, key).expect("made above")[at], block);
        let is_gapped = !is_plain && groups.iter().all(|group| group.window_blocks.is_some());
        let read = slots.read(key);
        let (Some([_, rank]), Some(([_, noted], _))) = (read.pair(slot), read.0) else { return };
        let was = rank.load(Relaxed);
        let flags = match (is_plain, is_gapped) {
            (true, _) => was & NOTED,
            (false, true) => NOTED | GROUPED | GAPPED,
            (false, false) => NOTED | GROUPED,
        };
        // Counts are above 0 whenever a flag can be seen, and the flags change at once: a look-up that found the rank
        // without groups was before one that found it with them.
        noted.fetch_add(u64::from(flags & !was & NOTED != 0), SeqCst);
        slots.gapped.fetch_add(u64::from(flags & !was & GAPPED != 0), SeqCst);
        rank.store(was & !(NOTED | GROUPED | GAPPED) | flags, SeqCst);
        slots.gapped.fetch_sub(u64::from(was & !flags & GAPPED != 0), SeqCst);
    }

    fn take_slot(&mut self, id: RankId, slots: &Slots, heap: &mut Heap, key: &WriterKey) -> Option<u16> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.held.len() < SLOTS_MAX => {
                self.held.push(Held::default());
                (self.held.len() - 1) as u16
            }
            None => return None,
        };
        if usize::from(slot) >= slots.read(key).len() {
            let block = heap.alloc(2 + 2 * (usize::from(slot) + 1).next_power_of_two().max(8), 0);
            let old = follow(&slots.link, key).unwrap_or_default();
            for (to, from) in block.words().iter().zip(old).skip(1) {
                to.store(from.load(Relaxed), Relaxed);
            }
            heap.relink(&slots.link, Some(block));
        }
        let [incarnation, rank] = slots.read(key).pair(slot).expect("made above");
        incarnation.store(id.incarnation.0, Relaxed);
        rank.store(u64::from(id.dp_rank) | IN_USE, SeqCst);
        // Those of its last owner.
        self.set_groups(slot, &[], slots, heap, key);
        Some(slot)
    }

    /// Unlinks what readers see: the index goes.
    pub(crate) fn clear_slots(&mut self, slots: &Slots, heap: &mut Heap, key: &WriterKey) {
        for link in follow(&slots.groups, key).unwrap_or_default().iter().skip(1) {
            heap.relink(link, None);
        }
        heap.relink(&slots.groups, None);
        heap.relink(&slots.link, None);
    }

    /// Empties a rank: what it held is of nobody from now on. Its groups stay. Takes nothing out of the index. False if
    /// that needs a slot and there is none: then nothing changed.
    ///
    /// # Panics
    /// If the rank is not known.
    pub(crate) fn clear(&mut self, id: RankId, slots: &Slots, heap: &mut Heap, key: &WriterKey) -> bool {
        let old = self.by_id[&id].slot;
        if self.held[usize::from(old)].all == 0 {
            return true;
        }
        let Some(slot) = self.take_slot(id, slots, heap, key) else { return false };
        if let Some(groups) = slots.read(key).groups(old, key).map(Iterator::collect::<Vec<_>>) {
            self.set_groups(slot, &groups, slots, heap, key);
        }
        self.give_up(old, slots, key);
        self.by_id.get_mut(&id).expect("found above").slot = slot;
        true
    }

    /// Forgets a rank.
    pub(crate) fn remove(&mut self, id: RankId, slots: &Slots, key: &WriterKey) {
        if let Some(rank) = self.by_id.remove(&id) {
            self.give_up(rank.slot, slots, key);
        }
    }

    fn give_up(&mut self, slot: u16, slots: &Slots, key: &WriterKey) {
        let read = slots.read(key);
        if let (Some([_, rank]), Some(([_, noted], _))) = (read.pair(slot), read.0) {
            let was = rank.swap(0, SeqCst);
            if was & NOTED != 0 {
                noted.fetch_sub(1, SeqCst);
            }
            if was & GAPPED != 0 {
                slots.gapped.fetch_sub(1, SeqCst);
            }
        }
        // After it says so: who reads the new count finds no rank in this slot.
        slots.given_up.fetch_add(1, SeqCst);
        self.leaving.push(slot);
    }

    /// Says that what a slot's rank holds is noted from now on.
    pub(crate) fn set_noted(&self, slot: u16, slots: &Slots, key: &WriterKey) {
        let read = slots.read(key);
        if let (Some([_, rank]), Some(([_, noted], _))) = (read.pair(slot), read.0)
            && rank.fetch_or(NOTED, SeqCst) & NOTED == 0
        {
            noted.fetch_add(1, SeqCst);
        }
    }

    /// The slots that are given up, for whoever takes them out of the index.
    pub(crate) fn take_leaving(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.leaving)
    }

    /// Nothing names the slot any more, and no reader can have seen its former owner.
    pub(crate) fn reuse(&mut self, slot: u16) {
        self.held[usize::from(slot)] = Held::default();
        self.free.push(slot);
    }

    /// `blocks` more are held, or less.
    #[inline]
    pub(crate) fn count(&mut self, holder: Holder, blocks: i64) {
        let held = &mut self.held[usize::from(holder.slot)];
        held.all = held.all.wrapping_add_signed(blocks);
        if holder.plane == Plane::DEVICE {
            held.device = held.device.wrapping_add_signed(blocks);
        }
    }

    /// Pairs of a block and a plane that ranks hold; those of ranks that left not among them.
    pub(crate) fn entries(&self) -> u64 {
        self.by_id.values().map(|rank| self.held[usize::from(rank.slot)].all).sum()
    }

    /// An estimate for the tree: about two words a node entry.
    pub(crate) fn bytes(&self) -> usize {
        self.held.capacity() * size_of::<Held>() + self.by_id.len() * size_of::<(RankId, Rank, u64)>()
    }
}

/// A group as a word: the window below, 0 for none, and the step above.
fn group_to_word(group: KvGroup) -> u64 {
    let KvGroup { window_blocks, step_blocks } = group;
    u64::from(step_blocks.get()) << 32 | window_blocks.map_or(0, |blocks| blocks.get().into())
}

fn group_from_word(word: u64) -> KvGroup {
    KvGroup {
        window_blocks: NonZeroU32::new(word as u32),
        step_blocks: NonZeroU32::new((word >> 32) as u32).unwrap_or(NonZeroU32::MIN),
    }
}
