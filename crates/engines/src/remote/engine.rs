//! The driver of an attached engine: legs as HTTP requests, straight to the engine.
//!
//! In: what the engine is ([`EngineFacts`]) and how it is spoken to ([`Speech`]), found out by whoever attached it. Out: a
//! [`Driver`]. Start at [`RemoteEngine::new`] and [`Driver::start`]; what a leg does is in [`legs`](super::legs).
//!
//! Invariants: legs share nothing that a token passes through; an engine that contradicts itself is fenced, and none of
//! its contradictions reaches a client.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_wire::transfer::discard_request;
use forebay_types::{FirstToken, LegId, TokenId};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
    task::AbortHandle,
};

use super::{
    Abort, Dialect, HandOver, Speech,
    attach::{audit, tokenize_question},
    client::{Endpoint, HttpError, Limits},
    held::{HeldKv, Release},
    legs::{LegTask, Stops},
};
use crate::{
    driver::{Audit, ClientBody, Driver, EngineFacts, KvHandle, KvPlace, Leg, StartError, Work},
    reports::{Notice, Reports},
    stream::{LegControl, LegStream, leg_stream},
};

/// Calls besides legs (aborts, KV that nobody wants) that may be under way. They only save the engine work: beyond it
/// they are left out.
const CALLS_MAX: usize = 64;
/// How long such a call may take.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// A model that no engine has: see [`discard_request`].
const NO_MODEL: &str = "forebay:nobody-comes-for-this-kv";

/// Bounds of one attached engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteLimits {
    /// Legs that may run beyond those that may wait ([`EngineFacts::waiting_max`]).
    pub running_max: u32,
    /// Bytes of an answer that comes as one document.
    pub answer_bytes_max: usize,
    /// Pieces of an engine's own answer that wait for a slow client; then the engine waits.
    pub reply_pieces_max: usize,
    /// How long a vLLM prefill engine holds KV (`kv_lease_duration`), where its answer does not say.
    pub kv_lease: Duration,
    /// Size of the model's vocabulary: a token beyond it is a lie. `None`: nobody knows.
    pub vocabulary: Option<TokenId>,
}

impl Default for RemoteLimits {
    fn default() -> Self {
        Self {
            running_max: 1024,
            answer_bytes_max: 64 << 20,
            reply_pieces_max: 64,
            kv_lease: Duration::from_secs(30),
            vocabulary: None,
        }
    }
}

/// What one life of an attached engine is made of.
pub struct RemoteParts {
    /// What it is.
    pub facts: EngineFacts,
    /// How it is spoken to.
    pub speech: Speech,
    /// Where it is.
    pub endpoint: Endpoint,
    /// Shared with whoever watches it.
    pub reports: Arc<Reports>,
    /// Bounds.
    pub limits: RemoteLimits,
    /// Where its legs run.
    pub runtime: Handle,
    /// Asks whoever watches it for the whole cache of a rank.
    pub snapshots: Arc<dyn Fn(u16) + Send + Sync>,
    /// Woken when a leg finds it in trouble: its observer looks at once.
    pub on_trouble: Arc<Notify>,
    /// Random numbers: SGLang's rooms, and what makes request ids unique among gateways.
    pub rooms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// One for all engines of the process.
    pub held: Arc<HeldKv>,
}

/// One life of an attached engine. Dropping it loses the legs that run.
pub struct RemoteEngine {
    shared: Arc<Shared>,
    snapshots: Arc<dyn Fn(u16) + Send + Sync>,
}

/// What the driver, its legs and their streams share.
pub(super) struct Shared {
    pub(super) facts: EngineFacts,
    pub(super) speech: Speech,
    pub(super) endpoint: Endpoint,
    pub(super) reports: Arc<Reports>,
    pub(super) limits: RemoteLimits,
    pub(super) rooms: Arc<dyn Fn() -> u64 + Send + Sync>,
    pub(super) held: Arc<HeldKv>,
    on_trouble: Arc<Notify>,
    runtime: Handle,
    running: Mutex<HashMap<LegId, Running>>,
    stopped: AtomicBool,
    fenced: OnceLock<Arc<str>>,
    calls: Arc<Semaphore>,
}

struct Running {
    task: AbortHandle,
    stops: Arc<Stops>,
    /// By which the engine knows it, where it can be called off by it.
    abort_id: Option<String>,
}

impl RemoteEngine {
    /// The driver of a life that has begun.
    pub fn new(parts: RemoteParts) -> Arc<Self> {
        let RemoteParts {
            facts,
            speech,
            endpoint,
            reports,
            limits,
            runtime,
            snapshots,
            on_trouble,
            rooms,
            held,
        } = parts;
        let (incarnation, kv) = (facts.incarnation, facts.kv);
        let takes = kv.can_import && speech.hand_over == HandOver::TransferParams;
        let shared = Arc::new(Shared {
            facts,
            speech,
            endpoint,
            reports,
            limits,
            rooms,
            held,
            on_trouble,
            runtime,
            running: Mutex::default(),
            stopped: AtomicBool::new(false),
            fenced: OnceLock::new(),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
        });
        if takes {
            shared.held.add_taker(incarnation, kv.layout, Arc::downgrade(&shared));
        }
        Arc::new(Self { shared, snapshots })
    }

    /// How it is spoken to.
    pub fn speech(&self) -> &Speech {
        &self.shared.speech
    }

    /// Legs that run now.
    pub fn legs_running(&self) -> usize {
        self.shared.running.lock().len()
    }
}

impl Driver for RemoteEngine {
    fn facts(&self) -> &EngineFacts {
        &self.shared.facts
    }

    fn audit_tokens(&self, body: &ClientBody, ours: Arc<[TokenId]>) -> Option<BoxFuture<'static, Audit>> {
        let Shared { endpoint, speech, .. } = &*self.shared;
        let question = tokenize_question(speech, body)?;
        let endpoint = endpoint.clone();
        Some(Box::pin(async move { audit(&endpoint, &question, &ours).await }))
    }

    fn start(&self, leg: Leg) -> Result<LegStream, StartError> {
        let shared = &self.shared;
        if shared.stopped.load(Ordering::Acquire) || shared.reports.is_dead() {
            return Err(StartError::Gone);
        }
        if let Some(why) = shared.fenced.get() {
            return Err(StartError::Failed { message: why.clone() });
        }
        shared.check(&leg)?;
        let waiting_max = shared.facts.waiting_max;
        let bound = waiting_max as usize + shared.limits.running_max as usize;
        let (outbox, stream) = leg_stream(leg.id, Arc::new(Control(shared.clone())));
        let (id, stops) = (leg.id, Arc::new(Stops::default()));
        let task = LegTask::new(shared.clone(), leg, outbox, stops.clone());
        let abort_id = task.abort_id();
        let mut running = shared.running.lock();
        let refusal = if shared.stopped.load(Ordering::Acquire) {
            Some(StartError::Gone) // since it was asked above
        } else {
            (running.len() >= bound).then_some(StartError::QueueFull { waiting_max })
        };
        if let Some(refusal) = refusal {
            drop(running);
            drop(stream); // before the outbox, so that nobody is told of a loss
            return Err(refusal);
        }
        // Under the lock: a leg that ends at once finds itself here to remove.
        let task = shared.runtime.spawn(task.run()).abort_handle();
        running.insert(id, Running { task, stops, abort_id });
        Ok(stream)
    }

    fn release_kv(&self, leg: LegId) {
        self.shared.release(leg);
    }

    fn reports(&self) -> &Reports {
        &self.shared.reports
    }

    fn request_snapshot(&self, dp_rank: u16) {
        (self.snapshots)(dp_rank);
    }

    fn stop(&self) {
        self.shared.lose_all();
        self.shared.reports.put_death("it was detached".into());
    }
}

impl Drop for RemoteEngine {
    fn drop(&mut self) {
        self.shared.lose_all();
    }
}

impl Shared {
    /// Whether the engine can run a leg at all.
    fn check(&self, leg: &Leg) -> Result<(), StartError> {
        let Self { facts, speech, .. } = self;
        if leg.dp_rank >= facts.dp_ranks {
            return Err(StartError::Malformed { reason: "the engine has no such rank" });
        }
        if leg.body.is_some() {
            if !facts.accepts.body {
                return Err(StartError::WrongForm);
            }
        } else {
            if !facts.accepts.tokens || speech.tokens.is_none() {
                return Err(StartError::WrongForm);
            }
            if leg.prompt.tokens.is_empty() || leg.choices.is_empty() || leg.sampling.output_tokens_max == 0 {
                return Err(StartError::Malformed { reason: "nothing to compute" });
            }
            let needed_tokens = u32::try_from(leg.prompt.tokens.len()).unwrap_or(u32::MAX).saturating_add(1);
            if needed_tokens > facts.context_tokens_max {
                let context_tokens_max = facts.context_tokens_max;
                return Err(StartError::TooLong { needed_tokens, context_tokens_max });
            }
        }
        self.check_work(leg)
    }

    /// vLLM frees held KV when it was read once, and each choice of a request reads it: several would read what is no
    /// longer theirs. SGLang's servers of a pair take nothing but the halves of a request.
    fn check_work(&self, leg: &Leg) -> Result<(), StartError> {
        let Self { facts, speech, .. } = self;
        let is_half = !matches!(leg.work, Work::Aggregated);
        if is_half && leg.body.is_none() && leg.choices.len() != 1 {
            return Err(StartError::Malformed { reason: "KV is handed over for one choice at a time" });
        }
        match &leg.work {
            Work::Aggregated => {
                let is_of_pair = matches!(speech.hand_over, HandOver::Bootstrap { .. })
                    || !(facts.role.prefills() && facts.role.decodes());
                if speech.dialect == Dialect::Sglang && is_of_pair {
                    return Err(StartError::WrongForm);
                }
                Ok(())
            }
            Work::Prefill => match speech.hand_over {
                HandOver::None => Err(StartError::Malformed { reason: "the engine hands no KV over" }),
                HandOver::TransferParams | HandOver::Bootstrap { .. } => Ok(()),
            },
            Work::Decode { kv, first } => {
                // Of a client's own words nobody here knows the length.
                if leg.body.is_none() && kv.tokens as usize != leg.prompt.tokens.len() {
                    return Err(StartError::ForeignKv);
                }
                self.check_handle(kv, !first.is_empty())
            }
        }
    }

    fn check_handle(&self, kv: &KvHandle, first_is_known: bool) -> Result<(), StartError> {
        let is_ours = match &kv.place {
            KvPlace::Pool { .. } => false,
            KvPlace::Params(_) => self.speech.hand_over == HandOver::TransferParams,
            KvPlace::Bootstrap(_) => self.speech.dialect == Dialect::Sglang,
        };
        let is_fresh = kv.held_until > Instant::now();
        let draws_first = kv.first == FirstToken::OfDecode && !first_is_known;
        // Blocks whose lease has ended may hold another prompt by now, and nothing would say so.
        if self.facts.kv.can_import && is_ours && is_fresh && draws_first {
            return Ok(());
        }
        Err(StartError::ForeignKv)
    }

    /// The engine is not there, or not well: whoever watches it should look.
    pub(super) fn trouble(&self) {
        self.on_trouble.notify_one();
    }

    /// The engine said what cannot be true.
    pub(super) fn fence(&self, why: &Arc<str>) {
        if self.fenced.set(why.clone()).is_ok() {
            tracing::error!(engine = %self.facts.engine, incarnation = %self.facts.incarnation, %why, "engine fenced");
            self.reports.put_notice(Notice::Fenced { why: why.clone() });
        }
    }

    /// A leg has ended; it is forgotten.
    pub(super) fn ended(&self, leg: LegId) {
        self.running.lock().remove(&leg);
    }

    fn release(self: &Arc<Self>, leg: LegId) {
        match self.held.release(leg) {
            Release::Nothing => {}
            Release::CancelLeg => self.call_off(leg),
            Release::Discard { taker, params } => taker.discard(leg, &params),
        }
    }

    /// Ends a running leg and closes its connection.
    fn call_off(self: &Arc<Self>, leg: LegId) {
        let Some(running) = self.running.lock().remove(&leg) else { return };
        running.task.abort();
        if let Some(id) = running.abort_id {
            self.abort(id);
        }
    }

    /// Tells the engine to abort a request, where closing the connection is not all there is.
    pub(super) fn abort(self: &Arc<Self>, id: String) {
        #[derive(serde::Serialize)]
        struct VllmAbort {
            request_ids: [String; 1],
        }
        #[derive(serde::Serialize)]
        struct SglangAbort {
            rid: String,
        }
        let (path, body) = match self.speech.abort {
            Abort::Close => return,
            Abort::VllmAbortRequests => {
                ("/inference/v1/abort_requests", serde_json::to_vec(&VllmAbort { request_ids: [id] }))
            }
            // It aborts all requests whose ids begin so: never an empty one, and ours end in digits of equal number.
            Abort::SglangAbortRequest => ("/abort_request", serde_json::to_vec(&SglangAbort { rid: id })),
        };
        self.call(path, body.expect("texts are JSON").into(), |_| {});
    }

    /// Makes a prefill engine free KV that nobody comes for, by a request that this engine refuses.
    fn discard(self: &Arc<Self>, leg: LegId, params: &RawValue) {
        let engine = self.facts.engine.clone();
        self.call("/v1/completions", discard_request(NO_MODEL, params).into(), move |answer| {
            if !matches!(answer, Err(HttpError::Status { status: 400..=499, .. })) {
                tracing::debug!(%engine, %leg, "held KV could not be discarded; its lease ends it");
            }
        });
    }

    fn call(
        self: &Arc<Self>,
        path: &'static str,
        body: Bytes,
        then: impl FnOnce(Result<super::client::Answer, HttpError>) + Send + 'static,
    ) {
        let Ok(permit) = self.calls.clone().try_acquire_owned() else { return };
        let endpoint = self.endpoint.clone();
        self.runtime.spawn(async move {
            let limits = Limits { body_bytes_max: 64 * 1024, deadline: Instant::now() + CALL_DEADLINE };
            then(endpoint.post_json(path, body, limits).await);
            drop(permit);
        });
    }

    fn lose_all(&self) {
        self.stopped.store(true, Ordering::Release);
        let running = std::mem::take(&mut *self.running.lock());
        for running in running.into_values() {
            running.task.abort(); // its outbox says that the engine was lost
        }
    }
}

/// Streams talk back through it.
struct Control(Arc<Shared>);

impl LegControl for Control {
    fn cancel(&self, leg: LegId) {
        self.0.call_off(leg);
        self.0.release(leg);
    }

    fn stop_choice(&self, leg: LegId, choice: u32) {
        if let Some(running) = self.0.running.lock().get(&leg) {
            running.stops.stop(choice);
        }
    }
}
