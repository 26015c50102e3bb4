use std::collections::BTreeSet;

use forebay_proto::Life;
use forebay_types::{BlockHash, Incarnation, RankId, Tier};
use proptest::prelude::*;

use super::*;

const LIFE: Life = Life { incarnation: Incarnation(1), dp_ranks: 2 };
const LIMITS: FeedLimits = FeedLimits { batches_max: 4, hashes_max: 24 };

fn batch(dp_rank: u16, sequence: u64, events: Vec<KvEvent>) -> KvEventBatch {
    KvEventBatch { rank: RankId { incarnation: Incarnation(1), dp_rank }, sequence, events }
}

fn stored(hashes: impl IntoIterator<Item = u64>) -> KvEvent {
    KvEvent::Stored {
        parent: None,
        hashes: hashes.into_iter().map(BlockHash).collect(),
        tier: Tier::Device,
        group: 0,
    }
}

fn removed(hashes: impl IntoIterator<Item = u64>) -> KvEvent {
    KvEvent::Removed { hashes: hashes.into_iter().map(BlockHash).collect(), tier: Tier::Device, group: 0 }
}

/// What is held: where, for which layers, and what.
type Blocks = BTreeSet<(Tier, u8, BlockHash)>;

/// The events that make `blocks` from nothing.
fn contents(blocks: &Blocks) -> Vec<KvEvent> {
    let event = |&(tier, group, hash): &_| KvEvent::Stored { parent: None, hashes: vec![hash], tier, group };
    blocks.iter().map(event).collect()
}

/// What a gateway makes of what it is told: plain sets, and a panic for a number out of order.
#[derive(Default)]
struct Gateway {
    cursor: Cursor,
    ranks: [Option<(u64, Blocks)>; 2],
    snapshots: usize,
}

impl Gateway {
    /// Reads once; false if there was nothing.
    fn read(&mut self, feed: &Feed, hashes_max: usize) -> bool {
        assert_eq!(feed.has_news(&self.cursor), feed.next(&mut self.cursor.clone(), hashes_max).is_some());
        match feed.next(&mut self.cursor, hashes_max) {
            None => return false,
            Some(Next::Snapshot { dp_rank, sequence_next, contents }) => {
                self.snapshots += 1;
                let mut blocks = Blocks::new();
                contents.iter().for_each(|event| apply(&mut blocks, event));
                self.ranks[usize::from(dp_rank)] = Some((sequence_next, blocks));
            }
            Some(Next::Deltas(deltas)) => {
                for delta in deltas {
                    let KvEventBatch { rank, sequence, events } =
                        LIFE.kv_batch(v1::KvDelta::clone(&delta)).expect("a valid batch");
                    let known =
                        self.ranks[usize::from(rank.dp_rank)].as_mut().expect("a snapshot came first");
                    assert_eq!(sequence, known.0, "batches in order");
                    known.0 += 1;
                    events.iter().for_each(|event| apply(&mut known.1, event));
                }
            }
        }
        true
    }
}

fn apply(blocks: &mut Blocks, event: &KvEvent) {
    match event {
        KvEvent::Groups(_) => {}
        KvEvent::Stored { hashes, tier, group, .. } => {
            blocks.extend(hashes.iter().map(|&hash| (*tier, *group, hash)));
        }
        KvEvent::Removed { hashes, tier, group } => hashes.iter().for_each(|&hash| {
            blocks.remove(&(*tier, *group, hash));
        }),
        KvEvent::Cleared => blocks.clear(),
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// The engine changes its cache.
    Event(u16, KvEvent),
    /// A batch of it is lost before it comes here.
    Lose(u16, KvEvent),
    /// A gateway reads once.
    Read(usize),
    /// A gateway loses what it knows of a rank.
    Forget(usize, u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tier = prop_oneof![4 => Just(Tier::Device), 1 => Just(Tier::Host)];
    let hashes = || proptest::collection::vec((0u64..20).prop_map(BlockHash), 1..8);
    let event = prop_oneof![
        6 => (hashes(), tier.clone(), 0..2_u8).prop_map(|(hashes, tier, group)| KvEvent::Stored { parent: None, hashes, tier, group }),
        4 => (hashes(), tier, 0..2_u8).prop_map(|(hashes, tier, group)| KvEvent::Removed { hashes, tier, group }),
        1 => Just(KvEvent::Cleared),
    ];
    let step = prop_oneof![
        8 => (0u16..2, event.clone()).prop_map(|(rank, event)| Step::Event(rank, event)),
        1 => (0u16..2, event).prop_map(|(rank, event)| Step::Lose(rank, event)),
        5 => (0usize..3).prop_map(Step::Read),
        1 => (0usize..3, 0u16..2).prop_map(|(gateway, rank)| Step::Forget(gateway, rank)),
    ];
    proptest::collection::vec(step, 1..120)
}

proptest! {
    #[test]
    fn every_gateway_ends_with_exactly_what_the_engine_holds(steps in steps(), hashes_max in 1usize..40) {
        let mut feed = Feed::new(2, LIMITS);
        let mut truth: [(u64, Blocks); 2] = Default::default();
        let mut gateways: [Gateway; 3] = Default::default();
        for step in steps {
            match step {
                Step::Event(rank, event) => {
                    let (next, blocks) = &mut truth[usize::from(rank)];
                    apply(blocks, &event);
                    let taken = feed.apply(batch(rank, *next, vec![event.clone()]));
                    *next += 1;
                    if taken == Taken::Gap {
                        prop_assert_eq!(feed.gaps().collect::<Vec<_>>(), vec![rank]);
                        feed.reset(rank, *next, contents(blocks));
                    } else {
                        prop_assert_eq!(taken, Taken::Applied);
                        prop_assert_eq!(feed.apply(batch(rank, *next - 1, vec![event])), Taken::Repeated);
                    }
                }
                Step::Lose(rank, event) => {
                    let (next, blocks) = &mut truth[usize::from(rank)];
                    apply(blocks, &event);
                    *next += 1;
                }
                Step::Read(gateway) => drop(gateways[gateway].read(&feed, hashes_max)),
                Step::Forget(gateway, rank) => {
                    gateways[gateway].cursor.forget(rank);
                }
            }
        }
        // One more batch on each rank shows what was lost last.
        for (dp_rank, (next, blocks)) in (0u16..).zip(&mut truth) {
            if feed.apply(batch(dp_rank, *next, vec![])) == Taken::Gap {
                feed.reset(dp_rank, *next + 1, contents(blocks));
            }
            *next += 1;
        }
        for gateway in &mut gateways {
            while gateway.read(&feed, hashes_max) {}
            for (known, expected) in gateway.ranks.iter().zip(&truth) {
                prop_assert_eq!(known.as_ref(), Some(expected));
            }
        }
        for (dp_rank, (_, blocks)) in (0u16..).zip(&truth) {
            let on_device = blocks.iter().filter(|(tier, group, _)| (*tier, *group) == (Tier::Device, 0));
            prop_assert_eq!(feed.blocks(dp_rank), on_device.count());
        }
    }
}

#[test]
fn a_gateway_that_keeps_up_gets_one_snapshot_and_a_slow_one_another() {
    let mut feed = Feed::new(1, LIMITS);
    let (mut fast, mut slow) = (Gateway::default(), Gateway::default());
    assert!(fast.read(&feed, 100) && slow.read(&feed, 100), "an empty cache is a snapshot too");
    for sequence in 0..10 {
        assert_eq!(feed.apply(batch(0, sequence, vec![stored([sequence])])), Taken::Applied);
        assert!(fast.read(&feed, 100));
    }
    while slow.read(&feed, 100) {}
    assert_eq!((fast.snapshots, slow.snapshots), (1, 2));
    assert_eq!(fast.ranks, slow.ranks);
}

#[test]
fn nothing_is_given_while_events_are_missing() {
    let mut feed = Feed::new(1, LIMITS);
    let mut gateway = Gateway::default();
    gateway.read(&feed, 100);
    assert_eq!(feed.apply(batch(0, 1, vec![stored([1])])), Taken::Gap);
    assert_eq!(feed.apply(batch(0, 2, vec![stored([2])])), Taken::Waiting);
    assert!(!gateway.read(&feed, 100));
    feed.reset(0, 3, vec![stored([7])]);
    assert_eq!(feed.apply(batch(0, 2, vec![stored([2])])), Taken::Repeated, "the whole cache has it");
    assert_eq!(feed.apply(batch(0, 3, vec![removed([7])])), Taken::Applied);
    while gateway.read(&feed, 100) {}
    assert_eq!((gateway.snapshots, gateway.ranks[0].clone()), (2, Some((4, BTreeSet::new()))));
    assert_eq!(feed.apply(batch(5, 0, vec![])), Taken::NoRank);
}

#[test]
fn a_batch_too_large_for_a_message_becomes_a_snapshot() {
    let mut feed = Feed::new(1, FeedLimits::default());
    let mut gateway = Gateway::default();
    gateway.read(&feed, 100);
    let many = forebay_proto::limits::BATCH_HASHES_MAX as u64 + 1;
    assert_eq!(feed.apply(batch(0, 0, vec![stored(0..many)])), Taken::Applied);
    assert!(gateway.read(&feed, 100) && !gateway.read(&feed, 100));
    assert_eq!(gateway.snapshots, 2);
    assert_eq!(gateway.ranks[0].as_ref().map(|(next, blocks)| (*next, blocks.len() as u64)), Some((1, many)));
}
