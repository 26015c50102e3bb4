//! Promised work, and which part of it its rank's load already shows.
//!
//! In: a promise and how far its leg got. Out: what is promised beyond the rank's load ([`Reservation::unseen`]) and, for
//! ranks that are only looked at now and then, what the leg puts on the rank by now ([`Reservation::on_rank`]).

use std::{
    ops::{AddAssign, SubAssign},
    time::Duration,
};

use forebay_placement::Reserved;
use forebay_types::RankId;

use crate::event::{LoadSight, Progress};

/// How far a leg got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Promised; the engine may not know of it yet.
    Placed,
    /// In the engine's queue.
    Accepted,
    /// Takes part in steps.
    Started,
    /// Its prompt is there.
    Decoding,
}

/// One promise.
#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) rank: RankId,
    sight: LoadSight,
    amount: Reserved,
    reached: Stage,
    /// What the rank's last load report can have shown: the stage reached before that report.
    visible: Stage,
    /// From when on load reports can show it.
    accepted_at: Duration,
    generated_tokens: u64,
}

impl Reservation {
    pub(crate) fn new(rank: RankId, sight: LoadSight, amount: Reserved) -> Self {
        Self {
            rank,
            sight,
            amount,
            reached: Stage::Placed,
            visible: Stage::Placed,
            accepted_at: Duration::MAX,
            generated_tokens: 0,
        }
    }

    /// Takes in progress; what it changes shows in [`Reservation::unseen`] and [`Reservation::on_rank`].
    pub(crate) fn advance(&mut self, now: Duration, progress: Progress) {
        let (stage, at) = match progress {
            Progress::Accepted { at } => (Stage::Accepted, at),
            Progress::Started => (Stage::Started, now),
            Progress::Decoding => (Stage::Decoding, now),
            Progress::Generated { tokens } => {
                self.generated_tokens = self.generated_tokens.max(tokens);
                (Stage::Decoding, now)
            }
        };
        self.accepted_at = self.accepted_at.min(at);
        self.reached = self.reached.max(stage);
    }

    /// Whether a load report may yet show more of it.
    pub(crate) fn is_pending(&self) -> bool {
        self.sight == LoadSight::EveryStep && self.visible < self.reached
    }

    /// The rank reported its load as it was at `as_of`.
    pub(crate) fn reported(&mut self, as_of: Duration) {
        if self.is_shown(as_of) {
            self.visible = self.reached;
        }
    }

    /// Whether the rank's load as of then has it.
    pub(crate) fn is_shown(&self, as_of: Duration) -> bool {
        self.accepted_at <= as_of
    }

    /// What the load does not show. A computed prompt is no prefill ahead of anyone, reported or not.
    pub(crate) fn unseen(&self) -> Reserved {
        let Reserved { prefill_tokens, context_tokens, output_tokens, sequences, decodes, blocks } =
            self.amount;
        let visible = match (self.sight, self.reached) {
            (LoadSight::EveryStep, _) => self.visible,
            // The load of such a rank is kept up to date with what is known here.
            (LoadSight::Sampled, Stage::Decoding) => Stage::Decoding,
            (LoadSight::Sampled, _) => Stage::Accepted,
        };
        let queueing = visible < Stage::Accepted;
        let unallocated = visible < Stage::Started;
        let not_decoding = visible < Stage::Decoding;
        Reserved {
            prefill_tokens: if queueing && self.reached < Stage::Decoding { prefill_tokens } else { 0 },
            sequences: if queueing { sequences } else { 0 },
            blocks: if unallocated { blocks } else { 0 },
            context_tokens: if not_decoding { context_tokens } else { 0 },
            decodes: if not_decoding { decodes } else { 0 },
            output_tokens: output_tokens.saturating_sub(self.generated_tokens),
        }
    }

    /// What it is on its rank by now, as a load report would count it; nothing where reports say it themselves.
    pub(crate) fn on_rank(&self) -> OnRank {
        if self.sight == LoadSight::EveryStep {
            return OnRank::default();
        }
        let Reserved { prefill_tokens, context_tokens, sequences, decodes, blocks, .. } = self.amount;
        if self.reached < Stage::Decoding {
            return OnRank { waiting: sequences, prefill_tokens, ..OnRank::default() };
        }
        let context_tokens = context_tokens + self.generated_tokens;
        OnRank { running: sequences, decoding: decodes, context_tokens, blocks, ..OnRank::default() }
    }

    /// What it has in the pool once it runs, its prompt computed or not: tokens of context, and blocks.
    pub(crate) fn pool(&self) -> (u64, u32) {
        (self.amount.context_tokens + self.generated_tokens, self.amount.blocks)
    }
}

/// Legs of this process on one rank, in the words of a load report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct OnRank {
    pub(crate) waiting: u32,
    pub(crate) prefill_tokens: u64,
    pub(crate) running: u32,
    pub(crate) decoding: u32,
    pub(crate) context_tokens: u64,
    pub(crate) blocks: u32,
}

impl AddAssign for OnRank {
    fn add_assign(&mut self, other: Self) {
        self.waiting += other.waiting;
        self.prefill_tokens += other.prefill_tokens;
        self.running += other.running;
        self.decoding += other.decoding;
        self.context_tokens += other.context_tokens;
        self.blocks += other.blocks;
    }
}

impl SubAssign for OnRank {
    fn sub_assign(&mut self, other: Self) {
        self.waiting -= other.waiting;
        self.prefill_tokens -= other.prefill_tokens;
        self.running -= other.running;
        self.decoding -= other.decoding;
        self.context_tokens -= other.context_tokens;
        self.blocks -= other.blocks;
    }
}
