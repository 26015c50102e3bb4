//! Seconds of a scheduler step, and of prefills and decode steps made of them.

use forebay_types::StepObservation;
use serde::{Deserialize, Serialize};

use crate::{
    fit::{Fit, Limits, ModelError, Tuning},
    profile::QueueShape,
};

/// What one rank's steps cost. All in seconds, all at least 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepCoefficients {
    /// Of any step: launching it, reading the weights.
    pub base_seconds: f64,
    /// Of each prompt token computed.
    pub per_prefill_token_seconds: f64,
    /// Of each unit of attention work (`m·c + m²/2` for a chunk of `m` tokens on `c` already computed).
    pub per_attention_seconds: f64,
    /// Of each sequence that decodes a token.
    pub per_decode_seconds: f64,
    /// Of each token of context that decoding sequences read.
    pub per_context_token_seconds: f64,
}

impl StepCoefficients {
    /// An 8B model in bf16 on one H100 under vLLM 0.25: 58 ms for a prefill of 2,048 tokens, 230 ms for 8,192; decode
    /// steps of 6.3 ms alone and 8.4 ms at 128 sequences, plus 4.4e-5 ms a token of context. Measured.
    pub const H100_8B: Self = Self {
        base_seconds: 6.3e-3,
        per_prefill_token_seconds: 2.35e-5,
        per_attention_seconds: 8.2e-10,
        per_decode_seconds: 1.6e-5,
        per_context_token_seconds: 4.4e-8,
    };
    /// A model of 135M parameters on two cores: estimated from 0.27 GFLOP a token at some 70 GFLOP/s. A start for the
    /// embedded engine; its first steps give the scale.
    pub const CPU_TINY: Self = Self {
        base_seconds: 1e-2,
        per_prefill_token_seconds: 4e-3,
        per_attention_seconds: 1e-6,
        per_decode_seconds: 4e-3,
        per_context_token_seconds: 2e-6,
    };

    /// Seconds of one step; the arguments are those of [`StepObservation`].
    pub fn step_seconds(
        &self,
        prefill_tokens: u32,
        prefill_attention: f64,
        decodes: u32,
        context_tokens: u64,
    ) -> f64 {
        self.base_seconds
            + self.per_prefill_token_seconds * f64::from(prefill_tokens)
            + self.per_attention_seconds * prefill_attention
            + self.per_decode_seconds * f64::from(decodes)
            + self.per_context_token_seconds * context_tokens as f64
    }

    /// Seconds to compute `new_tokens` of a prompt whose first `cached_tokens` are cached, alone on the rank, in steps of
    /// at most `chunk_tokens`. 0 if nothing is new.
    ///
    /// The attention work of all chunks together is `n·c + n²/2` however the prompt is cut, so no sum is needed.
    pub fn prefill_seconds(&self, new_tokens: u32, cached_tokens: u32, chunk_tokens: u32) -> f64 {
        let steps = new_tokens.div_ceil(chunk_tokens.max(1));
        let new = f64::from(new_tokens);
        self.base_seconds * f64::from(steps)
            + self.per_prefill_token_seconds * new
            + self.per_attention_seconds * new * (f64::from(cached_tokens) + new / 2.0)
    }

    /// Seconds until prompts that wait are computed, beside decodes; see
    /// [`Profile::queue_seconds`](crate::Profile::queue_seconds).
    pub fn queue_seconds(&self, shape: &QueueShape) -> f64 {
        shape.steps() as f64 * self.step_seconds(0, 0.0, shape.decodes, shape.context_tokens)
            + self.per_prefill_token_seconds * shape.tokens as f64
            + self.per_attention_seconds * shape.attention
    }

    /// The rates in the order of the fields, for arithmetic on all of them alike.
    pub fn to_array(self) -> [f64; 5] {
        let Self {
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        } = self;
        [
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        ]
    }

    /// The inverse of [`StepCoefficients::to_array`].
    pub fn from_array(array: [f64; 5]) -> Self {
        let [
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        ] = array;
        Self {
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        }
    }
}

/// At 10 ms a step a memory of about five seconds of decoding, or of the last 500 steps with prefill.
static TUNING: Tuning<5> = Tuning {
    forgetting: 0.998,
    prior_weight: 0.1,
    typical: [1.0, 512.0, 512.0 * 512.0 / 2.0, 8.0, 8.0 * 1024.0],
    limits: Limits::NOT_NEGATIVE,
    owner: None,
};

/// What one rank's steps cost, learned from them.
#[derive(Debug, Clone)]
pub struct StepModel {
    /// Decode-only steps, and steps with prefill, scatter differently.
    fit: Fit<5, 2>,
}

impl StepModel {
    /// Starts from what is known of a similar rank; its proportions matter more than its scale.
    pub fn new(prior: StepCoefficients) -> Self {
        Self { fit: Fit::new(prior.to_array(), &TUNING) }
    }

    /// Learns from one measured step. Steps that computed nothing and times that cannot be are ignored.
    pub fn observe(&mut self, step: &StepObservation) {
        let &StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds } = step;
        if prefill_tokens == 0 && decodes == 0 {
            return;
        }
        let row =
            [1.0, f64::from(prefill_tokens), prefill_attention, f64::from(decodes), context_tokens as f64];
        self.fit.observe(usize::from(prefill_tokens > 0), &row, seconds);
    }

    /// Seconds of one step; see [`StepCoefficients::step_seconds`].
    pub fn step_seconds(
        &self,
        prefill_tokens: u32,
        prefill_attention: f64,
        decodes: u32,
        context_tokens: u64,
    ) -> f64 {
        self.coefficients().step_seconds(prefill_tokens, prefill_attention, decodes, context_tokens)
    }

    /// Seconds of a prefill alone on the rank; see [`StepCoefficients::prefill_seconds`].
    pub fn prefill_seconds(&self, new_tokens: u32, cached_tokens: u32, chunk_tokens: u32) -> f64 {
        self.coefficients().prefill_seconds(new_tokens, cached_tokens, chunk_tokens)
    }

    /// Seconds of a step that only decodes `decodes` sequences with `context_tokens` tokens of context together.
    pub fn decode_step_seconds(&self, decodes: u32, context_tokens: u64) -> f64 {
        self.step_seconds(0, 0.0, decodes, context_tokens)
    }

    /// What is believed now: small, and enough to predict with.
    pub fn coefficients(&self) -> StepCoefficients {
        StepCoefficients::from_array(self.fit.coefficients())
    }

    /// Steps learned from.
    pub fn samples(&self) -> u64 {
        self.fit.samples()
    }

    /// How far predictions of the last 128 steps, made before learning from each, were off.
    pub fn error(&self) -> ModelError {
        self.fit.error()
    }
}

#[cfg(test)]
mod tests;
