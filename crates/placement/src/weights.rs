//! What a second of each term counts for.

use serde::{Deserialize, Serialize};

/// What a second of each term counts for. Waiting and the request's own prefill count in full.
///
/// `transfer`, `decode` and `harm` are those with which `bench/placement` found the highest rate within its targets, over
/// chats that share prefixes, fresh prompts and long ones (8B model on H100; its RESULTS.md has the others).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Of a transfer: 1. Less, since a hand-over delays only the second token where the prefill leg streams the first, makes
    /// more splits; and a prompt that lies in two pools leaves less room for others'.
    pub transfer: f64,
    /// Of the request's own decoding. 1 is the shortest end to end where nothing is cached, and lets the scatter of a few
    /// running sequences outweigh what a cached prefix saves. With 0 no split ever beats both phases on the prefill rank.
    pub decode: f64,
    /// Of each second for which a running decode stalls behind this prefill. 1 ignores the queue behind and was far too
    /// high.
    pub harm: f64,
    /// The same where ranks step together. 1: unlike a dense engine's, a group's prompts share their steps, so that who
    /// goes where others wait loses little by it.
    pub group_harm: f64,
    /// Of each second that computing again takes what a split pushes out of a cache, since its prompt lies in two pools. 2:
    /// with 0 a tenth of conversations' turns are split for a few milliseconds each and the fleet forgets as many prompts;
    /// beyond 2 conversations win what long prompts that share something lose.
    pub second_copy: f64,
    /// Seconds that a half-full KV pool counts for: λ of `λ·k/(1−k)`. 0.15 s is what the Shepherd Model Gateway's
    /// least-load policy uses.
    pub kv_pressure_seconds: f64,
    /// Decode steps from the last prefill step to the first decode step, beside the bytes: the pull begins at the next
    /// step (half a step away on average) and is noticed two steps later.
    pub handover_steps: f64,
    /// Ceiling of a rank's prefill share in the stretch `1/(1−share)` of decoding. 0.9, a tenfold stretch: a share
    /// measured near 1 must not price a rank out for good.
    pub prefill_share_max: f64,
    /// [`Policy::PrefixAffinity`](crate::Policy::PrefixAffinity) passes over a rank that has more than this many times the
    /// mean of sequences. 1.25 is what bounded-load hashing is published with (arXiv 1608.01350).
    pub affinity_load_factor: f64,
    /// Of [`Policy::Dynamo`](crate::Policy::Dynamo).
    pub dynamo: DynamoKnobs,
    /// Totals within this share of the least are equal and the seed chooses among them. 1e-9 covers rounding only.
    pub tie_epsilon: f64,
}

/// Knobs of Dynamo's cost, in KV blocks, under the names that its documentation gives them; the defaults are its own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DynamoKnobs {
    /// What a cached block takes off the blocks to prefill. With 0 caches do not count.
    pub overlap_credit: f64,
    /// What a block to prefill counts for.
    pub prefill_load_scale: f64,
    /// What a sequence that runs or waits counts for, beside its blocks.
    pub active_request_weight: f64,
    /// Above 0 a rank is drawn, the likelier the cheaper: softmax of the costs between the least (0) and the most (1),
    /// divided by this.
    pub temperature: f64,
}

impl Default for DynamoKnobs {
    fn default() -> Self {
        Self { overlap_credit: 1.0, prefill_load_scale: 1.0, active_request_weight: 0.0, temperature: 0.0 }
    }
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            transfer: 1.0,
            decode: 0.1,
            harm: 0.1,
            group_harm: 1.0,
            second_copy: 2.0,
            kv_pressure_seconds: 0.15,
            handover_steps: 2.5,
            prefill_share_max: 0.9,
            affinity_load_factor: 1.25,
            dynamo: DynamoKnobs::default(),
            tie_epsilon: 1e-9,
        }
    }
}

impl Weights {
    /// Checks what the arithmetic relies on.
    ///
    /// # Errors
    /// Names the first weight that is negative or not finite, or a `prefill_share_max` of 1 or more.
    pub fn validate(&self) -> Result<(), WeightsError> {
        let Self {
            transfer,
            decode,
            harm,
            group_harm,
            second_copy,
            kv_pressure_seconds,
            handover_steps,
            prefill_share_max,
            affinity_load_factor,
            dynamo: DynamoKnobs { overlap_credit, prefill_load_scale, active_request_weight, temperature },
            tie_epsilon,
        } = *self;
        let named = [
            ("transfer", transfer),
            ("decode", decode),
            ("harm", harm),
            ("group_harm", group_harm),
            ("second_copy", second_copy),
            ("kv_pressure_seconds", kv_pressure_seconds),
            ("handover_steps", handover_steps),
            ("prefill_share_max", prefill_share_max),
            ("affinity_load_factor", affinity_load_factor),
            ("dynamo.overlap_credit", overlap_credit),
            ("dynamo.prefill_load_scale", prefill_load_scale),
            ("dynamo.active_request_weight", active_request_weight),
            ("dynamo.temperature", temperature),
            ("tie_epsilon", tie_epsilon),
        ];
        if let Some((name, value)) = named.into_iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
            return Err(WeightsError::NotAWeight { name, value });
        }
        if prefill_share_max >= 1.0 {
            return Err(WeightsError::ShareTooLarge { value: prefill_share_max });
        }
        Ok(())
    }
}

/// Why weights cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WeightsError {
    /// Negative, infinite or not a number.
    #[error("weight `{name}` is {value}; give a number from 0 up")]
    NotAWeight {
        /// The field.
        name: &'static str,
        /// What it was set to.
        value: f64,
    },
    /// A stretch of `1/(1−share)` would be infinite.
    #[error("`prefill_share_max` is {value}; give a number below 1")]
    ShareTooLarge {
        /// What it was set to.
        value: f64,
    },
}
