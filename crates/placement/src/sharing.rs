//! What prompts save that are let go together.
//!
//! In: the fleet and a request that has not been placed. Out: [`Sharing`], for `admission` to weigh against waiting.

use crate::{
    filter,
    place::Request,
    snapshot::{RankView, Snapshot},
    standing::{Prompts, attention},
};

/// What prompts of one model could share if they went together: a step of ranks that step together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sharing {
    /// Seconds by which a step with this prompt is longer than one without any.
    pub stall_seconds: f64,
    /// Sequences that stall for so long: those of a group, in the mean.
    pub stalled: f64,
    /// Prompt tokens that one step of a group computes at most, all its ranks together.
    pub step_tokens: u64,
    /// Seconds from leaving the gateway until the engine's scheduler has it; 0 if nobody measured that.
    pub way_seconds: f64,
}

/// What `request` could share; `None` if nothing is to be had by waiting for others: a rank that steps alone may compute
/// it, or a group that has no decodes to stall. What it has cached is not looked at.
///
/// O(ranks); nothing where no ranks step together.
pub fn sharing(snapshot: &Snapshot, request: &Request<'_>) -> Option<Sharing> {
    if !snapshot.has_groups() {
        return None;
    }
    let verdicts = filter::judge(snapshot, request);
    let eligible = || {
        let free = verdicts.iter().filter(|verdict| verdict.exclusion.is_none());
        let ranks = free.map(|verdict| (verdict.index, &snapshot.ranks()[verdict.index]));
        ranks.filter(|(_, rank): &(usize, &RankView)| rank.role.prefills())
    };
    if eligible().any(|(_, rank)| !rank.steps_together) {
        return None;
    }
    let prompt =
        Prompts { tokens: u64::from(request.prompt_tokens), attention: attention(request.prompt_tokens, 0) };
    let mut together = Sharing { stall_seconds: 0.0, stalled: 0.0, step_tokens: 0, way_seconds: 0.0 };
    let (mut groups, mut last, mut group_tokens) = (0_u32, None, 0_u64);
    for (index, rank) in eligible() {
        // Ranks of one engine are neighbours.
        let is_first = last.replace(rank.id.incarnation) != Some(rank.id.incarnation);
        group_tokens = if is_first { 0 } else { group_tokens } + u64::from(rank.step_tokens_max);
        together.step_tokens = together.step_tokens.max(group_tokens);
        if !is_first {
            continue;
        }
        let standing = snapshot.standing(index);
        if standing.stalled == 0 {
            return None;
        }
        let way = rank.perf.profile().map_or(0.0, |profile| profile.request_seconds(request.prompt_tokens));
        groups += 1;
        together.stalled += f64::from(standing.stalled);
        together.stall_seconds = together.stall_seconds.max(standing.work_seconds(&prompt));
        together.way_seconds = together.way_seconds.max(way);
    }
    (groups > 0).then(|| Sharing { stalled: together.stalled / f64::from(groups), ..together })
}
