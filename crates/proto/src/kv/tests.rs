use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::limits::MESSAGE_BYTES_MAX;

const LIFE: Life = Life { incarnation: Incarnation(7), dp_ranks: 4 };

fn hashes() -> impl Strategy<Value = Vec<BlockHash>> {
    prop::collection::vec(any::<u64>().prop_map(BlockHash), 1..20)
}

fn tier() -> impl Strategy<Value = Tier> {
    prop::sample::select(vec![Tier::Device, Tier::Host, Tier::Disk, Tier::Remote])
}

fn event() -> impl Strategy<Value = KvEvent> {
    prop_oneof![
        (prop::option::of(any::<u64>().prop_map(BlockHash)), hashes(), tier(), 0..16_u8)
            .prop_map(|(parent, hashes, tier, group)| KvEvent::Stored { parent, hashes, tier, group }),
        (hashes(), tier(), 0..16_u8).prop_map(|(hashes, tier, group)| KvEvent::Removed {
            hashes,
            tier,
            group
        }),
        Just(KvEvent::Cleared),
        prop::collection::vec((any::<u32>(), 1..=u32::MAX), 0..=16).prop_map(|groups| {
            let group = |(window, step)| KvGroup {
                window_blocks: NonZeroU32::new(window),
                step_blocks: NonZeroU32::new(step).expect("above 0"),
            };
            KvEvent::Groups(groups.into_iter().map(group).collect())
        }),
    ]
}

fn batch() -> impl Strategy<Value = KvEventBatch> {
    (0_u16..4, any::<u64>(), prop::collection::vec(event(), 0..10)).prop_map(|(dp_rank, sequence, events)| {
        KvEventBatch { rank: RankId { incarnation: Incarnation(7), dp_rank }, sequence, events }
    })
}

fn stored(hashes: usize) -> KvEvent {
    KvEvent::Stored {
        parent: Some(BlockHash(u64::MAX)),
        hashes: (0..hashes as u64).map(|n| BlockHash(n | 1 << 63)).collect(),
        tier: Tier::Device,
        group: 0,
    }
}

fn batch_of(sequence: u64, events: Vec<KvEvent>) -> KvEventBatch {
    KvEventBatch { rank: RankId { incarnation: Incarnation(7), dp_rank: 0 }, sequence, events }
}

proptest! {
    #[test]
    fn packed_batches_come_back_in_order(batches in prop::collection::vec(batch(), 0..30)) {
        let deltas = batches.iter().map(|batch| v1::KvDelta::try_from(batch.clone()).expect("small"));
        let mut read = Vec::new();
        for message in pack_deltas(deltas) {
            let bytes = v1::FromAgent::from(v1::from_agent::Body::KvDeltas(message)).encode_to_vec();
            let message = v1::FromAgent::decode(bytes.as_slice()).expect("own encoding");
            let Some(v1::from_agent::Body::KvDeltas(message)) = message.body else { panic!("other body") };
            for delta in message.deltas {
                read.push(LIFE.kv_batch(delta).expect("valid"));
            }
        }
        prop_assert_eq!(read, batches);
    }

    /// Whatever bytes come, the answer is a value or an error, and what is accepted is within the bounds.
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(message) = v1::KvDeltas::decode(bytes.as_slice()) {
            for delta in message.deltas {
                if let Ok(batch) = LIFE.kv_batch(delta) {
                    prop_assert!(batch.rank.dp_rank < LIFE.dp_ranks);
                }
            }
        }
        if let Ok(v1::FromAgent { body: Some(v1::from_agent::Body::Hello(hello)) }) =
            v1::FromAgent::decode(bytes.as_slice())
        {
            _ = crate::Hello::try_from(hello);
        }
    }
}

#[test]
fn the_largest_messages_are_within_the_bound() {
    let encoded = |deltas: Vec<v1::KvDelta>| {
        let messages = pack_deltas(deltas);
        let largest = |message: v1::KvDeltas| {
            v1::FromAgent::from(v1::from_agent::Body::KvDeltas(message)).encoded_len()
        };
        (messages.len(), messages.into_iter().map(largest).max().expect("one at least"))
    };
    let delta =
        |sequence, events| v1::KvDelta::try_from(batch_of(sequence, events)).expect("within the bounds");
    let many_events: Vec<KvEvent> = (0..BATCH_EVENTS_MAX).map(|_| stored(4)).collect();
    let many_batches = (0..100_000).map(|n| delta(u64::MAX - n, vec![stored(3)])).collect();
    let rows = [
        ("one chain of all hashes", vec![delta(u64::MAX, vec![stored(BATCH_HASHES_MAX)])], 1),
        ("as many events as may be, and all hashes", vec![delta(u64::MAX, many_events)], 1),
        ("small batches: 2 of 32,768 'events' each", many_batches, 7),
    ];
    for (what, deltas, messages) in rows {
        let (count, bytes) = encoded(deltas);
        assert_eq!(count, messages, "{what}");
        assert!(bytes <= MESSAGE_BYTES_MAX, "{what}: {bytes} bytes");
    }
    let short_chains = (0..BATCH_EVENTS_MAX).map(|_| stored(2)).collect();
    for contents in [vec![stored(crate::limits::SNAPSHOT_CHUNK_HASHES_MAX)], short_chains] {
        let [chunk] = &crate::snapshot_chunks(3, u64::MAX, contents)[..] else { panic!("one piece") };
        assert!(chunk.encoded_len() <= MESSAGE_BYTES_MAX);
    }
}

#[test]
fn a_batch_that_is_too_large_asks_for_a_snapshot() {
    let too_large = |events| v1::KvDelta::try_from(batch_of(0, events)).expect_err("too large").to_string();
    let sentence = too_large(vec![stored(BATCH_HASHES_MAX), stored(1)]);
    assert_eq!(
        sentence,
        "a batch of 2 cache events with 131073 hashes is too large for a message; send a snapshot instead"
    );
    assert!(too_large(vec![KvEvent::Cleared; BATCH_EVENTS_MAX + 1]).contains("32769 cache events"));
}

#[test]
fn batches_that_cannot_be_are_refused_whole() {
    let stored = |tier, hashes| v1::KvEvent {
        event: Some(v1::kv_event::Event::Stored(v1::KvStored { parent: None, hashes, tier, group: 0 })),
    };
    let refused = |dp_rank, event: v1::KvEvent| {
        let good = stored(1, vec![1]);
        let delta = v1::KvDelta { dp_rank, sequence: 0, events: vec![good, event] };
        LIFE.kv_batch(delta).expect_err("refused").to_string()
    };
    assert_eq!(refused(4, stored(1, vec![2])), "DP rank 4 of an engine with 4");
    assert_eq!(
        refused(0, stored(0, vec![2])),
        "the tier of a cache event is 0, which this version does not know"
    );
    assert_eq!(
        refused(0, stored(9, vec![2])),
        "the tier of a cache event is 9, which this version does not know"
    );
    let removed = v1::KvRemoved { hashes: vec![1], tier: 1, group: 16 };
    assert_eq!(
        refused(0, v1::KvEvent { event: Some(v1::kv_event::Event::Removed(removed)) }),
        "the group of a cache event is 16, which this version does not know"
    );
    let groups = v1::KvGroups { groups: vec![v1::KvGroup::default(); 17] };
    assert_eq!(
        refused(0, v1::KvEvent { event: Some(v1::kv_event::Event::Groups(groups)) }),
        "the groups of a rank: 17 groups, at most 16 are allowed"
    );
    assert_eq!(refused(0, stored(1, vec![])), "a cache event has no hashes, which is required");
    assert_eq!(
        refused(0, v1::KvEvent { event: None }),
        "KvEvent has no event of a kind that this version knows, which is required"
    );
    let all = v1::KvDelta { dp_rank: 0, sequence: 0, events: vec![stored(1, vec![1; BATCH_HASHES_MAX]); 2] };
    assert_eq!(
        LIFE.kv_batch(all).expect_err("refused").to_string(),
        "a batch of cache events: 262144 hashes, at most 131072 are allowed"
    );
    let unknown = Life { dp_ranks: 0, ..LIFE };
    let early = v1::KvDelta { dp_rank: 0, sequence: 0, events: vec![] };
    assert_eq!(unknown.kv_batch(early).expect_err("refused").to_string(), "DP rank 0 of an engine with 0");
}

#[test]
fn events_without_blocks_are_not_sent() {
    let empty = KvEvent::Removed { hashes: vec![], tier: Tier::Device, group: 0 };
    let delta = v1::KvDelta::try_from(batch_of(3, vec![empty, KvEvent::Cleared])).expect("small");
    assert_eq!(LIFE.kv_batch(delta), Ok(batch_of(3, vec![KvEvent::Cleared])));
}
