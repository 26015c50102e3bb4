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
    held: BTreeSet<(Tier, BlockHash)>,
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
                KvEvent::Stored { hashes, tier, .. } => {
                    rank.held.extend(hashes.iter().map(|&hash| (*tier, hash)));
                }
                KvEvent::Removed { hashes, tier } => {
                    rank.held.retain(|(held, hash)| held != tier || !hashes.contains(hash));
                }
                KvEvent::Cleared => rank.held.clear(),
            }
        }
        Applied::Ok
    }

    fn overlaps(&self, chain: &[BlockHash]) -> Vec<(RankId, u32)> {
        let leading = |rank: &NaiveRank| {
            chain.iter().take_while(|&&hash| rank.held.contains(&(Tier::Device, hash))).count() as u32
        };
        self.ranks.iter().map(|(&id, rank)| (id, leading(rank))).filter(|&(_, depth)| depth > 0).collect()
    }

    /// Leading blocks that each rank holds on a tier or a nearer one.
    fn tiers(&self, chain: &[BlockHash]) -> Vec<(RankId, [u32; 4])> {
        let all = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];
        let leading = |rank: &NaiveRank, tiers: &[Tier]| {
            let holds = |hash| tiers.iter().any(|&tier| rank.held.contains(&(tier, hash)));
            chain.iter().take_while(|&&hash| holds(hash)).count() as u32
        };
        let blocks = |rank: &NaiveRank| [1, 2, 3, 4].map(|tiers| leading(rank, &all[..tiers]));
        self.ranks.iter().map(|(&id, rank)| (id, blocks(rank))).collect()
    }

    fn distinct(&self) -> usize {
        let held = self.ranks.values().flat_map(|rank| &rank.held);
        held.map(|(_, hash)| hash).collect::<BTreeSet<_>>().len()
    }
}

/// How deep paths go.
const DEEP: usize = 200;

/// Paths through a tree: chains that branch and overlap, within segments, at their ends and across them.
fn chain(path: u8, from: usize, to: usize) -> Vec<BlockHash> {
    let node = |depth: usize| {
        let branches = [1, 5, 20, 63, 64, 65, 130].iter().filter(|&&branch| branch <= depth).count();
        let taken = u64::from(path) & ((1 << branches) - 1);
        BlockHash(mix(taken << 32 | depth as u64))
    };
    (from..to.max(from)).map(node).collect()
}

/// Where to begin and end: often at the start, in short steps.
fn spans() -> impl Strategy<Value = (usize, usize)> {
    let from = prop_oneof![4 => Just(0), 2 => 0..DEEP, 1 => 60usize..68];
    let len = prop_oneof![2 => 1usize..4, 2 => 0..DEEP, 1 => 60usize..70];
    (from, len).prop_map(|(from, len)| (from, (from + len).min(DEEP)))
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
    let tier = || prop_oneof![8 => Just(Tier::Device), 2 => Just(Tier::Host), 1 => Just(Tier::Remote)];
    prop_oneof![
        10 => (any::<u8>(), spans(), tier(), any::<bool>()).prop_map(|(path, (from, to), tier, parent)| {
            let parent = if parent { from.checked_sub(1).map(|before| chain(path, before, from)[0]) } else { None };
            KvEvent::Stored { parent, hashes: chain(path, from, to), tier }
        }),
        6 => (any::<u8>(), spans(), tier(), any::<bool>()).prop_map(|(path, (from, to), tier, tail_first)| {
            let mut hashes = chain(path, from, to);
            if tail_first {
                hashes.reverse();
            }
            KvEvent::Removed { hashes, tier }
        }),
        1 => Just(KvEvent::Cleared),
    ]
}

fn ops(ranks: usize) -> impl Strategy<Value = Op> {
    let skip = prop_oneof![12 => Just(0i64), 1 => 1i64..3, 1 => -3i64..0];
    prop_oneof![
        20 => (0..ranks, skip, prop::collection::vec(events(), 0..4))
            .prop_map(|(rank, skip, events)| Op::Batch { rank, skip, events }),
        4 => (0..ranks, 0u64..5, any::<u8>(), spans())
            .prop_map(|(rank, sequence_next, path, (from, to))| Op::Reset { rank, sequence_next, path, from, to }),
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
    tiers_agree: impl Fn(&[u32; 4], &[u32; 4]) -> bool,
) -> Result<(KvIndex, Naive), TestCaseError> {
    let (index, mut naive) = (KvIndex::unchecked(limits), Naive::default());
    for rank in 0..*ranks {
        let first = batch(
            id(rank),
            0,
            vec![KvEvent::Stored {
                parent: None,
                hashes: chain(rank as u8, 0, rank % 130),
                tier: Tier::Device,
            }],
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
                let reset = NaiveRank {
                    held: held.into_iter().map(|hash| (Tier::Device, hash)).collect(),
                    next: sequence_next,
                    stale: false,
                };
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
                let chain = chain(*path, 0, DEEP);
                index.overlaps(&chain, &mut out);
                let expected = naive.overlaps(&chain);
                for (rank, blocks) in naive.tiers(&chain) {
                    let answer = out.tiers(rank);
                    let answer = [answer.device, answer.host, answer.disk, answer.remote];
                    prop_assert!(tiers_agree(&answer, &blocks), "{:?} for {:?} of {}", answer, blocks, rank);
                }
                for (rank, _) in out.iter_tiers() {
                    prop_assert!(naive.ranks.contains_key(&rank), "{} is gone", rank);
                }
                let answer = sorted(&out);
                prop_assert!(agree(&answer, &expected), "{:?} for {:?}", answer, expected);
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
        let (index, naive) = run(limits, &trace, |answer, expected| answer == expected, |answer, expected| answer == expected)?;
        tidy(&index);
        let stats = index.stats();
        prop_assert_eq!(stats.blocks as usize, naive.distinct());
        prop_assert_eq!(stats.entries as usize, naive.ranks.values().map(|rank| rank.held.len()).sum::<usize>());
        prop_assert_eq!(stats.refused, 0);
        for rank in 0..trace.0 {
            index.remove_rank(id(rank));
        }
        tidy(&index);
        let stats = index.stats();
        prop_assert_eq!((stats.blocks, stats.entries, stats.ranks, stats.segments), (0, 0, 0, 0));
        prop_assert!(stats.bytes <= 64 << 10, "{:?}", stats);
    }

    #[test]
    fn short_of_room_the_index_claims_less_but_nothing_wrong(trace in traces(), bytes_max in 80_000usize..130_000) {
        let limits = IndexLimits { bytes_max, ranks_max: 4096 };
        let (index, _) = run(limits, &trace, |answer, expected| {
            let expected: BTreeMap<_, _> = expected.iter().copied().collect();
            answer.iter().all(|(rank, depth)| expected.get(rank).is_some_and(|true_depth| depth <= true_depth))
        }, |answer, expected| answer.iter().zip(expected).all(|(blocks, most)| blocks <= most))?;
        let stats = index.stats();
        prop_assert!(stats.bytes as usize <= bytes_max, "{:?} of {}", stats, bytes_max);
    }
}
