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
    held: BTreeSet<(u8, Tier, BlockHash)>,
    groups: Vec<KvGroup>,
    next: u64,
    stale: bool,
}

impl NaiveRank {
    /// The longest prefix that all groups can serve from the first `tiers` tiers.
    fn longest(&self, chain: &[BlockHash], tiers: usize) -> u32 {
        if self.held.is_empty() {
            return 0;
        }
        let tiers = &[Tier::Device, Tier::Host, Tier::Disk, Tier::Remote][..tiers];
        let full = [KvGroup::FULL];
        let groups = if self.groups.is_empty() { &full } else { &self.groups[..] };
        // How many of the first blocks each group does not hold.
        let missing: Vec<Vec<usize>> = (0..groups.len() as u8)
            .map(|group| {
                let holds = |hash| tiers.iter().any(|&tier| self.held.contains(&(group, tier, hash)));
                let mut missing = 0;
                let counts = chain.iter().map(|&hash| {
                    missing += usize::from(!holds(hash));
                    missing
                });
                std::iter::once(0).chain(counts).collect()
            })
            .collect();
        let serves = |len: usize, group: usize, of: &KvGroup| {
            let first = of.window_blocks.map_or(0, |window| len.saturating_sub(window.get() as usize));
            len.is_multiple_of(of.step_blocks.get() as usize) && missing[group][first] == missing[group][len]
        };
        let good = |&len: &usize| groups.iter().enumerate().all(|(group, of)| serves(len, group, of));
        (1..=chain.len()).rev().find(good).unwrap_or(0) as u32
    }
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
                KvEvent::Groups(groups) => rank.groups.clone_from(groups),
                KvEvent::Stored { hashes, tier, group, .. } => {
                    rank.held.extend(hashes.iter().map(|&hash| (*group, *tier, hash)));
                }
                KvEvent::Removed { hashes, tier, group } => {
                    rank.held
                        .retain(|(of, held, hash)| (of, held) != (group, tier) || !hashes.contains(hash));
                }
                KvEvent::Cleared => rank.held.clear(),
            }
        }
        Applied::Ok
    }

    fn overlaps(&self, chain: &[BlockHash]) -> Vec<(RankId, u32)> {
        let all = self.tiers(chain).into_iter().map(|(id, blocks)| (id, blocks[0]));
        all.filter(|&(_, blocks)| blocks > 0).collect()
    }

    /// Leading blocks that each rank can reuse, from a tier or nearer ones.
    fn tiers(&self, chain: &[BlockHash]) -> Vec<(RankId, [u32; 4])> {
        let blocks = |rank: &NaiveRank| [1, 2, 3, 4].map(|tiers| rank.longest(chain, tiers));
        self.ranks.iter().map(|(&id, rank)| (id, blocks(rank))).collect()
    }

    fn distinct(&self) -> usize {
        let held = self.ranks.values().flat_map(|rank| &rank.held);
        held.map(|(_, _, hash)| hash).collect::<BTreeSet<_>>().len()
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
        contents: Vec<KvEvent>,
    },
    RemoveRank(usize),
    RemoveIncarnation(u64),
    Overlaps(u8),
}

fn group() -> impl Strategy<Value = u8> {
    prop_oneof![6 => Just(0), 1 => 0u8..4]
}

fn kv_group() -> impl Strategy<Value = KvGroup> {
    let window = prop_oneof![Just(0u32), Just(1), 2u32..12, 60u32..70, 100u32..200];
    (window, prop_oneof![3 => Just(1u32), 1 => 2u32..20])
        .prop_map(|(window, step)| super::window(window, step))
}

/// What a rank may begin with.
fn contents() -> impl Strategy<Value = Vec<KvEvent>> {
    let stored =
        (any::<u8>(), spans(), any::<bool>(), group()).prop_map(|(path, (from, to), parent, group)| {
            let parent =
                if parent { from.checked_sub(1).map(|before| chain(path, before, from)[0]) } else { None };
            KvEvent::Stored { parent, hashes: chain(path, from, to), tier: Tier::Device, group }
        });
    let groups = prop::option::of(prop::collection::vec(kv_group(), 1..4).prop_map(KvEvent::Groups));
    (groups, prop::collection::vec(stored, 0..4))
        .prop_map(|(groups, stored)| groups.into_iter().chain(stored).collect())
}

fn events() -> impl Strategy<Value = KvEvent> {
    let tier = || prop_oneof![8 => Just(Tier::Device), 2 => Just(Tier::Host), 1 => Just(Tier::Remote)];
    prop_oneof![
        10 => (any::<u8>(), spans(), tier(), any::<bool>(), group()).prop_map(|(path, (from, to), tier, parent, group)| {
            let parent = if parent { from.checked_sub(1).map(|before| chain(path, before, from)[0]) } else { None };
            KvEvent::Stored { parent, hashes: chain(path, from, to), tier, group }
        }),
        6 => (any::<u8>(), spans(), tier(), any::<bool>(), group()).prop_map(|(path, (from, to), tier, tail_first, group)| {
            let mut hashes = chain(path, from, to);
            if tail_first {
                hashes.reverse();
            }
            KvEvent::Removed { hashes, tier, group }
        }),
        1 => prop::collection::vec(kv_group(), 0..4).prop_map(KvEvent::Groups),
        1 => Just(KvEvent::Cleared),
    ]
}

fn ops(ranks: usize) -> impl Strategy<Value = Op> {
    let skip = prop_oneof![12 => Just(0i64), 1 => 1i64..3, 1 => -3i64..0];
    prop_oneof![
        20 => (0..ranks, skip, prop::collection::vec(events(), 0..4))
            .prop_map(|(rank, skip, events)| Op::Batch { rank, skip, events }),
        4 => (0..ranks, 0u64..5, contents())
            .prop_map(|(rank, sequence_next, contents)| Op::Reset { rank, sequence_next, contents }),
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
                group: 0,
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
            Op::Reset { rank, sequence_next, contents } => {
                let rank = id(*rank);
                prop_assert_eq!(index.reset(rank, *sequence_next, contents.clone()), Applied::Ok);
                naive.ranks.insert(rank, NaiveRank::default());
                prop_assert_eq!(naive.apply(&batch(rank, 0, contents.clone())), Applied::Ok);
                naive.ranks.get_mut(&rank).expect("just made").next = *sequence_next;
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
        // What the index says of its ranks makes another one like it.
        let again = KvIndex::unchecked(limits);
        for &rank in naive.ranks.keys().filter(|rank| !naive.ranks[*rank].stale) {
            let contents = index.contents(rank).expect("followed");
            prop_assert_eq!(again.reset(rank, 0, contents), Applied::Ok);
        }
        let mut out = Overlaps::default();
        for path in [0, 77, 255] {
            let chain = chain(path, 0, DEEP);
            again.overlaps(&chain, &mut out);
            prop_assert_eq!(sorted(&out), naive.overlaps(&chain));
        }
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
