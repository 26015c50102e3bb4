use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Tested {
    filter: Filter,
    state: FilterState,
}

impl Tested {
    fn add(&mut self, hash: u64) {
        self.state.add(&self.filter, hash);
    }

    fn remove(&mut self, hash: u64) {
        self.state.remove(&self.filter, hash);
    }
}

/// The `number`th hash for one bit: what `bit` multiplies by is odd, so it can be undone.
fn hash_of(at: usize, number: u64) -> u64 {
    let odd = 0x9e37_79b9_7f4a_7c15u64;
    let inverse = (0..6).fold(odd, |guess, _| guess.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(guess))));
    let hash = ((at as u64) << (64 - BITS.ilog2()) | number).wrapping_mul(inverse);
    assert_eq!(bit(hash), at);
    hash
}

proptest! {
    #[test]
    fn it_says_no_exactly_where_nothing_is(ops in prop::collection::vec((0usize..70, 0u64..3, any::<bool>()), 0..400)) {
        let mut tested = Tested::default();
        let mut counts: BTreeMap<usize, BTreeMap<u64, u32>> = BTreeMap::new();
        for (at, number, adds) in ops {
            let count = counts.entry(at).or_default().entry(number).or_default();
            if adds {
                *count += 1;
                tested.add(hash_of(at, number));
            } else if *count > 0 {
                *count -= 1;
                tested.remove(hash_of(at, number));
            }
        }
        for at in 0..80 {
            let any = counts.get(&at).is_some_and(|of| of.values().any(|&count| count > 0));
            // Another hash of the same bit is a maybe.
            prop_assert_eq!(tested.filter.may_have(hash_of(at, 99)), any, "{}", at);
        }
    }
}

#[test]
fn a_count_that_reached_its_end_stays_a_maybe() {
    let mut tested = Tested::default();
    (0..300).for_each(|number| tested.add(hash_of(9, number)));
    (0..300).for_each(|number| tested.remove(hash_of(9, number)));
    assert!(tested.filter.may_have(hash_of(9, 0)), "it cannot know");
    assert_eq!(tested.state.counts[9], u8::MAX);

    (0..254).for_each(|number| tested.add(hash_of(10, number)));
    (0..253).for_each(|number| tested.remove(hash_of(10, number)));
    assert!(tested.filter.may_have(hash_of(10, 253)), "one is left");
    tested.remove(hash_of(10, 253));
    assert!(!tested.filter.may_have(hash_of(10, 253)), "one less than the end is still counted");
}

#[test]
fn it_takes_what_it_says() {
    let tested = Tested::default();
    assert_eq!(Filter::BYTES, tested.filter.bits.len() * 8);
    assert_eq!(tested.state.bytes(), BITS);
    assert!((0..1000).all(|hash| !tested.filter.may_have(hash)));
}

#[test]
fn few_first_blocks_leave_most_unknown_prompts_out() {
    let mut tested = Tested::default();
    (0..1000).for_each(|hash| tested.add(hash));
    assert!((0..1000).all(|hash| tested.filter.may_have(hash)));
    let maybe = (1 << 32..(1 << 32) + 10_000).filter(|&hash| tested.filter.may_have(hash)).count();
    assert!(maybe < 600, "{maybe} of 10,000");
}
