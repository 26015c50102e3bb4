//! What a leg does: one HTTP request, read as it comes.
//!
//! In: a [`Leg`], the engine's [`Shared`] state. Out: events in the leg's [`Outbox`]. Start at [`LegTask::run`]: a leg of
//! tokens is in [`tokens`], an answer in the engine's own words in [`reply`], a leg that computes a prompt for another
//! engine in [`prefill`], what a refusal means in [`refusal`].
//!
//! Invariants: every leg ends with exactly one last event, at its deadline at the latest; dropping the task closes its
//! connection.

mod prefill;
mod refusal;
mod reply;
mod tokens;

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_wire::body::{Kv, Part, Room};
use forebay_types::LegId;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::timeout};

use super::{
    Abort, Dialect, RankPin, TokenRoute,
    client::{HttpError, Streaming},
    engine::Shared,
};
use crate::{
    driver::{Bootstrap, ClientRoute, KvHandle, KvPlace, Leg, LegEvent, StartError, TransferReport, Work},
    stream::Outbox,
};

/// How long the rest of an answer that has ended is waited for: it lets the connection be used again.
const REST_DEADLINE: Duration = Duration::from_millis(250);
/// Pieces of a body that are taken before the reader of the leg is woken.
const PIECES_MAX: usize = 64;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const DATA_PARALLEL_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// Why a leg came to nothing.
#[derive(Debug)]
enum Setback {
    /// The engine did not take it.
    Refused(StartError),
    /// The engine took it and is gone, or gave it up.
    Lost(Arc<str>),
    /// The engine said what cannot be true.
    Lie(Arc<str>),
}

impl Setback {
    fn failed(message: impl Into<Arc<str>>) -> Self {
        Self::Refused(StartError::Failed { message: message.into() })
    }

    fn lie(engine: &str, what: impl std::fmt::Display) -> Self {
        Self::Lie(format!("{engine}: {what}").into())
    }
}

/// How a leg ended well.
enum Done {
    /// Nothing of its answer is left.
    Whole,
    /// The end of its answer is still coming.
    Rest(Streaming),
    /// It was ended before its answer did.
    Short,
}

/// Choices that were ended from outside.
#[derive(Default)]
pub(super) struct Stops {
    stopped: Mutex<Vec<u32>>,
    news: Notify,
}

impl Stops {
    pub(super) fn stop(&self, choice: u32) {
        let mut stopped = self.stopped.lock();
        if !stopped.contains(&choice) {
            stopped.push(choice);
        }
        drop(stopped);
        self.news.notify_one();
    }

    fn contains(&self, choice: u32) -> bool {
        self.stopped.lock().contains(&choice)
    }
}

/// One leg, until it ends.
pub(super) struct LegTask {
    engine: Arc<Shared>,
    leg: Leg,
    outbox: Outbox,
    stops: Arc<Stops>,
    /// Unique among the requests of the engine, whoever sends them.
    id: String,
    began: Instant,
    /// Something of its answer was passed on.
    spoke: AtomicBool,
}

/// Takes the leg off the engine's table, however its task ends.
struct Ending {
    engine: Arc<Shared>,
    leg: LegId,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.engine.ended(self.leg);
    }
}

impl LegTask {
    pub(super) fn new(engine: Arc<Shared>, leg: Leg, outbox: Outbox, stops: Arc<Stops>) -> Self {
        // Of equal length, so that none is the beginning of another: SGLang aborts by beginnings.
        let id = format!("{}-{:016x}", leg.request, (engine.rooms)());
        Self { engine, leg, outbox, stops, id, began: Instant::now(), spoke: AtomicBool::new(false) }
    }

    /// By which the engine knows the request, where it can be aborted by it.
    pub(super) fn abort_id(&self) -> Option<String> {
        let id = &self.id;
        match self.engine.speech.abort {
            Abort::Close => None,
            Abort::SglangAbortRequest => Some(id.clone()),
            // vLLM makes its ids of ours: one for each prompt of a completion request.
            Abort::VllmAbortRequests => Some(match (&self.leg.body, self.engine.speech.tokens) {
                (Some(body), _) if body.route == ClientRoute::Chat => format!("chatcmpl-{id}"),
                (None, Some(TokenRoute::VllmGenerate)) => format!("generate-tokens-{id}"),
                _ => format!("cmpl-{id}-0"),
            }),
        }
    }

    /// Runs the leg to its end.
    pub(super) async fn run(self) {
        let _ending = Ending { engine: self.engine.clone(), leg: self.leg.id };
        let deadline = tokio::time::Instant::from_std(self.leg.deadline);
        let done = tokio::time::timeout_at(deadline, self.work()).await;
        let done = done.unwrap_or_else(|_| {
            self.call_off();
            Err(Setback::Lost(format!("{} did not end in time", self.engine.endpoint.name()).into()))
        });
        match done {
            Ok(done) => {
                self.outbox.put(LegEvent::Ended);
                match done {
                    Done::Whole => {}
                    Done::Short => self.call_off(),
                    Done::Rest(mut rest) => {
                        let _ = timeout(REST_DEADLINE, async { while rest.piece().await.is_some() {} }).await;
                    }
                }
            }
            Err(setback) => self.outbox.put(self.last_words(setback)),
        }
    }

    async fn work(&self) -> Result<Done, Setback> {
        match &self.leg.work {
            Work::Aggregated => self.answer(Kv::Own, None).await,
            Work::Prefill => prefill::run(self).await,
            Work::Decode { kv, .. } => self.decode(kv).await,
        }
    }

    /// The answer of a leg that gives one.
    async fn answer(&self, kv: Kv<'_>, source: Option<&KvHandle>) -> Result<Done, Setback> {
        match &self.leg.body {
            None => tokens::run(self, kv, source).await,
            Some(body) => reply::run(self, body, kv, source).await,
        }
    }

    async fn decode(&self, source: &KvHandle) -> Result<Done, Setback> {
        let held = &self.engine.held;
        if !held.take(source.leg, &self.leg) {
            return Err(Setback::Refused(StartError::ForeignKv));
        }
        match &source.place {
            KvPlace::Params(params) => self.answer(Kv::Import(params), Some(source)).await,
            KvPlace::Bootstrap(Bootstrap { host, port, room, prefill_dp_rank }) => {
                let room = Room { host, port: *port, room: *room, prefill_dp_rank: *prefill_dp_rank };
                let kv = Kv::Meet { room, part: Part::Decode };
                tokio::select! {
                    done = self.answer(kv, Some(source)) => done,
                    // The decode server would wait for minutes.
                    why = held.failure(source.leg) => {
                        self.call_off();
                        Err(Setback::failed(format!("the prefill leg came to nothing: {why}")))
                    }
                }
            }
            KvPlace::Pool { .. } => Err(Setback::Refused(StartError::ForeignKv)),
        }
    }

    fn last_words(&self, setback: Setback) -> LegEvent {
        match setback {
            Setback::Refused(error) => LegEvent::Refused(error),
            Setback::Lost(reason) => LegEvent::Lost { reason },
            Setback::Lie(why) => {
                self.engine.fence(&why);
                match self.spoke() {
                    true => LegEvent::Lost { reason: why },
                    false => LegEvent::Refused(StartError::Failed { message: why }),
                }
            }
        }
    }

    /// The engine need not go on.
    fn call_off(&self) {
        if let Some(id) = self.abort_id() {
            self.engine.abort(id);
        }
    }

    /// Sends the request; the answer may have any status.
    async fn open(&self, path: &str, body: Vec<u8>) -> Result<Streaming, Setback> {
        let mut headers = HeaderMap::new();
        if let Ok(id) = HeaderValue::from_str(&self.id) {
            headers.insert(REQUEST_ID, id);
        }
        if self.engine.speech.ranks == RankPin::Header {
            headers.insert(DATA_PARALLEL_RANK, self.leg.dp_rank.into());
        }
        // Boxed: making a connection takes several times what reading from it does, and only for a moment.
        let answer = Box::pin(self.engine.endpoint.post_stream(path, &headers, Bytes::from(body))).await;
        answer.map_err(|error| {
            if error.is_unsent()
                && let Work::Decode { kv, .. } = &self.leg.work
            {
                self.engine.held.give_back(kv.leg);
            }
            self.broken(&error)
        })
    }

    /// What it means that there is no (further) answer.
    fn broken(&self, error: &HttpError) -> Setback {
        if error.is_trouble() {
            self.engine.trouble();
        }
        // An engine that took the request and broke off may have died of it: that is a loss, and remembered as one.
        match error {
            HttpError::Unreachable { .. } => Setback::failed(error.to_string()),
            HttpError::BrokenOff { .. } | HttpError::TooSlow { .. } => {
                Setback::Lost(error.to_string().into())
            }
            HttpError::TooLarge { .. } => Setback::Lie(error.to_string().into()),
            HttpError::Status { .. } => Setback::failed(error.to_string()),
        }
    }

    /// The rank in a field of the body, where it goes there.
    fn rank_field(&self) -> Option<u16> {
        (self.engine.speech.ranks == RankPin::Field).then_some(self.leg.dp_rank)
    }

    /// What separates tenants, where the engine can.
    fn salt(&self) -> Option<&str> {
        Some(&*self.leg.prompt.salt).filter(|salt| self.engine.speech.salts_cache && !salt.is_empty())
    }

    fn engine_name(&self) -> &str {
        self.engine.endpoint.name()
    }

    fn is_sglang(&self) -> bool {
        self.engine.speech.dialect == Dialect::Sglang
    }

    fn spoke(&self) -> bool {
        self.spoke.load(Ordering::Relaxed)
    }

    /// The first sign of the answer, which is also the first sign of the engine's having begun: its head comes at once.
    fn speaks(&self, cached_tokens: u32, source: Option<&KvHandle>, events: &mut Vec<LegEvent>) {
        self.spoke.store(true, Ordering::Relaxed);
        events.push(LegEvent::Started { cached_tokens });
        if let Some(source) = source {
            self.engine.held.arrived(source.leg);
            events.push(self.kv_arrived(source));
        }
    }

    /// The KV of a decode leg is here: its first token is. Engines do not say what moved, nor how long it took: the blocks
    /// are those of the prompt, cached ones included, and the time is that from the leg's start to its first token, which
    /// holds the queue and one step besides.
    fn kv_arrived(&self, source: &KvHandle) -> LegEvent {
        let facts = &self.engine.facts;
        let blocks = source.tokens.div_ceil(facts.block_size_tokens.max(1));
        LegEvent::KvArrived(TransferReport {
            blocks,
            bytes: u64::from(blocks) * facts.block_bytes,
            pieces: 1,
            seconds: self.began.elapsed().as_secs_f64(),
        })
    }
}

/// The next piece of a body, if it is there already.
async fn piece_at_once(answer: &mut Streaming) -> Option<Option<Result<Bytes, HttpError>>> {
    poll_fn(|cx| {
        Poll::Ready(match answer.poll_piece(cx) {
            Poll::Ready(piece) => Some(piece),
            Poll::Pending => None,
        })
    })
    .await
}
