//! What no request changes about a rank's price, worked out once.
//!
//! In: a rank, the pace of its kind, the load of its group. Out: [`Standing`], kept in the snapshot beside the rank, and
//! what a request would add to it. A placement looks at every rank; most of what it would work out anew for each is here.

use forebay_perf_model::{QueueShape, RankPrices, StepShape};

use crate::{
    group::{GroupLoad, waiting_tokens},
    pace::Paces,
    place::Request,
    snapshot::RankView,
};

/// Where a rank stands before a request comes.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    prices: RankPrices,
    /// Sequences that decode, and their context.
    decodes: u32,
    context_tokens: u64,
    /// Steps of prompts, as they are without any: beside the rank's own decodes or, where ranks step together, beside its
    /// group's.
    beside: QueueShape,
    /// Sequences that a prefill here stalls.
    pub(crate) stalled: u32,
    /// A step of those decodes alone.
    pub(crate) step_seconds: f64,
    /// Share of its time that prefills lately took from decodes.
    pub(crate) prefill_share: f64,
    group: Option<GroupLoad>,
    /// Prompts ahead, the steps that compute them, and until then.
    ahead: Prompts,
    ahead_steps: u64,
    ahead_seconds: f64,
    /// Until the prompt of a request that comes now would begin.
    pub(crate) wait_seconds: f64,
    pub(crate) pool: Pool,
    /// Share of the prompt tokens that came here so far which were cached.
    pub(crate) reuse_share: f64,
}

/// Prompt tokens to compute, and their attention work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prompts {
    pub(crate) tokens: u64,
    pub(crate) attention: f64,
}

impl Prompts {
    fn and(&self, other: &Self) -> Self {
        Self { tokens: self.tokens.saturating_add(other.tokens), attention: self.attention + other.attention }
    }
}

impl Standing {
    pub(crate) fn of(rank: &RankView, paces: &Paces, group: Option<&GroupLoad>) -> Self {
        let (decodes, context_tokens) = (decodes(rank), context_tokens(rank));
        let prices = match rank.perf.prices() {
            RankPrices::Rates(own) => RankPrices::Rates(paces.pace(own, rank, decodes)),
            profile @ RankPrices::Profile(_) => profile,
        };
        let alone = QueueShape {
            tokens: 0,
            attention: 0.0,
            budget_tokens: rank.step_tokens_max.max(1),
            decodes,
            context_tokens,
            group_decodes: 0,
        };
        let beside = group.map_or(alone, |group| QueueShape {
            decodes: group.fullest_decodes,
            context_tokens: group.fullest_context_tokens,
            group_decodes: group.decodes,
            ..alone
        });
        let step_seconds = prices.step_seconds(&decode_step(&beside));
        let mut standing = Self {
            prices,
            decodes,
            context_tokens,
            beside,
            stalled: group.map_or(decodes, |group| group.decodes),
            step_seconds,
            prefill_share: group.map_or(rank.prefill_share, |group| group.prefill_share),
            group: group.copied(),
            ahead: Prompts { tokens: 0, attention: 0.0 },
            ahead_steps: 0,
            ahead_seconds: 0.0,
            wait_seconds: 0.0,
            pool: Pool::of(rank),
            reuse_share: reuse_share(rank),
        };
        standing.queue_up(rank);
        standing.wait_seconds = standing.rest_of_step_seconds(rank) + standing.ahead_seconds;
        standing
    }

    /// Attention is taken as if the queued tokens were equal, uncached prompts: nobody reports their lengths.
    fn queue_up(&mut self, rank: &RankView) {
        let tokens = if self.group.is_some() { waiting_tokens(rank) } else { queued_tokens(rank) };
        if tokens == 0 {
            return;
        }
        let prefilling = rank.load.running.saturating_sub(rank.load.decoding);
        let sequences = rank.load.waiting.saturating_add(prefilling).saturating_add(rank.reserved.sequences);
        let attention = (tokens as f64) * (tokens as f64) / (2.0 * f64::from(sequences.max(1)));
        self.ahead = Prompts { tokens, attention };
        self.ahead_steps = self.steps(&self.ahead);
        self.ahead_seconds = self.seconds(&self.ahead);
    }

    /// Half a decode step: a request comes at any moment of it. A step that computes a prompt is counted whole with
    /// the queue, because its tokens leave the load only when it ends; in a group, where it may be another rank's, half
    /// of that step is left.
    fn rest_of_step_seconds(&self, rank: &RankView) -> f64 {
        if let Some(group) = self.group.filter(|group| group.most_running_tokens > 0) {
            let tokens = group.most_running_tokens.min(u64::from(self.beside.budget_tokens));
            return self.seconds(&Prompts { tokens, attention: 0.0 }) / 2.0;
        }
        if rank.load.decoding > 0 && rank.load.prefill_tokens == 0 { self.step_seconds / 2.0 } else { 0.0 }
    }

    fn queue(&self, prompts: &Prompts) -> QueueShape {
        QueueShape { tokens: prompts.tokens, attention: prompts.attention, ..self.beside }
    }

    fn steps(&self, prompts: &Prompts) -> u64 {
        self.queue(prompts).steps()
    }

    /// Until these are computed, beside the decodes.
    fn seconds(&self, prompts: &Prompts) -> f64 {
        self.prices.queue_seconds(&self.queue(prompts))
    }

    /// What these alone add to the decode steps that would have run anyway: for how long they stall the decodes.
    pub(crate) fn work_seconds(&self, prompts: &Prompts) -> f64 {
        (self.seconds(prompts) - self.steps(prompts) as f64 * self.step_seconds).max(0.0)
    }

    /// Until the prompts ahead are computed.
    pub(crate) fn backlog_seconds(&self) -> f64 {
        self.ahead_seconds
    }

    /// A request's own prefill, behind what is ahead. In a group its steps are as long as the longest prompts in them.
    pub(crate) fn prefill_seconds(&self, own: &Prompts) -> f64 {
        let mut with_own = self.ahead.and(own);
        if let Some(group) = &self.group {
            let in_those = self.steps(&with_own).saturating_mul(u64::from(self.beside.budget_tokens));
            with_own.tokens = with_own.tokens.max(group.most_waiting_tokens.min(in_those));
        }
        self.seconds(&with_own) - self.ahead_seconds
    }

    /// By how much a running decode stalls behind a request's own prefill, which takes `prefill_seconds`: what it adds to
    /// the decode steps that would have run anyway.
    ///
    /// In a group, prompts of other ranks that no step has begun with share their steps with it: it stalls decodes only
    /// for as long as it outlasts those.
    pub(crate) fn stall_of(&self, own: &Prompts, prefill_seconds: f64) -> f64 {
        let with_own = self.ahead.and(own);
        let Some(group) = &self.group else {
            let steps = self.steps(&with_own) - self.ahead_steps;
            return (prefill_seconds - steps as f64 * self.step_seconds).max(0.0);
        };
        // The share of attention in a step of a group is in its price of a token.
        let prompts = |tokens: u64| Prompts { tokens, attention: 0.0 };
        let before = prompts(group.most_waiting_tokens);
        let after = prompts(before.tokens.max(with_own.tokens));
        (self.work_seconds(&after) - self.work_seconds(&before)).max(0.0)
    }

    /// What `decode_steps` steps of decoding lose to the chunks of the queue that they share steps with.
    pub(crate) fn queue_stall_seconds(&self, decode_steps: f64) -> f64 {
        if self.ahead_steps == 0 {
            return 0.0;
        }
        let steps = self.ahead_steps as f64;
        (self.ahead_seconds - steps * self.step_seconds).max(0.0) * (decode_steps / steps).min(1.0)
    }

    /// The request's own decoding: the output after the first token, at the step time of the batch it joins and of the
    /// context half-way through. In a group that of its own rank counts, as if it were the fullest: so ranks are levelled
    /// before one becomes so.
    pub(crate) fn decode(&self, request: &Request<'_>) -> Decode {
        let output_tokens = request.output_tokens();
        let choices = request.choices();
        let sequence_tokens = u64::from(request.prompt_tokens) + u64::from(output_tokens / 2);
        let context_tokens = self.context_tokens.saturating_add(u64::from(choices) * sequence_tokens);
        let step = StepShape {
            decodes: self.decodes.saturating_add(choices),
            context_tokens,
            group_decodes: self.beside.group_decodes.saturating_add(choices),
            ..StepShape::default()
        };
        Decode { steps: f64::from(output_tokens - 1), step_seconds: self.prices.step_seconds(&step) }
    }
}

/// A step of the same decodes without prompts.
fn decode_step(beside: &QueueShape) -> StepShape {
    let &QueueShape { decodes, context_tokens, group_decodes, .. } = beside;
    StepShape { decodes, context_tokens, group_decodes, ..StepShape::default() }
}

/// A request's own decoding.
pub(crate) struct Decode {
    pub(crate) steps: f64,
    pub(crate) step_seconds: f64,
}

impl Decode {
    /// Stretched by the share of its time that the rank lately spent on prefills.
    pub(crate) fn stretched_seconds(&self, prefill_share: f64, share_max: f64) -> f64 {
        let share = if prefill_share.is_finite() { prefill_share.clamp(0.0, share_max) } else { 0.0 };
        self.steps * self.step_seconds / (1.0 - share)
    }
}

/// KV blocks of a rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool {
    used_blocks: u64,
    total_blocks: u64,
}

impl Pool {
    pub(crate) fn of(rank: &RankView) -> Self {
        let expected_output = rank.reserved.output_tokens.div_ceil(u64::from(rank.block_size_tokens.max(1)));
        let used = rank.load.blocks_total.saturating_sub(rank.load.blocks_free);
        Self {
            used_blocks: u64::from(used) + u64::from(rank.reserved.blocks) + expected_output,
            total_blocks: u64::from(rank.load.blocks_total),
        }
    }

    /// Share of the pool that is in use or promised, with so many more; 0 if the pool's size is unknown.
    pub(crate) fn use_with(&self, more_blocks: u64) -> f64 {
        if self.total_blocks == 0 {
            return 0.0;
        }
        (self.used_blocks + more_blocks) as f64 / self.total_blocks as f64
    }
}

fn reuse_share(rank: &RankView) -> f64 {
    match rank.load.prompt_tokens {
        0 => 0.0,
        all => (rank.load.cached_tokens as f64 / all as f64).min(1.0),
    }
}

/// Sequences that decode, or will once their prompt is there.
pub(crate) fn decodes(rank: &RankView) -> u32 {
    rank.load.decoding.saturating_add(rank.reserved.decodes)
}

/// Prompt tokens ahead of a request that comes now.
pub(crate) fn queued_tokens(rank: &RankView) -> u64 {
    rank.load.prefill_tokens.saturating_add(rank.reserved.prefill_tokens)
}

/// Context that the decodes of a rank read, with what was promised.
pub(crate) fn context_tokens(rank: &RankView) -> u64 {
    rank.load.context_tokens.saturating_add(rank.reserved.context_tokens)
}

/// Attention work of `m` new tokens on `c` cached ones, however they are cut into chunks: `m·c + m²/2`.
pub(crate) fn attention(new_tokens: u32, cached_tokens: u32) -> f64 {
    let new = f64::from(new_tokens);
    new * f64::from(cached_tokens) + new * new / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_the_same_in_one_chunk_or_in_two() {
        assert_eq!(attention(96, 32), attention(64, 32) + attention(32, 32 + 64));
    }
}
