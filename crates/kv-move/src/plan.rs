//! Copy plans: which blocks go where.
//!
//! In: a source, a destination and pairs of blocks. Out: a validated [`CopyPlan`] whose pairs are merged into the fewest
//! contiguous pieces. Start at [`CopyPlan::new`].
//!
//! Invariants of a plan: block sizes equal, every index in range, the destination writable, no destination block
//! twice, and none that is also read. So the order of copying cannot change the result, and back ends need not check.

use crate::region::{Layout, Region, RegionKey};

/// One block's content: the index alone says only where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Index in its region.
    pub block: u32,
    /// Which content of the block is meant.
    pub generation: u64,
}

/// One block to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockPair {
    /// Read from here.
    pub source: BlockRef,
    /// Written to here. Its generation is the one that its owner published for this transfer: if the block was given to
    /// someone else meanwhile, nothing is written.
    pub destination: BlockRef,
}

/// Where blocks are read from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A pool that this process has mapped.
    Mapped(Region),
    /// A pool that only some back ends can reach.
    Remote {
        /// Which.
        key: RegionKey,
        /// What its owner said of its size.
        layout: Layout,
    },
}

impl Source {
    /// Identity of the pool.
    pub fn key(&self) -> RegionKey {
        match self {
            Source::Mapped(region) => region.key(),
            Source::Remote { key, .. } => *key,
        }
    }

    /// Size of the pool.
    pub fn layout(&self) -> Layout {
        match self {
            Source::Mapped(region) => region.layout(),
            Source::Remote { layout, .. } => *layout,
        }
    }
}

impl From<Region> for Source {
    fn from(region: Region) -> Self {
        Source::Mapped(region)
    }
}

/// A run of blocks that is contiguous on both sides: one copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First block in the source.
    pub source: u32,
    /// First block in the destination.
    pub destination: u32,
    /// Length.
    pub blocks: u32,
    /// Where its pairs begin in `CopyPlan::ordered`.
    first_pair: usize,
}

/// Why blocks cannot be copied so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A block of one pool is not a block of the other. (The number of blocks may differ.)
    #[error(
        "blocks of {source_bytes} bytes cannot go into a pool with blocks of {destination_bytes}: place both legs on engines of one KV layout"
    )]
    BlockSize {
        /// Of the source.
        source_bytes: u64,
        /// Of the destination.
        destination_bytes: u64,
    },
    /// An index beyond the source.
    #[error("source block {block} is not in a pool of {blocks} blocks: the reference is not from this pool")]
    SourceRange {
        /// The index.
        block: u32,
        /// Size of the pool.
        blocks: u32,
    },
    /// An index beyond the destination.
    #[error(
        "destination block {block} is not in a pool of {blocks} blocks: the reference is not from this pool"
    )]
    DestinationRange {
        /// The index.
        block: u32,
        /// Size of the pool.
        blocks: u32,
    },
    /// Two blocks for one place.
    #[error("destination block {block} is named twice: give each block a place of its own")]
    DestinationTwice {
        /// The index.
        block: u32,
    },
    /// Within one pool, a block that is read and written.
    #[error("block {block} is both source and destination of one plan: copy in two plans")]
    Overlap {
        /// The index.
        block: u32,
    },
    /// Only the process that made a region writes it.
    #[error("the destination pool was opened for reading: its owner must do the copying")]
    ReadOnly,
}

/// What to copy: validated, merged, immutable.
#[derive(Debug, Clone)]
pub struct CopyPlan {
    source: Source,
    destination: Region,
    pairs: Vec<BlockPair>,
    /// The pairs by destination block.
    ordered: Vec<BlockPair>,
    pieces: Vec<Piece>,
}

impl CopyPlan {
    /// Checks and merges. O(pairs · log pairs), near linear if the destination blocks come in order.
    ///
    /// # Errors
    /// A [`PlanError`] for the first thing that is wrong; no pairs at all is a valid plan.
    pub fn new(
        source: impl Into<Source>,
        destination: Region,
        pairs: Vec<BlockPair>,
    ) -> Result<Self, PlanError> {
        let source = source.into();
        let (from, to) = (source.layout(), destination.layout());
        if from.block_bytes != to.block_bytes {
            return Err(PlanError::BlockSize {
                source_bytes: from.block_bytes,
                destination_bytes: to.block_bytes,
            });
        }
        if !destination.is_writable() {
            return Err(PlanError::ReadOnly);
        }
        for BlockPair { source, destination } in &pairs {
            if source.block >= from.blocks {
                return Err(PlanError::SourceRange { block: source.block, blocks: from.blocks });
            }
            if destination.block >= to.blocks {
                return Err(PlanError::DestinationRange { block: destination.block, blocks: to.blocks });
            }
        }
        let mut ordered = pairs.clone();
        ordered.sort_unstable_by_key(|pair| pair.destination.block);
        if let Some(two) = ordered.windows(2).find(|two| two[0].destination.block == two[1].destination.block)
        {
            return Err(PlanError::DestinationTwice { block: two[0].destination.block });
        }
        if source.key() == destination.key() {
            let written =
                |block: u32| ordered.binary_search_by_key(&block, |pair| pair.destination.block).is_ok();
            if let Some(pair) = pairs.iter().find(|pair| written(pair.source.block)) {
                return Err(PlanError::Overlap { block: pair.source.block });
            }
        }
        let pieces = merge(&ordered);
        Ok(Self { source, destination, pairs, ordered, pieces })
    }

    /// Where blocks are read.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Where blocks are written.
    pub fn destination(&self) -> &Region {
        &self.destination
    }

    /// The pairs as they were given.
    pub fn pairs(&self) -> &[BlockPair] {
        &self.pairs
    }

    /// The copies to make, by destination: as few as the blocks allow.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pairs that a piece was merged from, in the piece's order.
    ///
    /// # Panics
    /// If the piece is another plan's.
    pub fn piece_pairs(&self, piece: Piece) -> &[BlockPair] {
        &self.ordered[piece.first_pair..][..piece.blocks as usize]
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        // Destination blocks are distinct, so there are no more than a region has.
        self.pairs.len() as u32
    }

    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.pairs.len() as u64 * self.destination.layout().block_bytes
    }
}

/// The fewest pieces: two pairs belong together iff both of their blocks are neighbours in the same order, and pairs
/// sorted by (distinct) destination have all such pairs side by side.
fn merge(ordered: &[BlockPair]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, pair) in ordered.iter().enumerate() {
        let (source, destination) = (pair.source.block, pair.destination.block);
        match pieces.last_mut() {
            // By distance, which cannot overflow where `last.source + last.blocks` could.
            Some(last)
                if destination - last.destination == last.blocks
                    && source.checked_sub(last.source) == Some(last.blocks) =>
            {
                last.blocks += 1;
            }
            _ => pieces.push(Piece { source, destination, blocks: 1, first_pair: index }),
        }
    }
    pieces
}

#[cfg(test)]
mod tests;
