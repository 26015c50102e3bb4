//! What a rank is asked to do and what comes of it.

use std::sync::Arc;

use forebay_types::{BlockHash, FinishReason, LegId, TokenId};

use crate::pool::Generation;

/// Sizes and bounds of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens of a KV block.
    pub block_size_tokens: u32,
    /// Blocks of the pool.
    pub blocks_total: u32,
    /// Tokens computed in one step, decodes included.
    pub step_tokens_max: u32,
    /// Tokens of one prompt computed in one step; `u32::MAX`: as many as there is room for. What a long prompt leaves of the
    /// step lets others begin, hand-overs among them. vLLM's `long_prefill_token_threshold`.
    pub chunk_tokens_max: u32,
    /// Whether decode legs begin to import before prompts that wait, and in full steps too: a hand-over computes nothing.
    /// vLLM's queue is in order of arrival, and closed while a step is full.
    pub imports_first: bool,
    /// Sequences in the running batch.
    pub sequences_max: u32,
    /// Jobs that wait for their first step.
    pub waiting_max: u32,
    /// Longest sequence, prompt and output; no more than the pool holds.
    pub context_tokens_max: u32,
}

/// One leg's work on this rank.
#[derive(Debug, Clone)]
pub struct Job {
    /// Names the leg in every answer. Unique among live jobs.
    pub leg: LegId,
    /// Never empty.
    pub prompt: Arc<[TokenId]>,
    /// Of every full block of `prompt`, in order.
    pub hashes: Arc<[BlockHash]>,
    /// Root of the chain: model and tenant salt.
    pub root: BlockHash,
    /// Choices to sample from one prefill; never empty.
    pub choices: Vec<u32>,
    /// Tokens to generate for each choice, at least 1; a [`Work::Decode`] counts its known first token.
    pub output_tokens_max: u32,
    /// Tokens that end a choice.
    pub stop_tokens: Arc<[TokenId]>,
    /// Which phases.
    pub work: Work,
}

/// The phases of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Prefill and decode.
    Aggregated,
    /// Compute the prompt, sample the first token of each choice, hold the KV.
    Prefill,
    /// Import the prompt's KV, continue after these first tokens.
    Decode {
        /// The first token of each choice; not output again.
        first: Vec<(u32, TokenId)>,
    },
}

/// What a step produced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A token was drawn.
    Token {
        /// Whose.
        leg: LegId,
        /// Which answer.
        choice: u32,
        /// Index in the whole sequence.
        position: u32,
        /// The token; stop tokens are output too.
        token: TokenId,
    },
    /// No more tokens of this choice follow.
    Finished {
        /// Whose.
        leg: LegId,
        /// Which answer.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// A prefill job is done and its blocks are held until [`crate::Scheduler::release_held`].
    Held {
        /// Whose.
        leg: LegId,
        /// The prompt's blocks in order, the last one perhaps partial.
        blocks: Vec<(u32, Generation)>,
        /// Prompt tokens that they cover.
        tokens: u32,
    },
    /// The job is over.
    Ended {
        /// Whose.
        leg: LegId,
    },
}

/// Why a job was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Waiting helps.
    #[error("the queue of {waiting_max} is full")]
    QueueFull {
        /// The bound.
        waiting_max: u32,
    },
    /// Prompt and one token exceed the context.
    #[error("the prompt has {prompt_tokens} tokens, sequences end at {context_tokens_max}")]
    TooLong {
        /// Length of the prompt.
        prompt_tokens: u32,
        /// The bound.
        context_tokens_max: u32,
    },
    /// A caller's bug: an empty prompt, no choices, no output, a leg that is already here, hashes that do not match.
    #[error("malformed job: {reason}")]
    Malformed {
        /// What is wrong.
        reason: &'static str,
    },
}
