use proptest::prelude::*;

use super::*;

/// The hash that is mixed into `mixed`: mixing loses nothing.
fn unmixed(mixed: u64) -> u64 {
    let unshifted = |mixed: u64| mixed ^ mixed >> 29 ^ mixed >> 58;
    let hash = unshifted(mixed.wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9)));
    let hash = hash.wrapping_mul(inverse(0x9e37_79b9_7f4a_7c15));
    hash ^ hash >> 32
}

/// Of an odd number, modulo 2^64, by Newton's method.
fn inverse(odd: u64) -> u64 {
    (0..6).fold(odd, |guess, _| guess.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(guess))))
}

/// A hash with these bits; `other` tells apart those that tables cannot.
pub(crate) fn hash_of(tag: u32, mark: u8, other: u32) -> u64 {
    unmixed(u64::from(tag) << 32 | u64::from(other & 0xff_ffff) << 8 | u64::from(mark))
}

/// Numbers that look like hashes.
pub(crate) fn mix(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

proptest! {
    #[test]
    fn a_hash_can_be_made_for_any_bits(tag: u32, mark in 1u8.., other in 0u32..1 << 24) {
        let hash = hash_of(tag, mark, other);
        prop_assert_eq!(Spread::new(hash), Spread { tag, mark });
        prop_assert_ne!(hash, hash_of(tag, mark, other ^ 1));
    }

    #[test]
    fn bytes_of_a_bucket_are_compared_exactly(
        bytes in prop::array::uniform8(prop_oneof![Just(0u8), Just(1), Just(0x7f), Just(0x80), Just(0xff), any::<u8>()]),
        mark in prop_oneof![Just(1u8), Just(0x7f), Just(0x80), Just(0x81), 1u8..],
    ) {
        let marks = u64::from_le_bytes(bytes);
        let of = |wanted: u8| {
            (0..7).filter(|&entry| bytes[entry] == wanted).fold(0u64, |found, entry| found | 0x80 << (8 * entry))
        };
        prop_assert_eq!(Spread { tag: 0, mark }.like(marks), of(mark));
        prop_assert_eq!(Spread::free(marks), of(0));
    }
}

#[test]
fn no_mark_is_that_of_a_free_entry() {
    assert_eq!(Spread::new(hash_of(7, 0, 9)), Spread { tag: 7, mark: 1 });
}

#[test]
fn a_directory_of_one_link_has_every_hash_there() {
    assert_eq!(Spread { tag: u32::MAX, mark: 1 }.page(0), 0);
    assert_eq!(Spread { tag: 0x8000_0000, mark: 1 }.page(1), 1);
    assert_eq!(Spread { tag: u32::MAX, mark: 1 }.page(22), (1 << 22) - 1);
}
