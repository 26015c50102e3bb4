use forebay_types::BlockHash;
use proptest::prelude::*;

use super::{SECOND_CHANCES_MAX, Shard, pieces_in};

const BLOCKS: usize = 2;

/// A name that tells nothing of `number` by its upper bits, as real ones.
fn name(number: u64) -> u64 {
    (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn hashes(number: u64) -> [BlockHash; BLOCKS] {
    [BlockHash(number), BlockHash(!number)]
}

fn is_known(shard: &mut Shard, number: u64) -> bool {
    let mut out = [BlockHash(0); BLOCKS];
    let is_known = shard.copy(name(number), &mut out);
    assert!(!is_known || out == hashes(number), "piece {number} has hashes of another");
    is_known
}

/// Every piece is in exactly one bucket's chain, once.
fn check_links(shard: &Shard) {
    let mut linked = vec![false; shard.pieces.len()];
    for &first in &shard.buckets {
        let mut link = first;
        while let Some(position) = link.checked_sub(1) {
            assert!(
                !std::mem::replace(&mut linked[position as usize], true),
                "piece {position} is linked twice"
            );
            link = shard.pieces[position as usize].next_in_bucket;
        }
    }
    assert!(linked.iter().all(|&is_linked| is_linked), "a piece is in no bucket");
}

/// The bound on one eviction: when all are in use again, the hand stops after so many and takes the next.
#[test]
fn an_eviction_passes_over_a_bounded_number_of_pieces() {
    let pieces_max = 3 * SECOND_CHANCES_MAX;
    let mut shard = Shard::new(BLOCKS, pieces_max);
    for number in 0..pieces_max as u64 {
        shard.remember(name(number), &hashes(number));
        assert!(is_known(&mut shard, number));
    }
    shard.remember(name(1_000_000), &hashes(1_000_000));
    assert!(!is_known(&mut shard, SECOND_CHANCES_MAX as u64));
    assert_eq!((shard.pieces(), shard.evictions()), (pieces_max, 1));
}

#[test]
fn what_was_not_wanted_again_goes_first() {
    let mut shard = Shard::new(BLOCKS, 4);
    (0..4).for_each(|number| shard.remember(name(number), &hashes(number)));
    for number in [0, 1, 3] {
        assert!(is_known(&mut shard, number));
    }
    shard.remember(name(4), &hashes(4));
    assert_eq!([0, 1, 2, 3, 4].map(|number| is_known(&mut shard, number)), [true, true, false, true, true]);
}

#[test]
fn nothing_is_allocated_before_the_first_piece() {
    let mut shard = Shard::new(BLOCKS, 1000);
    assert_eq!(shard.bytes(), 0);
    assert!(!is_known(&mut shard, 1));
    assert_eq!(shard.bytes(), 0);
}

proptest! {
    #[test]
    fn links_hold_and_bytes_are_bounded(
        bytes in 100usize..20_000, numbers in prop::collection::vec((0u64..500, any::<bool>()), 1..800),
    ) {
        let mut shard = Shard::new(BLOCKS, pieces_in(bytes, BLOCKS));
        for (number, is_wanted) in numbers {
            if is_wanted {
                is_known(&mut shard, number);
            } else {
                shard.remember(name(number), &hashes(number));
                prop_assert!(is_known(&mut shard, number), "what was just remembered is known");
            }
            prop_assert!(shard.bytes() <= bytes);
        }
        check_links(&shard);
    }
}
