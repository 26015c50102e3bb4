//! KV events of a vLLM double on their sockets.

use std::collections::BTreeMap;

use crate::common::{LONG, get, post, post_with};
use forebay_testkit::subscriber::{Subscriber, replay};
use forebay_testkit::{EventGarbage, Fault, KvEventOptions, VllmDouble, VllmOptions, VllmVersion, tokenizer};
use serde_json::{Value, json};

async fn ask(double: &VllmDouble, prompt: &str) {
    let body = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0});
    assert_eq!(post(&double.url(), "/v1/completions", &body).await.status, 200);
}

/// A subscriber that is known to be subscribed: it has seen a batch.
async fn subscribed(double: &VllmDouble) -> Subscriber {
    let endpoint = &double.event_endpoints()[0].events;
    let mut subscriber = Subscriber::connect(endpoint).await.unwrap();
    for attempt in 0..100 {
        ask(double, &format!("{attempt:0>40}")).await;
        if subscriber.next(std::time::Duration::from_millis(20)).await.is_ok() {
            while subscriber.next(std::time::Duration::from_millis(20)).await.is_ok() {}
            return subscriber;
        }
    }
    panic!("never subscribed");
}

#[tokio::test]
async fn blocks_are_announced_with_their_tokens() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let mut subscriber = subscribed(&double).await;
    let before =
        replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap().len() as u64;
    let prompt = "The quick brown fox jumps over the lazy dog";
    ask(&double, prompt).await;
    let batch = subscriber.next(LONG).await.unwrap();
    assert_eq!((batch.sequence, batch.topic.as_deref()), (before, Some("kv-events")));
    let stored = &batch.events()[0];
    assert_eq!(stored["token_ids"], json!(tokenizer::encode(&prompt[..32])));
    assert_eq!((&stored["block_size"], &stored["parent_block_hash"]), (&json!(16), &Value::Null));
    assert_eq!(stored["block_hashes"].as_array().unwrap().len(), 2);
    assert_eq!(batch.payload[2], json!(0));
    ask(&double, prompt).await;
    ask(&double, "entirely different words, long enough").await;
    let next = subscriber.next(LONG).await.unwrap();
    assert_eq!(next.events()[0]["token_ids"][0], json!(b'e'), "a hit announces nothing");
}

#[tokio::test]
async fn a_gap_is_filled_by_replay() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let mut subscriber = subscribed(&double).await;
    double.control().lose_events(2);
    for prompt in
        ["first of them, lost on the way", "second of them, lost as well", "third of them, it arrives"]
    {
        ask(&double, prompt).await;
    }
    let seen = subscriber.next(LONG).await.unwrap();
    let replayed =
        replay(double.event_endpoints()[0].replay.as_ref().unwrap(), seen.sequence - 2, LONG).await.unwrap();
    let sequences: Vec<u64> = replayed.iter().map(|batch| batch.sequence).collect();
    assert_eq!(sequences, [seen.sequence - 2, seen.sequence - 1, seen.sequence]);
    assert_eq!(replayed[2], seen);
}

#[tokio::test]
async fn the_ring_keeps_only_so_many_batches() {
    let kv_events = Some(KvEventOptions { buffer_steps: 3, ..Default::default() });
    let double = VllmDouble::start(VllmOptions { kv_events, ..Default::default() }).await;
    for number in 0..8 {
        ask(&double, &format!("prompt {number}, long enough for a block")).await;
    }
    let kept = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    assert_eq!(kept.iter().map(|batch| batch.sequence).collect::<Vec<_>>(), [5, 6, 7]);
}

#[tokio::test]
async fn a_reset_is_told_with_the_next_batch() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let replay_at = double.event_endpoints()[0].replay.clone().unwrap();
    ask(&double, "something that fills a block").await;
    let success = post(&double.url(), "/reset_prefix_cache", &json!({})).await.json();
    assert_eq!(success, json!({"success": true}));
    assert_eq!(replay(&replay_at, 0, LONG).await.unwrap().len(), 1, "nothing yet");
    ask(&double, "something that fills a block").await;
    let batches = replay(&replay_at, 1, LONG).await.unwrap();
    let kinds: Vec<&Value> = batches[0].events().iter().map(|event| &event["type"]).collect();
    assert_eq!(kinds, [&json!("AllBlocksCleared"), &json!("BlockStored")]);
    assert_eq!(double.counts(0).prefix_hits, 0);
}

#[tokio::test]
async fn hashes_counted_by_events_are_those_in_the_cache() {
    let double =
        VllmDouble::start(VllmOptions { blocks: 65, max_model_len: 512, ..Default::default() }).await;
    let prompts: Vec<String> =
        (0..40).map(|number| format!("{} and more of it {number}", "shared ".repeat(8))).collect();
    futures::future::join_all(prompts.iter().map(|prompt| {
        let body = json!({"prompt": prompt, "max_tokens": 60, "ignore_eos": true, "temperature": 0});
        let url = double.url();
        async move { post(&url, "/v1/completions", &body).await }
    }))
    .await;
    let batches = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    let mut counts: BTreeMap<u64, i64> = BTreeMap::new();
    let mut removed = 0;
    for event in batches.iter().flat_map(|batch| batch.events()) {
        let step = if event["type"] == "BlockStored" { 1 } else { -1 };
        removed += i64::from(step < 0);
        for hash in event["block_hashes"].as_array().unwrap() {
            *counts.entry(hash.as_u64().unwrap()).or_default() += step;
        }
    }
    assert!(removed > 0, "the pool is small enough to evict");
    counts.retain(|_, count| *count != 0);
    assert!(counts.values().all(|count| *count > 0));
    assert_eq!(counts.into_keys().collect::<Vec<_>>(), double.cached_hashes(0));
}

#[tokio::test]
async fn salts_and_adapters_are_told() {
    let double =
        VllmDouble::start(VllmOptions { adapters: vec!["tuned".into()], ..Default::default() }).await;
    let body = json!({"prompt": "z".repeat(40), "model": "tuned", "cache_salt": "tenant", "max_tokens": 1});
    post_with(&double.url(), "/v1/completions", &[("x-session-id", "talk")], &body).await;
    let batches = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    let stored = &batches[0].events()[0];
    assert_eq!(stored["extra_keys"], json!([["tuned", "tenant"], ["tuned"]]));
    assert_eq!((&stored["lora_name"], &stored["session_id"]), (&json!("tuned"), &json!("talk")));
    ask(&double, &"z".repeat(40)).await;
    assert_eq!(double.counts(0).prefix_hits, 0, "another identity, other blocks");
}

#[tokio::test]
async fn each_rank_publishes_on_its_own_port() {
    let double = VllmDouble::start(VllmOptions { dp: 2, ..Default::default() }).await;
    let sources = get(&double.url(), "/kv_event_sources").await.json();
    let port = |rank: &str| -> u16 {
        sources[rank]["endpoint"].as_str().unwrap().rsplit(':').next().unwrap().parse().unwrap()
    };
    assert_eq!(port("1"), port("0") + 1);
    let body = json!({"prompt": "for the second rank alone", "max_tokens": 1});
    post_with(&double.url(), "/v1/completions", &[("x-data-parallel-rank", "1")], &body).await;
    let of = |rank: usize| double.event_endpoints()[rank].replay.clone().unwrap();
    assert_eq!(replay(&of(0), 0, LONG).await.unwrap(), []);
    assert_eq!(replay(&of(1), 0, LONG).await.unwrap()[0].payload[2], json!(1));
    let any = Some(KvEventOptions { os_ports: true, ..Default::default() });
    let double = VllmDouble::start(VllmOptions { dp: 2, kv_events: any, ..Default::default() }).await;
    let sources = get(&double.url(), "/kv_event_sources").await.json();
    assert_eq!(sources["1"]["endpoint"], json!(double.event_endpoints()[1].events), "a concrete host");
}

#[tokio::test]
async fn older_releases_write_arrays_and_replay_without_topic() {
    let double = VllmDouble::start(VllmOptions { version: VllmVersion::V0_22, ..Default::default() }).await;
    ask(&double, "long enough for one block").await;
    let batches = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    assert_eq!(batches[0].topic, None);
    assert_eq!(batches[0].events()[0][0], json!("BlockStored"));
    assert_eq!(batches[0].events()[0].as_array().unwrap().len(), 9);
}

#[tokio::test]
async fn a_restart_begins_again_on_the_same_ports() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    ask(&double, "before the restart, a block").await;
    let (ids, hashes) = (double.engine_ids(), double.cached_hashes(0));
    double.control().restart().await.unwrap();
    assert_ne!(double.engine_ids(), ids);
    assert!(double.cached_hashes(0).is_empty());
    ask(&double, "before the restart, a block").await;
    let batches = replay(double.event_endpoints()[0].replay.as_ref().unwrap(), 0, LONG).await.unwrap();
    assert_eq!((batches.len(), batches[0].sequence), (1, 0));
    assert_ne!(double.cached_hashes(0), hashes, "hash roots are random");
}

#[tokio::test]
async fn events_can_lie() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let replay_at = double.event_endpoints()[0].replay.clone().unwrap();
    double.control().inject(Fault::WrongEventBlockSize { tokens: 64 });
    ask(&double, "one block of sixteen tokens").await;
    double.control().inject(Fault::UnknownParents);
    ask(&double, "another block, an orphan this time").await;
    let batches = replay(&replay_at, 0, LONG).await.unwrap();
    assert_eq!(batches[0].events()[0]["block_size"], json!(64));
    assert!(batches[1].events()[0]["parent_block_hash"].is_u64());
}

#[tokio::test]
async fn garbage_arrives_between_batches() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let mut subscriber = subscribed(&double).await;
    for garbage in EventGarbage::ALL {
        double.control().send_garbage(0, garbage).await;
        let frames = subscriber.frames(LONG).await.unwrap();
        assert_eq!(&frames[0][..], b"kv-events", "{garbage:?}");
    }
    ask(&double, "and then a proper batch again").await;
    assert_eq!(subscriber.next(LONG).await.unwrap().events().len(), 1);
}
