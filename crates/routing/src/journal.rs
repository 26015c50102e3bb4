//! What a router was told and answered, so that another one can be told the same.
//!
//! Invariant: it never grows beyond its bound; one that met it says so, and cannot be replayed to the end.

use std::{fmt, sync::Arc, time::Duration};

use forebay_admission::Admit;
use forebay_fleet::Event;
use forebay_placement::{Decision, Form, PlaceError, Plan, Policy, Weights};
use forebay_types::{BlockHash, Incarnation, RankId, TenantId};

use crate::{
    question::{Known, PromptUnit, Question},
    router::{Router, RouterSettings},
};

/// What a router was told, in order.
#[derive(Debug)]
pub struct Journal {
    settings: RouterSettings,
    told: Vec<Told>,
    /// Words that found no room.
    left_out: u64,
}

/// One word, and the answer where there is one.
#[derive(Debug)]
pub(crate) enum Told {
    Note { now: Duration, event: Event },
    Look { now: Duration },
    Ask(Box<Ask>),
    Placed { now: Duration, question: Asked, cached_tokens: u32 },
    Admit { now: Duration, question: Asked, admit: Admit },
    Guess { rank: RankId, blocks_total: u32, instead_of_events: bool },
    Forget { incarnation: Incarnation },
    Answer { model: Arc<str>, tenant: TenantId, tokens: f64, cut_off: bool },
}

/// A placement.
#[derive(Debug)]
pub(crate) struct Ask {
    now: Duration,
    question: Asked,
    known: Known,
    policy: Policy,
    weights: Weights,
    seed: u64,
    answer: Answer,
}

/// A question that owns what it asks.
#[derive(Debug)]
pub(crate) struct Asked {
    model: Arc<str>,
    tenant: TenantId,
    prompt_tokens: u32,
    unit: PromptUnit,
    form: Form,
    output_tokens_max: u32,
    choices: u32,
    excluded: Vec<RankId>,
    chain: Vec<BlockHash>,
}

/// What matters of a decision: the plan, the seconds to its first token to the bit, what is cached.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer(Result<(Plan, u64, u32), String>);

impl Answer {
    fn of(answer: &Result<Decision, PlaceError>) -> Self {
        let placed = |it: &Decision| (it.plan, it.predicted_ttft_seconds.to_bits(), it.cached_tokens);
        Self(answer.as_ref().map(placed).map_err(ToString::to_string))
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok((plan, seconds, cached)) => {
                write!(f, "{plan:?} in {} s with {cached} tokens cached", f64::from_bits(*seconds))
            }
            Err(error) => f.write_str(error),
        }
    }
}

/// Another router, told the same, answered something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("word {word} of the journal was answered with {before}, and is now answered with {now}")]
pub struct Differs {
    /// Which word, from 0.
    pub word: usize,
    /// The answer in the journal.
    pub before: String,
    /// The answer now.
    pub now: String,
}

impl Journal {
    pub(crate) fn new(settings: RouterSettings) -> Self {
        Self { settings, told: Vec::new(), left_out: 0 }
    }

    pub(crate) fn keep(&mut self, told: impl FnOnce() -> Told) {
        if !self.is_kept() {
            return;
        }
        if self.told.len() < self.settings.journal_max {
            self.told.push(told());
        } else {
            self.left_out += 1;
        }
    }

    /// Whether there is one.
    pub(crate) fn is_kept(&self) -> bool {
        self.settings.journal_max > 0
    }

    pub(crate) fn take(&mut self) -> Self {
        let nothing = Self::new(RouterSettings { journal_max: 0, ..self.settings });
        std::mem::replace(self, nothing)
    }

    /// Words that it has.
    pub fn len(&self) -> usize {
        self.told.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// Whether everything that the router was told is in it.
    pub fn is_whole(&self) -> bool {
        self.left_out == 0
    }

    /// Tells a new router the same: how many requests it placed, all as before.
    ///
    /// # Errors
    /// The first answer that is another one.
    pub fn replay(&self) -> Result<usize, Differs> {
        let mut router = Router::new(RouterSettings { journal_max: 0, ..self.settings });
        let mut placed = 0;
        for (word, told) in self.told.iter().enumerate() {
            match told {
                Told::Note { now, event } => {
                    let _ = router.note(*now, event.clone());
                }
                Told::Look { now } => {
                    router.snapshot(*now);
                }
                Told::Ask(ask) => {
                    let Ask { now, question, known, policy, weights, seed, answer } = &**ask;
                    let again =
                        router.place(*now, &question.question(), &mut known.clone(), *policy, weights, *seed);
                    same(word, answer, &Answer::of(&again))?;
                    placed += 1;
                }
                Told::Placed { now, question, cached_tokens } => {
                    router.placed(*now, &question.question(), *cached_tokens);
                }
                Told::Admit { now, question, admit } => {
                    let again = router.admit(*now, &question.question()).map(|gathered| gathered.admit);
                    let (before, now) = (format!("{:?}", Some(admit)), format!("{again:?}"));
                    if before != now {
                        return Err(Differs { word, before, now });
                    }
                }
                Told::Guess { rank, blocks_total, instead_of_events } => {
                    router.guess_cache(*rank, *blocks_total, *instead_of_events);
                }
                Told::Forget { incarnation } => router.forget(*incarnation),
                Told::Answer { model, tenant, tokens, cut_off } => {
                    router.learn_output(model, tenant, *tokens, *cut_off);
                }
            }
        }
        Ok(placed)
    }
}

fn same(word: usize, before: &Answer, now: &Answer) -> Result<(), Differs> {
    if before == now {
        return Ok(());
    }
    Err(Differs { word, before: before.to_string(), now: now.to_string() })
}

impl Asked {
    fn of(question: &Question<'_>) -> Self {
        let Question {
            model,
            tenant,
            prompt_tokens,
            unit,
            form,
            output_tokens_max,
            choices,
            excluded,
            chain,
        } = *question;
        Self {
            model: model.clone(),
            tenant: tenant.clone(),
            prompt_tokens,
            unit,
            form,
            output_tokens_max,
            choices,
            excluded: excluded.to_vec(),
            chain: chain.to_vec(),
        }
    }

    fn question(&self) -> Question<'_> {
        Question {
            model: &self.model,
            tenant: &self.tenant,
            prompt_tokens: self.prompt_tokens,
            unit: self.unit,
            form: self.form,
            output_tokens_max: self.output_tokens_max,
            choices: self.choices,
            excluded: &self.excluded,
            chain: &self.chain,
        }
    }
}

impl Told {
    pub(crate) fn ask(
        now: Duration,
        question: &Question<'_>,
        known: Known,
        policy: Policy,
        weights: &Weights,
        seed: u64,
        answer: &Result<Decision, PlaceError>,
    ) -> Self {
        let question = Asked::of(question);
        let answer = Answer::of(answer);
        Self::Ask(Box::new(Ask { now, question, known, policy, weights: *weights, seed, answer }))
    }

    pub(crate) fn placed(now: Duration, question: &Question<'_>, cached_tokens: u32) -> Self {
        Self::Placed { now, question: Asked::of(question), cached_tokens }
    }

    pub(crate) fn admit(now: Duration, question: &Question<'_>, admit: Admit) -> Self {
        Self::Admit { now, question: Asked::of(question), admit }
    }
}
