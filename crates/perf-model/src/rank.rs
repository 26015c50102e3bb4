//! What one rank's steps cost, by whichever model it has.

use std::sync::Arc;

use forebay_types::StepObservation;

use crate::{
    corrected::{CorrectedProfile, ProfileModel},
    fit::ModelError,
    profile::{Profile, QueueShape, StepShape},
    step::{StepCoefficients, StepModel},
};

/// Seconds of a rank's steps: five rates learned from nothing but a prior, or a profile and its correction.
#[derive(Debug, Clone)]
pub enum RankModel {
    /// Nothing is known of the engine's kind.
    Learned(StepModel),
    /// Its kind was measured.
    Profiled(ProfileModel),
}

impl RankModel {
    /// Of a rank of which a probe, or what is known of similar ones, says this.
    pub fn learned(prior: StepCoefficients) -> Self {
        Self::Learned(StepModel::new(prior))
    }

    /// Of a rank whose kind was measured and whose engine puts at most `budget_tokens` into a step.
    pub fn profiled(profile: Arc<Profile>, budget_tokens: u32) -> Self {
        Self::Profiled(ProfileModel::new(profile, budget_tokens))
    }

    /// Learns from one step of a rank that steps alone.
    pub fn observe(&mut self, step: &StepObservation) {
        match self {
            Self::Learned(model) => model.observe(step),
            Self::Profiled(model) => model.observe(step),
        }
    }

    /// Seconds of a step that only decodes `decodes` sequences with `context_tokens` tokens of context together.
    pub fn decode_step_seconds(&self, decodes: u32, context_tokens: u64) -> f64 {
        match self {
            Self::Learned(model) => model.decode_step_seconds(decodes, context_tokens),
            Self::Profiled(model) => model.decode_step_seconds(decodes, context_tokens),
        }
    }

    /// What is believed now, to keep and to ask.
    pub fn prices(&self) -> RankPrices {
        match self {
            Self::Learned(model) => RankPrices::Rates(model.coefficients()),
            Self::Profiled(model) => RankPrices::Profile(model.believed()),
        }
    }

    /// The profile that is corrected, if there is one.
    pub fn profile(&self) -> Option<&Profile> {
        match self {
            Self::Learned(_) => None,
            Self::Profiled(model) => Some(model.profile()),
        }
    }

    /// Steps learned from.
    pub fn samples(&self) -> u64 {
        match self {
            Self::Learned(model) => model.samples(),
            Self::Profiled(model) => model.samples(),
        }
    }

    /// How far predictions of late were off.
    pub fn error(&self) -> ModelError {
        match self {
            Self::Learned(model) => model.error(),
            Self::Profiled(model) => model.error(),
        }
    }
}

/// What a rank's model believed at one moment.
#[derive(Debug, Clone)]
pub enum RankPrices {
    /// Five rates.
    Rates(StepCoefficients),
    /// A profile and its correction.
    Profile(CorrectedProfile),
}

impl RankPrices {
    /// Seconds of one step. The five rates know no groups: there the fullest rank stands for all.
    #[inline]
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        match self {
            Self::Rates(rates) => rates.step_seconds(
                shape.prefill_tokens,
                shape.prefill_attention,
                shape.decodes,
                shape.context_tokens,
            ),
            Self::Profile(profile) => profile.step_seconds(shape),
        }
    }

    /// Seconds until prompts that wait are computed; see [`Profile::queue_seconds`].
    #[inline]
    pub fn queue_seconds(&self, shape: &QueueShape) -> f64 {
        match self {
            Self::Rates(rates) => rates.queue_seconds(shape),
            Self::Profile(profile) => profile.queue_seconds(shape),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models() -> [RankModel; 3] {
        let built_in = |name| RankModel::profiled(Arc::new(Profile::built_in(name).unwrap()), 8192);
        [
            RankModel::learned(StepCoefficients::H100_8B),
            built_in("h100-llama8b"),
            built_in("h100x2-qwen3-30b-a3b"),
        ]
    }

    #[test]
    fn a_queue_that_fits_one_step_takes_that_step() {
        for model in models() {
            let (tokens, attention, decodes, context_tokens) = (3000, 4.5e6, 7, 14_000);
            let queue = QueueShape {
                tokens: 3000,
                attention,
                budget_tokens: 8192,
                decodes,
                context_tokens,
                group_decodes: 40,
            };
            let step = StepShape {
                prefill_tokens: tokens,
                prefill_attention: attention,
                decodes,
                context_tokens,
                group_decodes: 40,
                budget_tokens: 8192,
            };
            let prices = model.prices();
            let (queue, step) = (prices.queue_seconds(&queue), prices.step_seconds(&step));
            assert!((queue - step).abs() < 1e-9, "{queue} {step}");
        }
    }

    #[test]
    fn a_longer_queue_never_takes_less_and_an_empty_one_nothing() {
        for model in models() {
            let mut last = 0.0;
            for tokens in (0..40_000).step_by(500) {
                let attention = f64::from(tokens) * 500.0;
                let shape = QueueShape {
                    tokens: u64::from(tokens as u32),
                    attention,
                    budget_tokens: 2048,
                    decodes: 16,
                    context_tokens: 32_000,
                    group_decodes: 0,
                };
                let now = model.prices().queue_seconds(&shape);
                assert!(now >= last && (tokens > 0 || now == 0.0), "{tokens}: {now} after {last}");
                last = now;
            }
        }
    }
}
