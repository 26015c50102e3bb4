//! Event streams as they should not be: lost, doubled, out of order, senseless. And the same calls twice.
#![cfg(not(feature = "shuttle"))]

use std::collections::{BTreeMap, BTreeSet};

use forebay_kv_index::{Applied, BYTES_MIN, IndexLimits, IndexStats, KvIndex, Overlaps};
use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};
use proptest::prelude::*;

const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];

fn rank(number: u8) -> RankId {
    RankId { incarnation: Incarnation(u64::from(number) / 2), dp_rank: u16::from(number) % 2 }
}

fn stored(parent: Option<u64>, hashes: &[u64], tier: Tier) -> KvEvent {
    KvEvent::Stored { parent: parent.map(BlockHash), hashes: blocks(hashes), tier, group: 0 }
}

fn removed(hashes: &[u64], tier: Tier) -> KvEvent {
    KvEvent::Removed { hashes: blocks(hashes), tier, group: 0 }
}

fn blocks(hashes: &[u64]) -> Vec<BlockHash> {
    hashes.iter().copied().map(BlockHash).collect()
}

/// Number of the next batch, whether events were lost, and what is held: tier and hash.
type Followed = (u64, bool, BTreeSet<(usize, u64)>);

/// What each rank holds, by its own events alone.
#[derive(Default)]
struct Naive {
    ranks: BTreeMap<RankId, Followed>,
    gaps: u64,
    duplicates: u64,
    removals_unknown: u64,
    /// Of these, repetitions within one event, which the index may count once.
    removals_repeated: u64,
}

fn tier_of(tier: Tier) -> usize {
    TIERS.iter().position(|&other| other == tier).expect("one of four")
}

impl Naive {
    fn apply(&mut self, batch: &KvEventBatch, ranks_max: usize) -> Applied {
        let followed = self.ranks.len();
        if !self.ranks.contains_key(&batch.rank) {
            if batch.sequence > 0 {
                self.gaps += 1;
                return Applied::Gap { expected: 0 };
            }
            if followed == ranks_max {
                return Applied::TooManyRanks;
            }
        }
        let (next, stale, held) = self.ranks.entry(batch.rank).or_default();
        if batch.sequence < *next {
            self.duplicates += 1;
            return Applied::Duplicate;
        }
        if *stale || batch.sequence > *next {
            self.gaps += u64::from(!*stale);
            *stale = true;
            held.clear();
            return Applied::Gap { expected: *next };
        }
        *next += 1;
        for event in &batch.events {
            match event {
                KvEvent::Stored { hashes, tier, .. } => {
                    held.extend(hashes.iter().map(|hash| (tier_of(*tier), hash.0)));
                }
                KvEvent::Removed { hashes, tier, group: _ } => {
                    for (index, hash) in hashes.iter().enumerate() {
                        self.removals_unknown += u64::from(!held.remove(&(tier_of(*tier), hash.0)));
                        self.removals_repeated += u64::from(hashes[..index].contains(hash));
                    }
                }
                KvEvent::Cleared => held.clear(),
                KvEvent::Groups(_) => unreachable!("never said here"),
            }
        }
        Applied::Ok
    }

    /// Leading blocks of `chain` that are held on `tiers`, by rank; ranks with none are left out.
    fn overlaps(&self, chain: &[u64]) -> BTreeMap<RankId, u32> {
        let leading = |held: &BTreeSet<(usize, u64)>| {
            chain.iter().take_while(|&&hash| held.contains(&(0, hash))).count() as u32
        };
        let all = self.ranks.iter().map(|(&id, (_, _, held))| (id, leading(held)));
        all.filter(|&(_, depth)| depth > 0).collect()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Batch { rank: u8, skip: i64, events: Vec<KvEvent> },
    Reset { rank: u8, sequence_next: u64, blocks: Vec<u64> },
    Leave(u8),
    Tidy,
}

/// Hashes in no order at all, with many that come twice: parents unknown, of themselves, or further down.
fn senseless() -> impl Strategy<Value = KvEvent> {
    let hash = || prop_oneof![4 => 0u64..12, 1 => 0u64..400];
    let hashes = || {
        prop_oneof![
            4 => prop::collection::vec(hash(), 0..8),
            1 => (hash(), 1usize..80).prop_map(|(hash, times)| vec![hash; times]),
            1 => (hash(), 0u64..200).prop_map(|(from, len)| (from..from + len).collect()),
            1 => (hash(), 0u64..200).prop_map(|(from, len)| (from..from + len).rev().collect()),
        ]
    };
    let tier = || prop_oneof![5 => Just(Tier::Device), 1 => prop::sample::select(&TIERS[..])];
    prop_oneof![
        6 => (prop::option::of(hash()), hashes(), tier())
            .prop_map(|(parent, hashes, tier)| stored(parent, &hashes, tier)),
        1 => (hash(), tier()).prop_map(|(hash, tier)| stored(Some(hash), &[hash, hash], tier)),
        5 => (hashes(), tier()).prop_map(|(hashes, tier)| removed(&hashes, tier)),
        1 => Just(KvEvent::Cleared),
    ]
}

/// Chains of one tree, each from its root on: what an engine would say, in any order of batches.
fn sensible() -> impl Strategy<Value = KvEvent> {
    let tier = || prop_oneof![6 => Just(Tier::Device), 1 => prop::sample::select(&TIERS[..])];
    prop_oneof![
        5 => (0u64..16, 0usize..150, tier()).prop_map(|(path, len, tier)| stored(None, &path_of(path, len), tier)),
        3 => (0u64..16, 0usize..150, 0usize..150, tier(), any::<bool>()).prop_map(|(path, from, len, tier, up)| {
            let mut hashes = path_of(path, len);
            let mut hashes = hashes.split_off(from.min(len));
            if up {
                hashes.reverse();
            }
            removed(&hashes, tier)
        }),
        1 => Just(KvEvent::Cleared),
    ]
}

/// Paths part at 2, 30, 64 and 100 blocks.
fn path_of(path: u64, len: usize) -> Vec<u64> {
    let taken = |depth: usize| [2, 30, 64, 100].iter().filter(|&&branch| branch <= depth).count() as u64;
    (0..len).map(|depth| 1000 + depth as u64 * 64 + (path & ((1 << taken(depth)) - 1))).collect()
}

fn ops(events: BoxedStrategy<KvEvent>) -> impl Strategy<Value = Op> {
    let held = prop_oneof![
        prop::collection::vec(0u64..40, 0..30),
        (0u64..16, 0usize..150, any::<bool>()).prop_map(|(path, len, up)| {
            let mut held = path_of(path, len);
            if up {
                held.reverse();
            }
            held
        }),
    ];
    let skip = prop_oneof![20 => Just(0i64), 1 => 1i64..4, 1 => -4i64..0];
    prop_oneof![
        20 => (0u8..7, skip, prop::collection::vec(events, 0..5))
            .prop_map(|(rank, skip, events)| Op::Batch { rank, skip, events }),
        2 => (0u8..7, 0u64..5, held)
            .prop_map(|(rank, sequence_next, blocks)| Op::Reset { rank, sequence_next, blocks }),
        1 => (0u8..7).prop_map(Op::Leave),
        1 => Just(Op::Tidy),
    ]
}

/// One less than ranks there may be in a trace.
const RANKS_MAX: u16 = 6;

fn run(trace: &[Op], index: &KvIndex, naive: &mut Naive) -> Result<(), TestCaseError> {
    for op in trace {
        match op {
            Op::Batch { rank: number, skip, events } => {
                let next = naive.ranks.get(&rank(*number)).map_or(0, |(next, ..)| *next);
                let sequence = next.saturating_add_signed(*skip);
                let batch = KvEventBatch { rank: rank(*number), sequence, events: events.clone() };
                prop_assert_eq!(index.apply(&batch), naive.apply(&batch, usize::from(RANKS_MAX)));
            }
            Op::Reset { rank: number, sequence_next, blocks: held } => {
                let answer = index.reset(
                    rank(*number),
                    *sequence_next,
                    held.iter().map(|&hash| stored(None, &[hash], Tier::Device)),
                );
                let full = naive.ranks.len() == usize::from(RANKS_MAX);
                if full && !naive.ranks.contains_key(&rank(*number)) {
                    prop_assert_eq!(answer, Applied::TooManyRanks);
                } else {
                    prop_assert_eq!(answer, Applied::Ok);
                    let held = held.iter().map(|&hash| (0, hash)).collect();
                    naive.ranks.insert(rank(*number), (*sequence_next, false, held));
                }
            }
            Op::Leave(number) => {
                index.remove_rank(rank(*number));
                naive.ranks.remove(&rank(*number));
            }
            Op::Tidy => {
                index.tidy();
            }
        }
    }
    Ok(())
}

/// Figures that follow from the trace, and nothing left once all have gone.
fn check_end(index: &KvIndex, naive: &Naive) -> Result<(), TestCaseError> {
    while index.tidy() {}
    let stats = index.stats();
    let held: BTreeSet<u64> =
        naive.ranks.values().flat_map(|(_, _, held)| held.iter().map(|&(_, hash)| hash)).collect();
    let expected = IndexStats {
        blocks: held.len() as u64,
        entries: naive.ranks.values().map(|(_, _, held)| held.len() as u64).sum(),
        ranks: naive.ranks.len() as u64,
        ranks_stale: naive.ranks.values().filter(|(_, stale, _)| *stale).count() as u64,
        gaps: naive.gaps,
        duplicates: naive.duplicates,
        removals_unknown: stats.removals_unknown,
        segments: stats.segments,
        bytes: stats.bytes,
        refused: 0,
        evicted: 0,
    };
    prop_assert_eq!(stats, expected);
    let least = naive.removals_unknown - naive.removals_repeated;
    prop_assert!((least..=naive.removals_unknown).contains(&stats.removals_unknown), "{:?}", stats);
    for (&id, (next, stale, held)) in &naive.ranks {
        let known = index.rank(id).expect("followed");
        let on_device = held.iter().filter(|(tier, _)| *tier == 0).count() as u64;
        prop_assert_eq!((known.sequence_next, known.stale, known.blocks), (*next, *stale, on_device));
    }
    (0..7).for_each(|number| index.remove_rank(rank(number)));
    while index.tidy() {}
    let stats = index.stats();
    prop_assert_eq!((stats.blocks, stats.entries, stats.segments, stats.ranks), (0, 0, 0, 0));
    prop_assert!(stats.bytes <= 64 << 10, "{:?}", stats);
    Ok(())
}

fn answer(index: &KvIndex, chain: &[u64]) -> Result<BTreeMap<RankId, u32>, TestCaseError> {
    let mut out = Overlaps::default();
    index.overlaps(&blocks(chain), &mut out);
    let answer: BTreeMap<RankId, u32> = out.iter().collect();
    prop_assert_eq!(answer.len(), out.as_slice().len(), "a rank is listed once");
    Ok(answer)
}

fn new_index() -> KvIndex {
    KvIndex::new(IndexLimits { ranks_max: RANKS_MAX, ..IndexLimits::default() })
}

proptest! {
    #[test]
    fn senseless_events_never_make_a_wrong_claim(
        trace in prop::collection::vec(ops(senseless().boxed()), 0..100),
        queries in prop::collection::vec(prop::collection::vec(0u64..12, 1..8), 10),
    ) {
        let (index, mut naive) = (new_index(), Naive::default());
        run(&trace, &index, &mut naive)?;
        let lines = (0..12).map(|from| (from..from + 200).collect());
        for query in queries.into_iter().chain(lines) {
            let expected = naive.overlaps(&query);
            for (rank, depth) in answer(&index, &query)? {
                prop_assert!(expected.get(&rank).is_some_and(|&most| depth <= most), "{:?} {}", query, depth);
            }
        }
        check_end(&index, &naive)?;
    }

    #[test]
    fn sensible_chains_in_faulty_streams_are_claimed_exactly(
        trace in prop::collection::vec(ops(sensible().boxed()), 0..100),
    ) {
        let (index, mut naive) = (new_index(), Naive::default());
        run(&trace, &index, &mut naive)?;
        for path in 0..16 {
            let chain = path_of(path, 150);
            prop_assert_eq!(answer(&index, &chain)?, naive.overlaps(&chain));
        }
        check_end(&index, &naive)?;
    }

    #[test]
    fn the_same_calls_give_the_same_answers_in_the_same_order(
        trace in prop::collection::vec(ops(prop_oneof![sensible(), senseless()].boxed()), 0..60),
    ) {
        let [one, other] = [new_index(), new_index()];
        let mut out = [Overlaps::default(), Overlaps::default()];
        // What an answer object was used for before says nothing.
        out[1].extend((0..20).map(|number| (rank(number), 7)));
        run(&trace, &one, &mut Naive::default())?;
        run(&trace, &other, &mut Naive::default())?;
        for chain in (0..16).map(|path| path_of(path, 150)).chain((0..12).map(|from| (from..from + 50).collect())) {
            one.overlaps(&blocks(&chain), &mut out[0]);
            other.overlaps(&blocks(&chain), &mut out[1]);
            prop_assert_eq!(out[0].as_slice(), out[1].as_slice());
            prop_assert!(out[0].iter_tiers().eq(out[1].iter_tiers()));
        }
        prop_assert_eq!(one.stats(), other.stats());
        while one.tidy() {}
        while other.tidy() {}
        prop_assert_eq!(one.stats(), other.stats());
        prop_assert_eq!(one.stale_ranks(), other.stale_ranks());
    }
}

fn apply(index: &KvIndex, rank: RankId, sequence: u64, event: KvEvent) {
    let batch = KvEventBatch { rank, sequence, events: vec![event] };
    assert_eq!(index.apply(&batch), Applied::Ok);
}

#[test]
fn a_chain_that_is_its_own_parent_ends() {
    let index = new_index();
    for (sequence, event) in (0..).zip([
        stored(None, &[1, 2, 3], Tier::Device),
        stored(Some(3), &[1, 2, 3, 1, 2, 3], Tier::Device),
        stored(Some(9), &[9], Tier::Device),
        stored(Some(2), &[4, 1], Tier::Device),
        removed(&[1, 2, 3, 4, 9, 1], Tier::Device),
        stored(Some(4), &[1], Tier::Device),
    ]) {
        apply(&index, rank(0), sequence, event);
    }
    assert_eq!((index.stats().blocks, index.stats().removals_unknown), (1, 1));
    index.remove_rank(rank(0));
    while index.tidy() {}
    assert_eq!((index.stats().blocks, index.stats().segments), (0, 0));
}

#[test]
fn two_ranks_with_one_chain_on_different_tiers_are_told_apart() {
    let index = new_index();
    apply(&index, rank(0), 0, stored(None, &[1, 2, 3], Tier::Host));
    apply(&index, rank(1), 0, stored(None, &[1, 2], Tier::Device));
    let mut out = Overlaps::default();
    index.overlaps(&blocks(&[1, 2, 3]), &mut out);
    assert_eq!((out.get(rank(0)), out.get(rank(1))), (0, 2));
    assert_eq!((out.tiers(rank(0)).host, out.tiers(rank(1)).host), (3, 2));
    apply(&index, rank(0), 1, removed(&[1, 2, 3], Tier::Device));
    assert_eq!(index.stats().removals_unknown, 3, "not held there");
    assert_eq!((index.stats().blocks, index.stats().entries), (3, 5));
}

/// Far more than the budget holds, in chains that all begin alike, removed and stored again.
#[test]
fn short_of_room_the_figures_add_up() {
    let index = KvIndex::new(IndexLimits { bytes_max: BYTES_MIN, ranks_max: RANKS_MAX });
    let mut next = [0; 6];
    let mut naive = Naive::default();
    for turn in 0..6000u64 {
        let number = (turn % 6) as u8;
        let chain: Vec<u64> = path_of(0, 40)
            .into_iter()
            .chain((0..60).map(|block| 1 << 40 | (turn % 1500) << 10 | block))
            .collect();
        let event = match turn % 7 {
            6 => removed(&chain[40..], Tier::Device),
            _ => stored(None, &chain, Tier::Device),
        };
        let batch =
            KvEventBatch { rank: rank(number), sequence: next[usize::from(number)], events: vec![event] };
        next[usize::from(number)] += 1;
        assert_eq!(index.apply(&batch), Applied::Ok);
        assert_eq!(naive.apply(&batch, 6), Applied::Ok);
        let stats = index.stats();
        assert!(stats.bytes <= BYTES_MIN as u64, "{stats:?}");
        assert!(stats.blocks <= stats.entries && stats.entries <= 6 * stats.blocks, "{stats:?}");
        let expected = naive.overlaps(&chain);
        for (rank, depth) in answer(&index, &chain).expect("no rank twice") {
            assert!(expected[&rank] >= depth);
        }
    }
    let stats = index.stats();
    assert!(stats.evicted > 10_000 && stats.refused == 0, "{stats:?}");
    (0..6).for_each(|number| index.remove_rank(rank(number)));
    while index.tidy() {}
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.entries, stats.segments), (0, 0, 0), "{stats:?}");
}

/// Chains that begin anew each time: no table keeps a word of what went.
#[test]
fn what_comes_and_goes_leaves_nothing() {
    let index = new_index();
    for turn in 0..50_000u64 {
        let chain: Vec<u64> = (0..20).map(|block| turn << 8 | block).collect();
        apply(&index, rank(0), 2 * turn, stored(None, &chain, Tier::Device));
        let gone = if turn % 2 == 0 { chain.iter().rev().copied().collect() } else { chain };
        apply(&index, rank(0), 2 * turn + 1, removed(&gone, Tier::Device));
    }
    while index.tidy() {}
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.segments, stats.removals_unknown), (0, 0, 0));
    // The filter is most of it.
    assert!(stats.bytes <= 64 << 10, "{stats:?}");
}
