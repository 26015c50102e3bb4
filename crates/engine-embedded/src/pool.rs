//! Where KV lives, as the executor sees it.

use std::ptr::NonNull;

/// A pool of equal KV blocks. The engine's shell owns it, usually as memory that other processes may read.
///
/// A block holds `[layer][k|v][token in block][kv head x head dim]` as f32, the keys as this crate's top tells.
///
/// # Safety
/// For every `index < blocks()`, `block(index)` must be aligned for f32 and valid for reads and writes of
/// `block_bytes()` initialised bytes (any bit pattern is a number) until the pool is dropped or mutably used by
/// someone other than the executor, and blocks of different index must not overlap. While `Executor::execute` runs,
/// nobody else may write a block that is in one of its block tables, and nobody else may read the slots that it writes.
pub unsafe trait KvPool {
    /// Where a block begins. May panic if `index >= blocks()`.
    fn block(&mut self, index: u32) -> NonNull<f32>;
    /// Number of blocks.
    fn blocks(&self) -> u32;
    /// Size of a block in bytes.
    fn block_bytes(&self) -> u64;
    /// Tokens in a block.
    fn block_size_tokens(&self) -> u32;
}

/// A pool in ordinary memory, for tests and for engines that share nothing.
#[derive(Debug, Clone)]
pub struct VecPool {
    data: Vec<f32>,
    floats_per_block: usize,
    blocks: u32,
    block_size_tokens: u32,
}

impl VecPool {
    /// A pool of `blocks` zeroed blocks of `block_bytes` (see [`Weights::kv_block_bytes`](crate::Weights)).
    pub fn new(blocks: u32, block_bytes: u64, block_size_tokens: u32) -> Self {
        let floats_per_block = usize::try_from(block_bytes / 4).expect("a block fits in memory");
        let data = vec![0.0; floats_per_block * blocks as usize];
        Self { data, floats_per_block, blocks, block_size_tokens }
    }

    /// One block's content.
    pub fn payload(&self, index: u32) -> &[f32] {
        let start = index as usize * self.floats_per_block;
        &self.data[start..start + self.floats_per_block]
    }

    /// One block's content, to overwrite.
    pub fn payload_mut(&mut self, index: u32) -> &mut [f32] {
        let start = index as usize * self.floats_per_block;
        &mut self.data[start..start + self.floats_per_block]
    }
}

// SAFETY: blocks are disjoint ranges of one owned, initialised vector, whose length never changes.
unsafe impl KvPool for VecPool {
    fn block(&mut self, index: u32) -> NonNull<f32> {
        assert!(index < self.blocks, "block {index} of {}", self.blocks);
        // SAFETY: the offset stays within the vector, by the assertion; a pointer from the whole vector may reach all
        // of the block, and those handed out before stay valid.
        unsafe { NonNull::new_unchecked(self.data.as_mut_ptr().add(index as usize * self.floats_per_block)) }
    }

    fn blocks(&self) -> u32 {
        self.blocks
    }

    fn block_bytes(&self) -> u64 {
        self.floats_per_block as u64 * 4
    }

    fn block_size_tokens(&self) -> u32 {
        self.block_size_tokens
    }
}

/// Copies a whole block within a pool: what a fork of a partly filled block needs before its first own token.
///
/// # Panics
/// If either index is outside the pool.
pub fn copy_block(pool: &mut dyn KvPool, from: u32, to: u32) {
    assert!(from < pool.blocks() && to < pool.blocks(), "blocks {from}, {to} of {}", pool.blocks());
    if from == to {
        return;
    }
    let bytes = usize::try_from(pool.block_bytes()).expect("a block fits in memory");
    let (source, target) = (pool.block(from), pool.block(to));
    // SAFETY: the trait promises that both are valid for that many bytes and, differing in index, do not overlap.
    unsafe { source.cast::<u8>().copy_to_nonoverlapping(target.cast::<u8>(), bytes) };
}

/// The blocks of one sequence, for one layer: reads and writes rows of K and V by position.
#[derive(Clone, Copy)]
pub(crate) struct SequenceKv<'a> {
    blocks: &'a [NonNull<f32>],
    /// A power of two, so that finding a slot takes no division.
    block_size: usize,
    /// Floats from a block's start to this layer's K; V follows `block_size * width` later.
    layer_start: usize,
    /// Floats of one token's K (or V): all KV heads.
    width: usize,
}

impl<'a> SequenceKv<'a> {
    /// A view of `layer` of the sequence whose block table is `blocks`.
    ///
    /// # Safety
    /// `block_size` must be a power of two. Every pointer must come from a [`KvPool`] whose blocks hold more than `layer`
    /// layers of `2 * block_size * width` floats, and the pool's promises must hold for `'a`. No slice from `k` or `v`
    /// of the same blocks and layer, through this view or another, may be in use when `write` is called.
    pub(crate) unsafe fn new(
        blocks: &'a [NonNull<f32>],
        block_size: usize,
        layer: usize,
        width: usize,
    ) -> Self {
        Self { blocks, block_size, layer_start: layer * 2 * block_size * width, width }
    }

    fn row(&self, position: usize, half: usize) -> NonNull<f32> {
        let block = self.blocks[position >> self.block_size.trailing_zeros()];
        let row = half * self.block_size + (position & (self.block_size - 1));
        // SAFETY: `row < 2 * block_size`, so the row lies within the layer's part of the block, by `new`'s contract.
        unsafe { block.add(self.layer_start + row * self.width) }
    }

    /// K of the token at `position`, as stored.
    #[inline(always)]
    pub(crate) fn k(&self, position: usize) -> &'a [f32] {
        // SAFETY: `width` floats from there are within the block; nobody writes them while the view is in use, since
        // the executor writes a pass's rows of a layer before it reads any.
        unsafe { NonNull::slice_from_raw_parts(self.row(position, 0), self.width).as_ref() }
    }

    /// V of the token at `position`.
    #[inline(always)]
    pub(crate) fn v(&self, position: usize) -> &'a [f32] {
        // SAFETY: as for `k`.
        unsafe { NonNull::slice_from_raw_parts(self.row(position, 1), self.width).as_ref() }
    }

    /// Stores K and V of the token at `position`.
    pub(crate) fn write(&self, position: usize, k: &[f32], v: &[f32]) {
        for (half, values) in [k, v].into_iter().enumerate() {
            assert_eq!(values.len(), self.width);
            // SAFETY: `width` floats from there are within the block, which `values` does not overlap, and no slice of
            // this layer is in use, by `new`'s contract.
            unsafe {
                self.row(position, half).copy_from_nonoverlapping(NonNull::from(values).cast(), self.width);
            }
        }
    }
}
