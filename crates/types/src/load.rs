//! What ranks are, carry and take.

use serde::{Deserialize, Serialize};

/// What an engine may be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill legs only.
    Prefill,
    /// Decode legs only.
    Decode,
    /// Anything: aggregated requests, prefill legs and decode legs.
    #[default]
    Both,
}

impl Role {
    /// Whether an engine in this role computes prompts for another engine.
    pub fn prefills(self) -> bool {
        matches!(self, Role::Prefill | Role::Both)
    }
    /// Whether an engine in this role continues prompts that another engine computed.
    pub fn decodes(self) -> bool {
        matches!(self, Role::Decode | Role::Both)
    }
}

/// The phase that an engine of role [`Role::Both`] is kept for, for a while and as far as others can take the other phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Leaning {
    /// Both.
    #[default]
    Neither,
    /// Computes prompts for others to continue.
    Prefill,
    /// Continues what others computed, and computes prompts where that is cheaper.
    Decode,
}

/// What a rank says about itself after a scheduler step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RankLoad {
    /// Sequences that wait for their first step.
    pub waiting: u32,
    /// Sequences in the running batch.
    pub running: u32,
    /// Of those, sequences whose prompt is computed.
    pub decoding: u32,
    /// Prompt tokens still to compute, of waiting and running sequences.
    pub prefill_tokens: u64,
    /// Tokens of context that one decode step reads.
    pub context_tokens: u64,
    /// Size of the KV pool.
    pub blocks_total: u32,
    /// Blocks that no sequence uses, cached ones included.
    pub blocks_free: u32,
    /// Sequences that were preempted since the start.
    pub preemptions: u64,
    /// Prompt tokens served from cache since the start.
    pub cached_tokens: u64,
    /// Prompt tokens accepted since the start.
    pub prompt_tokens: u64,
}

/// One scheduler step as it was measured: what it computed and how long that took. The input of `perf-model`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StepObservation {
    /// Prompt tokens computed.
    pub prefill_tokens: u32,
    /// Attention work of those tokens: the sum over chunks of `m·c + m²/2` for `m` tokens on `c` already computed.
    pub prefill_attention: f64,
    /// Sequences that decoded one token.
    pub decodes: u32,
    /// Tokens of context that those sequences read.
    pub context_tokens: u64,
    /// Duration.
    pub seconds: f64,
}
