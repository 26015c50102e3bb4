//! A request inside an engine, and the place where its tokens come out.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Map, Value};
use tokio::sync::Notify;

use super::pool::{BlockId, EngineHash, Identity};
use crate::kv::{Context, Model};
use crate::tokenizer::Token;

/// What the engine is asked to do.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// The engine's own id of the request: the API's id with a random end.
    pub(crate) id: String,
    pub(crate) prompt: Vec<Token>,
    pub(crate) identity: Identity,
    pub(crate) sampling: Sampling,
    /// Lower goes first, if the engine schedules by priority.
    pub(crate) priority: i64,
    pub(crate) transfer: Transfer,
}

/// How tokens are drawn and when they end.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) ignore_eos: bool,
    pub(crate) stop_token_ids: Vec<Token>,
    /// The state of the random generator; `None` for temperature 0.
    pub(crate) generator: Option<u64>,
}

/// What a request has to do with other engines' KV.
#[derive(Clone, Debug, Default)]
pub(crate) enum Transfer {
    #[default]
    None,
    /// vLLM: `kv_transfer_params` as the client sent them.
    Params(Map<String, Value>),
    /// SGLang: wait for the prefill server's KV of this room, then write it into our blocks.
    Room(Room),
    /// SGLang: compute the prompt, then offer the KV under this room.
    Offer(Room),
}

/// An SGLang hand-over.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) room: u64,
    /// The prefill server's rank, if the router named it.
    pub(crate) prefill_rank: Option<u32>,
    /// `bootstrap_host` 2.2.2.2: no partner, the KV goes nowhere.
    pub(crate) fake: bool,
}

/// One token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) token: Token,
    pub(crate) logprob: f64,
    /// Other tokens at this place can be told from it.
    pub(crate) state: u64,
}

/// Why there are no more tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ending {
    /// An end token, or `Some` stop token of the request.
    Stop(Option<Token>),
    Length,
    Abort,
    /// The request failed, the engine lives: a KV load that failed.
    Failed(String),
    /// The engine is dead.
    EngineDead,
}

/// What came out of the engine since the last look.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) ending: Option<Ending>,
    /// Tokens of the prompt that needed no computing; known with the first token.
    pub(crate) cached_tokens: Option<usize>,
    /// vLLM: what a prefill leg hands to the decode leg.
    pub(crate) transfer_params: Option<Value>,
}

/// Where a request's tokens come out. Bounded by `max_tokens`.
#[derive(Debug)]
pub(crate) struct Outlet {
    state: Mutex<Output>,
    /// Shared by all choices of one HTTP request, which has one reader.
    pub(crate) notify: Arc<Notify>,
}

impl Outlet {
    pub(crate) fn new(notify: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(Output::default()), notify })
    }

    /// Everything since the last call.
    pub(crate) fn take(&self) -> Output {
        let mut state = self.state.lock();
        Output {
            tokens: std::mem::take(&mut state.tokens),
            ending: state.ending.take(),
            cached_tokens: state.cached_tokens,
            transfer_params: state.transfer_params.take(),
        }
    }

    pub(crate) fn put(&self, change: impl FnOnce(&mut Output)) {
        change(&mut self.state.lock());
        self.notify.notify_one();
    }
}

/// What a scheduled request is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Waiting,
    Running,
    /// Has blocks and waits for another engine's KV.
    Loading,
    /// As `Loading`, but nobody will ever bring it: the transfer parameters were incomplete.
    Stranded,
}

/// A request with its blocks.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) work: Work,
    pub(crate) outlet: Arc<Outlet>,
    /// Prompt, then what was generated.
    pub(crate) tokens: Vec<Token>,
    pub(crate) phase: Phase,
    pub(crate) model: Model,
    pub(crate) table: Vec<BlockId>,
    pub(crate) hashes: Vec<EngineHash>,
    /// Blocks of `table` that are in the cache (and were announced).
    pub(crate) cached_blocks: usize,
    /// Positions whose KV is in the blocks.
    pub(crate) computed: usize,
    /// What attention has read: the first `attended` positions.
    pub(crate) context: Context,
    pub(crate) attended: usize,
    /// Of the prompt: found in the own cache, brought by another engine.
    pub(crate) hit: usize,
    pub(crate) external: usize,
    /// What to report as cached, if not `hit`: a prefill engine's count.
    pub(crate) reported_cached: Option<usize>,
    /// The external KV was brought, or given up: it is not asked for again.
    pub(crate) loaded: bool,
    /// Order of arrival.
    pub(crate) arrival: u64,
}

impl Sequence {
    pub(crate) fn new(work: Work, outlet: Arc<Outlet>, model: Model, arrival: u64) -> Self {
        Self {
            tokens: work.prompt.clone(),
            context: model.start(),
            work,
            outlet,
            phase: Phase::Waiting,
            model,
            table: Vec::new(),
            hashes: Vec::new(),
            cached_blocks: 0,
            computed: 0,
            attended: 0,
            hit: 0,
            external: 0,
            reported_cached: None,
            loaded: false,
            arrival,
        }
    }

    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.work.prompt.len()
    }

    /// As before it was first scheduled, except for the tokens: its blocks were given back.
    pub(crate) fn reset(&mut self) {
        self.table.clear();
        self.cached_blocks = 0;
        self.computed = 0;
        self.attended = 0;
        self.context = self.model.start();
        self.phase = Phase::Waiting;
    }
}
