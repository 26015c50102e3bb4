//! A profile corrected for one rank by what that rank's steps took.
//!
//! In: a [`Profile`], then measured steps. Out: the same questions answered with a factor on each of the profile's
//! terms. Start at [`ProfileModel::observe`].
//!
//! Invariants: every factor stays within [`FACTOR_MIN`]`..=`[`FACTOR_MAX`], so every answer is finite, at least 0, and
//! never falls when work is added; the same observations in the same order give the same bits.

use std::sync::Arc;

use forebay_types::StepObservation;
use serde::{Deserialize, Serialize};

use crate::fit::{Fit, Limits, ModelError, Tuning};
use crate::profile::{AS_MEASURED, Factors, PrefillShape, Profile, QueueShape, StepShape, TERMS};

/// No term gets shorter than this share of the profile's: an engine 20 times faster than its profile has the wrong
/// profile.
pub const FACTOR_MIN: f64 = 1.0 / 20.0;
/// No term gets longer than this many times the profile's. A rank slower than that is broken, and looks so.
pub const FACTOR_MAX: f64 = 20.0;

/// The memory of `StepModel`: at 10 ms a step about five seconds of decoding, or the last 500 steps with prefill. The
/// shape of a profile is measured, so it is worth ten times as much as that model's prior.
static TUNING: Tuning<TERMS> = Tuning {
    forgetting: 0.998,
    prior_weight: 1.0,
    typical: [1.0; TERMS],
    limits: Limits { least: FACTOR_MIN, most: FACTOR_MAX },
    // Launch and context jump with decode-only steps; tokens, prefill and mixing with steps that have prefill. Apart,
    // so that a jump of one kind never unsettles the other.
    owner: Some([DECODE_ONLY, WITH_PREFILL, WITH_PREFILL, DECODE_ONLY, WITH_PREFILL]),
};

/// Kinds of steps, whose scatter differs.
const DECODE_ONLY: usize = 0;
const WITH_PREFILL: usize = 1;

/// What a rank takes, as multiples of its profile. 1 is as measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Corrections {
    /// Of the launch of a step: weights read, kernels started. Nearly all of a small decode step.
    pub launch: f64,
    /// Of more tokens in a step (in a group: sequences). Most of a prefill.
    pub tokens: f64,
    /// Of attention of prompt tokens. In a group: of all that a step with prefill takes.
    pub prefill: f64,
    /// Of context that decodes read.
    pub context: f64,
    /// Of the price of mixing: what that context costs more beside a prefill. In a group without effect.
    pub mixing: f64,
}

/// A profile with a factor on each of its terms, learned from one rank's steps.
#[derive(Debug, Clone)]
pub struct ProfileModel {
    profile: Arc<Profile>,
    budget_tokens: u32,
    fit: Fit<TERMS, 2>,
}

/// What a [`ProfileModel`] believed at one moment: a small value that answers what prices are made of.
#[derive(Debug, Clone)]
pub struct CorrectedProfile {
    profile: Arc<Profile>,
    budget_tokens: u32,
    factors: Factors,
}

impl CorrectedProfile {
    /// As [`ProfileModel::step_seconds`].
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        let budget_tokens = budget(shape.budget_tokens, self.budget_tokens);
        self.profile.steps().step_seconds(&self.factors, &StepShape { budget_tokens, ..*shape })
    }

    /// Seconds until prompts that wait are computed; see [`Profile::queue_seconds`]. A shape without a token budget has
    /// the rank's own.
    pub fn queue_seconds(&self, shape: &QueueShape) -> f64 {
        let budget_tokens = budget(shape.budget_tokens, self.budget_tokens);
        self.profile.steps().queue_seconds(&self.factors, &QueueShape { budget_tokens, ..*shape })
    }
}

fn budget(asked: u32, own: u32) -> u32 {
    if asked > 0 { asked } else { own }
}

impl ProfileModel {
    /// Starts from the profile as it is, for a rank whose engine puts at most `budget_tokens` into a step (0: not
    /// known).
    pub fn new(profile: Arc<Profile>, budget_tokens: u32) -> Self {
        Self { profile, budget_tokens, fit: Fit::new(AS_MEASURED, &TUNING) }
    }

    /// Learns from one measured step of a rank that steps alone. Steps that computed nothing and times that cannot be
    /// are ignored.
    pub fn observe(&mut self, step: &StepObservation) {
        self.observe_shape(&StepShape::observed(step, self.budget_tokens), step.seconds);
    }

    /// Learns that a step of `shape` took `seconds`: for groups, whose ranks' shapes are put together first
    /// ([`StepShape::of_group`]).
    pub fn observe_shape(&mut self, shape: &StepShape, seconds: f64) {
        // The profile would take such attention for none or for the most that can be; nothing is learned from it.
        if !shape.prefill_attention.is_finite() || shape.prefill_attention < 0.0 {
            return;
        }
        let shape = StepShape { budget_tokens: self.budget(shape.budget_tokens), ..*shape };
        let row = self.profile.steps().row(&self.factors(), &shape);
        if row.iter().all(|&term| term == 0.0) {
            return;
        }
        let kind = if shape.prefill_tokens > 0 { WITH_PREFILL } else { DECODE_ONLY };
        self.fit.observe(kind, &row, seconds);
    }

    /// Seconds of one step; see [`Profile::step_seconds`]. A shape without a token budget has the rank's own.
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        let shape = StepShape { budget_tokens: self.budget(shape.budget_tokens), ..*shape };
        self.profile.steps().step_seconds(&self.factors(), &shape)
    }

    /// Seconds of a step that only decodes; see [`Profile::decode_step_seconds`].
    pub fn decode_step_seconds(&self, decodes: u32, context_tokens: u64) -> f64 {
        self.step_seconds(&StepShape { decodes, context_tokens, ..StepShape::default() })
    }

    /// Seconds of a prefill alone on the rank, under its token budget; see [`Profile::prefill_seconds`].
    pub fn prefill_seconds(&self, new_tokens: u32, cached_tokens: u32) -> f64 {
        self.mixed_prefill_seconds(&PrefillShape { new_tokens, cached_tokens, ..PrefillShape::default() })
    }

    /// Seconds of a prefill beside decodes; see [`Profile::mixed_prefill_seconds`]. A shape without a token budget
    /// has the rank's own.
    pub fn mixed_prefill_seconds(&self, shape: &PrefillShape) -> f64 {
        let shape = PrefillShape { budget_tokens: self.budget(shape.budget_tokens), ..*shape };
        self.profile.steps().prefill_seconds(&self.factors(), &shape)
    }

    /// What is believed now, to keep and to ask.
    pub fn believed(&self) -> CorrectedProfile {
        let (profile, budget_tokens) = (self.profile.clone(), self.budget_tokens);
        CorrectedProfile { profile, budget_tokens, factors: self.factors() }
    }

    /// What is believed now.
    pub fn corrections(&self) -> Corrections {
        let [launch, tokens, prefill, context, mixing] = self.factors();
        Corrections { launch, tokens, prefill, context, mixing }
    }

    /// The profile that is corrected.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Steps learned from.
    pub fn samples(&self) -> u64 {
        self.fit.samples()
    }

    /// How far predictions of the last 128 steps, made before learning from each, were off.
    pub fn error(&self) -> ModelError {
        self.fit.error()
    }

    fn budget(&self, asked: u32) -> u32 {
        budget(asked, self.budget_tokens)
    }

    fn factors(&self) -> Factors {
        self.fit.coefficients()
    }
}

#[cfg(test)]
mod tests;
