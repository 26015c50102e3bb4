//! Block hash -> holders: open addressing with linear probing, within a budget of bytes.
//!
//! Invariants: a slot whose holders are empty is free; every key is reachable from its home without passing a free slot
//! (deletion shifts back, so there are no tombstones and memory is exactly slots x 24 bytes plus the holders' bitmaps);
//! memory is within the budget given to `insert`, except while a resize copies.

use forebay_types::BlockHash;

use crate::holders::Holders;

#[derive(Debug, Clone, Default)]
struct Slot {
    hash: u64,
    holders: Holders,
}

const _: () = assert!(size_of::<Slot>() == 24, "the documented size");

/// Fewer slots are not worth resizing for.
const SLOTS_MIN: usize = 64;

/// What became of an insertion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// The rank did not hold the block.
    New,
    /// It did.
    Already,
    /// Keeping it would exceed the budget.
    NoRoom,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    slots: Vec<Slot>,
    len: usize,
    heap_bytes: usize,
}

impl Table {
    /// Distinct blocks.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Slot>() * self.slots.len() + self.heap_bytes
    }

    pub(crate) fn get(&self, hash: BlockHash) -> Option<&Holders> {
        self.find(hash).ok().map(|index| &self.slots[index].holders)
    }

    /// Records that rank slot `rank` holds `hash`, if that fits into `bytes_max`.
    pub(crate) fn insert(&mut self, hash: BlockHash, rank: u16, bytes_max: usize) -> Inserted {
        let found = self.find(hash);
        let holders = found.ok().map(|index| &self.slots[index].holders);
        let (more, is_new) = match holders {
            Some(holders) => (holders.heap_bytes_with(rank) - holders.heap_bytes(), false),
            None => (Holders::default().heap_bytes_with(rank), true),
        };
        let bytes_max = bytes_max.saturating_sub(more);
        if is_new && !self.make_room(bytes_max) || self.bytes() > bytes_max {
            return Inserted::NoRoom;
        }
        // A resize moved everything.
        let index = if is_new { self.find(hash) } else { found }.unwrap_or_else(|free| {
            self.len += 1;
            self.slots[free].hash = hash.0;
            free
        });
        let changed = self.slots[index].holders.insert(rank);
        self.heap_bytes = self.heap_bytes - changed.heap_bytes.0 + changed.heap_bytes.1;
        if changed.changed { Inserted::New } else { Inserted::Already }
    }

    /// Forgets that rank slot `rank` holds `hash`; says whether it did.
    pub(crate) fn remove(&mut self, hash: BlockHash, rank: u16) -> bool {
        let Ok(index) = self.find(hash) else {
            return false;
        };
        let removed = self.remove_at(index, rank);
        self.shrink();
        removed
    }

    /// Forgets all that rank slot `rank` holds. Walks the table.
    pub(crate) fn remove_rank(&mut self, rank: u16) {
        for index in 0..self.slots.len() {
            // Deleting shifts another block to this index, which then has its turn. None is missed: blocks only ever
            // move towards `index`, and those that wrap around the end come from the part already walked.
            while self.slots[index].holders.contains(rank) {
                self.remove_at(index, rank);
            }
        }
        self.shrink();
    }

    fn remove_at(&mut self, index: usize, rank: u16) -> bool {
        let holders = &mut self.slots[index].holders;
        let changed = holders.remove(rank);
        self.heap_bytes = self.heap_bytes - changed.heap_bytes.0 + changed.heap_bytes.1;
        if holders.is_empty() {
            self.len -= 1;
            self.close_gap(index);
        }
        changed.changed
    }

    /// Moves later blocks of the same run back over the free slot at `free`, so that none loses its way home.
    fn close_gap(&mut self, mut free: usize) {
        let slots = self.slots.len();
        let distance = |from: usize, to: usize| if to >= from { to - from } else { to + slots - from };
        let mut next = free;
        loop {
            next = self.after(next);
            if self.slots[next].holders.is_empty() {
                return;
            }
            let home = self.home(self.slots[next].hash);
            if distance(home, free) < distance(home, next) {
                self.slots.swap(free, next);
                free = next;
            }
        }
    }

    /// Grows so that one more block fits. False if the budget forbids it.
    fn make_room(&mut self, bytes_max: usize) -> bool {
        let fits = |slots: usize| (self.len + 1) * 5 <= slots * 4;
        if fits(self.slots.len()) {
            return true;
        }
        let affordable = bytes_max.saturating_sub(self.heap_bytes) / size_of::<Slot>();
        let slots = (self.slots.len() * 3 / 2).max(SLOTS_MIN).min(affordable);
        // A resize copies everything: not for less than an eighth more, or the last slots before the budget would cost
        // one each.
        if slots < self.slots.len() + self.slots.len() / 8 || !fits(slots) {
            return false;
        }
        self.resize(slots);
        true
    }

    /// Gives memory back when four fifths of it are unused. Leaves room to grow, so that it does not alternate.
    fn shrink(&mut self) {
        if self.slots.len() > SLOTS_MIN && self.len * 5 < self.slots.len() {
            self.resize((self.len * 2).max(SLOTS_MIN));
        }
    }

    fn resize(&mut self, slots: usize) {
        let mut fresh = Vec::new();
        fresh.resize_with(slots, Slot::default);
        for slot in std::mem::replace(&mut self.slots, fresh) {
            if !slot.holders.is_empty()
                && let Err(free) = self.find(BlockHash(slot.hash))
            {
                self.slots[free] = slot;
            }
        }
    }

    /// The slot that has `hash`, or else the free one where it would go. `Err(0)` while there are no slots.
    fn find(&self, hash: BlockHash) -> Result<usize, usize> {
        if self.slots.is_empty() {
            return Err(0);
        }
        let mut index = self.home(hash.0);
        loop {
            let slot = &self.slots[index];
            if slot.holders.is_empty() {
                return Err(index);
            }
            if slot.hash == hash.0 {
                return Ok(index);
            }
            index = self.after(index);
        }
    }

    fn after(&self, index: usize) -> usize {
        if index + 1 == self.slots.len() { 0 } else { index + 1 }
    }

    /// Where `hash` would be if nothing were in its way. Block hashes are uniform; the multiplication is for test data
    /// and for drivers that number blocks instead of hashing them.
    fn home(&self, hash: u64) -> usize {
        let mixed = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mixed) * self.slots.len() as u128) >> 64) as usize
    }
}
