//! What two scrapes of one rank say about the speed of its steps.

use std::time::Duration;

use forebay_types::StepObservation;

use super::{Figures, Pool};

/// Intervals that a rank's mean prompt remembers, as a share of the newest one's weight.
const MEAN_WEIGHT: f64 = 0.2;

/// What is remembered of a rank from one scrape to the next.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    /// Tokens that a prompt of late took to compute, cached ones left out. `None` until the first.
    pub prefill_tokens_mean: Option<f64>,
}

/// The steps that a rank is taken to have run between two scrapes `elapsed` apart: none, or one that stands for its
/// decode steps, and one for its prefills. Engines do not tell of single steps, so these are approximations:
///
/// - *Decode*: where nothing was prefilled and sequences ran at both ends, a step took the mean time between two tokens of
///   one sequence. How many sequences it decoded is the sum of those times over the interval: each running sequence adds
///   one second a second. They read what of the pool is in use.
/// - *Prefill*: a prompt took its mean time from first step to first token, with the mean number of tokens computed, as if
///   in one step beside the sequences that decoded meanwhile. Only where those times do not add up to more than the
///   interval and nothing waits: prompts that share steps would each be charged for the others. A prompt longer than the
///   engine's step budget counts the base of a step once instead of once a chunk, which is little of it.
/// - SGLang (`/v1/loads`) says how long its prefill steps took and what they computed: that, cut to one step of
///   `step_tokens_max`.
pub fn steps_between(
    before: &Figures,
    after: &Figures,
    elapsed: Duration,
    pool: Pool,
    step_tokens_max: u32,
    pace: &mut Pace,
) -> Vec<StepObservation> {
    let seconds = elapsed.as_secs_f64();
    let gaps = after.token_gaps.since(before.token_gaps);
    let computed = (after.computed() - before.computed()).max(0.0);
    let context_tokens = ((before.pool_used + after.pool_used) / 2.0).clamp(0.0, 1.0) * pool.tokens();
    let decodes = if seconds > 0.0 { (gaps.sum / seconds).round() } else { 0.0 };

    let mut steps = Vec::new();
    let decoded_throughout = before.running >= 1.0 && after.running >= 1.0;
    if computed == 0.0
        && decoded_throughout
        && let Some(mean) = gaps.mean().filter(|mean| *mean > 0.0)
    {
        steps.push(StepObservation {
            decodes: decodes.max(1.0) as u32,
            context_tokens: context_tokens as u64,
            seconds: mean,
            ..StepObservation::default()
        });
    }
    let prefills = after.prefills.since(before.prefills);
    let sizes = after.prefill_tokens.since(before.prefill_tokens);
    // Before 0.17 vLLM does not say how many tokens each took; their sum is known.
    let size = sizes.mean().or_else(|| (prefills.count > 0.0).then(|| computed / prefills.count));
    if let Some(size) = size.filter(|size| *size > 0.0) {
        let known = pace.prefill_tokens_mean.unwrap_or(size);
        pace.prefill_tokens_mean = Some(known + MEAN_WEIGHT * (size - known));
    }
    let alone = before.waiting < 1.0 && after.waiting < 1.0 && prefills.sum <= seconds;
    let busy = after.prefill_busy_seconds.zip(before.prefill_busy_seconds);
    let prefill = match (size, prefills.mean(), busy) {
        (_, _, Some((after, before))) if computed >= 1.0 && after > before => {
            let tokens = computed.min(f64::from(step_tokens_max));
            Some((tokens, (after - before) * tokens / computed))
        }
        (Some(size), Some(mean), None) if size >= 1.0 && alone => Some((size, mean)),
        _ => None,
    };
    if let Some((tokens, seconds)) = prefill {
        let cached = cached_mean(before, after, prefills.count);
        steps.push(StepObservation {
            prefill_tokens: tokens as u32,
            prefill_attention: tokens * cached + tokens * tokens / 2.0,
            decodes: decodes as u32,
            context_tokens: if decodes >= 1.0 { context_tokens as u64 } else { 0 },
            seconds,
        });
    }
    steps
}

/// Tokens that a prompt found cached, in the mean of the interval.
fn cached_mean(before: &Figures, after: &Figures, prompts: f64) -> f64 {
    if prompts < 1.0 {
        return 0.0;
    }
    (after.cached_tokens - before.cached_tokens).max(0.0) / prompts
}
