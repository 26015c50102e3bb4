//! Fixtures of the tests: a fleet of 8B engines on H100s, whose times are known from measurements.

use std::{sync::Arc, time::Duration};

use forebay_perf_model::{LinkModel, LinkPrior, RankModel, StepCoefficients};
use forebay_types::{BlockHash, FirstToken, Incarnation, Leaning, RankId, RankLoad, Role};

use crate::{
    Breaker, Decision, Form, Links, PlaceError, Plan, Policy, RankState, RankView, Request, Reserved,
    Snapshot, Weights, place,
};

mod errors;
mod explanation;
mod facts;
mod groups;
mod leanings;
mod policies;
mod properties;

pub(crate) const MODEL: &str = "m";
pub(crate) const BLOCK_TOKENS: u32 = 16;
pub(crate) const POOL_BLOCKS: u32 = 20_000;
pub(crate) const WAITING_MAX: u32 = 64;

/// Rank 0 of incarnation `n`.
pub(crate) fn id(n: u64) -> RankId {
    RankId { incarnation: Incarnation(n), dp_rank: 0 }
}

/// An idle rank that may do everything.
pub(crate) fn idle(n: u64) -> RankView {
    RankView {
        id: id(n),
        engine: format!("e{n}").into(),
        model: MODEL.into(),
        role: Role::Both,
        state: RankState::Ready,
        breaker: Breaker::Closed,
        load: RankLoad { blocks_total: POOL_BLOCKS, blocks_free: POOL_BLOCKS, ..RankLoad::default() },
        load_age: Duration::from_millis(5),
        others: 0,
        reserved: Reserved::default(),
        prefill_share: 0.0,
        perf: Arc::new(RankModel::learned(StepCoefficients::H100_8B)),
        steps_together: false,
        block_size_tokens: BLOCK_TOKENS,
        block_bytes: 2 << 20,
        step_tokens_max: 8192,
        context_tokens_max: 32_768,
        waiting_max: WAITING_MAX,
        kv_layout: 1,
        can_export: true,
        can_import: true,
        needs_warming: false,
        first_token: FirstToken::Handed,
        takes_tokens: true,
        takes_body: false,
        itl_p99_seconds: 0.0,
        leaning: Leaning::Neither,
    }
}

/// States that a rank can be put into; each returns it changed.
pub(crate) trait Put: Sized {
    fn put(self, change: impl FnOnce(&mut RankView)) -> RankView;

    /// `sequences` decode, each with `context_tokens`.
    fn decoding(self, sequences: u32, context_tokens: u32) -> RankView {
        self.put(|rank| {
            rank.load.running += sequences;
            rank.load.decoding += sequences;
            rank.load.context_tokens += u64::from(sequences) * u64::from(context_tokens);
            rank.load.blocks_free -= sequences * context_tokens.div_ceil(BLOCK_TOKENS);
        })
    }

    /// `sequences` wait, `tokens` of prompt in all.
    fn queued(self, sequences: u32, tokens: u64) -> RankView {
        self.put(|rank| {
            rank.load.waiting += sequences;
            rank.load.prefill_tokens += tokens;
        })
    }

    fn share(self, prefill_share: f64) -> RankView {
        self.put(|rank| rank.prefill_share = prefill_share)
    }

    fn role(self, role: Role) -> RankView {
        self.put(|rank| rank.role = role)
    }

    fn state(self, state: RankState) -> RankView {
        self.put(|rank| rank.state = state)
    }

    fn leaning(self, leaning: Leaning) -> RankView {
        self.put(|rank| rank.leaning = leaning)
    }

    fn breaker(self, breaker: Breaker) -> RankView {
        self.put(|rank| rank.breaker = breaker)
    }
}

impl Put for RankView {
    fn put(mut self, change: impl FnOnce(&mut RankView)) -> RankView {
        change(&mut self);
        self
    }
}

pub(crate) fn links() -> Links {
    Links::new(LinkModel::new(LinkPrior::NVLINK))
}

pub(crate) fn fleet(ranks: impl IntoIterator<Item = RankView>) -> Snapshot {
    Snapshot::new(7, ranks.into_iter().collect(), links())
}

/// A fresh prompt of `prompt_tokens`; 200 tokens of answer are expected.
pub(crate) fn prompt(prompt_tokens: u32) -> Request<'static> {
    Request {
        model: MODEL,
        prompt_tokens,
        overlaps: &[],
        overlap_block_tokens: 16,
        form: Form::Tokens,
        output_tokens_expected: 200,
        output_tokens_max: 1024,
        choices: 1,
        excluded: &[],
        beginning: Some(BlockHash(7)),
    }
}

pub(crate) fn on(n: u64) -> Plan {
    Plan::Aggregated { rank: id(n) }
}

pub(crate) fn split(prefill: u64, decode: u64) -> Plan {
    Plan::Split { prefill: id(prefill), decode: id(decode) }
}

pub(crate) fn placed(snapshot: &Snapshot, request: &Request<'_>) -> Result<Decision, PlaceError> {
    place(snapshot, request, Policy::Cost, &Weights::default(), 1)
}

/// Asserts where `request` goes by cost.
#[track_caller]
pub(crate) fn check(
    fact: &str,
    ranks: impl IntoIterator<Item = RankView>,
    request: &Request<'_>,
    expected: Plan,
) -> Decision {
    let decision = placed(&fleet(ranks), request).unwrap_or_else(|error| panic!("{fact}: {error}"));
    assert_eq!(decision.plan, expected, "{fact}: {:#?}", decision.explanation.table());
    decision
}
