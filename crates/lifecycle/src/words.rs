//! What goes in and what comes out.

use std::{sync::Arc, time::Duration};

use forebay_placement::Plan;
use forebay_types::{FinishReason, FirstToken, LegId, RankId, TokenId};

use crate::failure::Failure;

/// Bounds of one request's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Placements of the request before its first token, the first one included. At least 1.
    pub placements_max: u32,
    /// Legs of the request that may be lost before its first token. At least 1; a request that kills engines kills no
    /// more.
    pub losses_max: u32,
    /// Placements of one choice after the request's first token.
    pub migrations_max: u32,
    /// How long to wait before asking again for a place that may come free.
    pub placement_retry: Duration,
    /// From arrival to the first token of any choice.
    pub first_token_max: Duration,
    /// From arrival to the end.
    pub total_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            placements_max: 3,
            losses_max: 2,
            migrations_max: 3,
            placement_retry: Duration::from_millis(250),
            first_token_max: Duration::from_secs(120),
            total_max: Duration::from_secs(600),
        }
    }
}

/// What the lifecycle needs to know of a request.
#[derive(Debug, Clone)]
pub struct Start {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Answers to generate, numbered from 0. At least 1.
    pub choices: u32,
    /// Tokens of each, at most. At least 1.
    pub output_tokens_max: u32,
    /// Tokens that end a choice. Used where an engine died before it could say that a choice had ended.
    pub stop_tokens: Arc<[TokenId]>,
    /// In which form its answer comes.
    pub form: Form,
}

/// In which form an answer comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Tokens, one by one: they can be continued elsewhere.
    Tokens,
    /// The engine's own words, unread ([`Lifecycle::passed`](crate::Lifecycle::passed)): once some were sent, only the
    /// engine that began can end it. It counts as one choice.
    Opaque,
}

/// What holds for the legs of a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Another engine can go on after tokens of these legs as they would have gone on.
    pub continues: bool,
    /// A leg that has begun to send is lost after being silent for so long; `None`: its engine cannot fall silent.
    pub stall_after: Option<Duration>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { continues: true, stall_after: None }
    }
}

/// Connects an answer with the [`Action::Place`] that asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlacementId(pub u32);

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// There is a place.
    Placed {
        /// Of which question.
        placement: PlacementId,
        /// Where.
        plan: Plan,
        /// Two fresh ids: of the first leg, and of a split's decode leg.
        legs: [LegId; 2],
        /// What holds for these legs.
        terms: Terms,
    },
    /// There is none.
    NotPlaced {
        /// Of which question.
        placement: PlacementId,
        /// And what helps.
        why: Unplaced,
    },
    /// An engine began to compute.
    LegStarted {
        /// Which leg.
        leg: LegId,
        /// Prompt tokens that it found in its prefix cache.
        cached_tokens: u32,
    },
    /// An engine did not take a leg.
    LegRefused {
        /// Which leg.
        leg: LegId,
        /// Why.
        why: Refusal,
    },
    /// The decode leg of a split may begin: the prefill leg has computed the prompt and holds its KV, or computes while the
    /// decode leg waits for it. The leg counts as ended and is never cancelled; its KV is released instead.
    Prefilled {
        /// Which leg.
        leg: LegId,
        /// With [`FirstToken::Handed`] the first token of each choice came before, through
        /// [`Lifecycle::token`](crate::Lifecycle::token).
        first: FirstToken,
    },
    /// A decode leg has its KV.
    KvArrived {
        /// Which leg.
        leg: LegId,
    },
    /// A decode leg did not get its KV intact and computes the prompt itself.
    KvFailed {
        /// Which leg.
        leg: LegId,
    },
    /// No more tokens of this choice follow.
    ChoiceFinished {
        /// From which leg.
        leg: LegId,
        /// Which choice.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// A leg has ended as it should.
    LegEnded {
        /// Which leg.
        leg: LegId,
    },
    /// A leg's engine died, or the leg broke off.
    LegLost {
        /// Which leg.
        leg: LegId,
    },
    /// The client closed the connection.
    ClientGone,
    /// The text of a choice contains a stop string: it ends here.
    StopMatched {
        /// Which choice.
        choice: u32,
    },
    /// [`Lifecycle::deadline`](crate::Lifecycle::deadline) has come.
    Tick,
}

/// What would help a request that has no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unplaced {
    /// Waiting: a rank is starting, or full and worth waiting for.
    Retry,
    /// Nothing: the sequence fills the longest context. That is where a choice that already has tokens ends.
    TooLong,
    /// Nothing.
    Never,
}

/// Why an engine did not take a leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its queue is full, or the leg cannot run there. It is well.
    Unfit,
    /// It is gone, or failed.
    Gone,
    /// The request itself cannot be served, here or elsewhere.
    Rejected,
}

/// What to do, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Choose ranks; answer with [`Event::Placed`] or [`Event::NotPlaced`].
    Place {
        /// Goes into the answer.
        placement: PlacementId,
        /// For what.
        purpose: Purpose,
        /// Ranks that already failed this request.
        exclude: Vec<RankId>,
    },
    /// Start a leg.
    Start(LegOrder),
    /// Cancel a leg: nothing that it does matters any more.
    CancelLeg {
        /// Which leg.
        leg: LegId,
        /// Where.
        rank: RankId,
    },
    /// End one choice of a leg whose other choices go on. Only saves work: tokens that still come are ignored.
    StopChoice {
        /// Which leg.
        leg: LegId,
        /// Where.
        rank: RankId,
        /// Which choice.
        choice: u32,
    },
    /// Free the KV that an ended prefill leg holds.
    ReleaseHeld {
        /// Which leg.
        leg: LegId,
        /// Where.
        rank: RankId,
    },
    /// Tell the breaker of a rank how a leg ended there.
    Report {
        /// Which rank.
        rank: RankId,
        /// How.
        health: Health,
    },
    /// Tell the client that a choice has ended.
    FinishChoice {
        /// Which choice.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// The answer is complete. Last.
    Finish,
    /// There is no (whole) answer. Last.
    Fail(Failure),
}

/// What a place is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The request, from its prompt.
    Prompt,
    /// One choice, from the prompt and the tokens that it has
    /// ([`Lifecycle::generated`](crate::Lifecycle::generated)).
    Continue {
        /// Which choice.
        choice: u32,
        /// Tokens that it has.
        generated_tokens: u32,
    },
}

/// A leg to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegOrder {
    /// Its id, from [`Event::Placed`].
    pub leg: LegId,
    /// Where.
    pub rank: RankId,
    /// The prompt: the request's own, or that and the first `generated_tokens` tokens of a choice.
    pub prompt: Purpose,
    /// Choices to sample.
    pub choices: Vec<u32>,
    /// Tokens that may follow the prompt in each choice. The first tokens that a decode leg is given count.
    pub output_tokens_max: u32,
    /// Which phases.
    pub work: Work,
}

/// The phases that a leg covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Prefill and decode.
    Aggregated,
    /// Prefill; sample a first token of each choice; hold the KV.
    Prefill,
    /// Import KV and go on.
    Decode {
        /// The prefill leg that holds the KV.
        from: LegId,
        /// Where it does.
        from_rank: RankId,
        /// The token after the prompt, of each choice; it was sent already.
        first: Vec<(u32, TokenId)>,
    },
}

/// How a leg ended, as its rank's breaker sees it. Refusals for lack of room are neither, nor are cancelled legs: they are
/// not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// As it should.
    Ok,
    /// The engine died, broke off or skipped a token.
    Failed,
}

/// What to do with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "only accepted tokens are sent"]
pub enum Accepted {
    /// It is the next one of its choice: send it.
    Yes,
    /// It is from a superseded leg, a repetition, or out of order: drop it.
    No,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every choice has ended.
    Finished,
    /// It failed.
    Failed(Failure),
}
