//! The answer of a look-up.

use forebay_types::RankId;

/// How many leading blocks of one chain each rank holds: ranks in order of their ids, ranks with none left out. Owned by
/// the caller and reused, so that a look-up allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overlaps(pub Vec<(RankId, u32)>);

impl Overlaps {
    /// Blocks that `rank` holds; 0 for a rank that is not listed.
    pub fn get(&self, rank: RankId) -> u32 {
        self.0.binary_search_by_key(&rank, |&(listed, _)| listed).map_or(0, |index| self.0[index].1)
    }

    /// Every rank that holds at least the first block.
    pub fn iter(&self) -> impl Iterator<Item = (RankId, u32)> + '_ {
        self.0.iter().copied()
    }
}
