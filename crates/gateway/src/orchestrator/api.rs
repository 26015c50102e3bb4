//! The seam between HTTP and the fleet: what the shell above asks for and what comes back.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use forebay_engines::{ClientBody, Reply};
use forebay_placement::{Explanation, Plan};
pub use forebay_routing::PromptUnit;
use forebay_types::{
    EngineName, FinishReason, Leaning, RankLoad, RequestId, Role, SampledToken, Sampling, TenantId, TokenId,
};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::decisions::{Accuracy, DecisionQuery, DecisionRecord};

/// One request, as tokens or to be passed on.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Echoed on every answer, log line and decision.
    pub id: RequestId,
    /// For the record.
    pub tenant: TenantId,
    /// Salts the block hashes and the engines' prefix caches, so that tenants never share KV. Empty for none.
    pub salt: Arc<str>,
    /// A model that [`Orchestrate::models`] lists.
    pub model: Arc<str>,
    /// Token ids of the whole prompt, template included; where nobody here knows them, numbers that stand for stretches of
    /// its text ([`PromptUnit`]). Never empty.
    pub prompt: Arc<[TokenId]>,
    /// What the numbers in `prompt` are.
    pub unit: PromptUnit,
    /// Given: engines are sent this and their answer is passed on, as [`ResponseEvent::Reply`].
    pub body: Option<Arc<ClientBody>>,
    /// Given: the words that `prompt` was made of, to ask the engine whether it makes the same of them.
    pub audit: Option<Arc<ClientBody>>,
    /// `n`: how many answers to sample from one prefill. At least 1.
    pub choices: u32,
    /// How to sample.
    pub sampling: Sampling,
    /// The client chose the seed, wants log-probabilities or several answers: only an engine that draws every token from
    /// (seed, choice, position) can go on after another.
    pub sampling_is_particular: bool,
}

/// Counts of one finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Of those, served from an engine's prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated over all choices, stop tokens included.
    pub output_tokens: u32,
}

/// What a response is made of, in order.
#[derive(Debug, Clone)]
pub enum ResponseEvent {
    /// A token of one choice. Stop tokens come too; they have no text.
    Token(SampledToken),
    /// No more tokens of this choice follow.
    Finished {
        /// Which.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// A piece of an engine's own answer, to be passed on.
    Reply(Reply),
    /// Last event of a good response.
    Done(Usage),
    /// Last event of a bad one. If tokens came before, the stream ends with an SSE `error` event and no `[DONE]`.
    Failed(RouteError),
}

/// Why a request has no answer. One table in `http::errors` turns this into a response; nothing below knows HTTP.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RouteError {
    /// Every rank that could serve is full. Waiting helps.
    #[error("all {serving} engines that serve this model are full; retry in {retry_after_seconds:.0} s")]
    Saturated {
        /// Ranks that could have served.
        serving: usize,
        /// A guess at when room appears.
        retry_after_seconds: f64,
    },
    /// The gateway's own bound on requests in flight is reached. Waiting helps.
    #[error(
        "{limit} requests are in flight, which is the limit `requests_in_flight_max`; retry in {retry_after_seconds:.0} s"
    )]
    TooManyInFlight {
        /// The bound.
        limit: usize,
        /// A guess at when room appears.
        retry_after_seconds: f64,
    },
    /// No engine serves this model (now).
    #[error("no engine can serve model `{model}` now: {detail}")]
    NoEngine {
        /// As asked for.
        model: Arc<str>,
        /// Each engine's reason.
        detail: String,
    },
    /// The prompt cannot fit.
    #[error(
        "the prompt has {prompt_tokens} tokens, the context of this model here is {context_tokens_max} tokens; shorten the prompt"
    )]
    TooLong {
        /// Length of the prompt.
        prompt_tokens: u32,
        /// Longest sequence that any engine holds, prompt and output.
        context_tokens_max: u32,
    },
    /// Lost before its first token, as often as is allowed.
    #[error("the request was lost on {attempts} engines before its first token; retry")]
    LostUnanswered {
        /// Placements tried.
        attempts: u32,
    },
    /// Lost after tokens were sent, and no engine could continue it.
    #[error("the engine was lost after {tokens_sent} tokens and no other could continue; retry the request")]
    LostMidStream {
        /// Tokens already delivered.
        tokens_sent: u32,
    },
    /// An engine says that the request itself cannot be served.
    #[error("the engine refused the request: {message}")]
    Rejected {
        /// Its status, 4xx.
        status: u16,
        /// Its sentence.
        message: Arc<str>,
    },
    /// Engines died while they had this request, and it is not given to another for a while.
    #[error(
        "{deaths} engines died while they computed this request; it is refused for {retry_after_seconds:.0} s, change it"
    )]
    Quarantined {
        /// How many.
        deaths: u32,
        /// Until it is tried again.
        retry_after_seconds: f64,
    },
    /// A deadline passed.
    #[error("the request took longer than {limit_seconds:.0} s, the limit `request_seconds_max`")]
    DeadlineExceeded {
        /// The limit.
        limit_seconds: f64,
    },
    /// The server is going down.
    #[error("the server is shutting down; retry on another instance")]
    ShuttingDown,
    /// A bug or a lost component; the text is for the log and the client alike.
    #[error("internal error: {detail}")]
    Internal {
        /// What happened.
        detail: String,
    },
}

/// A model as `/v1/models` lists it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServedModel {
    /// The id that requests name.
    pub id: Arc<str>,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: u32,
    /// When it began to be served, seconds since the Unix epoch.
    pub created: u64,
    /// Every engine of it takes tokens.
    pub takes_tokens: bool,
    /// At least one engine of it takes a client's own words.
    pub takes_body: bool,
}

/// One engine as `/fleet/v1/engines` and `forebay status` show it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Stable name.
    pub engine: EngineName,
    /// `embedded`, `sim`, `vllm`, ...
    pub kind: String,
    /// Current life.
    pub incarnation: u64,
    /// `starting`, `ready`, `draining`, `silent`, `fenced`, `lost`.
    pub state: String,
    /// What it is doing or why it is in that state, as a sentence; empty if there is nothing to say.
    #[serde(default)]
    pub detail: String,
    /// What it may be asked to do.
    pub role: Role,
    /// The phase that it is kept for at present, as far as others take the other one.
    #[serde(default)]
    pub leaning: Leaning,
    /// Model that it serves.
    pub model: Arc<str>,
    /// Latest load reports, added up over its ranks.
    pub load: RankLoad,
    /// Circuit breaker: `closed`, `open`, `half_open`.
    pub breaker: String,
    /// Share of recent time spent on steps with prefill, 0 to 1.
    pub prefill_share: f64,
    /// Blocks of this engine that the index knows.
    pub indexed_blocks: u64,
    /// Times this engine was started again after a death.
    pub restarts: u64,
    /// Each DP rank.
    #[serde(default)]
    pub ranks: Vec<RankStatus>,
    /// Whether its cache is known from its own events or guessed from what was routed there.
    #[serde(default)]
    pub cache_sight: String,
    /// What an operator should know of it: what is missing, and the flag that mends it.
    #[serde(default)]
    pub notes: Vec<Arc<str>>,
}

/// One DP rank of an engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankStatus {
    /// Its number.
    pub dp_rank: u16,
    /// Latest load report.
    pub load: RankLoad,
    /// Its age, seconds.
    pub load_age_seconds: f64,
    /// Sequences that were sent there and that the report does not show yet.
    pub reserved_sequences: u32,
    /// Blocks of it that the index knows.
    pub indexed_blocks: u64,
}

/// Handing KV over from one engine to another, as `/fleet/v1/links` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The engine that prefills.
    pub from: EngineName,
    /// The engine that decodes.
    pub to: EngineName,
    /// `ready`; or `resting`: a hand-over failed lately, and until the pair is tried again no request goes over it.
    pub state: String,
    /// What a hand-over costs whatever its size, seconds, as learned so far.
    pub latency_seconds: f64,
    /// Tokens of KV a second beyond that, as learned so far.
    pub tokens_per_second: f64,
    /// The same in bytes, if the engines say how much KV a token has.
    pub bytes_per_second: Option<f64>,
    /// Hand-overs that this was learned from; with none, it is an assumption.
    pub transfers: u64,
}

/// An answer to a question for an engine's log.
pub enum LogsAnswer {
    /// There is no such engine.
    UnknownEngine,
    /// Nobody keeps its log: it is in this process, or attached by URL.
    NotKept,
    /// Will come from its agent.
    Asked(BoxFuture<'static, Result<Vec<String>, String>>),
}

/// Where a request would go.
#[derive(Debug, Clone, Serialize)]
pub struct WhatIf {
    /// `placement`
    pub object: &'static str,
    /// Where.
    pub plan: Plan,
    /// Predicted seconds from arrival to the first token.
    pub predicted_ttft_seconds: f64,
    /// Prompt tokens that the rank which computes the prompt is expected to have cached.
    pub cached_tokens: u32,
    /// Time that the placement core took.
    pub took_microseconds: f64,
    /// Why.
    pub explanation: Explanation,
}

/// What HTTP needs from below. The real one is [`super::Orchestrator`]; tests of HTTP script their own.
pub trait Orchestrate: Send + Sync + 'static {
    /// Takes a request. Returns at once; dropping the [`Response`] cancels the request wherever it is.
    ///
    /// # Errors
    /// Those [`RouteError`]s that are known at once.
    fn submit(&self, request: GenerateRequest) -> Result<Response, RouteError>;
    /// Where a request would go now, without running it.
    ///
    /// # Errors
    /// As [`Orchestrate::submit`], if it would find no place.
    fn what_if(&self, request: &GenerateRequest) -> Result<WhatIf, RouteError>;
    /// Models that can be asked for.
    fn models(&self) -> Vec<ServedModel>;
    /// One of them, by its id. Asked for every request.
    fn served(&self, model: &str) -> Option<ServedModel> {
        self.models().into_iter().find(|served| *served.id == *model)
    }
    /// Whether any engine takes a client's own words. Asked for every request.
    fn takes_bodies(&self) -> bool {
        self.models().iter().any(|model| model.takes_body)
    }
    /// Whether some model can be served from its prompt to its last token.
    fn is_ready(&self) -> bool;
    /// Every engine.
    fn engines(&self) -> Vec<EngineStatus>;
    /// Every pair of engines that handed KV over or failed to.
    fn links(&self) -> Vec<LinkStatus>;
    /// The decisions that are asked for.
    fn decisions(&self, query: &DecisionQuery) -> Vec<Arc<DecisionRecord>>;
    /// How far predictions were off, by model, over the decisions that are kept.
    fn accuracy(&self) -> Vec<Accuracy>;
    /// One decision.
    fn decision(&self, id: &RequestId) -> Option<Arc<DecisionRecord>>;
    /// Lets an engine finish what runs and gives it nothing new; whether there is one of that name.
    fn drain(&self, engine: &str) -> bool;
    /// The last lines that an engine logged, if somebody beside it keeps them.
    fn logs(&self, engine: &str, lines: usize) -> LogsAnswer;
    /// Name of the placement policy in force.
    fn policy(&self) -> &'static str;
    /// Changes the placement policy from the next placement on: the kill switch.
    ///
    /// # Errors
    /// A sentence that names the nearest policy.
    fn set_policy(&self, name: &str) -> Result<(), String>;
}

/// One response as its reader sees it. Dropping it tells whoever produces it that the client is gone.
pub struct Response {
    source: Box<dyn ResponseSource>,
}

/// What produces a response. It is driven by its reader's polls, on the reader's task, so a token takes one wake-up
/// from engine to client. Dropping it is the client's disconnect.
pub trait ResponseSource: Send + 'static {
    /// Appends everything that has arrived to `batch`; pending while nothing has. `false` after the last event.
    fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<ResponseEvent>) -> Poll<bool>;
    /// A stop string ended this choice: generate no more of it.
    fn stop_choice(&mut self, choice: u32);
}

/// A response that is scripted through a [`ResponseSender`]: for tests of what stands above.
#[derive(Debug)]
struct Scripted {
    shared: Arc<Shared>,
}

/// The sending half of a scripted response.
#[derive(Debug)]
pub struct ResponseSender {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<ResponseEvent>,
    /// Choices whose stop string matched, for the sender to pick up.
    stopped: Vec<u32>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    reader_gone: bool,
    writer_gone: bool,
}

/// What the reader of a scripted response says back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feedback {
    /// A stop string ended this choice: generate no more of it.
    StopMatched {
        /// Which.
        choice: u32,
    },
    /// Nobody listens any more.
    ClientGone,
}

/// A scripted response and the hand that writes it.
pub fn response() -> (ResponseSender, Response) {
    let shared = Arc::new(Shared { state: Mutex::new(State::default()) });
    (ResponseSender { shared: shared.clone() }, Response::new(Scripted { shared }))
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Response").finish_non_exhaustive()
    }
}

impl Response {
    /// What `source` produces.
    pub fn new(source: impl ResponseSource) -> Self {
        Self { source: Box::new(source) }
    }

    /// Appends everything that has arrived to `batch`; pending while nothing has. `false` after the last event.
    pub fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<ResponseEvent>) -> Poll<bool> {
        self.source.poll_batch(cx, batch)
    }

    /// As [`Response::poll_batch`], to await.
    pub async fn next_batch(&mut self, batch: &mut Vec<ResponseEvent>) -> bool {
        poll_fn(|cx| self.poll_batch(cx, batch)).await
    }

    /// Ends one choice: its stop string matched.
    pub fn stop_choice(&mut self, choice: u32) {
        self.source.stop_choice(choice);
    }
}

impl ResponseSource for Scripted {
    fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<ResponseEvent>) -> Poll<bool> {
        let mut state = self.shared.state.lock();
        if !state.events.is_empty() {
            batch.extend(state.events.drain(..));
            return Poll::Ready(true);
        }
        if state.writer_gone {
            return Poll::Ready(false);
        }
        if !state.reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.reader = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    fn stop_choice(&mut self, choice: u32) {
        let mut state = self.shared.state.lock();
        if !state.stopped.contains(&choice) {
            state.stopped.push(choice);
        }
        if let Some(waker) = state.writer.take() {
            waker.wake();
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.reader_gone = true;
        state.events.clear();
        if let Some(waker) = state.writer.take() {
            waker.wake();
        }
    }
}

impl ResponseSender {
    /// Hands events over and wakes the reader once. Drops them if nobody listens.
    pub fn send(&self, events: impl IntoIterator<Item = ResponseEvent>) {
        let mut state = self.shared.state.lock();
        if state.reader_gone {
            return;
        }
        let before = state.events.len();
        state.events.extend(events);
        if state.events.len() > before
            && let Some(waker) = state.reader.take()
        {
            waker.wake();
        }
    }

    /// What the reader said since the last call; pending while it said nothing. [`Feedback::ClientGone`] repeats.
    pub fn poll_feedback(&self, cx: &mut Context<'_>) -> Poll<Feedback> {
        let mut state = self.shared.state.lock();
        if let Some(choice) = state.stopped.pop() {
            return Poll::Ready(Feedback::StopMatched { choice });
        }
        if state.reader_gone {
            return Poll::Ready(Feedback::ClientGone);
        }
        if !state.writer.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.writer = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for ResponseSender {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.writer_gone = true;
        if let Some(waker) = state.reader.take() {
            waker.wake();
        }
    }
}
