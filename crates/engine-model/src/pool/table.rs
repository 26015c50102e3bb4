//! Block hash -> block of the pool, in eight bytes a slot.
//!
//! Open addressing with linear probing: a pool that is full takes a block's hash out for each that it puts in, and here
//! either touches one cache line. What follows a gap moves up (Knuth, The Art of Computer Programming 3, 6.4, algorithm R),
//! so nothing is left of what was removed. A slot has half of the hash; the other half is for the caller to compare.

use forebay_types::BlockHash;

/// Slots of a table that holds anything. A power of two, as all sizes are.
const SLOTS_MIN: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// The hash's last 32 bits; hashes are keyed, so these are as good as drawn.
    tag: u32,
    block: u32,
}

/// Of a slot that is free.
const NONE: u32 = u32::MAX;
const FREE: Slot = Slot { tag: 0, block: NONE };

/// Which block has which content.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    len: usize,
}

impl Table {
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.slots.len() as u64) >> 32) as usize
    }

    fn after(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }

    /// Slots from the home of `hash` to the first that is free.
    fn probe(&self, hash: BlockHash) -> impl Iterator<Item = usize> + '_ {
        let first = (!self.slots.is_empty()).then(|| self.home(hash.0 as u32));
        std::iter::successors(first, |&slot| Some(self.after(slot)))
            .take_while(|&slot| self.slots[slot].block != NONE)
    }

    /// The first block under `hash` that `is_it` accepts.
    pub(super) fn get(&self, hash: BlockHash, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut candidates = self.probe(hash).map(|slot| self.slots[slot]);
        candidates.find(|slot| slot.tag == hash.0 as u32 && is_it(slot.block)).map(|slot| slot.block)
    }

    /// Adds `block`, which is not there.
    pub(super) fn insert(&mut self, hash: BlockHash, block: u32) {
        if (self.len + 1) * 4 > self.slots.len() * 3 {
            let slots = vec![FREE; (2 * self.slots.len()).max(SLOTS_MIN)];
            let before = std::mem::replace(&mut self.slots, slots);
            before.into_iter().filter(|slot| slot.block != NONE).for_each(|slot| self.put(slot));
        }
        self.put(Slot { tag: hash.0 as u32, block });
        self.len += 1;
    }

    fn put(&mut self, new: Slot) {
        let mut slot = self.home(new.tag);
        while self.slots[slot].block != NONE {
            slot = self.after(slot);
        }
        self.slots[slot] = new;
    }

    /// Takes `block` out, which is there under `hash`.
    pub(super) fn remove(&mut self, hash: BlockHash, block: u32) {
        let Some(mut gap) = self.probe(hash).find(|&slot| self.slots[slot].block == block) else { return };
        let (mask, mut slot) = (self.slots.len() - 1, gap);
        loop {
            slot = self.after(slot);
            let moving = self.slots[slot];
            if moving.block == NONE {
                break;
            }
            // Not to before its home.
            let from_home = slot.wrapping_sub(self.home(moving.tag)) & mask;
            if from_home >= slot.wrapping_sub(gap) & mask {
                self.slots[gap] = moving;
                gap = slot;
            }
        }
        self.slots[gap] = FREE;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few first bits, so that many share a home, and homes at the end run over into the beginning.
        #[test]
        fn what_was_put_in_is_found_until_it_is_taken_out(
            steps in prop::collection::vec((0..400_u32, any::<bool>()), 1..2000),
            homes in 1..40_u32,
        ) {
            let hash = |block: u32| BlockHash(u64::from(block) << 32 | u64::from(u32::MAX - block % homes));
            let (mut table, mut model) = (Table::default(), HashMap::new());
            for (block, inserts) in steps {
                if inserts && !model.contains_key(&block) {
                    table.insert(hash(block), block);
                    model.insert(block, hash(block));
                } else if !inserts && model.remove(&block).is_some() {
                    table.remove(hash(block), block);
                }
                prop_assert_eq!(table.len, model.len());
            }
            for block in 0..400 {
                let found = table.get(hash(block), |other| hash(other) == hash(block));
                prop_assert_eq!(found, model.contains_key(&block).then_some(block));
            }
        }
    }
}
