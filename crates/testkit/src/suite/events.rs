//! Checks of KV events: what is announced, the replay, the reset.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Check, Outcome, Target, ensure, equal, skipped};
use crate::subscriber::{EventBatch, Subscriber, replay};

/// Longer than a batch that was published takes to arrive.
const ARRIVAL: Duration = Duration::from_secs(2);

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("a prompt's full blocks are announced with their tokens", announces),
        Check::new("a replay repeats what was published", replays),
        Check::new("a reset is told with the next batch", resets),
    ]
}

/// Rank 0's endpoints, if the server says where they are.
struct Endpoints {
    events: String,
    replay: Option<String>,
}

async fn endpoints(target: &Target) -> Result<Option<Endpoints>, String> {
    let answer = target.get("/kv_event_sources").await?;
    let source = answer.json()["0"].clone();
    if answer.status != 200 || source.is_null() {
        return Ok(None);
    }
    let host = target.url.trim_start_matches("http://").split(':').next().unwrap_or("127.0.0.1").to_owned();
    let dial = |name: &str| source[name].as_str().map(|endpoint| endpoint.replace('*', &host));
    Ok(dial("endpoint").map(|events| Endpoints { events, replay: dial("replay_endpoint") }))
}

/// Subscribes, and asks until a batch has come: only then nothing is missed any more.
async fn subscribe(target: &Target, endpoints: &Endpoints) -> Result<(Subscriber, EventBatch), String> {
    let mut subscriber = Subscriber::connect(&endpoints.events).await.map_err(|error| error.to_string())?;
    for _ in 0..20 {
        target.complete(&target.url, json!(target.fresh_text(200)), json!({"max_tokens": 1})).await?;
        if let Ok(mut batch) = subscriber.next(ARRIVAL).await {
            while let Ok(next) = subscriber.next(Duration::from_millis(200)).await {
                batch = next;
            }
            return Ok((subscriber, batch));
        }
    }
    Err(format!("nothing arrives from {}", endpoints.events))
}

fn stored(batch: &EventBatch) -> impl Iterator<Item = &Value> {
    batch.events().iter().filter(|event| event["type"] == "BlockStored")
}

async fn announces(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(endpoints) = endpoints(&target).await? else { return skipped("no KV events") };
    let (mut subscriber, before) = subscribe(&target, &endpoints).await?;
    let answer =
        target.complete(&target.url, json!(target.fresh_text(200)), json!({"max_tokens": 1})).await?;
    let prompt: Vec<u32> = serde_json::from_value(answer["choices"][0]["prompt_token_ids"].clone())
        .map_err(|_| format!("no prompt ids in {answer}"))?;
    let batch = subscriber.next(ARRIVAL).await.map_err(|error| error.to_string())?;
    equal("the sequence", batch.sequence, before.sequence + 1)?;
    let event = stored(&batch).next().ok_or_else(|| format!("nothing stored in {:?}", batch.payload))?;
    let size = event["block_size"].as_u64().unwrap_or(0) as usize;
    ensure(size > 0, || format!("no block size in {event}"))?;
    let full = prompt.len() / size * size;
    let tokens: Vec<u32> =
        serde_json::from_value(event["token_ids"].clone()).map_err(|_| format!("no tokens in {event}"))?;
    equal("the tokens", tokens.as_slice(), &prompt[..full])?;
    equal("the hashes", event["block_hashes"].as_array().map(Vec::len), Some(full / size))?;
    equal("the parent", &event["parent_block_hash"], &Value::Null)?;
    let label = format!("block_size=\"{size}\"");
    target.metric(&target.url, "vllm:cache_config_info", &label).await?;
    ensure(batch.payload[2].is_u64(), || format!("no rank in {:?}", batch.payload))?;
    Ok(Outcome::Passed)
}

async fn replays(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(endpoints) = endpoints(&target).await? else { return skipped("no KV events") };
    let Some(replay_at) = endpoints.replay.clone() else { return skipped("no replay endpoint") };
    let (_, seen) = subscribe(&target, &endpoints).await?;
    let batches =
        replay(&replay_at, seen.sequence, target.timeout).await.map_err(|error| error.to_string())?;
    let repeated = batches.first().ok_or("nothing is replayed")?;
    equal("the batch", (repeated.sequence, &repeated.payload), (seen.sequence, &seen.payload))?;
    let all = replay(&replay_at, 0, target.timeout).await.map_err(|error| error.to_string())?;
    let gapless = all.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence);
    ensure(gapless, || "the ring has gaps".to_owned())?;
    if all.first().is_some_and(|batch| batch.sequence == 0) {
        counted(&all)?;
    }
    Ok(Outcome::Passed)
}

/// No hash is removed more often than it was stored.
fn counted(batches: &[EventBatch]) -> Result<(), String> {
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    for event in batches.iter().flat_map(EventBatch::events) {
        let step = match event["type"].as_str() {
            Some("BlockStored") => 1,
            Some("BlockRemoved") => -1,
            _ => {
                counts.clear();
                continue;
            }
        };
        for hash in event["block_hashes"].as_array().into_iter().flatten() {
            let count = counts.entry(hash.to_string()).or_default();
            *count += step;
            ensure(*count >= 0, || format!("{hash} is removed more often than stored"))?;
        }
    }
    Ok(())
}

async fn resets(target: Arc<Target>) -> Result<Outcome, String> {
    let Some(endpoints) = endpoints(&target).await? else { return skipped("no KV events") };
    let (mut subscriber, _) = subscribe(&target, &endpoints).await?;
    let answer = target.post("/reset_prefix_cache", &json!({})).await?;
    if answer.status == 404 {
        return skipped("no dev mode");
    }
    equal("the reset", answer.json(), json!({"success": true}))?;
    let quiet = subscriber.next(Duration::from_millis(300)).await.is_err();
    ensure(quiet, || "the reset was told before the next batch".to_owned())?;
    target.complete(&target.url, json!(target.fresh_text(200)), json!({"max_tokens": 1})).await?;
    let batch = subscriber.next(ARRIVAL).await.map_err(|error| error.to_string())?;
    let kinds: Vec<&str> = batch.events().iter().filter_map(|event| event["type"].as_str()).collect();
    equal("the batch", kinds, vec!["AllBlocksCleared", "BlockStored"])?;
    Ok(Outcome::Passed)
}
