use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering::Relaxed as Plain},
};

use proptest::prelude::*;

use super::*;
use crate::{
    reclaim::{Epochs, tests::live_bytes},
    spread::tests::{hash_of, mix},
};

/// A table beside a map of what was put into it.
struct Tested {
    heads: Heads,
    state: HeadsState,
    heap: Heap,
    key: WriterKey,
    epochs: Epochs,
    by_place: BTreeMap<u32, u64>,
}

impl Tested {
    fn new() -> Self {
        Self {
            heads: Heads::default(),
            state: HeadsState::default(),
            heap: Heap::default(),
            key: WriterKey::new(),
            epochs: Epochs::default(),
            by_place: BTreeMap::new(),
        }
    }

    fn insert(&mut self, hash: u64, place: u32) -> bool {
        let Self { heads, state, heap, key, .. } = self;
        let is_new = heads.insert(hash, place, state, heap, key);
        if is_new {
            self.by_place.insert(place, hash);
        }
        is_new
    }

    fn remove(&mut self, hash: u64, place: u32) -> bool {
        let Self { heads, state, heap, key, .. } = self;
        let was_there = heads.remove(hash, place, state, heap, key);
        assert_eq!(was_there, self.by_place.remove(&place).is_some());
        was_there
    }

    fn find(&self, hash: u64) -> Option<u32> {
        let guard = self.epochs.pin();
        self.heads.find(hash, &guard, |place| self.by_place.get(&place) == Some(&hash))
    }

    fn collect(&mut self) {
        self.heap.collect(&self.epochs, &mut self.key, |_| unreachable!("no slots here"));
    }

    fn check(&self) {
        for (&place, &hash) in &self.by_place {
            let found = self.heads.find(hash, &self.key, |found| found == place);
            assert_eq!(found, Some(place), "{hash:x}");
        }
        check_shape(&self.heads, &self.state, &self.key);
        assert_eq!(self.state.len as usize, self.by_place.len());
    }

    fn links(&self) -> usize {
        follow(&self.heads.directory, &self.key).map_or(0, |words| words.len() - DIRECTORY_HEADER)
    }
}

impl Drop for Tested {
    fn drop(&mut self) {
        self.heads.clear(&mut self.state, &mut self.heap, &self.key);
        self.collect();
        if !std::thread::panicking() {
            assert_eq!((self.heap.retired_bytes(), self.heap.has_retired()), (0, false));
            assert_eq!(live_bytes(&self.heap), 0, "each is retired once");
        }
    }
}

/// What the module promises of directory, pages and counts.
fn check_shape(heads: &Heads, state: &HeadsState, key: &WriterKey) {
    let Some(directory) = follow(&heads.directory, key) else { return };
    let depth = directory[DIRECTORY_DEPTH].load(Relaxed) as u32;
    let links = &directory[DIRECTORY_HEADER..];
    assert_eq!(links.len(), 1 << depth);
    let (mut at, mut len, mut pages) = (0, 0, [0; DEPTH_MAX as usize + 1]);
    let mut seen = BTreeSet::new();
    while at < links.len() {
        let link = links[at].load(Relaxed);
        assert!(seen.insert(link), "the links to a page are neighbours");
        let words = follow(&links[at], key).expect("a directory has no holes");
        let page = Page::new(words);
        let same = 1 << (depth - page.depth);
        assert_eq!(at % same, 0);
        assert!(links[at..at + same].iter().all(|other| other.load(Relaxed) == link));
        assert!(page.entries().all(|(spread, _)| spread.page(page.depth) == at / same));
        assert_eq!(page.entries().count() as u64, words[PAGE_LEN].load(Relaxed));
        assert_eq!(page.bucket(0).as_ptr().addr() % 64, 0, "a bucket is a cache line");
        check_passed(page);
        pages[page.depth as usize] += 1;
        len += page.entries().count() as u64;
        at += same;
    }
    assert_eq!((state.len, state.pages), (len, pages));
}

/// Each bucket counts the entries that passed it, or has given up counting.
fn check_passed(page: Page<'_>) {
    let mut passed = vec![0u64; page.buckets as usize];
    for at in 0..page.buckets as usize {
        let marks = page.bucket(at)[0].load(Relaxed);
        for entry in (0..BUCKET_ENTRIES).filter(|entry| marks >> (8 * entry) & 0xff != 0) {
            let mut index = page.home((page.bucket(at)[1 + entry].load(Relaxed) >> 32) as u32);
            while index != at {
                passed[index] += 1;
                index = page.after(index);
            }
        }
    }
    for (index, passed) in passed.into_iter().enumerate() {
        let counted = page.bucket(index)[0].load(Relaxed) >> 56;
        assert!(counted == passed || counted == 0xff, "{counted} of {passed}");
    }
}

/// Hashes that a table can hardly tell apart, and others.
fn hash(kind: u8, number: u32) -> u64 {
    match kind {
        0 => mix(u64::from(number)),
        1 => hash_of(0x1234_5678, 7, number % 400),
        2 => hash_of(0xabc0_0000 | (number * 64), number as u8, number),
        _ => hash_of(u32::MAX - number % 5, 9, number % 50),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn heads_are_a_map(
        trace in prop::collection::vec(
            (prop_oneof![3 => Just(0u8), 1 => 1u8..4], 0u32..6000, prop_oneof![1u32..70, 500u32..3000], 0u8..5),
            0..50,
        )
    ) {
        let mut tested = Tested::new();
        for (kind, from, len, what) in trace {
            for number in from..from + len {
                let hash = hash(kind, number);
                let place = u32::from(kind) << 16 | number;
                let found = tested.find(hash);
                if what < 3 && found.is_none() {
                    tested.insert(hash, place);
                } else if let Some(place) = found.filter(|_| what == 3) {
                    tested.remove(hash, place);
                }
            }
            if what == 4 {
                tested.collect();
            }
            check_shape(&tested.heads, &tested.state, &tested.key);
            prop_assert_eq!(tested.find(mix(1 << 40)), None);
        }
        tested.check();
        let all: Vec<(u32, u64)> = tested.by_place.iter().map(|(&place, &hash)| (place, hash)).collect();
        for (place, hash) in all {
            prop_assert!(tested.remove(hash, place));
        }
        tested.collect();
        tested.check();
        prop_assert!(tested.links() <= 64, "{}", tested.links());
        prop_assert!(tested.heap.bytes() <= 24 << 10, "{}", tested.heap.bytes());
    }
}

#[test]
fn one_insertion_takes_no_more_than_it_says() {
    let mut tested = Tested::new();
    for number in 0..100_000 {
        let (before, most) = (tested.heap.bytes(), tested.heads.growth_bytes(&tested.key));
        assert!(tested.insert(mix(number), number as u32));
        assert!(tested.heap.bytes() <= before + most, "{} after {before}, {number}", tested.heap.bytes());
        tested.collect();
    }
}

#[test]
fn what_is_removed_is_given_back() {
    let mut tested = Tested::new();
    for number in 0..200_000 {
        assert!(tested.insert(mix(number), number as u32));
    }
    tested.collect();
    let full = tested.heap.bytes();
    assert!((11..=16).contains(&(full / 200_000)), "{full}");
    for number in 100..200_000 {
        assert!(tested.remove(mix(number), number as u32));
        assert!(!tested.remove(mix(number), number as u32), "it is not there");
    }
    tested.collect();
    tested.check();
    assert!(tested.heap.bytes() < 24 << 10, "{}", tested.heap.bytes());
}

#[test]
fn counts_of_what_passed_that_reached_their_end_stay() {
    let mut tested = Tested::new();
    let like = |number| hash_of(0x8765_4321, 0x55, number);
    for number in 0..3000 {
        assert!(tested.insert(like(number), number));
    }
    tested.check();
    for number in 0..2990 {
        assert!(tested.remove(like(number), number));
    }
    tested.check();
    assert_eq!((tested.find(like(2999)), tested.find(like(0))), (Some(2999), None));
}

#[test]
fn hashes_chosen_to_fall_together_are_refused_and_cost_the_others_little() {
    let mut tested = Tested::new();
    for number in 0..50_000 {
        assert!(tested.insert(mix(number), number as u32));
    }
    tested.collect();
    let before = tested.heap.bytes();
    let forged = |number: u32| hash_of(0xdead_be00 | number & 0x3ff, number as u8, number);
    let taken = (0..1 << 20).filter(|&number| tested.insert(forged(number), 1 << 20 | number)).count();
    tested.collect();
    assert!((1000..=512 * 6).contains(&taken), "{taken}");
    assert!(tested.links() <= 4096, "{}", tested.links());
    assert!(tested.heap.bytes() <= before + (512 << 10), "{} after {before}", tested.heap.bytes());
    tested.check();
}

/// Sends readers home, also if the writer fails: a failure must not wait for them.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Plain);
    }
}

/// What is there all along is found at any time, whatever comes and goes beside it.
#[test]
fn readers_find_what_stays() {
    let mut tested = Tested::new();
    let Tested { heads, state, heap, key, epochs, .. } = &mut tested;
    let (heads, epochs) = (&*heads, &*epochs);
    let stays = |number: u32| {
        if number.is_multiple_of(2) { mix(number.into()) } else { hash(number as u8 % 4, number) }
    };
    let permanent: BTreeMap<u32, u64> = (0..2000u32).map(|number| (number, stays(number))).collect();
    for (&place, &hash) in &permanent {
        assert!(heads.insert(hash, place, state, heap, key));
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Plain) {
                    for (&place, &hash) in &permanent {
                        let guard = epochs.pin();
                        let found = heads.find(hash, &guard, |found| found == place);
                        assert_eq!(found, Some(place));
                    }
                }
            });
        }
        let _done = Done(&done);
        for _ in 0..6 {
            let churned = |number: u32| hash(number as u8 % 4, 7000 + number);
            let taken: Vec<u32> = (1 << 20..(1 << 20) + 20_000)
                .filter(|&place| heads.insert(churned(place), place, state, heap, key))
                .collect();
            for place in taken {
                assert!(heads.remove(churned(place), place, state, heap, key));
                if place % 64 == 0 {
                    heap.collect(epochs, key, |_| unreachable!());
                }
            }
        }
    });
    check_shape(heads, state, key);
}
