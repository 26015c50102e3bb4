//! Which hashes may begin a prompt: so that the look-up of one that nobody has seen costs a load.
//!
//! A Bloom filter of one bit a hash, with counts beside it for the writer, so that what goes is taken out again. It is
//! never moved or freed: a reader needs no protection to look. With a few thousand distinct first blocks most unknown
//! prompts are told here; with very many it says maybe to all, and costs a nanosecond.

use crate::sync::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// Bits: a power of two.
const BITS: usize = 1 << 15;

/// What readers see.
#[derive(Debug)]
pub(crate) struct Filter {
    bits: Box<[AtomicU64; BITS / 64]>,
}

/// How many hashes there are for each bit. One that reaches the end stays there.
#[derive(Debug)]
pub(crate) struct FilterState {
    counts: Box<[u8]>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { bits: Box::new(std::array::from_fn(|_| AtomicU64::new(0))) }
    }
}

impl Default for FilterState {
    fn default() -> Self {
        Self { counts: vec![0; BITS].into() }
    }
}

impl Filter {
    /// Bytes of a filter.
    pub(crate) const BYTES: usize = BITS / 8;

    /// False only if no prompt begins with `hash`.
    #[inline]
    pub(crate) fn may_have(&self, hash: u64) -> bool {
        let bit = bit(hash);
        self.bits[bit / 64].load(SeqCst) & 1 << (bit % 64) != 0
    }
}

impl FilterState {
    /// Bytes of the counts.
    pub(crate) fn bytes(&self) -> usize {
        self.counts.len()
    }

    pub(crate) fn add(&mut self, filter: &Filter, hash: u64) {
        let bit = bit(hash);
        let count = &mut self.counts[bit];
        *count = count.saturating_add(1);
        let word = &filter.bits[bit / 64];
        word.store(word.load(Relaxed) | 1 << (bit % 64), SeqCst);
    }

    pub(crate) fn remove(&mut self, filter: &Filter, hash: u64) {
        let bit = bit(hash);
        let count = &mut self.counts[bit];
        if *count < u8::MAX {
            *count -= 1;
        }
        if *count == 0 {
            let word = &filter.bits[bit / 64];
            word.store(word.load(Relaxed) & !(1 << (bit % 64)), SeqCst);
        }
    }
}

fn bit(hash: u64) -> usize {
    (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS.ilog2())) as usize
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
