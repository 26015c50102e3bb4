//! KV events as a subscriber sees them.

use std::{collections::BTreeMap, time::Instant};

use bytes::Bytes;
use forebay_dialect::{EngineOptions, EventOptions};
use forebay_engines::EngineLimits;
use forebay_types::TokenId;
use serde_json::{Value, json};
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::support::{
    Engine, PATIENCE, client::Open, limits, msgpack, options, prompt, simulated, token_ids,
};

/// Batches from `first` on, as the replay socket gives them.
async fn replay(engine: &Engine, first: u64) -> Vec<(u64, Value)> {
    let mut socket = DealerSocket::new();
    socket.connect(&format!("tcp://127.0.0.1:{}", engine.addresses.kv_replay_port.unwrap())).await.unwrap();
    let request = vec![Bytes::new(), Bytes::copy_from_slice(&first.to_be_bytes())];
    socket.send(ZmqMessage::try_from(request).unwrap()).await.unwrap();
    let mut batches = Vec::new();
    loop {
        let answer = tokio::time::timeout(PATIENCE, socket.recv()).await.expect("a replay ends").unwrap();
        let frames = answer.into_vec();
        let [empty, topic, sequence, payload] = &frames[..] else { panic!("{frames:?}") };
        assert!(empty.is_empty());
        let number = u64::from_be_bytes(sequence[..].try_into().unwrap());
        if number == u64::MAX {
            assert!(topic.is_empty() && payload.is_empty());
            return batches;
        }
        assert_eq!(&topic[..], b"kv-events");
        batches.push((number, msgpack::decode(payload)));
    }
}

/// What an index makes of the events.
#[derive(Default)]
struct Cache {
    /// Tokens of each block and its parent, by hash.
    blocks: BTreeMap<u64, (Vec<TokenId>, Option<u64>)>,
    removed: usize,
    salts: Vec<Value>,
}

impl Cache {
    fn of(batches: &[(u64, Value)]) -> Self {
        let mut cache = Self::default();
        for (_, payload) in batches {
            let [seconds, events, rank] = &payload.as_array().unwrap()[..] else { panic!("{payload}") };
            assert!(seconds.as_f64().unwrap() > 1.6e9 && *rank == json!(0));
            events.as_array().unwrap().iter().for_each(|event| cache.take(event));
        }
        cache
    }

    fn take(&mut self, event: &Value) {
        let hashes = || event["block_hashes"].as_array().unwrap().iter().map(|hash| hash.as_u64().unwrap());
        match event["type"].as_str().unwrap() {
            "BlockStored" => {
                let size = event["block_size"].as_u64().unwrap() as usize;
                let tokens = token_ids(&event["token_ids"]);
                assert_eq!(tokens.len(), hashes().count() * size);
                assert_eq!(event["extra_keys"].as_array().unwrap().len(), hashes().count());
                assert!(event["medium"] == "GPU" && event["lora_id"].is_null() && event["group_idx"] == 0);
                let mut parent = event["parent_block_hash"].as_u64();
                if let Some(parent) = parent {
                    assert!(self.blocks.contains_key(&parent), "an unknown parent");
                } else {
                    self.salts.push(event["extra_keys"][0].clone());
                }
                for (hash, tokens) in hashes().zip(tokens.chunks(size)) {
                    let before = self.blocks.insert(hash, (tokens.to_vec(), parent));
                    assert!(before.is_none(), "our pools hold a block once");
                    parent = Some(hash);
                }
            }
            "BlockRemoved" => {
                for hash in hashes() {
                    assert!(self.blocks.remove(&hash).is_some(), "removed before it was stored");
                    self.removed += 1;
                }
            }
            other => panic!("{other}"),
        }
    }

    /// Leading tokens of a sequence that whole blocks of the cache hold, under the salt that holds most of it.
    fn prefix(&self, tokens: &[TokenId]) -> usize {
        let mut parents = vec![None];
        let mut held = 0;
        for block in tokens.chunks_exact(16) {
            let follows =
                |(_, (own, before)): &(&u64, &(Vec<TokenId>, _))| own == block && parents.contains(before);
            parents = self.blocks.iter().filter(follows).map(|(hash, _)| Some(*hash)).collect();
            if parents.is_empty() {
                break;
            }
            held += 16;
        }
        held
    }
}

/// The cache as the events tell it, once they have told enough.
async fn told(engine: &Engine, enough: impl Fn(&Cache) -> bool) -> Cache {
    let begun = Instant::now();
    loop {
        let cache = Cache::of(&replay(engine, 0).await);
        if enough(&cache) {
            return cache;
        }
        assert!(begun.elapsed() < PATIENCE, "only {} blocks were announced", cache.blocks.len());
    }
}

async fn complete(engine: &Engine, prompt: &[TokenId], output: u32, salt: &str) -> Vec<TokenId> {
    let body = json!({
        "prompt": prompt, "max_tokens": output, "ignore_eos": true, "return_token_ids": true, "cache_salt": salt,
        "seed": 1,
    });
    token_ids(&engine.client.post("/v1/completions", &body).await.good()["choices"][0]["token_ids"])
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_prompts_and_answers_are_announced_with_their_tokens() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let prompt = prompt(1, 40);
    let answer = complete(&engine, &prompt, 30, "").await;
    complete(&engine, &prompt, 4, "tenant-7").await;
    let cache = told(&engine, |cache| cache.blocks.len() >= 6).await;
    let numbers: Vec<u64> = replay(&engine, 0).await.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>());
    // The last token was drawn, but nothing was computed after it.
    let computed = [&prompt[..], &answer[..29]].concat();
    assert_eq!(cache.prefix(&computed), 64, "of 69");
    assert_eq!(cache.blocks.len(), 4 + 2, "the other tenant's two blocks are others");
    assert_eq!(cache.salts, [Value::Null, json!(["tenant-7"])]);
    let hits = complete(&engine, &computed, 1, "").await;
    assert_eq!(hits.len(), 1);
    assert_eq!(engine.metrics().await.value("vllm:prefix_cache_hits_total"), 64.0, "the cache agrees");
    assert_eq!(engine.metrics().await.value("forebay:kv_blocks_unpublished_total"), 0.0);
    assert_eq!(replay(&engine, 3).await.first().unwrap().0, 3);
    assert!(replay(&engine, 1_000).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_get_what_happens_in_vllms_frames() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let mut subscriber = SubSocket::new();
    let port = engine.addresses.kv_events_port.unwrap();
    subscriber.connect(&format!("tcp://127.0.0.1:{port}")).await.unwrap();
    subscriber.subscribe("kv-events").await.unwrap();
    // Until the subscription has arrived there, what happens is missed.
    let mut seed = 0;
    let message = loop {
        seed += 1;
        complete(&engine, &prompt(seed, 20), 1, "").await;
        let wait = std::time::Duration::from_millis(50);
        if let Ok(message) = tokio::time::timeout(wait, subscriber.recv()).await {
            break message.unwrap();
        }
        assert!(seed < 200, "nothing was published");
    };
    let frames = message.into_vec();
    let [topic, sequence, payload] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!((&topic[..], sequence.len()), (&b"kv-events"[..], 8));
    let number = u64::from_be_bytes(sequence[..].try_into().unwrap());
    let kept = replay(&engine, number).await;
    assert_eq!(kept[0], (number, msgpack::decode(payload)), "the replay is the same batch");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_evicted_is_taken_back() {
    let limits = EngineLimits { blocks_total: 12, ..limits() };
    let engine = Engine::start(EngineOptions { limits, ..options(simulated(0.0)) }).await;
    for seed in 0..12 {
        complete(&engine, &prompt(seed, 70), 20, "").await;
    }
    let cache = told(&engine, |cache| cache.prefix(&prompt(11, 70)) == 64).await;
    assert!(cache.removed > 20, "{} were evicted", cache.removed);
    assert!(cache.blocks.len() <= 12, "{} are more than there are", cache.blocks.len());
    assert_eq!(cache.prefix(&prompt(0, 70)), 0, "the first one is not");
    assert_eq!(engine.metrics().await.value("forebay:kv_blocks_unpublished_total"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_hide_no_tokens() {
    let engine = Engine::start(options(simulated(0.0))).await;
    let body = |seed: u32| json!({"prompt": prompt(seed, 20), "max_tokens": 1500, "ignore_eos": true, "stream": true, "return_token_ids": true});
    // Streams of which only the beginning is read: the engine runs ahead of them.
    let mut unread: Vec<Open> = Vec::new();
    for seed in 0..2 {
        unread.push(engine.client.stream("/v1/completions", &body(seed)).await);
    }
    let metrics = engine
        .until("all is generated", |metrics| metrics.value("vllm:generation_tokens_total") == 3000.0)
        .await;
    assert_eq!(metrics.value("forebay:kv_blocks_unpublished_total"), 0.0);
    told(&engine, |cache| cache.blocks.len() == 2 * (1519 / 16)).await;
    drop(unread);
    // Clients that leave at any moment do not either.
    for seed in 10..30 {
        let mut stream = engine.client.stream("/v1/completions", &body(seed)).await;
        for _ in 0..seed {
            stream.piece().await;
        }
    }
    let idle = engine.until_idle().await;
    assert_eq!(idle.value("forebay:kv_blocks_unpublished_total"), 0.0);
    Cache::of(&replay(&engine, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_last_batches_are_kept() {
    let events = EventOptions { buffer_steps: 3, ..EventOptions::default() };
    let engine = Engine::start(EngineOptions { events: Some(events), ..options(simulated(0.0)) }).await;
    for seed in 0..6 {
        complete(&engine, &prompt(seed, 20), 1, "").await;
    }
    let begun = Instant::now();
    loop {
        let numbers: Vec<u64> = replay(&engine, 0).await.iter().map(|(number, _)| *number).collect();
        if numbers == [3, 4, 5] {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{numbers:?} are kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_can_be_left_out() {
    let engine = Engine::start(EngineOptions { events: None, ..options(simulated(0.0)) }).await;
    assert_eq!(engine.addresses.kv_events_port, None);
    assert_eq!(engine.client.get("/kv_event_sources").await.good()["0"]["enable_kv_cache_events"], false);
    assert_eq!(complete(&engine, &prompt(1, 40), 30, "").await.len(), 30);
}
