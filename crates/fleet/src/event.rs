//! What happens to a fleet, as values.

use std::{sync::Arc, time::Duration};

use forebay_perf_model::{Profile, StepCoefficients};
use forebay_placement::Reserved;
use forebay_types::{
    EngineName, FirstToken, Incarnation, Leaning, RankId, RankLoad, ReservationId, Role, StepObservation,
};

/// What an engine says of itself when it joins. It holds for the incarnation's whole life.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFacts {
    /// What users call it.
    pub engine: EngineName,
    /// This life of it.
    pub incarnation: Incarnation,
    /// The model it serves.
    pub model: Arc<str>,
    /// The work it may be given.
    pub role: Role,
    /// Its schedulers, numbered from 0.
    pub dp_ranks: u16,
    /// Tokens in a KV block.
    pub block_size_tokens: u32,
    /// Bytes of a KV block, all layers.
    pub block_bytes: u64,
    /// KV blocks of each rank.
    pub blocks_total: u32,
    /// Tokens that one step computes at most.
    pub step_tokens_max: u32,
    /// Tokens of prompt and answer that one sequence may have.
    pub context_tokens_max: u32,
    /// Sequences that may wait in a rank's queue.
    pub waiting_max: u32,
    /// Equal values: KV may move between the engines byte for byte.
    pub kv_layout: u64,
    /// Whether other engines can read its KV.
    pub can_export: bool,
    /// Whether it can take in KV of other engines.
    pub can_import: bool,
    /// Whether a pair with it is to be warmed before it carries requests.
    pub needs_warming: bool,
    /// Which leg of a split sends the first token when it prefills.
    pub first_token: FirstToken,
    /// Whether it takes a request as tokens.
    pub takes_tokens: bool,
    /// Whether it takes a request in the client's own words.
    pub takes_body: bool,
    /// Whether its ranks run each step in common: an expert-parallel group.
    pub steps_together: bool,
    /// What engines of its kind take, if that was measured.
    pub profile: Option<Arc<Profile>>,
    /// How its load is known.
    pub load_sight: LoadSight,
    /// What its steps cost where there is no profile, by the start-up probe or by what is known of its kind.
    pub step_prior: StepCoefficients,
}

/// How the load of an engine's ranks is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadSight {
    /// It reports with every step, exactly: what is left of prompts included.
    EveryStep,
    /// It is looked at now and then, and says how many sequences run and wait and how full its pool is. In between, and
    /// for what it does not say, this process goes by the legs that it knows of.
    Sampled,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An engine is there, and starting. An earlier life of the same engine ends.
    Joined(EngineFacts),
    /// It serves (or serves again, after a drain was called off).
    Ready(Incarnation),
    /// It finishes what runs and takes nothing new.
    Draining(Incarnation),
    /// It missed a deadline: nothing new goes there until [`Event::Ready`].
    Silent(Incarnation),
    /// From now on its ranks are kept for a phase, as far as others can take the other one.
    Leans(Incarnation, Leaning),
    /// It said something that cannot be true: nothing more goes there.
    Fenced(Incarnation),
    /// Its tokenizer is not ours: from now on it is given text alone.
    TextOnly(Incarnation),
    /// Its lease has lapsed, or it ended.
    Lost(Incarnation),
    /// A rank reported its load.
    Load {
        /// Which rank.
        rank: RankId,
        /// What it said.
        load: RankLoad,
        /// When that was true: whatever reached the engine before is in it.
        as_of: Duration,
    },
    /// A rank measured one scheduler step.
    Step {
        /// Which rank.
        rank: RankId,
        /// What it computed and how long that took.
        step: StepObservation,
    },
    /// Work was promised to a rank.
    Reserved {
        /// New and unique.
        id: ReservationId,
        /// To whom.
        rank: RankId,
        /// How much.
        amount: Reserved,
    },
    /// A promised leg got further.
    Progress {
        /// Whose.
        id: ReservationId,
        /// How far.
        progress: Progress,
    },
    /// A promised leg ended, however it did, or never began.
    Released(ReservationId),
    /// A leg on this rank succeeded: the rank does its work.
    LegOk(RankId),
    /// A leg failed by this rank's fault.
    LegFailed(RankId),
    /// KV moved.
    Transferred {
        /// The rank that held it.
        from: RankId,
        /// The rank that took it in.
        to: RankId,
        /// How much.
        bytes: u64,
        /// From the request for it to its last byte.
        seconds: f64,
    },
    /// A hand-over failed by the fault of the pair: it rests, longer with each failure in a row.
    TransferFailed {
        /// The rank that held it.
        from: RankId,
        /// The rank that was to take it in.
        to: RankId,
    },
}

/// How far a leg got. Stages may be skipped; an earlier one after a later changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The engine has it in its queue: load reports as of `at` and later count it.
    Accepted {
        /// The moment; it may be yet to come, where an engine is some way off.
        at: Duration,
    },
    /// It takes part in steps: its next load report counts its blocks.
    Started,
    /// Its prompt is computed or imported: its next load report counts its decodes and their context.
    Decoding,
    /// Its choices have generated this many tokens, all together and so far.
    Generated {
        /// Since the leg began.
        tokens: u64,
    },
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The next snapshot may differ.
    Changed,
    /// It was taken in and alters no snapshot.
    Unchanged,
    /// The engine joined, and its earlier life ended: everything kept about that incarnation is void.
    Replaced(Incarnation),
    /// It was counted, and nothing else.
    Ignored(Ignored),
}

/// Why an event was ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// Of an incarnation that is lost or never joined, or of a DP rank that it does not have.
    Fenced,
    /// The incarnation has joined already, or was lost before.
    JoinedBefore,
    /// `ranks_max` is reached.
    RanksFull,
    /// No reservation has that id.
    UnknownReservation,
    /// Another reservation has that id.
    DuplicateReservation,
    /// `reservations_max` is reached.
    ReservationsFull,
}
