//! One attempt at one or more choices: a place is sought, then at most one leg at a time works for them.

use std::time::Duration;

use forebay_types::{LegId, RankId};

use crate::words::{PlacementId, Purpose, Terms};

/// A leg and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LegAt {
    pub(crate) leg: LegId,
    pub(crate) rank: RankId,
}

#[derive(Debug)]
pub(crate) struct Run {
    /// Those that were unfinished when the run began.
    pub(crate) choices: Vec<u32>,
    pub(crate) prompt: Purpose,
    pub(crate) state: State,
    /// Of the placement whose legs work now.
    pub(crate) terms: Terms,
    /// When the leg that works now last sent something; `None` before.
    pub(crate) heard: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum State {
    Placing(PlacementId),
    /// There was no place; ask again then.
    Waiting {
        until: Duration,
    },
    Aggregated(LegAt),
    Prefilling {
        leg: LegAt,
        then: LegAt,
    },
    Decoding {
        leg: LegAt,
        /// The prefill leg, until its KV is no longer needed.
        held: Option<LegAt>,
    },
}

impl Run {
    pub(crate) fn new(choices: Vec<u32>, prompt: Purpose, state: State) -> Self {
        Self { choices, prompt, state, terms: Terms::default(), heard: None }
    }

    /// When the leg that works now counts as lost unless it sends something.
    pub(crate) fn stalls_at(&self) -> Option<Duration> {
        Some(self.heard?.saturating_add(self.terms.stall_after?))
    }

    /// The leg that works now.
    pub(crate) fn live(&self) -> Option<LegAt> {
        match self.state {
            State::Placing(_) | State::Waiting { .. } => None,
            State::Aggregated(leg) | State::Prefilling { leg, .. } | State::Decoding { leg, .. } => Some(leg),
        }
    }

    /// The ended leg that holds KV.
    pub(crate) fn held(&self) -> Option<LegAt> {
        match self.state {
            State::Decoding { held, .. } => held,
            _ => None,
        }
    }

    /// As [`held`](Self::held), and it is not held any more.
    pub(crate) fn take_held(&mut self) -> Option<LegAt> {
        match &mut self.state {
            State::Decoding { held, .. } => held.take(),
            _ => None,
        }
    }
}
