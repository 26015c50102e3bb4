//! The driver trait: what an engine is to the rest of Forebay.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_wire::object::Object;
use forebay_kv_move::{BlockRef, Region};
use forebay_perf_model::StepCoefficients;
pub use forebay_types::FirstToken;
use forebay_types::{
    BlockHash, EngineName, FinishReason, Incarnation, LegId, RankId, RequestId, Role, SampledToken, Sampling,
    TokenId,
};
use futures::future::BoxFuture;
use serde_json::value::RawValue;

use crate::{reports::Reports, stream::LegStream};

/// One life of one engine: takes legs, streams what they produce, reports load and cache changes.
///
/// A driver is made by a [`Launch`] for one incarnation and is never revived: after [`crate::Report::Died`] every call
/// answers [`StartError::Gone`].
pub trait Driver: Send + Sync + 'static {
    /// What was found out at the start; constant for this life.
    fn facts(&self) -> &EngineFacts;

    /// Hands a leg to the engine and returns at once. Dropping the stream before its [`LegEvent::Ended`] cancels the
    /// leg: within one step it computes nothing more and its blocks are free, held ones included.
    ///
    /// # Errors
    /// Those that are known at once; later ones come as [`LegEvent::Refused`].
    fn start(&self, leg: Leg) -> Result<LegStream, StartError>;

    /// Frees the KV that a finished prefill leg holds. Unknown legs are ignored: the lease may have ended first.
    fn release_kv(&self, leg: LegId);

    /// Whether the engine runs in this process: then it cannot fall silent without dying.
    fn is_in_process(&self) -> bool {
        false
    }

    /// What the engine says about itself, for one reader.
    fn reports(&self) -> &Reports;

    /// Asks for the whole cache of one rank in a next report, after events were lost.
    fn request_snapshot(&self, dp_rank: u16);

    /// Asks whether the engine makes of a client's words the tokens that we made. `None` if it cannot be asked that.
    fn audit_tokens(&self, _body: &ClientBody, _ours: Arc<[TokenId]>) -> Option<BoxFuture<'static, Audit>> {
        None
    }

    /// Ends this life as soon as its running step is over; what runs is lost.
    fn stop(&self);
}

/// What an engine makes of words whose tokens we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audit {
    /// The same tokens.
    Agrees,
    /// Others; a sentence says where they begin to differ.
    Differs(String),
    /// It did not say.
    Unanswered,
}

/// Starts lives of one engine.
pub trait Launch: Send + Sync + 'static {
    /// The name that survives restarts.
    fn name(&self) -> &EngineName;
    /// `embedded`, `sim`, ...
    fn kind(&self) -> &'static str;
    /// What it may be asked to do.
    fn role(&self) -> Role;
    /// Whether the engine lives elsewhere, and is found rather than started: looking again costs little.
    fn is_attached(&self) -> bool {
        false
    }
    /// Starts a life, or finds the one that runs elsewhere. Dropping the future calls it off.
    ///
    /// # Errors
    /// What kept it from starting.
    fn launch(&self, incarnation: Incarnation) -> BoxFuture<'_, Result<Arc<dyn Driver>, LaunchError>>;
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[error("engine {engine} did not start: {reason}")]
pub struct LaunchError {
    /// Which.
    pub engine: EngineName,
    /// A sentence.
    pub reason: String,
}

/// What an engine is and can do. Sizes of KV are those of each rank.
#[derive(Debug, Clone)]
pub struct EngineFacts {
    /// Stable name.
    pub engine: EngineName,
    /// `embedded`, `sim`, `vllm`, ...
    pub kind: &'static str,
    /// This life.
    pub incarnation: Incarnation,
    /// Model id that requests name.
    pub model: Arc<str>,
    /// What it may be asked to do.
    pub role: Role,
    /// Its schedulers, numbered from 0. At least 1.
    pub dp_ranks: u16,
    /// Tokens of a KV block.
    pub block_size_tokens: u32,
    /// Bytes of a KV block over all layers; 0 if nobody knows.
    pub block_bytes: u64,
    /// Size of a rank's KV pool; 0 if nobody knows.
    pub blocks_total: u32,
    /// Token budget of one scheduler step.
    pub step_tokens_max: u32,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: u32,
    /// Legs that may wait at a rank.
    pub waiting_max: u32,
    /// What it can do with KV of others, and others with its own.
    pub kv: KvAbilities,
    /// In which forms it takes a request.
    pub accepts: Accepts,
    /// Whether a leg elsewhere, given the prompt and the tokens so far, goes on with the very tokens that this engine
    /// would have drawn, whatever the sampling (`seed`, several choices, logprobs). Where not, only plain sampling moves.
    pub continues_sampling: bool,
    /// How much is known of its cache.
    pub cache_sight: CacheSight,
    /// Sentences for operators: what is missing or off, and the flag that mends it.
    pub notes: Vec<Arc<str>>,
    /// First guess at the speed of a step, from a probe at the start or a profile of its kind.
    pub prior: StepCoefficients,
}

/// What an engine can do with KV beyond its own pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvAbilities {
    /// Engines may exchange KV only if this is equal: weights, arithmetic, layout, block size, version, connector.
    pub layout: u64,
    /// Others can continue from what it computed.
    pub can_export: bool,
    /// It can continue from what others computed.
    pub can_import: bool,
    /// The first hand-over between two of its kind takes far longer than the next: a pair is warmed before it is used.
    pub needs_warming: bool,
}

/// In which forms an engine takes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepts {
    /// Token ids in, token ids out: text is turned into tokens once, by the gateway.
    pub tokens: bool,
    /// The client's own body, answered in the engine's own words ([`Leg::body`]).
    pub body: bool,
}

impl Accepts {
    /// Tokens alone: what in-process engines take.
    pub const TOKENS: Self = Self { tokens: true, body: false };
}

/// How much is known of what an engine caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheSight {
    /// It announces every change.
    Events,
    /// It announces nothing: what was routed there lately is taken to be there.
    Approximate {
        /// Why, as a sentence.
        why: Arc<str>,
    },
}

/// KV of a token, bytes, of engines that do not tell: an 8B model's in 16 bits (32 layers, 8 KV heads of 128).
const KV_TOKEN_BYTES_NOMINAL: u64 = 128 << 10;

impl EngineFacts {
    /// Bytes of a KV block for comparing costs. Where nobody knows them they are nominal: what moving so much takes is
    /// learned in the same measure, so only bytes a second come out as nominal as they are.
    pub fn block_bytes_or_nominal(&self) -> u64 {
        match self.block_bytes {
            0 => u64::from(self.block_size_tokens) * KV_TOKEN_BYTES_NOMINAL,
            bytes => bytes,
        }
    }

    /// One of its ranks.
    pub fn rank(&self, dp_rank: u16) -> RankId {
        RankId { incarnation: self.incarnation, dp_rank }
    }

    /// All of its ranks.
    pub fn ranks(&self) -> impl Iterator<Item = RankId> + use<> {
        let incarnation = self.incarnation;
        (0..self.dp_ranks).map(move |dp_rank| RankId { incarnation, dp_rank })
    }
}

/// The tokens of a prompt and the identities of its full blocks, computed once by the gateway.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Empty only beside a [`Leg::body`] whose tokens nobody here knows.
    pub tokens: Arc<[TokenId]>,
    /// Of every full block of `tokens`, or of stretches of the body's text where the tokens are unknown.
    pub hashes: Arc<[BlockHash]>,
    /// Root of the chain: model and `salt`.
    pub root: BlockHash,
    /// What separates tenants in an engine's prefix cache (`cache_salt`); empty for none.
    pub salt: Arc<str>,
}

/// A client's request in its own words, for engines that are given text. The fields that could harm an engine or reach
/// another tenant's cache are gone.
#[derive(Debug, Clone)]
pub struct ClientBody {
    /// Which route it came in by.
    pub route: ClientRoute,
    /// What it says.
    pub json: Object,
    /// The client asked for server-sent events.
    pub streams: bool,
}

/// The routes whose bodies are passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClientRoute {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl ClientRoute {
    /// The path, the same at the gateway and at engines.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// One piece of a request's work on one rank.
#[derive(Debug, Clone)]
pub struct Leg {
    /// Unique in the process.
    pub id: LegId,
    /// For logs; engines are told it where they take one.
    pub request: RequestId,
    /// Which of the engine's ranks.
    pub dp_rank: u16,
    /// What to compute.
    pub prompt: Prompt,
    /// Choice indices to sample; they share one prefill.
    pub choices: Vec<u32>,
    /// How; `output_tokens_max` counts from this leg's first token.
    pub sampling: Arc<Sampling>,
    /// Which phases.
    pub work: Work,
    /// Given: the engine is sent this body and its answer comes as [`LegEvent::Reply`], not as tokens. `choices` and
    /// `sampling` are then for load accounting alone.
    pub body: Option<Arc<ClientBody>>,
    /// When whoever asked stops waiting.
    pub deadline: Instant,
}

/// The phases that a leg covers.
#[derive(Debug, Clone)]
pub enum Work {
    /// Prefill and decode.
    Aggregated,
    /// Compute the prompt, sample the first token of each choice, hold the KV under a lease.
    Prefill,
    /// Import the prompt's KV and continue after tokens that are already known.
    Decode {
        /// Where the KV lies.
        kv: KvHandle,
        /// The first token of each choice, where the prefill leg has delivered it ([`FirstToken::Handed`]); else empty.
        first: Vec<(u32, TokenId)>,
    },
}

/// KV of one prompt at a prefill engine, held under a lease.
#[derive(Clone)]
pub struct KvHandle {
    /// Whose.
    pub from: RankId,
    /// The leg that holds it; what [`Driver::release_kv`] takes.
    pub leg: LegId,
    /// Prompt tokens covered.
    pub tokens: u32,
    /// End of the lease: from then on the owner may write there again.
    pub held_until: Instant,
    /// Who delivers the first token.
    pub first: FirstToken,
    /// Where it lies, in the words of those who move it.
    pub place: KvPlace,
}

/// Where held KV lies.
#[derive(Clone)]
pub enum KvPlace {
    /// In a pool of this machine; the shell of the reading engine copies it.
    Pool {
        /// The pool.
        region: Region,
        /// The prompt's blocks in order, the last one perhaps partial.
        blocks: Arc<[BlockRef]>,
        /// Must equal the reader's.
        layout: u64,
    },
    /// At a vLLM engine: the `kv_transfer_params` that its prefill leg answered, checked to be complete, passed on word for
    /// word.
    Params(Arc<RawValue>),
    /// At an SGLang prefill server: where the decode server meets it. The prefill leg still runs.
    Bootstrap(Bootstrap),
}

/// The meeting point of an SGLang pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// Of the prefill server, as the decode server reaches it.
    pub host: Arc<str>,
    /// Its bootstrap port.
    pub port: u16,
    /// Unique to the request.
    pub room: u64,
    /// Rank of the prefill server that computes it.
    pub prefill_dp_rank: Option<u16>,
}

impl fmt::Debug for KvHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.place {
            KvPlace::Pool { blocks, .. } => format!("{} blocks of a pool", blocks.len()),
            KvPlace::Params(_) => "kv_transfer_params".to_owned(),
            KvPlace::Bootstrap(bootstrap) => format!("{bootstrap:?}"),
        };
        f.debug_struct("KvHandle")
            .field("from", &self.from)
            .field("leg", &self.leg)
            .field("tokens", &self.tokens)
            .field("first", &self.first)
            .field("place", &place)
            .finish_non_exhaustive()
    }
}

/// What a leg produces, in order. [`LegEvent::Ended`], [`LegEvent::Refused`] and [`LegEvent::Lost`] are last.
#[derive(Debug, Clone)]
pub enum LegEvent {
    /// The engine began to compute.
    Started {
        /// Prompt tokens found in its prefix cache.
        cached_tokens: u32,
    },
    /// A token was drawn.
    Token(SampledToken),
    /// No more tokens of this choice follow.
    Finished {
        /// Which.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// A decode leg may begin: the prompt is computed and its KV held, or the decode engine is to meet the prefill engine
    /// while it computes ([`KvPlace::Bootstrap`]). With [`FirstToken::Handed`] the first tokens came before.
    Prefilled(KvHandle),
    /// The KV of a decode leg is here; the source may free it.
    KvArrived(TransferReport),
    /// The KV did not arrive intact; the engine recomputes the prompt. The source may free it.
    KvFailed {
        /// Which of the outcomes.
        outcome: TransferOutcome,
    },
    /// The engine's own answer to [`Leg::body`], piece by piece.
    Reply(Reply),
    /// The engine's count of an answer, where it gave one. Comes before the end.
    Usage(LegUsage),
    /// All choices have finished (or the KV is held).
    Ended,
    /// The engine did not take the leg.
    Refused(StartError),
    /// The engine died.
    Lost {
        /// Its last words.
        reason: Arc<str>,
    },
}

/// An engine's answer in its own words.
#[derive(Debug, Clone)]
pub enum Reply {
    /// First, once. Only statuses that are an answer to the client: 2xx, and those 4xx that say what is wrong with the
    /// request. Anything else is a failed leg.
    Head {
        /// HTTP status.
        status: u16,
        /// `content-type`.
        content_type: Arc<str>,
    },
    /// A piece of the body; of a stream, whole events.
    Data(Bytes),
}

/// Counts of one leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LegUsage {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Of those, from a prefix cache.
    pub cached_tokens: u32,
    /// Generated, over all choices.
    pub output_tokens: u32,
}

/// One completed hand-over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TransferReport {
    /// Blocks that moved; cached ones did not.
    pub blocks: u32,
    /// Bytes that moved.
    pub bytes: u64,
    /// Copies after merging neighbours.
    pub pieces: u32,
    /// Duration.
    pub seconds: f64,
}

/// How a hand-over failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransferOutcome {
    /// The source's blocks are no longer what they were, or the copy is damaged.
    Failed(String),
    /// Its deadline passed.
    TimedOut,
    /// Called off.
    Cancelled,
}

impl fmt::Display for TransferOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(reason) => write!(f, "failed: {reason}"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// Why an engine did not take a leg.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// Waiting or another engine helps.
    #[error("the engine's queue of {waiting_max} is full")]
    QueueFull {
        /// The bound.
        waiting_max: u32,
    },
    /// It can never fit here.
    #[error("prompt and output need {needed_tokens} tokens, the engine holds {context_tokens_max}")]
    TooLong {
        /// What the leg needs.
        needed_tokens: u32,
        /// What there is.
        context_tokens_max: u32,
    },
    /// This life is over.
    #[error("the engine is gone")]
    Gone,
    /// The caller's bug.
    #[error("malformed leg: {reason}")]
    Malformed {
        /// What is wrong.
        reason: &'static str,
    },
    /// The KV to import has another layout or size.
    #[error("the KV to import does not fit this engine")]
    ForeignKv,
    /// The engine says that the request itself cannot be served; no other engine of the model would.
    #[error("the engine refused the request with status {status}: {message}")]
    Rejected {
        /// HTTP status, 4xx.
        status: u16,
        /// The engine's own sentence.
        message: Arc<str>,
    },
    /// The engine answered with an error that says nothing about the request. It counts against the engine.
    #[error("the engine failed: {message}")]
    Failed {
        /// What it said.
        message: Arc<str>,
    },
    /// The engine does not take requests in this form ([`Accepts`]).
    #[error("the engine does not take requests in this form")]
    WrongForm,
}

/// Bounds of one in-process engine.
#[derive(Debug, Clone)]
pub struct EngineLimits {
    /// Size of the KV pool.
    pub blocks_total: u32,
    /// Tokens of a block.
    pub block_size_tokens: u32,
    /// Token budget of one step.
    pub step_tokens_max: u32,
    /// Sequences in the running batch.
    pub sequences_max: u32,
    /// Legs that wait.
    pub waiting_max: u32,
    /// How long a finished prefill leg holds its KV.
    pub kv_lease: Duration,
    /// How long one hand-over may take.
    pub transfer_deadline: Duration,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            blocks_total: 512,
            block_size_tokens: 16,
            step_tokens_max: 256,
            sequences_max: 64,
            waiting_max: 256,
            kv_lease: Duration::from_secs(30),
            transfer_deadline: Duration::from_secs(5),
        }
    }
}
