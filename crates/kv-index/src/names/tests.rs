use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::spread::tests::{hash_of, mix};

/// Names beside a map of what was put into them.
#[derive(Default)]
struct Tested {
    names: Names,
    by_place: BTreeMap<u32, u64>,
    next: u32,
}

impl Tested {
    /// Inserts a run under places of its own, as a segment does. Returns the first place, and how many went in.
    fn insert(&mut self, hashes: &[u64]) -> (u32, usize) {
        let first = self.next;
        self.next += hashes.len() as u32;
        let (blocks, by_place) = (blocks(hashes), &self.by_place);
        let is_it = |hash: u64, place: u32| match place.checked_sub(first) {
            Some(index) => hashes[index as usize] == hash,
            None => by_place[&place] == hash,
        };
        let run = self.names.insert_run(&blocks, first, is_it);
        self.by_place.extend((first..).zip(hashes[..run].iter().copied()));
        (first, run)
    }

    fn remove(&mut self, first: u32, len: usize) {
        let hashes: Vec<u64> =
            (first..).take(len).map_while(|place| self.by_place.get(&place).copied()).collect();
        for place in (first..).take(hashes.len()) {
            self.by_place.remove(&place);
        }
        self.names.remove_run(first, hashes.into_iter());
    }

    fn find(&self, hash: u64) -> Option<u32> {
        self.names.find(hash, |place| self.by_place.get(&place) == Some(&hash))
    }

    fn tidy(&mut self) {
        let most = 4 * (self.names.directory.len() + 2);
        assert!((0..most).any(|_| !self.names.tidy()), "tidying ends");
    }

    fn check(&self) {
        assert_eq!(self.names.len as usize, self.by_place.len());
        for (&place, &hash) in &self.by_place {
            assert_eq!(self.names.find(hash, |found| found == place), Some(place), "{hash:x}");
        }
        check_shape(&self.names);
    }
}

fn blocks(hashes: &[u64]) -> Vec<BlockHash> {
    hashes.iter().copied().map(BlockHash).collect()
}

/// What the module promises of directory, pages and counts.
fn check_shape(names: &Names) {
    assert_eq!(names.directory.len(), 1 << names.depth);
    let (mut at, mut len, mut room, mut bytes) = (0, 0, 0, 0);
    let mut depths = [0; DEPTH_MAX as usize + 1];
    let mut seen = BTreeSet::new();
    while at < names.directory.len() {
        let number = names.directory[at];
        let page = &names.pages[number as usize];
        assert!(seen.insert(number), "the links to a page are neighbours");
        let links = 1 << (names.depth - page.depth);
        assert_eq!(at % links, 0);
        assert!(names.directory[at..at + links].iter().all(|&link| link == number));
        for (spread, _) in page.entries() {
            assert_eq!(spread.page(page.depth), at / links, "an entry where its bits say");
        }
        assert_eq!(page.buckets.len(), SIZES[page.size as usize] as usize);
        assert_eq!(page.entries().count(), page.len as usize);
        assert!(page.len <= page.len_max());
        check_passed(page);
        depths[page.depth as usize] += 1;
        len += u64::from(page.len);
        room += u64::from(page.len_max());
        bytes += page.bytes();
        at += links;
    }
    assert_eq!((names.len, names.room, names.bytes, names.depths), (len, room, bytes, depths));
    assert_eq!(seen.len() + names.free.len(), names.pages.len());
}

/// Each bucket counts the entries that passed it, or has given up counting.
fn check_passed(page: &Page) {
    let mut passed = vec![0u64; page.buckets.len()];
    for (at, bucket) in page.buckets.iter().enumerate() {
        for entry in (0..BUCKET_ENTRIES).filter(|entry| bucket.marks >> (8 * entry) & 0xff != 0) {
            let home = page.home((bucket.entries[entry] >> 32) as u32);
            let mut index = home;
            while index != at {
                passed[index] += 1;
                index = page.after(index, home);
            }
        }
    }
    for (bucket, passed) in page.buckets.iter().zip(passed) {
        let counted = bucket.marks >> 56;
        assert!(counted == passed || counted == 0xff, "{counted} of {passed}");
    }
}

/// Hashes that tables can hardly tell apart, and others.
fn hash(kind: u8, number: u32) -> u64 {
    match kind {
        0 => mix(u64::from(number)),
        // One tag and one mark: told apart by the places alone.
        1 => hash_of(0x1234_5678, 7, number % 400),
        // One page, many marks.
        2 => hash_of(0xabc0_0000 | (number * 64), number as u8, number),
        // The last bucket, so that what passes it goes on at the first.
        _ => hash_of(u32::MAX - number % 5, 9, number % 50),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert {
        kind: u8,
        from: u32,
        len: u32,
    },
    /// The `which`th of the runs that were inserted, from `skip` on.
    Remove {
        which: usize,
        skip: usize,
        len: usize,
    },
    Tidy(usize),
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (prop_oneof![4 => Just(0u8), 1 => 1u8..4], 0u32..6000, prop_oneof![1u32..70, 500u32..3000])
            .prop_map(|(kind, from, len)| Op::Insert { kind, from, len }),
        4 => (any::<usize>(), 0usize..100, prop_oneof![1usize..70, Just(3000)])
            .prop_map(|(which, skip, len)| Op::Remove { which, skip, len }),
        2 => prop_oneof![1usize..4, Just(1000)].prop_map(Op::Tidy),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn names_are_a_map(trace in prop::collection::vec(ops(), 0..60)) {
        let mut tested = Tested::default();
        let mut runs: Vec<(u32, usize)> = vec![];
        for op in &trace {
            match *op {
                Op::Insert { kind, from, len } => {
                    let hashes: Vec<u64> = (from..from + len).map(|number| hash(kind, number)).collect();
                    // Past those that are known already, as a store does.
                    let mut rest = &hashes[..];
                    while let Some(&hash) = rest.first() {
                        if tested.find(hash).is_some() {
                            rest = &rest[1..];
                            continue;
                        }
                        let (first, run) = tested.insert(rest);
                        runs.push((first, run));
                        rest = &rest[run..];
                        if let Some(&hash) = rest.first().filter(|&&hash| tested.find(hash).is_none()) {
                            let page = &tested.names.pages[tested.names.page_number(Spread::new(hash))];
                            prop_assert!(page.len >= 5 * SIZES[SIZE_MAX], "refused without need");
                            break;
                        }
                    }
                }
                Op::Remove { which, skip, len } => {
                    if let Some(&(first, run)) = runs.get(which % runs.len().max(1)) {
                        tested.remove(first + skip.min(run) as u32, len.min(run - skip.min(run)));
                    }
                }
                Op::Tidy(steps) => {
                    for _ in 0..steps {
                        tested.names.tidy();
                    }
                }
            }
            check_shape(&tested.names);
            prop_assert_eq!(tested.find(mix(1 << 40)), None);
        }
        tested.check();
        let places: Vec<u32> = tested.by_place.keys().copied().collect();
        places.into_iter().for_each(|place| tested.remove(place, 1));
        tested.tidy();
        tested.check();
        prop_assert!(tested.names.bytes() <= 2048, "{}", tested.names.bytes());
    }
}

#[test]
fn one_insertion_takes_no_more_than_it_says() {
    let mut tested = Tested::default();
    for number in 0..200_000 {
        let (before, most) = (tested.names.bytes(), tested.names.growth_bytes());
        assert_eq!(tested.insert(&[mix(number)]).1, 1);
        assert!(tested.names.bytes() <= before + most, "{} after {before}", tested.names.bytes());
    }
}

#[test]
fn what_is_removed_is_given_back_once_tidied() {
    let mut tested = Tested::default();
    let hashes: Vec<u64> = (0..300_000).map(mix).collect();
    assert_eq!(tested.insert(&hashes), (0, hashes.len()));
    let full = tested.names.bytes();
    assert!((11..=16).contains(&(full / hashes.len())), "{full}");
    // All but a few: the pages merge, the directory shrinks, and those few stay.
    tested.remove(1000, hashes.len() - 1000);
    assert_eq!(tested.names.bytes(), full, "not at once");
    tested.tidy();
    tested.check();
    assert!(tested.names.bytes() < 64 << 10, "{}", tested.names.bytes());
    assert!(!tested.names.tidy(), "done");
    assert_eq!(tested.insert(&hashes).1, 0, "the first is known");
    assert_eq!(tested.insert(&hashes[1000..]).1, hashes.len() - 1000);
    tested.check();
}

#[test]
fn what_goes_from_pages_that_were_looked_at_is_given_back_too() {
    let mut tested = Tested::default();
    let hashes: Vec<u64> = (0..100_000).map(mix).collect();
    assert_eq!(tested.insert(&hashes).1, hashes.len());
    tested.remove(0, 60_000);
    tested.tidy();
    tested.remove(60_000, 30_000);
    // Half way through the pages.
    while tested.names.tidied.next < 1 << 31 || tested.names.tidied.next > u64::from(u32::MAX) {
        assert!(tested.names.tidy());
    }
    tested.remove(90_000, 10_000);
    tested.tidy();
    tested.check();
    assert!(tested.names.bytes() <= 16 << 10, "{}", tested.names.bytes());
}

/// Eight pages that are as small as they get and yet less than half full: as many as two or more whole steps look at.
#[test]
fn tidying_ends_where_its_last_step_ends_with_the_last_page() {
    for keep in [1000, 1100, 1200, 1300, 1355, 1400, 1500] {
        let mut tested = Tested::default();
        let hashes: Vec<u64> = (0..33_000).map(mix).collect();
        assert_eq!(tested.insert(&hashes).1, hashes.len());
        tested.remove(keep, hashes.len());
        tested.tidy();
        tested.check();
    }
}

#[test]
fn a_run_ends_before_what_is_known_or_comes_twice() {
    let mut tested = Tested::default();
    assert_eq!(tested.insert(&[1, 2, 3, 1, 4]), (0, 3));
    assert_eq!(tested.insert(&[5, 6, 2, 7]), (5, 2));
    assert_eq!(tested.insert(&[3]), (9, 0));
    assert_eq!(tested.find(6), Some(6));
    tested.names.remove_run(100, [1, 2].into_iter());
    tested.check();
}

#[test]
fn counts_of_what_passed_that_reached_their_end_stay() {
    let mut tested = Tested::default();
    let like = |number| hash_of(0x8765_4321, 0x55, number);
    let hashes: Vec<u64> = (0..3000).map(like).collect();
    assert_eq!(tested.insert(&hashes).1, hashes.len());
    tested.check();
    let page = &tested.names.pages[tested.names.page_number(Spread::new(like(0)))];
    assert!(page.buckets.iter().any(|bucket| bucket.marks >> 56 == 0xff));
    tested.remove(0, 2990);
    tested.check();
    // They are not true any more, and nothing is lost by that.
    assert_eq!(tested.find(like(2999)), Some(2999));
    assert_eq!(tested.find(like(0)), None);
    assert_eq!(tested.insert(&hashes[..2000]).1, 2000);
    tested.check();
    let last = tested.next;
    tested.remove(last - 2000, 2000);
    tested.tidy();
    tested.check();
    let page = &tested.names.pages[tested.names.page_number(Spread::new(like(0)))];
    assert!(page.buckets.iter().all(|bucket| bucket.marks >> 56 < 0xff), "a new page counts anew");
}

#[test]
fn hashes_chosen_to_fall_together_are_refused_and_cost_the_others_little() {
    let mut tested = Tested::default();
    let honest: Vec<u64> = (0..100_000).map(mix).collect();
    assert_eq!(tested.insert(&honest).1, honest.len());
    let before = (tested.names.bytes(), tested.names.directory.len());
    // The same first 22 bits: no directory that the module allows tells them apart.
    let forged: Vec<u64> =
        (0..1 << 20).map(|number| hash_of(0xdead_be00 | number & 0x3ff, number as u8, number)).collect();
    let taken = forged.iter().filter(|&&hash| tested.insert(&[hash]).1 == 1).count();
    let most = page_len_max(SIZES[SIZE_MAX]) as usize;
    assert!((most / 2..=most).contains(&taken), "{taken}");
    assert!(tested.names.directory.len() <= 8192, "{}", tested.names.directory.len());
    assert!(tested.names.bytes() <= before.0 + (512 << 10), "{} after {before:?}", tested.names.bytes());
    let more: Vec<u64> = (1 << 20..(1 << 20) + 200_000).map(mix).collect();
    let taken = more.iter().filter(|&&hash| tested.insert(&[hash]).1 == 1).count();
    assert!(taken > more.len() * 99 / 100, "{taken}");
    tested.check();
}
