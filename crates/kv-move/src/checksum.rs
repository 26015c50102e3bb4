//! XXH64 over words of shared memory.
//!
//! In: a block's words and a seed. Out: the same number as any XXH64 gives for those bytes (a test compares it with
//! another implementation). Written here because a hash crate wants `&[u8]`, and a slice of plain bytes must not be
//! made over memory that another process may write; these loads are atomic.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const PRIME_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME_5: u64 = 0x27D4_EB2F_1656_67C5;

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(PRIME_2)).rotate_left(31).wrapping_mul(PRIME_1)
}

/// XXH64 of the little-endian bytes of `words`.
pub(crate) fn xxh64(words: &[AtomicU64], seed: u64) -> u64 {
    let load = |word: &AtomicU64| u64::from_le(word.load(Relaxed));
    let stripes = words.chunks_exact(4);
    let tail = stripes.remainder();
    let mut hash = if words.len() >= 4 {
        let mut lanes = [
            seed.wrapping_add(PRIME_1).wrapping_add(PRIME_2),
            seed.wrapping_add(PRIME_2),
            seed,
            seed.wrapping_sub(PRIME_1),
        ];
        for stripe in stripes {
            for (lane, word) in lanes.iter_mut().zip(stripe) {
                *lane = round(*lane, load(word));
            }
        }
        let [a, b, c, d] = lanes;
        let merged = a
            .rotate_left(1)
            .wrapping_add(b.rotate_left(7))
            .wrapping_add(c.rotate_left(12))
            .wrapping_add(d.rotate_left(18));
        lanes
            .into_iter()
            .fold(merged, |hash, lane| (hash ^ round(0, lane)).wrapping_mul(PRIME_1).wrapping_add(PRIME_4))
    } else {
        seed.wrapping_add(PRIME_5)
    };
    hash = hash.wrapping_add(size_of_val(words) as u64);
    for word in tail {
        hash = (hash ^ round(0, load(word))).rotate_left(27).wrapping_mul(PRIME_1).wrapping_add(PRIME_4);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(PRIME_2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(PRIME_3);
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_has_the_published_hash() {
        assert_eq!(xxh64(&[], 0), 0xEF46_DB37_51D8_E999, "the value that every XXH64 gives for no bytes");
    }

    proptest! {
        #[test]
        fn agrees_with_another_implementation(words in prop::collection::vec(any::<u64>(), 0..70), seed: u64) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let shared: Vec<AtomicU64> = words.into_iter().map(|word| AtomicU64::new(word.to_le())).collect();
            prop_assert_eq!(xxh64(&shared, seed), twox_hash::XxHash64::oneshot(seed, &bytes));
        }
    }
}
