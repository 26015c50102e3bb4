//! The driver trait: what an engine is to the rest of Forebay.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_kv_move::{BlockRef, Region};
use forebay_perf_model::StepCoefficients;
use forebay_types::{
    BlockHash, EngineName, FinishReason, Incarnation, LegId, RankId, RequestId, Role, SampledToken, Sampling,
    TokenId,
};

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

    /// What the engine says about itself, for one reader.
    fn reports(&self) -> &Reports;

    /// Asks for the whole cache in the next report, after events were lost.
    fn request_snapshot(&self);

    /// Ends this life as soon as its running step is over; what runs is lost.
    fn stop(&self);
}

/// Starts lives of one engine.
pub trait Launch: Send + Sync + 'static {
    /// The name that survives restarts.
    fn name(&self) -> &EngineName;
    /// `embedded`, `sim`, ...
    fn kind(&self) -> &'static str;
    /// What it may be asked to do.
    fn role(&self) -> Role;
    /// Starts a life.
    ///
    /// # Errors
    /// What kept it from starting.
    fn launch(&self, incarnation: Incarnation) -> Result<Arc<dyn Driver>, LaunchError>;
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

/// What an engine is and can do.
#[derive(Debug, Clone)]
pub struct EngineFacts {
    /// Stable name.
    pub engine: EngineName,
    /// `embedded`, `sim`, ...
    pub kind: &'static str,
    /// This life.
    pub incarnation: Incarnation,
    /// Model id that requests name.
    pub model: Arc<str>,
    /// What it may be asked to do.
    pub role: Role,
    /// Tokens of a KV block.
    pub block_size_tokens: u32,
    /// Bytes of a KV block over all layers.
    pub block_bytes: u64,
    /// Size of the KV pool.
    pub blocks_total: u32,
    /// Token budget of one scheduler step.
    pub step_tokens_max: u32,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: u32,
    /// Legs that may wait.
    pub waiting_max: u32,
    /// Engines may exchange KV only if this is equal: weights, arithmetic and layout.
    pub kv_layout: u64,
    /// First guess at the speed of a step, from a probe at the start.
    pub prior: StepCoefficients,
}

impl EngineFacts {
    /// The rank of an engine that has only one.
    pub fn rank(&self) -> RankId {
        RankId { incarnation: self.incarnation, dp_rank: 0 }
    }
}

/// The tokens of a prompt and the identities of its full blocks, computed once by the gateway.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Never empty.
    pub tokens: Arc<[TokenId]>,
    /// Of every full block of `tokens`.
    pub hashes: Arc<[BlockHash]>,
    /// Root of the chain: model and tenant salt.
    pub root: BlockHash,
}

/// One piece of a request's work on one rank.
#[derive(Debug, Clone)]
pub struct Leg {
    /// Unique in the process.
    pub id: LegId,
    /// For logs.
    pub request: RequestId,
    /// What to compute.
    pub prompt: Prompt,
    /// Choice indices to sample; they share one prefill.
    pub choices: Vec<u32>,
    /// How; `output_tokens_max` counts from this leg's first token.
    pub sampling: Arc<Sampling>,
    /// Which phases.
    pub work: Work,
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
        /// The first token of each choice; the prefill leg has delivered it.
        first: Vec<(u32, TokenId)>,
    },
}

/// KV of one prompt in a prefill engine's pool, held under a lease.
#[derive(Clone)]
pub struct KvHandle {
    /// Whose pool.
    pub from: RankId,
    /// The leg that holds it; what [`Driver::release_kv`] takes.
    pub leg: LegId,
    /// The pool.
    pub region: Region,
    /// The prompt's blocks in order, the last one perhaps partial.
    pub blocks: Arc<[BlockRef]>,
    /// Prompt tokens covered.
    pub tokens: u32,
    /// Must equal the reader's.
    pub kv_layout: u64,
    /// End of the lease: from then on the owner may write there again.
    pub held_until: Instant,
}

impl fmt::Debug for KvHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvHandle")
            .field("from", &self.from)
            .field("leg", &self.leg)
            .field("blocks", &self.blocks.len())
            .field("tokens", &self.tokens)
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
    /// The prompt is computed and its KV held; the first tokens came before.
    Prefilled(KvHandle),
    /// The KV of a decode leg is here; the source may free it.
    KvArrived(TransferReport),
    /// The KV did not arrive intact; the engine recomputes the prompt. The source may free it.
    KvFailed {
        /// Which of the outcomes.
        outcome: TransferOutcome,
    },
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
