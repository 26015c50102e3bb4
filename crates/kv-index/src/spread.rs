//! A hash, spread over the bits that tables choose by.

/// A hash as tables see it: callers' hashes may be numbers that somebody counted up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Spread {
    /// Chooses page and bucket, and stands in the entry.
    pub(crate) tag: u32,
    /// Stands in the bucket's first word. Never 0.
    pub(crate) mark: u8,
}

const ONES: u64 = 0x0001_0101_0101_0101;
const LOW_BITS: u64 = 0x7f * ONES;

impl Spread {
    #[inline]
    pub(crate) fn new(hash: u64) -> Self {
        let mixed = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self { tag: (mixed >> 32) as u32, mark: (mixed as u8).max(1) }
    }

    /// Which of the 2^`depth` links of a directory.
    #[inline]
    pub(crate) fn page(self, depth: u32) -> usize {
        (u64::from(self.tag) >> (32 - depth)) as usize
    }

    /// An entry for `place`.
    #[inline]
    pub(crate) fn entry(self, place: u32) -> u64 {
        u64::from(self.tag) << 32 | u64::from(place)
    }

    /// The high bits of those of the seven low bytes of `marks` that equal the mark.
    #[inline]
    pub(crate) fn like(self, marks: u64) -> u64 {
        // Exact in every byte, unlike the shorter test that borrows: a freed entry's word is still there to be found.
        let differs = marks ^ (ONES * u64::from(self.mark));
        !(((differs & LOW_BITS) + LOW_BITS) | differs) & (ONES << 7)
    }

    /// The same for 0: entries that are free.
    #[inline]
    pub(crate) fn free(marks: u64) -> u64 {
        !(((marks & LOW_BITS) + LOW_BITS) | marks) & (ONES << 7)
    }
}

#[cfg(test)]
pub(crate) mod tests;
