//! The numbers that everything here is drawn from: splitmix64, whose states never repeat within a run.

/// Its increment: keeps neighbouring seeds apart.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One sequence of numbers.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mixed(self.0)
    }

    /// Above 0, at most 1: its logarithm is finite.
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// A seed of its own for part `index` of what `seed` makes.
pub fn derived_seed(seed: u64, index: u64) -> u64 {
    mixed(mixed(seed).wrapping_add(index.wrapping_mul(GOLDEN)).wrapping_add(1))
}

fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
