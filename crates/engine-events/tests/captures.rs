//! What a real vLLM 0.32 published (`fixtures/vllm`, whose README says how), through the whole crate.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

use std::collections::{BTreeMap, BTreeSet};

use forebay_engine_events::{
    Applied, EngineEvent, EngineHash, EventBatch, ExtraKey, GroupKind, Observed, RankCache, RankSettings,
    Removed, Sequence, Stored, Via, decode,
    encode::{Dialect, encode},
    frames,
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::{BlockHash, KvEvent, Tier, TokenId, device_blocks};
use proptest::prelude::*;

macro_rules! payloads {
    ($($name:literal)*) => {
        [$(include_bytes!(concat!("../fixtures/vllm/kv_events/", $name, ".payload.msgpack")) as &[u8],)*]
    };
}

/// Batches 0 to 13.
const PAYLOADS: [&[u8]; 14] = payloads!(
    "seq000" "seq001" "seq002" "seq003" "seq004" "seq005" "seq006" "seq007" "seq008" "seq009" "seq010" "seq011"
    "seq012" "seq013_all_blocks_cleared"
);
/// The same, decoded by msgspec.
const STREAM: &str = include_str!("../fixtures/vllm/kv_events/stream.jsonl");
const RANKS: [&str; 2] = [
    include_str!("../fixtures/vllm/kv_events/dp2/rank0.jsonl"),
    include_str!("../fixtures/vllm/kv_events/dp2/rank1.jsonl"),
];

/// A block that the server computed twice.
const TWICE: EngineHash = EngineHash(16_324_517_495_956_039_047);

fn hasher(block_size_tokens: u32) -> BlockHasher {
    BlockHasher::new(HashKey::GOLDEN, block_size_tokens)
}

fn cache(block_size_tokens: u32) -> RankCache {
    RankCache::new(RankSettings {
        hasher: hasher(block_size_tokens),
        model: "tiny".into(),
        engine_block_size_tokens: Some(32),
        blocks_max: 1000,
    })
}

fn batches() -> Vec<EventBatch> {
    PAYLOADS.iter().map(|payload| decode(payload).unwrap()).collect()
}

fn stored(batch: &EventBatch) -> &Stored {
    match batch.events.last() {
        Some(EngineEvent::Stored(stored)) => stored,
        other => panic!("{other:?}"),
    }
}

fn removed(batch: &EventBatch) -> Vec<EngineHash> {
    let hashes = batch.events.iter().filter_map(|event| match event {
        EngineEvent::Removed(Removed { hashes, tier: Tier::Device, group: Some(0) }) => Some(hashes.clone()),
        _ => None,
    });
    hashes.flatten().collect()
}

/// What the other decoder read, as ours would say it.
fn from_json(payload: &serde_json::Value) -> EventBatch {
    let events = payload[1].as_array().unwrap().iter().map(|event| {
        let hashes = |key: &str| {
            let values = event[key].as_array().unwrap();
            values.iter().map(|hash| EngineHash(hash.as_u64().unwrap())).collect()
        };
        let group = event["group_idx"].as_u64().map(|group| group as u32);
        match event["type"].as_str().unwrap() {
            "AllBlocksCleared" => EngineEvent::Cleared,
            "BlockRemoved" => {
                assert_eq!(event["medium"], "GPU");
                EngineEvent::Removed(Removed { hashes: hashes("block_hashes"), tier: Tier::Device, group })
            }
            "BlockStored" => {
                assert_eq!(
                    (&event["medium"], &event["kv_cache_spec_kind"]),
                    (&"GPU".into(), &"full_attention".into())
                );
                assert!(event["lora_id"].is_null() && event["lora_name"].is_null());
                let tokens = event["token_ids"].as_array().unwrap();
                let keys = event["extra_keys"].as_array().unwrap().iter().map(|keys| {
                    let texts = keys.as_array().into_iter().flatten();
                    texts.map(|text| ExtraKey::Text(text.as_str().unwrap().into())).collect()
                });
                EngineEvent::Stored(Stored {
                    hashes: hashes("block_hashes"),
                    parent: event["parent_block_hash"].as_u64().map(EngineHash),
                    tokens: tokens.iter().map(|token| token.as_u64().unwrap() as TokenId).collect(),
                    block_size_tokens: event["block_size"].as_u64().unwrap() as u32,
                    lora_id: None,
                    lora_name: None,
                    salt: None,
                    extra_keys: Some(keys.collect()),
                    tier: Tier::Device,
                    group,
                    kind: Some(GroupKind::FullAttention),
                    window_tokens: None,
                })
            }
            other => panic!("{other}"),
        }
    });
    EventBatch {
        time_seconds: payload[0].as_f64().unwrap(),
        events: events.collect(),
        dp_rank: payload[2].as_u64().map(|rank| rank as u16),
    }
}

#[test]
fn captured_payloads_are_read_as_another_decoder_reads_them() {
    let lines: Vec<serde_json::Value> =
        STREAM.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), PAYLOADS.len());
    for (line, payload) in lines.iter().zip(PAYLOADS) {
        let mut expected = from_json(&line["payload"]);
        let batch = decode(payload).unwrap();
        assert!((expected.time_seconds - batch.time_seconds).abs() < 1e-6);
        expected.time_seconds = batch.time_seconds;
        assert_eq!(batch, expected, "batch {}", line["seq"]);
        assert_eq!(
            encode(&batch, Dialect::VllmMap),
            payload,
            "what is written is what vLLM wrote, to the byte"
        );
    }
}

#[test]
fn frames_and_numbers_are_those_of_the_capture() {
    let mut sequence = Sequence::new();
    for (line, payload) in STREAM.lines().zip(PAYLOADS) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let number = line["seq"].as_u64().unwrap();
        let sent = frames::publication(line["topic"].as_str().unwrap(), number, payload.to_vec());
        let hex: String = sent[1].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(line["seq_hex"].as_str(), Some(&*hex));
        let message = frames::published(&sent).unwrap();
        assert_eq!((message.topic, message.sequence, message.payload), (&b"kv-events"[..], number, payload));
        let time = decode(payload).unwrap().time_seconds;
        assert_eq!(sequence.observe(number, time, Via::Published), Observed::InOrder);
    }
    assert_eq!(sequence.next(), 14);
}

#[test]
fn the_facts_of_the_capture() {
    let batches = batches();
    assert!(batches.iter().all(|batch| batch.dp_rank == Some(0)));
    assert_eq!([1, 3].map(|number: usize| stored(&batches[number]).hashes.clone()), [[TWICE], [TWICE]]);
    assert_eq!(removed(&batches[9]).iter().filter(|&&hash| hash == TWICE).count(), 2);
    let salted = stored(&batches[5]);
    assert_eq!(salted.extra_keys, Some(vec![vec![ExtraKey::Text("tenant-7-salt".into())], vec![]]));
    assert_eq!(salted.tokens, stored(&batches[0]).tokens, "the same prompt as the first, but salted");
    assert_ne!(salted.hashes, stored(&batches[0]).hashes);
    assert_eq!(batches[13].events[0], EngineEvent::Cleared);
    assert_eq!(batches[13].events.len(), 2, "and a store in the same batch");
}

#[test]
fn each_rank_of_a_data_parallel_server_says_who_it_is() {
    for (rank, line) in (0..).zip(RANKS) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let expected = from_json(&line["payload"]);
        assert_eq!(expected.dp_rank, Some(rank));
        let payload = encode(&expected, Dialect::VllmMap);
        assert_eq!(line["payload_bytes"].as_u64(), Some(payload.len() as u64));
        let batch = decode(&payload).unwrap();
        assert_eq!(batch, expected);
        assert_eq!(cache(16).apply(&batch).events.len(), 1);
    }
}

/// Our chain of the tokens of `batches`' stores, one after another.
fn chain(block_size_tokens: u32, salt: &str, batches: &[&EventBatch]) -> Vec<BlockHash> {
    let tokens: Vec<TokenId> = batches.iter().flat_map(|batch| stored(batch).tokens.clone()).collect();
    let hasher = hasher(block_size_tokens);
    hasher.chain(hasher.root("tiny", salt), &tokens)
}

#[test]
fn our_hashes_are_those_of_the_prompts() {
    // 32 tokens an engine block: 2 of ours, 1, or two thirds of one.
    for block_size_tokens in [16, 32, 48] {
        let batches = batches();
        let mut cache = cache(block_size_tokens);
        let mut applied = batches[..8].iter().map(|batch| cache.apply(batch));
        let per_engine_block = |engine_blocks: u32| (engine_blocks * 32 / block_size_tokens) as usize;
        let prompt = chain(block_size_tokens, "", &[&batches[0], &batches[1], &batches[2]]);
        let salted = chain(block_size_tokens, "tenant-7-salt", &[&batches[5]]);
        let (first, second) = (per_engine_block(2), per_engine_block(3));
        let link = |parent: Option<BlockHash>, hashes: &[BlockHash]| Applied {
            events: if hashes.is_empty() {
                vec![]
            } else {
                vec![KvEvent::Stored { parent, hashes: hashes.to_vec(), tier: Tier::Device, group: 0 }]
            },
            faults: vec![],
        };
        let said: Vec<Applied> = applied.by_ref().take(6).collect();
        assert_eq!(said[0], link(None, &prompt[..first]));
        assert_eq!(said[1], link(Some(prompt[first - 1]), &prompt[first..second]));
        assert_eq!(said[2], link(Some(prompt[second - 1]), &prompt[second..]));
        assert_eq!(said[3], Applied::default(), "stored again: nothing new");
        assert_eq!(said[4], Applied::default());
        assert_eq!(said[5], link(None, &salted));
        assert_eq!(said[5].events.len(), 1);
        assert_ne!(salted[0], prompt[0]);
    }
}

#[test]
fn the_capture_leaves_what_its_last_batch_stored() {
    let batches = batches();
    let mut cache = cache(16);
    let mut held: BTreeMap<usize, usize> = BTreeMap::new();
    let mut index = BTreeSet::new();
    for (number, batch) in batches.iter().enumerate() {
        let applied = cache.apply(batch);
        assert_eq!(applied.faults, []);
        follow(&mut index, &applied.events);
        assert_eq!(device_blocks(&cache.snapshot()).collect::<BTreeSet<_>>(), index);
        held.insert(number, index.len());
    }
    // Batch 8 removes a block that is stored twice; batch 9 takes the second and the other copies.
    assert_eq!([7, 8, 9, 12, 13].map(|number| held[&number]), [32, 42, 44, 44, 2]);
    let last = chain(16, "", &[&batches[13]]);
    assert_eq!(index, last.into_iter().collect());
    let stats = cache.stats();
    assert_eq!((stats.engine_blocks, stats.blocks_device, stats.engine_block_size_tokens), (1, 2, 32));
    assert_eq!((stats.left_out, stats.removals_unknown), (0, 0));
}

/// An index that insists that what is stored was not there and what is removed was.
fn follow(index: &mut BTreeSet<BlockHash>, events: &[KvEvent]) {
    for event in events {
        match event {
            KvEvent::Stored { hashes, tier: Tier::Device, group: 0, .. } => {
                assert!(hashes.iter().all(|&hash| index.insert(hash)), "stored twice");
            }
            KvEvent::Removed { hashes, tier: Tier::Device, group: 0 } => {
                assert!(hashes.iter().all(|hash| index.remove(hash)), "removed twice");
            }
            KvEvent::Stored { .. } | KvEvent::Removed { .. } => {}
            KvEvent::Cleared => index.clear(),
            KvEvent::Groups(_) => {}
        }
    }
}

/// One change of a payload.
#[derive(Debug, Clone)]
enum Damage {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index),
    /// Goes on with the rest of another payload.
    Graft(prop::sample::Index, usize, prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    use any as of;
    prop_oneof![
        4 => (of::<prop::sample::Index>(), of::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        1 => of::<prop::sample::Index>().prop_map(Damage::Cut),
        1 => (of::<prop::sample::Index>(), prop::collection::vec(of::<u8>(), 1..6))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => of::<prop::sample::Index>().prop_map(Damage::Remove),
        1 => (of::<prop::sample::Index>(), 0..PAYLOADS.len(), of::<prop::sample::Index>())
            .prop_map(|(at, other, from)| Damage::Graft(at, other, from)),
    ]
}

fn damaged(payload: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    for damage in damages {
        if payload.is_empty() {
            break;
        }
        match damage {
            Damage::Set(at, byte) => {
                let at = at.index(payload.len());
                payload[at] = *byte;
            }
            Damage::Cut(at) => payload.truncate(at.index(payload.len())),
            Damage::Insert(at, bytes) => {
                let at = at.index(payload.len());
                payload.splice(at..at, bytes.iter().copied());
            }
            Damage::Remove(at) => drop(payload.remove(at.index(payload.len()))),
            Damage::Graft(at, other, from) => {
                payload.truncate(at.index(payload.len()));
                payload.extend_from_slice(&PAYLOADS[*other][from.index(PAYLOADS[*other].len())..]);
            }
        }
    }
    payload
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever garbage lies between good batches: no panic, and whoever follows the events has what the rank has.
    #[test]
    fn damaged_captures_do_no_harm(
        damages in prop::collection::vec((0..PAYLOADS.len(), prop::collection::vec(damage(), 0..3)), 1..12),
        block_size_tokens in prop::sample::select(vec![1, 16, 24, 32, 100]),
        declared in prop::option::of(Just(32)),
        blocks_max in 1_usize..40,
    ) {
        let mut cache = RankCache::new(RankSettings {
            hasher: hasher(block_size_tokens),
            model: "tiny".into(),
            engine_block_size_tokens: declared,
            blocks_max,
        });
        let mut index = BTreeSet::new();
        for (number, damages) in damages {
            if let Ok(batch) = decode(&damaged(PAYLOADS[number], &damages)) {
                let applied = cache.apply(&batch);
                prop_assert!(applied.faults.len() <= 9);
                follow(&mut index, &applied.events);
            }
            let snapshot = cache.snapshot();
            prop_assert_eq!(device_blocks(&snapshot).count(), index.len());
            prop_assert_eq!(device_blocks(&snapshot).collect::<BTreeSet<_>>(), index.clone());
            let stats = cache.stats();
            prop_assert!(stats.engine_blocks + stats.engine_blocks_other_groups <= blocks_max as u64);
            prop_assert!(index.len() <= blocks_max);
        }
    }
}
