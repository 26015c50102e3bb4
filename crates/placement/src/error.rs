//! Why a request cannot be placed, and what would help.

use std::fmt::{self, Write as _};

use forebay_types::Role;
use serde::{Deserialize, Serialize};

use crate::{
    explain::{self, Excluded},
    filter::{Exclusion, Relaxed, Verdict},
    place::Request,
    snapshot::{RankView, Snapshot},
};

/// Names and reasons listed in an error's text at most; a fleet may have hundreds.
const LISTED_MAX: usize = 8;

/// Bounds of the advice to retry: below a tenth of a second a client would only add load, and beyond a minute the
/// prediction says nothing.
const RETRY_AFTER_SECONDS: (f64, f64) = (0.1, 60.0);

/// Why a request has no place.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum PlaceError {
    /// No engine serves the model.
    #[error("no engine serves the model `{model}`; {}", known_text(known))]
    NoModel {
        /// What was asked for.
        model: String,
        /// What is served, sorted.
        known: Vec<String>,
    },
    /// Engines serve the model, but none can take the request and neither waiting nor a shorter prompt helps.
    #[error("no rank can take a request for `{model}`: {missing}{}", reasons_text(reasons))]
    NoRank {
        /// What was asked for.
        model: String,
        /// What would have to be there.
        missing: Missing,
        /// Why the ranks of that model were excluded (the first of them, if they are many).
        reasons: Vec<Excluded>,
    },
    /// The queues are full. Waiting helps.
    #[error(
        "all {serving} ranks that could take the request have full queues; retry in {retry_after_seconds:.1} s"
    )]
    Saturated {
        /// Ranks with full queues.
        serving: u32,
        /// Until the least loaded of them will have computed the prompts that it has queued, by prediction.
        retry_after_seconds: f64,
    },
    /// The prompt leaves no room for an answer. Shortening it helps.
    #[error(
        "the prompt has {prompt_tokens} tokens and the longest context is {context_tokens_max}; \
         shorten it to leave at least one token for the answer"
    )]
    TooLong {
        /// The prompt's length.
        prompt_tokens: u32,
        /// The longest context, prompt and answer, that a rank can hold.
        context_tokens_max: u32,
    },
}

/// What would have to be there for a request to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// Any rank that is in service.
    Rank,
    /// A rank whose role allows prefill, or both phases.
    Prefill,
    /// A rank whose role allows decode, or both phases.
    Decode,
    /// A prefill rank and a decode rank between which KV can move.
    Link,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Missing::Rank => "none is in service; wait until an engine is ready, or start one",
            Missing::Prefill => "none may prefill; add an engine with the role prefill or both",
            Missing::Decode => "none may decode; add an engine with the role decode or both",
            Missing::Link => {
                "KV cannot move from any prefill rank to any decode rank (layout, block size or abilities differ); \
                 add an engine with the role both, or engines of one kind"
            }
        })
    }
}

fn known_text(known: &[String]) -> String {
    if known.is_empty() {
        return "no engine has joined".to_owned();
    }
    let mut text = format!("known models: {}", known[..known.len().min(LISTED_MAX)].join(", "));
    if known.len() > LISTED_MAX {
        let _ = write!(text, " and {} more", known.len() - LISTED_MAX);
    }
    text
}

fn reasons_text(reasons: &[Excluded]) -> String {
    let mut text = String::new();
    for (i, excluded) in reasons.iter().take(LISTED_MAX).enumerate() {
        let before = if i == 0 { " (" } else { ", " };
        let _ = write!(text, "{before}{}: {}", excluded.label(), excluded.reason);
    }
    if reasons.len() > LISTED_MAX {
        let _ = write!(text, " and {} more", reasons.len() - LISTED_MAX);
    }
    if !text.is_empty() {
        text.push(')');
    }
    text
}

/// Whether a plan would exist if full queues were not full.
pub(crate) fn waiting_helps(snapshot: &Snapshot, verdicts: &[Verdict], relaxed: Relaxed) -> bool {
    plan_exists(snapshot, verdicts, |verdict| {
        verdict.eligible(relaxed) || verdict.exclusion.is_some_and(Exclusion::is_saturation)
    })
}

/// The error for a request that has no place even with every rule relaxed.
pub(crate) fn refuse(snapshot: &Snapshot, request: &Request<'_>, verdicts: &[Verdict]) -> PlaceError {
    let serves = |verdict: &&Verdict| verdict.exclusion != Some(Exclusion::OtherModel);
    if !verdicts.iter().any(|verdict| serves(&verdict)) {
        let mut known: Vec<String> = snapshot.ranks().iter().map(|rank| rank.model.to_string()).collect();
        known.sort_unstable();
        known.dedup();
        return PlaceError::NoModel { model: request.model.to_owned(), known };
    }
    if waiting_helps(snapshot, verdicts, Relaxed::Breakers) {
        return saturated(snapshot, verdicts);
    }
    let shorter = |verdict: &Verdict| {
        let exclusion = verdict.exclusion;
        verdict.eligible(Relaxed::Breakers)
            || exclusion.is_some_and(|reason| reason.is_saturation() || reason.is_length())
    };
    if plan_exists(snapshot, verdicts, shorter) {
        return too_long(snapshot, request, verdicts);
    }
    PlaceError::NoRank {
        model: request.model.to_owned(),
        missing: missing(snapshot, verdicts),
        reasons: verdicts
            .iter()
            .filter(serves)
            .filter_map(|verdict| explain::excluded(snapshot, verdict))
            .collect(),
    }
}

fn saturated(snapshot: &Snapshot, verdicts: &[Verdict]) -> PlaceError {
    let full = verdicts.iter().filter(|verdict| verdict.exclusion.is_some_and(Exclusion::is_saturation));
    let soonest = full
        .clone()
        .map(|verdict| snapshot.standing(verdict.index).backlog_seconds())
        .fold(f64::INFINITY, f64::min);
    let (shortest, longest) = RETRY_AFTER_SECONDS;
    PlaceError::Saturated {
        serving: full.count() as u32,
        retry_after_seconds: soonest.clamp(shortest, longest),
    }
}

fn too_long(snapshot: &Snapshot, request: &Request<'_>, verdicts: &[Verdict]) -> PlaceError {
    let context_tokens = |rank: &RankView| match rank.load.blocks_total {
        0 => rank.context_tokens_max,
        blocks => rank.context_tokens_max.min(blocks.saturating_mul(rank.block_size_tokens)),
    };
    let short = verdicts.iter().filter(|verdict| verdict.exclusion.is_some_and(Exclusion::is_length));
    PlaceError::TooLong {
        prompt_tokens: request.prompt_tokens,
        context_tokens_max: short
            .map(|verdict| context_tokens(&snapshot.ranks()[verdict.index]))
            .max()
            .unwrap_or_default(),
    }
}

fn missing(snapshot: &Snapshot, verdicts: &[Verdict]) -> Missing {
    let usable = || {
        let eligible = verdicts.iter().filter(|verdict| verdict.eligible(Relaxed::Breakers));
        eligible.map(|verdict| snapshot.ranks()[verdict.index].role)
    };
    match (usable().any(Role::prefills), usable().any(Role::decodes)) {
        (false, false) => Missing::Rank,
        (false, true) => Missing::Prefill,
        (true, false) => Missing::Decode,
        (true, true) => Missing::Link,
    }
}

/// Whether the ranks that `usable` lets through allow any plan. Quadratic only where no pair is compatible; off the
/// path of requests that are placed.
fn plan_exists(snapshot: &Snapshot, verdicts: &[Verdict], usable: impl Fn(&Verdict) -> bool) -> bool {
    let ranks: Vec<&RankView> = verdicts
        .iter()
        .filter(|&verdict| usable(verdict))
        .map(|verdict| &snapshot.ranks()[verdict.index])
        .collect();
    let prefills = || ranks.iter().filter(|rank| rank.role.prefills());
    let decodes = || ranks.iter().filter(|rank| rank.role.decodes());
    ranks.iter().any(|rank| rank.role == Role::Both)
        || prefills().any(|prefill| decodes().any(|decode| snapshot.pairs(prefill, decode)))
}
