//! A leg that computes a prompt for another engine.
//!
//! vLLM: the leg draws one token, which is dropped, and answers what a decode engine needs to fetch the KV. SGLang: both
//! engines are told of a room at once, and the leg runs until the KV is handed over there.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use forebay_engine_wire::{
    body::{Kv, Part, Room},
    transfer::{Incomplete, PrefillAnswer, TransferMode},
};
use forebay_types::FirstToken;
use serde_json::value::RawValue;

use super::{Done, LegTask, Setback};
use crate::{
    driver::{Bootstrap, KvHandle, KvPlace, LegEvent, StartError},
    remote::{
        HandOver, RankPin,
        held::{Prompted, What},
    },
};

/// Taken off a lease: it began when the engine finished, not when we heard of it, and the decode engine must hear of it
/// before it ends.
const LEASE_MARGIN: Duration = Duration::from_secs(1);
/// SGLang's rooms are signed.
const ROOM_MASK: u64 = i64::MAX as u64;

pub(super) async fn run(task: &LegTask) -> Result<Done, Setback> {
    match &task.engine.speech.hand_over {
        HandOver::TransferParams => export(task).await,
        HandOver::Bootstrap { host, port } => {
            // `follow_bootstrap_room`, unless the request names the rank.
            let prefill_dp_rank = (task.engine.speech.ranks == RankPin::Field).then_some(task.leg.dp_rank);
            let room = (task.engine.rooms)() & ROOM_MASK;
            meet(task, Bootstrap { host: host.clone(), port: *port, room, prefill_dp_rank }).await
        }
        HandOver::None => {
            Err(Setback::Refused(StartError::Malformed { reason: "the engine hands no KV over" }))
        }
    }
}

/// Sends the request; its answer comes as one document.
async fn ask(task: &LegTask, kv: Kv<'_>) -> Result<bytes::Bytes, Setback> {
    let (path, body) = match &task.leg.body {
        None => task.token_request(kv),
        Some(body) => (body.route.path(), task.client_request(body, kv)?),
    };
    let answer = task.open(path, body).await?;
    if answer.status != 200 {
        return Err(task.refused(answer).await);
    }
    let whole = answer.whole(task.engine.limits.answer_bytes_max).await;
    Ok(whole.map_err(|error| task.broken(&error))?.body)
}

async fn export(task: &LegTask) -> Result<Done, Setback> {
    let body = ask(task, Kv::Export).await?;
    let answer = PrefillAnswer::read(&body).map_err(|incomplete| match incomplete {
        Incomplete::Fault(fault) => task.complaint(&fault),
        other => Setback::failed(format!("{}: {other}", task.engine_name())),
    })?;
    let asked = task.leg.prompt.tokens.len() as u32;
    let counted = answer.usage.prompt_tokens;
    if task.leg.body.is_none() && counted.is_some_and(|counted| counted != asked) {
        return Err(Setback::lie(task.engine_name(), "counts another prompt than it was given"));
    }
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let lease = answer.held_for(unix, task.engine.limits.kv_lease);
    let until = Instant::now() + lease.saturating_sub(LEASE_MARGIN.min(lease / 2));
    let params: Arc<RawValue> = answer.params.into();
    let what = match answer.mode {
        TransferMode::Pull => What::Pulled {
            params: params.clone(),
            layout: task.engine.facts.kv.layout,
            from: task.engine.facts.incarnation,
        },
        TransferMode::Push => What::Pushed,
    };
    let tokens = if task.leg.body.is_none() { asked } else { counted.unwrap_or(asked) };
    hold(task, until, what, tokens, KvPlace::Params(params), answer.usage.cached_tokens.unwrap_or(0));
    Ok(Done::Whole)
}

async fn meet(task: &LegTask, bootstrap: Bootstrap) -> Result<Done, Setback> {
    let Bootstrap { host, port, room, prefill_dp_rank } = bootstrap.clone();
    let tokens = task.leg.prompt.tokens.len() as u32;
    // The room lasts as long as the leg does.
    hold(task, task.leg.deadline, What::Room, tokens, KvPlace::Bootstrap(bootstrap), 0);
    let waiting = Waiting { task, over: false };
    let room = Room { host: &host, port, room, prefill_dp_rank };
    let answered = ask(task, Kv::Meet { room, part: Part::Prefill }).await;
    waiting.end(answered.map(|_| Done::Whole))
}

/// Puts the events with which a decode leg may begin.
fn hold(task: &LegTask, until: Instant, what: What, tokens: u32, place: KvPlace, cached_tokens: u32) {
    let leg = task.leg.id;
    task.engine.held.hold(leg, until, what, Prompted::of(&task.leg));
    let from = task.engine.facts.rank(task.leg.dp_rank);
    let handle = KvHandle { from, leg, tokens, held_until: until, first: FirstToken::OfDecode, place };
    task.outbox.put_all(&mut vec![LegEvent::Started { cached_tokens }, LegEvent::Prefilled(handle)]);
}

/// Tells the decode leg that waits in the room when there is nothing to wait for, however this leg ends.
struct Waiting<'a> {
    task: &'a LegTask,
    over: bool,
}

impl Waiting<'_> {
    fn end(mut self, done: Result<Done, Setback>) -> Result<Done, Setback> {
        self.over = true;
        if let Err(setback) = &done {
            let why = match setback {
                Setback::Refused(error) => error.to_string(),
                Setback::Lost(why) | Setback::Lie(why) => why.to_string(),
            };
            self.task.engine.held.fail(self.task.leg.id, &why);
        }
        done
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.task.engine.held.fail(self.task.leg.id, "it was called off");
        }
    }
}
