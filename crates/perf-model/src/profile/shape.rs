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

impl PrefillShape {
    /// Prompt tokens in each step but perhaps the last; at least 1.
    pub(crate) fn chunk_tokens(&self) -> u32 {
        match self.budget_tokens {
            0 => self.new_tokens.max(1),
            budget => budget.saturating_sub(self.decodes).max(1),
        }
    }
}
