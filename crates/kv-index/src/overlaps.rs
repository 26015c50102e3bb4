//! The answer of a look-up.

use forebay_types::{Incarnation, RankId};

use crate::notes::Notes;

/// How many leading blocks of one chain each rank can reuse; ranks with none are left out. Owned by the caller and reused, so
/// that a look-up allocates nothing.
#[derive(Debug, Clone, Default)]
pub struct Overlaps {
    /// The first `len` are the answer; those after it are of earlier ones, kept so that nothing is filled twice.
    pub(crate) found: Vec<(RankId, u32)>,
    pub(crate) len: usize,
    /// Ranks that also hold blocks elsewhere than on their device.
    pub(crate) tiers: Vec<(RankId, TierBlocks)>,
    pub(crate) scratch: Scratch,
}

/// What a look-up notes on its way: a sparse set, which is emptied without a walk. A slot's rank is listed at
/// `place[slot]` if that is below the answer's length and the rank is listed there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scratch {
    /// By slot.
    pub(crate) place: Vec<u16>,
    /// What is noted of ranks that have more than full attention on a device.
    pub(crate) notes: Notes,
}

/// Leading blocks that a rank can reuse, by how far away it may have to fetch them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierBlocks {
    /// All of them on the device.
    pub device: u32,
    /// Each on the device or in host memory.
    pub host: u32,
    /// Each there or on disk.
    pub disk: u32,
    /// Each anywhere.
    pub remote: u32,
}

impl From<[u32; 4]> for TierBlocks {
    fn from([device, host, disk, remote]: [u32; 4]) -> Self {
        Self { device, host, disk, remote }
    }
}

impl Overlaps {
    /// Blocks that `rank` can reuse from its device; 0 for a rank that is not listed. O(ranks listed).
    pub fn get(&self, rank: RankId) -> u32 {
        self.as_slice().iter().find(|(listed, _)| *listed == rank).map_or(0, |&(_, blocks)| blocks)
    }

    /// Blocks that `rank` can reuse by tier. O(ranks listed).
    pub fn tiers(&self, rank: RankId) -> TierBlocks {
        let listed = self.tiers.iter().find(|(listed, _)| *listed == rank);
        listed.map_or_else(|| TierBlocks::from([self.get(rank); 4]), |&(_, blocks)| blocks)
    }

    /// Those ranks that hold blocks of the chain elsewhere than on their device. Some may hold none there and are not
    /// among [`iter`](Self::iter).
    pub fn iter_tiers(&self) -> impl Iterator<Item = (RankId, TierBlocks)> + '_ {
        self.tiers.iter().copied()
    }

    /// Every rank that can reuse something from its device. In no order that means anything, but the same for the
    /// same calls.
    pub fn iter(&self) -> impl Iterator<Item = (RankId, u32)> + '_ {
        self.as_slice().iter().copied()
    }

    /// What [`iter`](Self::iter) goes through.
    pub fn as_slice(&self) -> &[(RankId, u32)] {
        &self.found[..self.len]
    }

    /// Lists more ranks: what another index knows of them.
    pub fn extend(&mut self, more: impl IntoIterator<Item = (RankId, u32)>) {
        self.found.truncate(self.len);
        self.found.extend(more);
        self.len = self.found.len();
    }

    /// Makes room for `ranks` answers and for slots up to `slots`.
    #[inline]
    pub(crate) fn reserve(&mut self, ranks: usize, slots: usize) {
        let place = &mut self.scratch.place;
        if self.found.len() < ranks {
            let nobody = RankId { incarnation: Incarnation(0), dp_rank: 0 };
            self.found.resize(ranks, (nobody, 0));
        }
        if place.len() < slots {
            place.resize(slots, 0);
        }
    }

    /// Forgets the last answer.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.tiers.clear();
        self.scratch.notes.clear();
    }
}
