//! What a rank would charge for a request, in seconds.
//!
//! In: a rank, what it holds of the prompt, the request. Out: [`Priced`], every term that depends on that rank alone.
//! A candidate's terms are sums of those: the prefill part of one rank, the decode part of another (or the same), and
//! the transfer between them. That separation is what keeps placement O(ranks).
//!
//! Invariant: every term is finite and at least 0, whatever the model says.

use forebay_perf_model::LinkModel;
use forebay_types::{Leaning, RankId, Role};

use crate::{
    explain::Terms,
    filter::Verdict,
    place::Request,
    snapshot::RankView,
    standing::{Prompts, Standing, attention},
    weights::Weights,
};

/// What stands for a price that is not a number: over thirty years, so such a rank is chosen only if nothing else is
/// left, and the record still serialises.
const UNPRICED_SECONDS: f64 = 1e9;

/// KV use above which pressure rises in a straight line. `k/(1−k)` has a pole at 1, and a pool can be promised more
/// than it has; from here its tangent continues, so that two overfull ranks still compare.
const PRESSURE_KNEE: f64 = 0.95;

/// One rank's part of the price.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Priced {
    /// Index in the snapshot.
    pub(crate) index: usize,
    pub(crate) id: RankId,
    pub(crate) role: Role,
    pub(crate) leaning: Leaning,
    pub(crate) overlap_blocks: u32,
    /// Prompt tokens it would serve from cache, and compute.
    pub(crate) cached_tokens: u32,
    pub(crate) new_tokens: u32,
    /// Blocks of the prompt that it does not hold.
    pub(crate) missing_blocks: u32,
    missing_bytes: u64,
    // The prefill part.
    wait: f64,
    prefill: f64,
    harm: f64,
    /// Pressure that the prompt adds while a prefill leg holds it, and what it pushes out of the cache by lying in a second
    /// pool: as many tokens as it computes, of which the usual share would have been asked for again.
    hold_pressure: f64,
    // The decode part.
    decode: f64,
    /// The same as a decode leg, which the prompts that are queued here overtake.
    decode_leg: f64,
    pressure: f64,
    handover: f64,
}

impl Priced {
    /// Both phases here.
    pub(crate) fn aggregated(&self) -> Terms {
        Terms {
            wait: self.wait,
            prefill: self.prefill,
            transfer: 0.0,
            decode: self.decode,
            harm: self.harm,
            kv_pressure: self.pressure,
        }
    }

    /// Prefill here, decode on `decode`, KV over `link`.
    pub(crate) fn split(&self, decode: &Priced, link: &LinkModel, weights: &Weights) -> Terms {
        let moving = link.seconds(decode.missing_bytes);
        Terms {
            wait: self.wait,
            prefill: self.prefill,
            transfer: finite(weights.transfer * (moving + decode.handover)),
            decode: decode.decode_leg,
            harm: self.harm,
            kv_pressure: finite(self.hold_pressure + decode.pressure),
        }
    }

    /// What this rank adds to any split as its prefill side.
    pub(crate) fn prefill_side(&self) -> f64 {
        self.wait + self.prefill + self.harm + self.hold_pressure
    }

    /// What this rank adds to a split as its decode side, over a link that was never measured.
    pub(crate) fn decode_side(&self, unmeasured: &LinkModel, weights: &Weights) -> f64 {
        let transfer = weights.transfer * (unmeasured.seconds(self.missing_bytes) + self.handover);
        finite(self.decode_leg + self.pressure + transfer)
    }

    /// Its own prefill here.
    pub(crate) fn prefill_seconds(&self) -> f64 {
        self.prefill
    }

    /// Bytes that a decode leg here would fetch.
    pub(crate) fn missing_bytes(&self) -> u64 {
        self.missing_bytes
    }
}

/// Prices `rank` for `request`.
pub(crate) fn price(
    rank: &RankView,
    standing: &Standing,
    verdict: &Verdict,
    request: &Request<'_>,
    weights: &Weights,
) -> Priced {
    let block_tokens = rank.block_size_tokens.max(1);
    let prompt_tokens = request.prompt_tokens.max(1);
    let prompt_blocks = prompt_tokens.div_ceil(block_tokens);
    // In blocks of the rank's own size: it can reuse only whole ones.
    let held_tokens = verdict.overlap_blocks.saturating_mul(request.overlap_block_tokens.max(1));
    let held_blocks = held_tokens.min(prompt_tokens) / block_tokens;
    // At least one token is computed, since the logits of the last one give the first token of the answer; and engines
    // compute whole blocks again.
    let cached_tokens = held_blocks.min((prompt_tokens - 1) / block_tokens) * block_tokens;
    let new_tokens = prompt_tokens - cached_tokens;
    let missing_blocks = prompt_blocks - held_blocks;

    let own = Prompts { tokens: u64::from(new_tokens), attention: attention(new_tokens, cached_tokens) };
    let prefill = standing.prefill_seconds(&own);
    let weight = if rank.steps_together { weights.group_harm } else { weights.harm };
    let stall = standing.stall_of(&own, prefill);
    let harm = weight * f64::from(standing.stalled) * stall;

    let decode = standing.decode(request);
    let stretched = decode.stretched_seconds(standing.prefill_share, weights.prefill_share_max);
    let beside_queue = decode.steps * decode.step_seconds + standing.queue_stall_seconds(decode.steps);

    let output_blocks = request.choices().saturating_mul(request.output_tokens().div_ceil(block_tokens));
    let resident_blocks = u64::from(missing_blocks) + u64::from(output_blocks);
    let pressure = |blocks: u64| weights.kv_pressure_seconds * pressure(standing.pool.use_with(blocks));
    Priced {
        index: verdict.index,
        id: rank.id,
        role: rank.role,
        leaning: rank.leaning,
        overlap_blocks: verdict.overlap_blocks,
        cached_tokens,
        new_tokens,
        missing_blocks,
        missing_bytes: u64::from(missing_blocks) * rank.block_bytes,
        wait: finite(standing.wait_seconds),
        prefill: finite(prefill),
        harm: finite(harm),
        hold_pressure: finite(
            pressure(u64::from(missing_blocks)) - pressure(0)
                + weights.second_copy * standing.reuse_share * stall,
        ),
        decode: finite(weights.decode * stretched),
        decode_leg: finite(weights.decode * stretched.max(beside_queue)),
        pressure: finite(pressure(resident_blocks)),
        handover: finite(weights.handover_steps * standing.step_seconds),
    }
}

/// `k/(1−k)`, continued in a straight line above the knee.
fn pressure(k: f64) -> f64 {
    if k <= PRESSURE_KNEE {
        return k / (1.0 - k);
    }
    let room = 1.0 - PRESSURE_KNEE;
    PRESSURE_KNEE / room + (k - PRESSURE_KNEE) / (room * room)
}

fn finite(seconds: f64) -> f64 {
    if (0.0..=UNPRICED_SECONDS).contains(&seconds) {
        seconds
    } else if seconds < 0.0 {
        0.0
    } else {
        UNPRICED_SECONDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_small_in_an_empty_pool_and_rises_without_a_jump_or_a_pole() {
        assert_eq!(pressure(0.0), 0.0);
        assert_eq!(pressure(0.5), 1.0);
        let at_knee = pressure(PRESSURE_KNEE);
        assert!((pressure(PRESSURE_KNEE + 1e-9) - at_knee).abs() < 1e-5);
        let mut last = 0.0;
        for percent in 1..300 {
            let now = pressure(f64::from(percent) / 100.0);
            assert!(now.is_finite() && now > last);
            last = now;
        }
    }

    #[test]
    fn no_price_is_negative_infinite_or_not_a_number() {
        for seconds in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 2.0] {
            assert!((0.0..=UNPRICED_SECONDS).contains(&finite(seconds)));
        }
    }
}
