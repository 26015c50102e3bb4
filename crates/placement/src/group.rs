//! Ranks that step together, as one load.
//!
//! The ranks of an expert-parallel group run every step in common: the fullest of them sets its length, and a prompt
//! that is computed on one stops the decodes of all. So what a prompt does to others is counted over the whole group,
//! and prompts that share a step are paid for once.

use std::ops::Range;

use crate::{snapshot::RankView, standing};

/// What all ranks of a group carry.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct GroupLoad {
    /// Sequences that decode on all of its ranks.
    pub(crate) decodes: u32,
    /// Sequences that decode on the rank with most.
    pub(crate) fullest_decodes: u32,
    /// Context of the rank with most.
    pub(crate) fullest_context_tokens: u64,
    /// Prompt tokens that the running step computes, on the rank with most.
    pub(crate) most_running_tokens: u64,
    /// Prompt tokens that no step has begun with yet, on the rank with most: what a new prompt can share steps with.
    pub(crate) most_waiting_tokens: u64,
    /// Share of its time that prefills on any rank took from decodes.
    pub(crate) prefill_share: f64,
}

impl GroupLoad {
    fn add(&mut self, rank: &RankView) {
        let decodes = standing::decodes(rank);
        self.decodes = self.decodes.saturating_add(decodes);
        self.fullest_decodes = self.fullest_decodes.max(decodes);
        self.fullest_context_tokens = self.fullest_context_tokens.max(standing::context_tokens(rank));
        let waiting = waiting_tokens(rank);
        self.most_running_tokens = self.most_running_tokens.max(standing::queued_tokens(rank) - waiting);
        self.most_waiting_tokens = self.most_waiting_tokens.max(waiting);
        // Where prompts rarely share steps, the sum is what the group lost to them; it cannot lose more than all.
        self.prefill_share = (self.prefill_share + rank.prefill_share).min(1.0);
    }
}

/// Prompt tokens on `rank` that the running step does not compute. Which those are is not reported: where sequences wait
/// or were promised, all of them are taken to wait, else what goes beyond one step.
pub(crate) fn waiting_tokens(rank: &RankView) -> u64 {
    let queued = standing::queued_tokens(rank);
    if rank.load.waiting > 0 || rank.reserved.sequences > 0 {
        return queued;
    }
    queued.saturating_sub(u64::from(rank.step_tokens_max))
}

/// The load of the group of `ranks[index]`, if it is in one, and where its ranks are. Ranks of one engine are neighbours.
pub(crate) fn group_of(ranks: &[RankView], index: usize) -> Option<(GroupLoad, Range<usize>)> {
    let rank = &ranks[index];
    if !rank.steps_together {
        return None;
    }
    let incarnation = rank.id.incarnation;
    let start = ranks[..index].partition_point(|rank| rank.id.incarnation < incarnation);
    let count = ranks[start..].iter().take_while(|rank| rank.id.incarnation == incarnation).count();
    let mut load = GroupLoad::default();
    ranks[start..start + count].iter().for_each(|rank| load.add(rank));
    Some((load, start..start + count))
}
