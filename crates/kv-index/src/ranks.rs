//! The ranks of an index: small numbers for their ids, and how far their events were followed.

use std::collections::BTreeMap;

use forebay_types::RankId;

/// What the index knows of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankStats {
    /// Number of the next batch expected.
    pub sequence_next: u64,
    /// Blocks recorded.
    pub blocks: u64,
    /// Events were lost: it counts as empty until a snapshot resets it.
    pub stale: bool,
}

/// One rank, under its slot.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) id: RankId,
    pub(crate) stats: RankStats,
}

#[derive(Debug, Default)]
pub(crate) struct Ranks {
    by_id: BTreeMap<RankId, u16>,
    slots: Vec<Option<Rank>>,
}

impl Ranks {
    pub(crate) fn find(&self, id: RankId) -> Option<u16> {
        self.by_id.get(&id).copied()
    }

    /// The slot of `id`, taken if it has none. `None` if all `ranks_max` are taken.
    pub(crate) fn intern(&mut self, id: RankId, ranks_max: u16) -> Option<u16> {
        if let Some(slot) = self.find(id) {
            return Some(slot);
        }
        // The lowest free one keeps sets of ranks short.
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let number = u16::try_from(slot).ok().filter(|&number| number < ranks_max)?;
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(Rank { id, stats: RankStats { sequence_next: 0, blocks: 0, stale: false } });
        self.by_id.insert(id, number);
        Some(number)
    }

    pub(crate) fn free(&mut self, slot: u16) {
        if let Some(rank) = self.slots[usize::from(slot)].take() {
            self.by_id.remove(&rank.id);
        }
        while self.slots.last().is_some_and(Option::is_none) {
            self.slots.pop();
        }
        if self.slots.len() * 4 < self.slots.capacity() {
            self.slots.shrink_to_fit();
        }
    }

    pub(crate) fn get(&self, slot: u16) -> &Rank {
        self.slots[usize::from(slot)].as_ref().expect("a slot in use")
    }

    pub(crate) fn stats_mut(&mut self, slot: u16) -> &mut RankStats {
        &mut self.slots[usize::from(slot)].as_mut().expect("a slot in use").stats
    }

    /// In order of their ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Rank> {
        self.by_id.values().map(|&slot| self.get(slot))
    }

    /// One more than the highest slot in use.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// An estimate for the tree: about two words a node entry.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Option<Rank>>() + self.by_id.len() * size_of::<(RankId, u16, u64)>()
    }
}
