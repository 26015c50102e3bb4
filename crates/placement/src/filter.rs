//! Who may run a request, and why the others may not.
//!
//! In: the snapshot and the request. Out: one [`Verdict`] per rank. Roles are not judged here: what a role allows
//! (aggregated, prefill, decode) is a matter of candidates, in `choose`.

use forebay_types::RankId;
use serde::{Deserialize, Serialize};

use crate::{
    place::{Form, Request},
    snapshot::{Breaker, RankState, RankView, Snapshot},
};

/// Why a rank may not run a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Exclusion {
    /// It serves another model.
    OtherModel,
    /// It has joined but does not serve yet.
    Starting,
    /// It takes nothing new.
    Draining,
    /// It has missed a deadline and was not heard of since.
    Silent,
    /// It said something that cannot be true.
    Fenced,
    /// Its lease has lapsed.
    Lost,
    /// It takes requests as tokens alone, and this one can only be passed on as it came.
    TokensOnly,
    /// It takes requests in the client's own words alone, and this one can only be sent as tokens.
    BodyOnly,
    /// The prompt leaves no room for an answer in its context.
    ContextTooShort {
        /// What its context holds.
        context_tokens_max: u32,
    },
    /// The prompt and one token of answer do not fit into its KV pool, even if that were empty.
    PoolTooSmall {
        /// What the request needs.
        blocks_needed: u32,
        /// What there is.
        blocks_total: u32,
    },
    /// Its queue is full.
    QueueFull {
        /// Sequences that wait, with those promised.
        waiting: u32,
        /// How many may.
        waiting_max: u32,
    },
    /// Its recent legs failed and its back-off is not over.
    BreakerOpen,
    /// Its back-off is over and one request already tries it.
    ProbeInFlight,
    /// It failed this very request before.
    AlreadyFailed,
}

impl Exclusion {
    /// Whether the rank counts as eligible once the rules are relaxed that far.
    fn forgiven(self, relaxed: Relaxed) -> bool {
        match self {
            Exclusion::AlreadyFailed => relaxed >= Relaxed::Failed,
            Exclusion::BreakerOpen | Exclusion::ProbeInFlight => relaxed >= Relaxed::Breakers,
            _ => false,
        }
    }

    /// Whether waiting helps.
    pub(crate) fn is_saturation(self) -> bool {
        matches!(self, Exclusion::QueueFull { .. })
    }

    /// Whether a shorter prompt helps.
    pub(crate) fn is_length(self) -> bool {
        matches!(self, Exclusion::ContextTooShort { .. } | Exclusion::PoolTooSmall { .. })
    }
}

impl std::fmt::Display for Exclusion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exclusion::OtherModel => f.write_str("serves another model"),
            Exclusion::Starting => f.write_str("starting"),
            Exclusion::Draining => f.write_str("draining"),
            Exclusion::Silent => f.write_str("silent"),
            Exclusion::Fenced => f.write_str("fenced"),
            Exclusion::Lost => f.write_str("lost"),
            Exclusion::TokensOnly => f.write_str("takes tokens only"),
            Exclusion::BodyOnly => f.write_str("takes no tokens"),
            Exclusion::ContextTooShort { context_tokens_max } => {
                write!(f, "context of {context_tokens_max} tokens too short")
            }
            Exclusion::PoolTooSmall { blocks_needed, blocks_total } => {
                write!(f, "needs {blocks_needed} KV blocks of {blocks_total}")
            }
            Exclusion::QueueFull { waiting, waiting_max } => {
                write!(f, "queue full ({waiting} of {waiting_max})")
            }
            Exclusion::BreakerOpen => f.write_str("breaker open"),
            Exclusion::ProbeInFlight => f.write_str("breaker half open, probe in flight"),
            Exclusion::AlreadyFailed => f.write_str("already failed this request"),
        }
    }
}

/// Which rules had to be relaxed to place a request at all. Never those that protect an engine or an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Relaxed {
    /// None.
    #[default]
    Nothing,
    /// Ranks that failed this request may try again.
    Failed,
    /// Breakers are ignored too: when all are open, the fault is as likely on our side.
    Breakers,
}

impl Relaxed {
    /// From strict to lenient.
    pub(crate) const ALL: [Relaxed; 3] = [Relaxed::Nothing, Relaxed::Failed, Relaxed::Breakers];
}

/// One rank's eligibility and what it holds of the prompt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Verdict {
    /// Index in the snapshot.
    pub(crate) index: usize,
    /// Leading blocks of the prompt that the rank holds.
    pub(crate) overlap_blocks: u32,
    /// Why not; `None` if eligible.
    pub(crate) exclusion: Option<Exclusion>,
}

impl Verdict {
    /// Whether the rank may be used when the rules are relaxed that far.
    pub(crate) fn eligible(&self, relaxed: Relaxed) -> bool {
        self.exclusion.is_none_or(|exclusion| exclusion.forgiven(relaxed))
    }
}

/// Judges every rank, in the snapshot's order.
pub(crate) fn judge(snapshot: &Snapshot, request: &Request<'_>) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = snapshot
        .ranks()
        .iter()
        .enumerate()
        .map(|(index, rank)| Verdict { index, overlap_blocks: 0, exclusion: exclusion(rank, request) })
        .collect();
    for &(id, blocks) in request.overlaps {
        if let Some(index) = snapshot.index_of(id) {
            verdicts[index].overlap_blocks = blocks;
        }
    }
    verdicts
}

/// The first reason that applies. What waiting, shortening or relaxing cannot mend comes first; a breaker and an
/// earlier failure come last, so that they are reported only where nothing else stands in the way.
fn exclusion(rank: &RankView, request: &Request<'_>) -> Option<Exclusion> {
    if *rank.model != *request.model {
        return Some(Exclusion::OtherModel);
    }
    match rank.state {
        RankState::Starting => return Some(Exclusion::Starting),
        RankState::Draining => return Some(Exclusion::Draining),
        RankState::Silent => return Some(Exclusion::Silent),
        RankState::Fenced => return Some(Exclusion::Fenced),
        RankState::Lost => return Some(Exclusion::Lost),
        RankState::Ready => {}
    }
    match request.form {
        Form::Tokens if !rank.takes_tokens => return Some(Exclusion::BodyOnly),
        Form::Body if !rank.takes_body => return Some(Exclusion::TokensOnly),
        Form::Tokens | Form::Body => {}
    }
    if request.prompt_tokens >= rank.context_tokens_max {
        return Some(Exclusion::ContextTooShort { context_tokens_max: rank.context_tokens_max });
    }
    let blocks_total = rank.load.blocks_total;
    let blocks_needed = (request.prompt_tokens + 1).div_ceil(rank.block_size_tokens.max(1));
    if blocks_total > 0 && blocks_needed > blocks_total {
        return Some(Exclusion::PoolTooSmall { blocks_needed, blocks_total });
    }
    let waiting = rank.load.waiting.saturating_add(rank.reserved.sequences);
    if waiting >= rank.waiting_max {
        return Some(Exclusion::QueueFull { waiting, waiting_max: rank.waiting_max });
    }
    match rank.breaker {
        Breaker::Open => return Some(Exclusion::BreakerOpen),
        Breaker::HalfOpen if rank.reserved.sequences > 0 => return Some(Exclusion::ProbeInFlight),
        Breaker::HalfOpen | Breaker::Closed => {}
    }
    already_failed(rank.id, request).then_some(Exclusion::AlreadyFailed)
}

fn already_failed(rank: RankId, request: &Request<'_>) -> bool {
    request.excluded.contains(&rank)
}
