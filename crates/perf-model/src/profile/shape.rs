//! What a step or a prefill holds.

use forebay_types::StepObservation;

/// What one scheduler step computes, on one rank or on the ranks of one expert-parallel group that step together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepShape {
    /// Prompt tokens computed; in a group those of the rank with most.
    pub prefill_tokens: u32,
    /// Attention work of those tokens: the sum over chunks of `m·c + m²/2` for `m` tokens on `c` already computed.
    pub prefill_attention: f64,
    /// Sequences that decode one token; in a group those of the rank with most.
    pub decodes: u32,
    /// Tokens of context that they read; in a group those of the rank with most.
    pub context_tokens: u64,
    /// Sequences that decode on all ranks of the group together. Less than `decodes` counts as `decodes`, so 0 is right
    /// for a rank that steps alone.
    pub group_decodes: u32,
    /// Tokens that the engine puts into a step at most, as it was started. 0: not known, taken to be ample.
    pub budget_tokens: u32,
}

impl StepShape {
    /// The step of a group whose ranks each do one of `ranks`: the fullest rank's of everything, and all sequences.
    pub fn of_group(ranks: impl IntoIterator<Item = StepShape>) -> Self {
        ranks.into_iter().fold(Self::default(), |group, rank| Self {
            prefill_tokens: group.prefill_tokens.max(rank.prefill_tokens),
            prefill_attention: group.prefill_attention.max(rank.prefill_attention),
            decodes: group.decodes.max(rank.decodes),
            context_tokens: group.context_tokens.max(rank.context_tokens),
            group_decodes: group.group_decodes.saturating_add(rank.group_decodes.max(rank.decodes)),
            budget_tokens: group.budget_tokens.max(rank.budget_tokens),
        })
    }

    /// What was computed in a step that was measured, on a rank that steps alone with this token budget.
    pub fn observed(step: &StepObservation, budget_tokens: u32) -> Self {
        let &StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds: _ } =
            step;
        Self { prefill_tokens, prefill_attention, decodes, context_tokens, group_decodes: 0, budget_tokens }
    }
}

/// One prompt computed in chunks, perhaps beside sequences that decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefillShape {
    /// Prompt tokens to compute.
    pub new_tokens: u32,
    /// Prompt tokens before them whose KV is there.
    pub cached_tokens: u32,
    /// Tokens that the engine puts into a step at most; decodes go first, the chunk gets the rest, but at least 1. 0:
    /// the whole prompt in one step.
    pub budget_tokens: u32,
    /// Sequences that decode in every one of the steps.
    pub decodes: u32,
    /// Tokens of context that they read in each; taken to stay the same while the prefill runs.
    pub context_tokens: u64,
}

/// Prompts that wait on one rank, all together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct QueueShape {
    /// Prompt tokens to compute.
    pub tokens: u64,
    /// Attention work of those tokens; see [`StepShape::prefill_attention`].
    pub attention: f64,
    /// Tokens that the engine puts into a step at most; decodes go first, prompts get the rest, but at least 1. 0: all
    /// of them in one step.
    pub budget_tokens: u32,
    /// Sequences that decode in every one of the steps; in a group those of the rank with most.
    pub decodes: u32,
    /// Tokens of context that they read in each; in a group those of the rank with most.
    pub context_tokens: u64,
    /// Sequences that decode on all ranks of the group together; see [`StepShape::group_decodes`].
    pub group_decodes: u32,
}

impl QueueShape {
    /// Steps that compute them.
    pub fn steps(&self) -> u64 {
        // Most prompts fit one step, and a division takes as long as the rest of a price.
        match self.chunk_tokens() {
            chunk if self.tokens <= chunk => u64::from(self.tokens > 0),
            chunk => self.tokens.div_ceil(chunk),
        }
    }

    fn chunk_tokens(&self) -> u64 {
        match self.budget_tokens {
            0 => self.tokens.max(1),
            budget => u64::from(budget.saturating_sub(self.decodes).max(1)),
        }
    }

    /// Full steps, prompt tokens of each, and those of the last one that is not full.
    pub(crate) fn cut(&self) -> (u64, u32, u32) {
        let chunk = self.chunk_tokens();
        let (full, rest) = match self.tokens {
            tokens if tokens <= chunk => (0, tokens),
            tokens => (tokens / chunk, tokens % chunk),
        };
        (full, u32::try_from(chunk).unwrap_or(u32::MAX), u32::try_from(rest).unwrap_or(u32::MAX))
    }

    /// One of its steps, but for the attention.
    pub(crate) fn step(&self, prefill_tokens: u32) -> StepShape {
        let &Self { budget_tokens, decodes, context_tokens, group_decodes, .. } = self;
        StepShape {
            prefill_tokens,
            prefill_attention: 0.0,
            decodes,
            context_tokens,
            group_decodes,
            budget_tokens,
        }
    }
}

impl PrefillShape {
    /// Prompt tokens in each step but perhaps the last; at least 1.
    pub(crate) fn chunk_tokens(&self) -> u32 {
        match self.budget_tokens {
            0 => self.new_tokens.max(1),
            budget => budget.saturating_sub(self.decodes).max(1),
        }
    }
}
