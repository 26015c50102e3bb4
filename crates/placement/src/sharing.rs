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
    let (mut groups, mut stalled, mut step_tokens, mut stall_seconds) = (0_u32, 0.0, 0, 0.0_f64);
    let (mut last, mut way_seconds) = (None, 0.0_f64);
    for (index, rank) in eligible() {
        if last.replace(rank.id.incarnation) == Some(rank.id.incarnation) {
            continue;
        }
        let standing = snapshot.standing(index);
        let tokens = u64::from(request.prompt_tokens);
        let prompt = Prompts { tokens, attention: attention(request.prompt_tokens, 0) };
        let (decodes, seconds) = (standing.stalled, standing.lone_stall_seconds(&prompt));
        if decodes == 0 {
            return None;
        }
        let way = rank.perf.profile().map(|profile| profile.request_seconds(request.prompt_tokens));
        way_seconds = way_seconds.max(way.unwrap_or(0.0));
        groups += 1;
        stalled += f64::from(decodes);
        stall_seconds = stall_seconds.max(seconds);
        let in_group = eligible().filter(|(_, other)| other.id.incarnation == rank.id.incarnation);
        step_tokens = step_tokens.max(in_group.map(|(_, rank)| u64::from(rank.step_tokens_max)).sum());
    }
    (groups > 0).then(|| Sharing {
        stall_seconds,
        stalled: stalled / f64::from(groups),
        step_tokens,
        way_seconds,
    })
}
