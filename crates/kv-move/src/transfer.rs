//! One transfer over mapped regions, slice by slice: checks, copies, checks again.
//!
//! In: a plan. Out: per slice, nothing or the [`MoveError`] that ends the transfer. It takes no time and starts no thread,
//! so tests let owners act between any two of its steps; [`shm`](crate::shm) runs them in a loop.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{
    mover::{Checksum, MoveError},
    plan::{BlockPair, CopyPlan},
    region::Region,
};

/// Part of a piece: what is copied between two looks at the deadline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice<'plan> {
    /// Contiguous on both sides. Never empty.
    pairs: &'plan [BlockPair],
}

pub(crate) struct Transfer<'plan> {
    plan: &'plan CopyPlan,
    source: &'plan Region,
    checksum: Checksum,
    slice_blocks: usize,
    pieces_begun: usize,
    /// What is left of the piece at hand.
    rest: &'plan [BlockPair],
}

impl<'plan> Transfer<'plan> {
    /// Slices are as many whole blocks as fit `slice_bytes_max`, and at least one.
    pub(crate) fn new(
        plan: &'plan CopyPlan,
        source: &'plan Region,
        checksum: Checksum,
        slice_bytes_max: u64,
    ) -> Self {
        let slice_blocks =
            usize::try_from(slice_bytes_max / source.layout().block_bytes).unwrap_or(usize::MAX);
        Self { plan, source, checksum, slice_blocks: slice_blocks.max(1), pieces_begun: 0, rest: &[] }
    }

    /// The next slice to copy, `None` after the last.
    pub(crate) fn next_slice(&mut self) -> Option<Slice<'plan>> {
        if self.rest.is_empty() {
            let piece = self.plan.pieces().get(self.pieces_begun)?;
            self.pieces_begun += 1;
            self.rest = self.plan.piece_pairs(*piece);
        }
        let (pairs, rest) = self.rest.split_at(self.slice_blocks.min(self.rest.len()));
        self.rest = rest;
        Some(Slice { pairs })
    }

    /// Checks, copies, checks again.
    pub(crate) fn copy_slice(&self, slice: Slice<'_>) -> Result<(), MoveError> {
        self.copy_slice_pausing(slice, || ())
    }

    /// The same with a pause after each step but the last, in which tests let owners act.
    fn copy_slice_pausing(&self, slice: Slice<'_>, mut pause: impl FnMut()) -> Result<(), MoveError> {
        self.check_before(slice)?;
        pause();
        self.copy(slice);
        pause();
        let content = self.check_content(slice);
        pause();
        // First: a block that was rewritten meanwhile is stale, whatever its checksum looks like.
        self.check_after(slice)?;
        content
    }

    /// Nothing is read from a block that is already another's, nor written to one.
    fn check_before(&self, slice: Slice<'_>) -> Result<(), MoveError> {
        for pair in slice.pairs {
            self.compare(pair, self.source.generation(pair.source.block), |region, block| {
                region.generation(block)
            })?;
        }
        Ok(())
    }

    fn copy(&self, slice: Slice<'_>) {
        let first = slice.pairs[0];
        let blocks = slice.pairs.len() as u32;
        let source = self.source.words(first.source.block, blocks);
        copy_words(source, self.plan.destination().words(first.destination.block, blocks));
    }

    fn check_content(&self, slice: Slice<'_>) -> Result<(), MoveError> {
        if self.checksum == Checksum::Skip {
            return Ok(());
        }
        for BlockPair { source, destination } in slice.pairs {
            let block = source.block;
            let published =
                self.source.published_checksum(block).ok_or(MoveError::ChecksumMissing { block })?;
            let arrived = self.plan.destination().compute_checksum(destination.block, source.generation);
            if arrived != published {
                return Err(MoveError::ChecksumMismatch { block });
            }
        }
        Ok(())
    }

    /// What was read was not being rewritten (see the argument in [`region`](crate::region)); what was written still
    /// belongs to this transfer.
    fn check_after(&self, slice: Slice<'_>) -> Result<(), MoveError> {
        for pair in slice.pairs {
            let found = self.source.generation_after_reads(pair.source.block);
            self.compare(pair, found, |region, block| region.generation_after_reads(block))?;
        }
        Ok(())
    }

    fn compare(
        &self,
        pair: &BlockPair,
        source_found: u64,
        destination_found: impl Fn(&Region, u32) -> u64,
    ) -> Result<(), MoveError> {
        let BlockPair { source, destination } = *pair;
        if source_found != source.generation {
            return Err(MoveError::Stale {
                block: source.block,
                expected: source.generation,
                found: source_found,
            });
        }
        let found = destination_found(self.plan.destination(), destination.block);
        if found != destination.generation {
            return Err(MoveError::DestinationReallocated {
                block: destination.block,
                expected: destination.generation,
                found,
            });
        }
        Ok(())
    }
}

/// Copies word by word with relaxed atomics, so that losing a race against the source's owner is defined.
///
/// Unrolled by eight this is as fast as `memcpy` where blocks come from memory: median 10.1 against 10.2 GB/s for 2,000
/// scattered blocks of 64 KiB, 12.2 against 11.3 for 180 of 720 KiB (AMD EPYC, two processors, nine alternating
/// rounds; `examples/bandwidth.rs` repeats the comparison for the whole mover). It is slower in the caches (23
/// against 38 GB/s for eight blocks of 64 KiB), where no transfer of a real pool happens. `rep movsb` in inline assembly
/// equals `memcpy` everywhere; it was not worth a second path with its own argument about ordering.
fn copy_words(source: &[AtomicU64], destination: &[AtomicU64]) {
    debug_assert_eq!(source.len(), destination.len());
    let (source_lines, source_rest) = source.as_chunks::<8>();
    let (destination_lines, destination_rest) = destination.as_chunks::<8>();
    for (source, destination) in source_lines.iter().zip(destination_lines) {
        let line = source.each_ref().map(|word| word.load(Relaxed));
        for (word, destination) in line.into_iter().zip(destination) {
            destination.store(word, Relaxed);
        }
    }
    for (source, destination) in source_rest.iter().zip(destination_rest) {
        destination.store(source.load(Relaxed), Relaxed);
    }
}

#[cfg(test)]
mod tests;
