//! The index against a naive model: a set of block hashes per rank.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Naive {
    ranks: BTreeMap<RankId, NaiveRank>,
}

#[derive(Default)]
struct NaiveRank {
    held: BTreeSet<BlockHash>,
    next: u64,
    stale: bool,
}

impl Naive {
    fn apply(&mut self, batch: &KvEventBatch) -> Applied {
        let known = self.ranks.contains_key(&batch.rank);
        if !known && batch.sequence > 0 {
            return Applied::Gap { expected: 0 };
        }
        let rank = self.ranks.entry(batch.rank).or_default();
        if batch.sequence < rank.next {
            return Applied::Duplicate;
        }
        if rank.stale || batch.sequence > rank.next {
            rank.stale = true;
            rank.held.clear();
            return Applied::Gap { expected: rank.next };
        }
        rank.next += 1;
        for event in &batch.events {
            match event {
                KvEvent::Stored { hashes, tier: Tier::Device, .. } => rank.held.extend(hashes),
                KvEvent::Removed { hashes, tier: Tier::Device } => {
                    rank.held.retain(|hash| !hashes.contains(hash));
                }
                KvEvent::Stored { .. } | KvEvent::Removed { .. } => {}
                KvEvent::Cleared => rank.held.clear(),
            }
        }
        Applied::Ok
    }

    fn overlaps(&self, chain: &[BlockHash]) -> Vec<(RankId, u32)> {
        let leading =
            |rank: &NaiveRank| chain.iter().take_while(|hash| rank.held.contains(hash)).count() as u32;
        self.ranks.iter().map(|(&id, rank)| (id, leading(rank))).filter(|&(_, depth)| depth > 0).collect()
    }

    fn distinct(&self) -> usize {
        self.ranks.values().flat_map(|rank| &rank.held).collect::<BTreeSet<_>>().len()
    }
}

/// Paths through a binary tree of depth 7: chains that branch and overlap. A node's hash is its number, times a constant
/// that makes half of them collide at home.
fn chain(path: u8, from: usize, to: usize) -> Vec<BlockHash> {
    let node = |depth: usize| 1u64 << depth | u64::from(path) >> (7 - depth);
    (from..to.max(from)).map(|depth| BlockHash((node(depth) % 2) << 63 | node(depth))).collect()
}

#[derive(Debug, Clone)]
enum Op {
    /// `skip`: 0 in order, above it a gap, below it a repetition.
    Batch {
        rank: usize,
        skip: i64,
        events: Vec<KvEvent>,
    },
    Reset {
        rank: usize,
        sequence_next: u64,
        path: u8,
        from: usize,
        to: usize,
    },
    RemoveRank(usize),
    RemoveIncarnation(u64),
    Overlaps(u8),
}

fn events() -> impl Strategy<Value = KvEvent> {
    let tier = || prop_oneof![9 => Just(Tier::Device), 1 => Just(Tier::Host)];
    prop_oneof![
        10 => (any::<u8>(), 0usize..8, 0usize..8, tier())
            .prop_map(|(path, from, to, tier)| KvEvent::Stored { parent: None, hashes: chain(path, from, to), tier }),
        6 => (any::<u8>(), 0usize..8, 0usize..8, tier())
            .prop_map(|(path, from, to, tier)| KvEvent::Removed { hashes: chain(path, from, to), tier }),
        1 => Just(KvEvent::Cleared),
    ]
}

fn ops(ranks: usize) -> impl Strategy<Value = Op> {
    let skip = prop_oneof![12 => Just(0i64), 1 => 1i64..3, 1 => -3i64..0];
    prop_oneof![
        20 => (0..ranks, skip, prop::collection::vec(events(), 0..4))
            .prop_map(|(rank, skip, events)| Op::Batch { rank, skip, events }),
        4 => (0..ranks, 0u64..5, any::<u8>(), 0usize..8, 0usize..8)
            .prop_map(|(rank, sequence_next, path, from, to)| Op::Reset { rank, sequence_next, path, from, to }),
        1 => (0..ranks).prop_map(Op::RemoveRank),
        1 => (0u64..8).prop_map(Op::RemoveIncarnation),
        8 => any::<u8>().prop_map(Op::Overlaps),
    ]
}

/// Fleets of one word, of exactly one full word, and of several.
fn traces() -> impl Strategy<Value = (usize, Vec<Op>)> {
    prop_oneof![Just(1usize), Just(5), Just(64), Just(65), Just(200)]
        .prop_flat_map(|ranks| (Just(ranks), prop::collection::vec(ops(ranks), 0..150)))
}

fn id(rank: usize) -> RankId {
    super::rank(rank as u64 % 8, rank as u16 / 8)
}

/// Runs `trace` on both; `agree` compares two answers to one query.
fn run(
    limits: IndexLimits,
    (ranks, trace): &(usize, Vec<Op>),
    agree: impl Fn(&[(RankId, u32)], &[(RankId, u32)]) -> bool,
) -> Result<(KvIndex, Naive), TestCaseError> {
    let (mut index, mut naive) = (KvIndex::new(limits), Naive::default());
    for rank in 0..*ranks {
        let first = batch(
            id(rank),
            0,
            vec![KvEvent::Stored { parent: None, hashes: chain(rank as u8, 0, 8), tier: Tier::Device }],
        );
        prop_assert_eq!(index.apply(&first), naive.apply(&first));
    }
    let mut out = Overlaps::default();
    for op in trace {
        match op {
            Op::Batch { rank, skip, events } => {
                let next = naive.ranks.get(&id(*rank)).map_or(0, |rank| rank.next);
                let batch = batch(id(*rank), next.saturating_add_signed(*skip), events.clone());
                prop_assert_eq!(index.apply(&batch), naive.apply(&batch));
            }
            &Op::Reset { rank, sequence_next, path, from, to } => {
                let held = chain(path, from, to);
                prop_assert_eq!(
                    index.reset(id(rank), sequence_next, held.iter().rev().copied()),
                    Applied::Ok
                );
                let reset = NaiveRank { held: held.into_iter().collect(), next: sequence_next, stale: false };
                naive.ranks.insert(id(rank), reset);
            }
            Op::RemoveRank(rank) => {
                index.remove_rank(id(*rank));
                naive.ranks.remove(&id(*rank));
            }
            Op::RemoveIncarnation(incarnation) => {
                index.remove_incarnation(Incarnation(*incarnation));
                naive.ranks.retain(|id, _| id.incarnation != Incarnation(*incarnation));
            }
            Op::Overlaps(path) => {
                let chain = chain(*path, 0, 8);
                index.overlaps(&chain, &mut out);
                let expected = naive.overlaps(&chain);
                prop_assert!(agree(&out.0, &expected), "{:?} for {:?}", out.0, expected);
            }
        }
        let stats = index.stats();
        prop_assert_eq!(stats.ranks as usize, naive.ranks.len());
        prop_assert_eq!(stats.ranks_stale as usize, naive.ranks.values().filter(|rank| rank.stale).count());
    }
    Ok((index, naive))
}

proptest! {
    #[test]
    fn with_room_the_index_is_the_naive_model(trace in traces()) {
        let limits = IndexLimits::default();
        let (mut index, naive) = run(limits, &trace, |answer, expected| answer == expected)?;
        let stats = index.stats();
        prop_assert_eq!(stats.blocks as usize, naive.distinct());
        prop_assert_eq!(stats.entries as usize, naive.ranks.values().map(|rank| rank.held.len()).sum::<usize>());
        prop_assert_eq!(stats.refused, 0);
        for rank in 0..trace.0 {
            index.remove_rank(id(rank));
        }
        let stats = index.stats();
        prop_assert_eq!((stats.blocks, stats.entries, stats.ranks), (0, 0, 0));
        prop_assert!(stats.bytes <= 2048, "{:?}", stats);
    }

    #[test]
    fn short_of_room_the_index_claims_less_but_nothing_wrong(trace in traces(), bytes_max in 0usize..8000) {
        let limits = IndexLimits { bytes_max, ranks_max: 4096 };
        let (index, _) = run(limits, &trace, |answer, expected| {
            let expected: BTreeMap<_, _> = expected.iter().copied().collect();
            answer.iter().all(|(rank, depth)| expected.get(rank).is_some_and(|true_depth| depth <= true_depth))
        })?;
        prop_assert!(index.table.bytes() <= bytes_max, "{} of {}", index.table.bytes(), bytes_max);
    }
}
