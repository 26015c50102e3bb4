//! Safe access to a region's words for the process that made it: what an engine without tensors computes on.

use std::sync::atomic::Ordering::Relaxed;

use crate::region::Region;

impl Region {
    /// Word `index` of a block.
    ///
    /// # Panics
    /// If there is no such block or word. So do the others.
    pub fn word(&self, block: u32, index: usize) -> u64 {
        self.words(block, 1)[index].load(Relaxed)
    }

    /// Sets word `index` of a block. Publish the generation first.
    pub fn set_word(&self, block: u32, index: usize, value: u64) {
        self.assert_writable();
        self.words(block, 1)[index].store(value, Relaxed);
    }

    /// Copies one whole block to another of the same region. Publish the target's generation first.
    pub fn copy_block(&self, from: u32, to: u32) {
        self.assert_writable();
        for (source, target) in self.words(from, 1).iter().zip(self.words(to, 1)) {
            target.store(source.load(Relaxed), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::conformance::{clear, holds, is_clear, small};

    #[test]
    fn a_copied_block_is_whole_and_its_neighbours_are_left_alone() {
        let (region, _) = small();
        (3..6).for_each(|block| clear(&region, block));
        region.copy_block(1, 4);
        assert!(holds(&region, 4, 1, 101) && is_clear(&region, 3) && is_clear(&region, 5));
        region.set_word(4, 23, 7);
        assert_eq!(region.word(4, 23), 7);
        assert!(is_clear(&region, 5));
    }

    #[test]
    #[should_panic(expected = "opened for reading")]
    fn only_the_creator_sets_words() {
        let fd = small().0.fd().try_clone_to_owned().unwrap();
        crate::Region::open(fd).unwrap().set_word(0, 0, 1);
    }
}
