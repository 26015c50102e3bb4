//! Warms pairs of engines before they carry requests, and measures them while doing so.
//!
//! The first hand-over between two engines sets up their connection and takes far longer than the next. So each pair
//! hands over three made-up prompts: the first is not timed, a short and a long one then tell what a hand-over costs at
//! all and what each byte of it costs. A pair that fails rests, longer each time, and is tried again.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use forebay_engine_wire::object::Object;
use forebay_engines::{
    ClientBody, ClientRoute, Driver, KvHandle, Leg, LegEvent, LegStream, Prompt, TransferReport, Work,
};
use forebay_fleet::Event;
use forebay_types::{LegId, RankId, Sampling, TokenId};
use tokio::time::{Instant, timeout, timeout_at};

use super::Shared;

/// Pairs looked at in one round.
const PAIRS_MAX: usize = 64;
/// Between two rounds, unless an engine joins.
const ROUND: Duration = Duration::from_secs(1);
/// Longest that one hand-over of a made-up prompt may take.
const HAND_OVER_MAX: Duration = Duration::from_secs(20);
/// Lengths of the prompts, in blocks. The first one is not learned from.
const BLOCKS: [u32; 3] = [1, 2, 32];

/// Warms what is cold, for as long as the orchestrator lives.
pub(super) async fn keep_warm(shared: Weak<Shared>) {
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let pairs = shared.core.lock().cold_pairs(PAIRS_MAX);
        for (from, to) in pairs {
            if shared.closing.load(Ordering::Acquire) {
                return;
            }
            warm(&shared, from, to).await;
        }
        let joined = shared.joined.notified();
        let _ = timeout(ROUND, joined).await;
    }
}

async fn warm(shared: &Shared, from: RankId, to: RankId) {
    let (Some(source), Some(target)) = (shared.driver(from.incarnation), shared.driver(to.incarnation))
    else {
        return;
    };
    let block_tokens = source.facts().block_size_tokens.max(1);
    for (round, blocks) in (0..).zip(BLOCKS) {
        // One token more than whole blocks: the decode engine always has something to compute.
        let tokens = (blocks * block_tokens + 1).min(source.facts().context_tokens_max.saturating_sub(2));
        let seed = shared.next_leg.load(Ordering::Relaxed) as u32;
        let handed = hand_over(shared, &*source, from, &*target, to, made_up(seed, tokens));
        let event = match timeout(HAND_OVER_MAX, handed).await {
            Ok(Ok(_)) if round == 0 => continue,
            Ok(Ok(report)) => {
                let bytes = match report.bytes {
                    0 => u64::from(blocks) * target.facts().block_bytes_or_nominal(),
                    bytes => bytes,
                };
                Event::Transferred { from, to, bytes, seconds: report.seconds }
            }
            Ok(Err(why)) => failed(shared, from, to, &why),
            Err(_) => failed(shared, from, to, "it took too long"),
        };
        let is_failure = matches!(event, Event::TransferFailed { .. });
        let now = shared.now();
        shared.core.lock().note(now, event);
        if is_failure {
            return;
        }
    }
    tracing::info!(from = %source.facts().engine, to = %target.facts().engine, "pair warmed");
}

fn failed(shared: &Shared, from: RankId, to: RankId, why: &str) -> Event {
    let name = |rank: RankId| shared.driver(rank.incarnation).map(|driver| driver.facts().engine.clone());
    tracing::warn!(from = ?name(from), to = ?name(to), why, "pair could not be warmed; it rests");
    Event::TransferFailed { from, to }
}

/// Tokens that every vocabulary has, different for each `seed`, so that no cache has them.
fn made_up(seed: u32, length: u32) -> Arc<[TokenId]> {
    (0..length).map(|index| 10 + (index ^ seed).wrapping_mul(2_654_435_761).rotate_left(7) % 200).collect()
}

async fn hand_over(
    shared: &Shared,
    source: &dyn Driver,
    from: RankId,
    target: &dyn Driver,
    to: RankId,
    tokens: Arc<[TokenId]>,
) -> Result<TransferReport, String> {
    let root = shared.hasher.root(&source.facts().model, "warming");
    let prompt = Prompt { hashes: shared.hasher.chain(root, &tokens).into(), tokens, root, salt: "".into() };
    let prefill = leg(shared, source, from, &prompt, Work::Prefill);
    let prefill_id = prefill.id;
    let mut stream = source.start(prefill).map_err(|error| error.to_string())?;
    let kv = wait(&mut stream, |event| match event {
        LegEvent::Prefilled(kv) => Some(kv),
        _ => None,
    });
    let kv: KvHandle = kv.await?;
    let began = Instant::now();
    let decode = leg(shared, target, to, &prompt, Work::Decode { kv, first: Vec::new() });
    let decoded = async {
        let mut stream = target.start(decode).map_err(|error| error.to_string())?;
        let report = wait(&mut stream, |event| match event {
            LegEvent::KvArrived(report) => Some(Ok(report)),
            LegEvent::KvFailed { outcome } => Some(Err(outcome.to_string())),
            LegEvent::Token(_) | LegEvent::Reply(_) => {
                let seconds = began.elapsed().as_secs_f64();
                Some(Ok(TransferReport { blocks: 0, bytes: 0, pieces: 0, seconds }))
            }
            _ => None,
        });
        report.await?
    };
    let report = decoded.await;
    source.release_kv(prefill_id);
    report
}

fn leg(shared: &Shared, driver: &dyn Driver, rank: RankId, prompt: &Prompt, work: Work) -> Leg {
    let id: LegId = shared.leg_id();
    let body = (!driver.facts().accepts.tokens).then(|| {
        let text: Vec<String> = prompt.tokens.iter().map(ToString::to_string).collect();
        let json = serde_json::json!({
            "model": &*driver.facts().model, "prompt": text.join(" "), "max_tokens": 1, "temperature": 0,
        });
        let json = Object::parse(json.to_string()).expect("it is an object");
        Arc::new(ClientBody { route: ClientRoute::Completions, json, streams: false })
    });
    Leg {
        id,
        request: format!("warming-{id}").into(),
        dp_rank: rank.dp_rank,
        prompt: prompt.clone(),
        choices: vec![0],
        sampling: Arc::new(Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            output_tokens_max: 1,
            stop_tokens: [].into(),
            logprobs: None,
        }),
        work,
        body,
        deadline: (Instant::now() + HAND_OVER_MAX).into_std(),
    }
}

/// The first event that `wanted` takes; an error if the leg ends before.
async fn wait<T>(stream: &mut LegStream, mut wanted: impl FnMut(LegEvent) -> Option<T>) -> Result<T, String> {
    let mut events = Vec::new();
    let deadline = Instant::now() + HAND_OVER_MAX;
    loop {
        let more = timeout_at(deadline, stream.next_batch(&mut events)).await.map_err(|_| "too long")?;
        for event in events.drain(..) {
            match event {
                LegEvent::Refused(error) => return Err(error.to_string()),
                LegEvent::Lost { reason } => return Err(reason.to_string()),
                event => {
                    if let Some(found) = wanted(event) {
                        return Ok(found);
                    }
                }
            }
        }
        if !more {
            return Err("the leg ended early".to_owned());
        }
    }
}
