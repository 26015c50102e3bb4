//! Blocks and what each follows, joined into chains.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use forebay_types::BlockHash;

/// By block hash. They are keyed already: what spreads them over a table is in them.
type BlockMap<T> = HashMap<BlockHash, T, BuildHasherDefault<AsItIs>>;

/// See [`BlockMap`].
#[derive(Debug, Default, Clone, Copy)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a block hash is one word")
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

/// Blocks in a row, each of which follows the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// What the first one follows; `None` if it begins a prompt.
    pub parent: Option<BlockHash>,
    /// At least one.
    pub hashes: Vec<BlockHash>,
}

/// Joins blocks, each with what it follows, into runs: every block once, and a run after the one that it branches off.
/// A parent need not be among the blocks. O(blocks); deterministic for the same blocks in the same order.
pub fn join(blocks: impl IntoIterator<Item = (BlockHash, Option<BlockHash>)>) -> Vec<Run> {
    let mut order = Vec::new();
    let mut parents: BlockMap<Option<BlockHash>> = BlockMap::default();
    for (block, parent) in blocks {
        // One that follows itself follows nothing that is known.
        let parent = parent.filter(|parent| *parent != block);
        if parents.insert(block, parent).is_none() {
            order.push(block);
        }
    }
    // One of those that follow each block; the others branch off.
    let mut next: BlockMap<BlockHash> = BlockMap::with_capacity_and_hasher(order.len(), Default::default());
    let mut branches: BlockMap<Vec<BlockHash>> = BlockMap::default();
    let mut starts = Vec::new();
    for &block in &order {
        match parents[&block].filter(|parent| parents.contains_key(parent)) {
            None => starts.push(block),
            Some(parent) => match next.entry(parent) {
                std::collections::hash_map::Entry::Vacant(vacant) => drop(vacant.insert(block)),
                std::collections::hash_map::Entry::Occupied(_) => {
                    branches.entry(parent).or_default().push(block);
                }
            },
        }
    }
    let mut runs = Vec::new();
    let mut joined = 0;
    let mut rest = order.iter();
    while joined < order.len() {
        // Blocks that follow each other in a ring, which no honest hash does, have no start.
        let start = starts.pop().or_else(|| rest.find(|block| parents.contains_key(block)).copied());
        let Some(start) = start.filter(|start| parents.contains_key(start)) else { continue };
        let mut run = Run { parent: parents[&start], hashes: Vec::new() };
        let mut at = Some(start);
        while let Some(block) = at.filter(|block| parents.remove(block).is_some()) {
            run.hashes.push(block);
            starts.extend(branches.remove(&block).unwrap_or_default());
            at = next.get(&block).copied();
        }
        joined += run.hashes.len();
        runs.push(run);
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn runs(blocks: &[(u64, Option<u64>)]) -> Vec<(Option<u64>, Vec<u64>)> {
        let runs = join(blocks.iter().map(|&(block, parent)| (BlockHash(block), parent.map(BlockHash))));
        let numbers = |hashes: Vec<BlockHash>| hashes.into_iter().map(|hash| hash.0).collect();
        runs.into_iter().map(|run| (run.parent.map(|hash| hash.0), numbers(run.hashes))).collect()
    }

    #[test]
    fn chains_lie_together_and_branches_come_after() {
        let blocks = [(3, Some(2)), (1, None), (2, Some(1)), (12, Some(1)), (7, Some(6)), (13, Some(12))];
        assert_eq!(runs(&blocks), [(Some(6), vec![7]), (None, vec![1, 2, 3]), (Some(1), vec![12, 13])]);
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[(1, Some(1)), (1, Some(1))]), [(None, vec![1])]);
        let ring = runs(&[(1, Some(2)), (2, Some(1))]);
        assert_eq!(ring.len(), 1, "{ring:?}");
    }

    proptest! {
        #[test]
        fn every_block_is_there_once_after_its_parent(
            blocks in prop::collection::vec((0u64..40, prop::option::of(0u64..40)), 0..60),
        ) {
            let truth: BTreeMap<u64, Option<u64>> = blocks.iter().copied().collect();
            let mut seen = BTreeSet::new();
            for (parent, hashes) in runs(&blocks) {
                let mut before = parent;
                for hash in hashes {
                    prop_assert_eq!(before, truth[&hash].filter(|parent| *parent != hash));
                    prop_assert!(seen.insert(hash), "{} twice", hash);
                    before = Some(hash);
                }
            }
            prop_assert_eq!(seen.len(), truth.len());
            // Without rings a parent that is there comes first.
            let honest: Vec<_> = blocks.iter().map(|&(block, parent)| (block, parent.filter(|p| *p < block))).collect();
            let mut seen = BTreeSet::new();
            let truth: BTreeMap<u64, Option<u64>> = honest.iter().copied().collect();
            for (parent, hashes) in runs(&honest) {
                prop_assert!(parent.is_none_or(|parent| !truth.contains_key(&parent) || seen.contains(&parent)));
                seen.extend(hashes);
            }
        }
    }
}
