//! What a rank would charge for a request, in seconds.
//!
//! In: a rank, what it holds of the prompt, the request. Out: [`Priced`], every term that depends on that rank alone.
//! A candidate's terms are sums of those: the prefill part of one rank, the decode part of another (or the same), and
//! the transfer between them. That separation is what keeps placement O(ranks).
//!
//! Invariant: every term is finite and at least 0, whatever the model says.

use forebay_perf_model::{LinkModel, QueueShape, RankModel, StepCoefficients, StepShape};
use forebay_types::{RankId, Role};

use crate::{
    explain::Terms,
    filter::Verdict,
    group::{GroupLoad, Groups, waiting_tokens},
    pace::Paces,
    place::Request,
    snapshot::{RankView, Snapshot},
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

    /// Bytes that a decode leg here would fetch.
    pub(crate) fn missing_bytes(&self) -> u64 {
        self.missing_bytes
    }
}

/// What is around a rank: others of its kind, and those that it steps together with.
pub(crate) struct Surroundings {
    paces: Paces,
    groups: Groups,
}

impl Surroundings {
    /// O(ranks).
    pub(crate) fn of(snapshot: &Snapshot, weights: &Weights) -> Self {
        Self { paces: Paces::of(snapshot, weights.pace_tolerance), groups: Groups::of(snapshot) }
    }

    /// Sequences that a prompt of so many tokens stalls on the rank at `index`, and for how long, if nothing else waits.
    pub(crate) fn stall(&self, index: usize, rank: &RankView, prompt_tokens: u32) -> (u32, f64) {
        let batch = self.batch(index, rank);
        let prompt = Prompts { tokens: u64::from(prompt_tokens), attention: attention(prompt_tokens, 0) };
        (batch.stalled, finite(batch.work_seconds(&prompt, batch.seconds(&prompt))))
    }

    fn batch<'a>(&'a self, index: usize, rank: &'a RankView) -> Batch<'a> {
        let prices = match rank.perf.rates() {
            Some(own) => Prices::Rates(self.paces.pace(own, rank, decodes(rank))),
            None => Prices::Measured(&rank.perf),
        };
        Batch::of(rank, prices, self.groups.load(index, rank))
    }
}

/// Prices `rank` for `request`.
pub(crate) fn price(
    rank: &RankView,
    surroundings: &Surroundings,
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

    let batch = surroundings.batch(verdict.index, rank);
    let own = Prompts { tokens: u64::from(new_tokens), attention: attention(new_tokens, cached_tokens) };
    let ahead = Queue::of(rank, &batch);
    let wait = batch.rest_of_step_seconds(rank) + ahead.seconds;
    let prefill = batch.prefill_seconds(&ahead, &own);
    let weight = if rank.steps_together { weights.group_harm } else { weights.harm };
    let stall = batch.stall_of(&ahead, &own, prefill);
    let harm = weight * f64::from(batch.stalled) * stall;

    let decode = batch.decode(request);
    let stretched = decode.stretched_seconds(batch.prefill_share, weights.prefill_share_max);
    let beside_queue = decode.steps * decode.step_seconds + ahead.stall_seconds(&batch, decode.steps);

    let pool = Pool::of(rank);
    let output_blocks = request.choices().saturating_mul(request.output_tokens().div_ceil(block_tokens));
    let resident_blocks = u64::from(missing_blocks) + u64::from(output_blocks);
    let pressure = |blocks: u64| weights.kv_pressure_seconds * pressure(pool.use_with(blocks));
    Priced {
        index: verdict.index,
        id: rank.id,
        role: rank.role,
        overlap_blocks: verdict.overlap_blocks,
        cached_tokens,
        new_tokens,
        missing_blocks,
        missing_bytes: u64::from(missing_blocks) * rank.block_bytes,
        wait: finite(wait),
        prefill: finite(prefill),
        harm: finite(harm),
        hold_pressure: finite(
            pressure(u64::from(missing_blocks)) - pressure(0)
                + weights.second_copy * reuse_share(rank) * stall,
        ),
        decode: finite(weights.decode * stretched),
        decode_leg: finite(weights.decode * stretched.max(beside_queue)),
        pressure: finite(pressure(resident_blocks)),
        handover: finite(weights.handover_steps * batch.step_seconds),
    }
}

/// Seconds until `rank` will have computed the prompts that it has queued.
pub(crate) fn backlog_seconds(rank: &RankView) -> f64 {
    let batch = Batch::of(rank, Prices::Measured(&rank.perf), None);
    finite(Queue::of(rank, &batch).seconds)
}

/// Share of the KV pool that is in use or promised, 0 if the pool's size is unknown.
pub(crate) fn pool_use(rank: &RankView) -> f64 {
    Pool::of(rank).use_with(0)
}

/// Sequences that decode, or will once their prompt is there.
pub(crate) fn decodes(rank: &RankView) -> u32 {
    rank.load.decoding.saturating_add(rank.reserved.decodes)
}

/// Prompt tokens ahead of a request that comes now.
pub(crate) fn queued_tokens(rank: &RankView) -> u64 {
    rank.load.prefill_tokens.saturating_add(rank.reserved.prefill_tokens)
}

/// Context that the decodes of a rank read, with what was promised.
pub(crate) fn context_tokens(rank: &RankView) -> u64 {
    rank.load.context_tokens.saturating_add(rank.reserved.context_tokens)
}

/// By what steps are priced.
enum Prices<'a> {
    /// Five rates: the rank's own, or the mean of its kind's.
    Rates(StepCoefficients),
    /// What the rank's own model says.
    Measured(&'a RankModel),
}

impl Prices<'_> {
    fn queue_seconds(&self, shape: &QueueShape) -> f64 {
        match self {
            Self::Rates(rates) => rates.queue_seconds(shape),
            Self::Measured(model) => model.queue_seconds(shape),
        }
    }

    fn decode_step_seconds(&self, decodes: u32, context_tokens: u64, group_decodes: u32) -> f64 {
        match self {
            Self::Rates(rates) => rates.step_seconds(0, 0.0, decodes, context_tokens),
            Self::Measured(model) => {
                let shape = StepShape { decodes, context_tokens, group_decodes, ..StepShape::default() };
                model.step_seconds(&shape)
            }
        }
    }
}

/// Prompt tokens to compute, and their attention work.
#[derive(Clone, Copy)]
struct Prompts {
    tokens: u64,
    attention: f64,
}

impl Prompts {
    fn and(&self, other: &Self) -> Self {
        Self { tokens: self.tokens.saturating_add(other.tokens), attention: self.attention + other.attention }
    }
}

/// The decodes beside which a rank computes prompts in chunks: its own or, where ranks step together, its group's.
struct Batch<'a> {
    prices: Prices<'a>,
    /// Its own.
    decodes: u32,
    context_tokens: u64,
    /// Steps of prompts, as they are without any.
    beside: QueueShape,
    /// Sequences that a prefill here stalls.
    stalled: u32,
    /// A step of these decodes alone.
    step_seconds: f64,
    /// Share of its time that prefills lately took from decodes.
    prefill_share: f64,
    group: Option<&'a GroupLoad>,
}

impl<'a> Batch<'a> {
    fn of(rank: &RankView, prices: Prices<'a>, group: Option<&'a GroupLoad>) -> Self {
        let (decodes, context_tokens) = (decodes(rank), context_tokens(rank));
        let alone = QueueShape {
            tokens: 0,
            attention: 0.0,
            budget_tokens: rank.step_tokens_max.max(1),
            decodes,
            context_tokens,
            group_decodes: 0,
        };
        let beside = group.map_or(alone, |group| QueueShape {
            decodes: group.fullest_decodes,
            context_tokens: group.fullest_context_tokens,
            group_decodes: group.decodes,
            ..alone
        });
        Self {
            step_seconds: prices.decode_step_seconds(
                beside.decodes,
                beside.context_tokens,
                beside.group_decodes,
            ),
            prices,
            decodes,
            context_tokens,
            beside,
            stalled: group.map_or(decodes, |group| group.decodes),
            prefill_share: group.map_or(rank.prefill_share, |group| group.prefill_share),
            group,
        }
    }

    fn queue(&self, prompts: &Prompts) -> QueueShape {
        QueueShape { tokens: prompts.tokens, attention: prompts.attention, ..self.beside }
    }

    /// Until these are computed, beside the decodes.
    fn seconds(&self, prompts: &Prompts) -> f64 {
        self.prices.queue_seconds(&self.queue(prompts))
    }

    /// What these add to the decode steps that would have run anyway.
    fn work_seconds(&self, prompts: &Prompts, seconds: f64) -> f64 {
        (seconds - self.queue(prompts).steps() as f64 * self.step_seconds).max(0.0)
    }

    /// A request's own prefill, behind what is ahead. In a group its steps are as long as the longest prompts in them.
    fn prefill_seconds(&self, ahead: &Queue, own: &Prompts) -> f64 {
        let mut with_own = ahead.prompts.and(own);
        if let Some(group) = self.group {
            let steps = self.queue(&with_own).steps();
            let in_those = steps.saturating_mul(u64::from(self.beside.budget_tokens));
            with_own.tokens = with_own.tokens.max(group.most_waiting_tokens.min(in_those));
        }
        self.seconds(&with_own) - ahead.seconds
    }

    /// By how much a running decode stalls behind a request's own prefill, which takes `prefill_seconds`.
    ///
    /// In a group, prompts of other ranks that no step has begun with share their steps with it: it stalls decodes only
    /// for as long as it outlasts those.
    fn stall_of(&self, ahead: &Queue, own: &Prompts, prefill_seconds: f64) -> f64 {
        let Some(group) = self.group else {
            let steps = self.queue(&ahead.prompts.and(own)).steps() - ahead.steps;
            return (prefill_seconds - steps as f64 * self.step_seconds).max(0.0);
        };
        // The share of attention in a step of a group is in its price of a token.
        let prompts = |tokens: u64| Prompts { tokens, attention: 0.0 };
        let before = prompts(group.most_waiting_tokens);
        let after = prompts(before.tokens.max(ahead.prompts.and(own).tokens));
        let work = |prompts: &Prompts| self.work_seconds(prompts, self.seconds(prompts));
        (work(&after) - work(&before)).max(0.0)
    }

    /// Half a decode step: a request comes at any moment of it. A step that computes a prompt is counted whole with
    /// the queue, because its tokens leave the load only when it ends; in a group, where it may be another rank's, half
    /// of that step is left.
    fn rest_of_step_seconds(&self, rank: &RankView) -> f64 {
        if let Some(group) = self.group.filter(|group| group.most_running_tokens > 0) {
            let tokens = group.most_running_tokens.min(u64::from(self.beside.budget_tokens));
            return self.seconds(&Prompts { tokens, attention: 0.0 }) / 2.0;
        }
        if rank.load.decoding > 0 && rank.load.prefill_tokens == 0 { self.step_seconds / 2.0 } else { 0.0 }
    }

    /// The request's own decoding: the output after the first token, at the step time of the batch it joins and of the
    /// context half-way through. In a group that of its own rank counts, as if it were the fullest: so ranks are levelled
    /// before one becomes so.
    fn decode(&self, request: &Request<'_>) -> Decode {
        let output_tokens = request.output_tokens();
        let choices = request.choices();
        let sequence_tokens = u64::from(request.prompt_tokens) + u64::from(output_tokens / 2);
        let context_tokens = self.context_tokens.saturating_add(u64::from(choices) * sequence_tokens);
        let group_decodes = self.beside.group_decodes.saturating_add(choices);
        Decode {
            steps: f64::from(output_tokens - 1),
            step_seconds: self.prices.decode_step_seconds(
                self.decodes.saturating_add(choices),
                context_tokens,
                group_decodes,
            ),
        }
    }
}

/// The request's own decoding.
struct Decode {
    steps: f64,
    step_seconds: f64,
}

impl Decode {
    /// Stretched by the share of its time that the rank lately spent on prefills.
    fn stretched_seconds(&self, prefill_share: f64, share_max: f64) -> f64 {
        let share = if prefill_share.is_finite() { prefill_share.clamp(0.0, share_max) } else { 0.0 };
        self.steps * self.step_seconds / (1.0 - share)
    }
}

/// Prompts ahead.
struct Queue {
    prompts: Prompts,
    /// Steps that compute them.
    steps: u64,
    /// Until they are computed, beside the decodes.
    seconds: f64,
}

impl Queue {
    /// Attention is taken as if the queued tokens were equal, uncached prompts: nobody reports their lengths.
    fn of(rank: &RankView, batch: &Batch<'_>) -> Self {
        let tokens = if batch.group.is_some() { waiting_tokens(rank) } else { queued_tokens(rank) };
        if tokens == 0 {
            return Self { prompts: Prompts { tokens, attention: 0.0 }, steps: 0, seconds: 0.0 };
        }
        let prefilling = rank.load.running.saturating_sub(rank.load.decoding);
        let sequences = rank.load.waiting.saturating_add(prefilling).saturating_add(rank.reserved.sequences);
        let attention = (tokens as f64) * (tokens as f64) / (2.0 * f64::from(sequences.max(1)));
        let prompts = Prompts { tokens, attention };
        Self { prompts, steps: batch.queue(&prompts).steps(), seconds: batch.seconds(&prompts) }
    }

    /// What `decode_steps` steps of decoding lose to the chunks of the queue that they share steps with.
    fn stall_seconds(&self, batch: &Batch<'_>, decode_steps: f64) -> f64 {
        if self.steps == 0 {
            return 0.0;
        }
        let work_seconds = (self.seconds - self.steps as f64 * batch.step_seconds).max(0.0);
        work_seconds * (decode_steps / self.steps as f64).min(1.0)
    }
}

/// Share of the prompt tokens that came to `rank` so far which it had cached.
fn reuse_share(rank: &RankView) -> f64 {
    match rank.load.prompt_tokens {
        0 => 0.0,
        all => (rank.load.cached_tokens as f64 / all as f64).min(1.0),
    }
}

/// KV blocks of a rank.
struct Pool {
    used_blocks: u64,
    total_blocks: u64,
}

impl Pool {
    fn of(rank: &RankView) -> Self {
        let expected_output = rank.reserved.output_tokens.div_ceil(u64::from(rank.block_size_tokens.max(1)));
        let used = rank.load.blocks_total.saturating_sub(rank.load.blocks_free);
        Self {
            used_blocks: u64::from(used) + u64::from(rank.reserved.blocks) + expected_output,
            total_blocks: u64::from(rank.load.blocks_total),
        }
    }

    fn use_with(&self, more_blocks: u64) -> f64 {
        if self.total_blocks == 0 {
            return 0.0;
        }
        (self.used_blocks + more_blocks) as f64 / self.total_blocks as f64
    }
}

/// Attention work of `m` new tokens on `c` cached ones, however they are cut into chunks: `m·c + m²/2`.
fn attention(new_tokens: u32, cached_tokens: u32) -> f64 {
    let new = f64::from(new_tokens);
    new * f64::from(cached_tokens) + new * new / 2.0
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
    fn attention_is_the_same_in_one_chunk_or_in_two() {
        assert_eq!(attention(96, 32), attention(64, 32) + attention(32, 32 + 64));
    }

    #[test]
    fn no_price_is_negative_infinite_or_not_a_number() {
        for seconds in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 2.0] {
            assert!((0.0..=UNPRICED_SECONDS).contains(&finite(seconds)));
        }
    }
}
