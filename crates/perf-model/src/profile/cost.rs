//! The terms of a step's time, for a rank that steps alone and for an expert-parallel group.
//!
//! In: a shape and a factor for each term. Out: seconds. Start at [`StepCost::row`].
//!
//! Invariants: the factors times the row are the seconds of the step; with factors that are not negative they never
//! fall when work is added; nothing here allocates.

use super::curve::Curve;
use super::shape::{PrefillShape, QueueShape, StepShape};

/// Terms of a step's time; each has a factor that is 1 in the profile and is learned for a rank.
pub(crate) const TERMS: usize = 5;
/// A step with one token: launching it, reading the weights.
pub(crate) const LAUNCH: usize = 0;
/// More tokens or sequences in it.
pub(crate) const TOKENS: usize = 1;
/// Attention of prompt tokens; in a group whatever a prefill costs.
pub(crate) const PREFILL: usize = 2;
/// Context that decodes read.
pub(crate) const CONTEXT: usize = 3;
/// What that context costs more beside a prefill.
pub(crate) const MIX: usize = 4;

pub(crate) type Factors = [f64; TERMS];

/// The factors of the profile itself.
pub(crate) const AS_MEASURED: Factors = [1.0; TERMS];

/// Far above any real attention work (a prompt of 2^32 tokens makes 10^19): keeps sums finite.
const ATTENTION_MAX: f64 = 1e20;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StepCost {
    Rank(RankCost),
    Group(GroupCost),
}

/// Seconds of what a rank does. Sources and fit: `profiles/README.md`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RankCost {
    /// Of a step by its tokens, prompt and decode alike.
    pub(crate) launch: Curve,
    /// Of a unit of attention work.
    pub(crate) attention: f64,
    /// Of a token of context that a decode reads.
    pub(crate) context_token: f64,
    /// Of the same token, in addition, in a step with prefill.
    pub(crate) mixed_context_token: f64,
    /// (budget, seconds): under at most this budget, a step with prefill takes no less for each of its tokens. Budgets
    /// rise, seconds fall.
    pub(crate) token_min: Box<[(u32, f64)]>,
}

/// Seconds of what a group does, whose ranks step together. Sources and fit: `profiles/README.md`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GroupCost {
    /// Of a step by the sequences that decode in the whole group.
    pub(crate) sequences: Curve,
    /// Of a sequence on the fullest rank.
    pub(crate) fullest_decode: f64,
    /// Of a token of context on the rank with most.
    pub(crate) fullest_context_token: f64,
    /// Of a step with prefill on any rank, in the place of `sequences`.
    pub(crate) prefill_step: f64,
    /// Of a prompt token on the rank with most.
    pub(crate) fullest_prefill_token: f64,
}

impl StepCost {
    /// The terms of a step. All 0 for a step that holds nothing, which nobody runs.
    #[inline]
    pub(crate) fn row(&self, factors: &Factors, shape: &StepShape) -> [f64; TERMS] {
        if shape.prefill_tokens == 0 && shape.decodes == 0 && shape.group_decodes == 0 {
            return [0.0; TERMS];
        }
        match self {
            Self::Rank(rank) => rank.row(factors, shape),
            Self::Group(group) => group.row(factors, shape),
        }
    }

    #[inline]
    pub(crate) fn step_seconds(&self, factors: &Factors, shape: &StepShape) -> f64 {
        total(factors, &self.row(factors, shape))
    }

    /// The steps' time as a sum of full ones and a last one. Attention is spread evenly over their tokens.
    pub(crate) fn queue_seconds(&self, factors: &Factors, shape: &QueueShape) -> f64 {
        if shape.tokens == 0 {
            return 0.0;
        }
        let (full, chunk, rest) = shape.cut();
        let attention = ATTENTION_MAX.min(shape.attention.max(0.0)) / shape.tokens as f64;
        let step = |tokens: u32| {
            let prefill_attention = attention * f64::from(tokens);
            self.step_seconds(factors, &StepShape { prefill_attention, ..shape.step(tokens) })
        };
        let full = if full > 0 { full as f64 * step(chunk) } else { 0.0 };
        if rest > 0 { full + step(rest) } else { full }
    }

    pub(crate) fn prefill_seconds(&self, factors: &Factors, shape: &PrefillShape) -> f64 {
        if shape.new_tokens == 0 {
            return 0.0;
        }
        match self {
            Self::Rank(rank) => rank.prefill_seconds(factors, shape),
            Self::Group(group) => group.prefill_seconds(factors, shape),
        }
    }
}

impl RankCost {
    #[inline]
    fn row(&self, factors: &Factors, shape: &StepShape) -> [f64; TERMS] {
        let tokens = shape.prefill_tokens.saturating_add(shape.decodes);
        let context = shape.context_tokens as f64;
        let mut row = [0.0; TERMS];
        row[LAUNCH] = self.launch.first();
        row[TOKENS] = self.launch.at(tokens) - self.launch.first();
        row[CONTEXT] = self.context_token * context;
        if shape.prefill_tokens > 0 {
            // `max` turns NaN into 0, which `clamp` would keep.
            row[PREFILL] = self.attention * ATTENTION_MAX.min(shape.prefill_attention.max(0.0));
            row[MIX] = self.mixed_context_token * context;
            let least = self.token_min(shape.budget_tokens) * f64::from(tokens);
            if factors[TOKENS] * least > total(factors, &row) {
                row = [0.0; TERMS];
                row[TOKENS] = least;
            }
        }
        row
    }

    /// The least seconds of a token in a step with prefill, under the narrowest listed budget that is not below this
    /// one.
    fn token_min(&self, budget_tokens: u32) -> f64 {
        let listed = self.token_min.iter().find(|(budget, _)| budget_tokens > 0 && budget_tokens <= *budget);
        listed.map_or(0.0, |&(_, seconds)| seconds)
    }

    /// The sum of its steps in closed form. Attention work of all chunks together is `n·c + n²/2` however the prompt is
    /// cut; the least that a step takes is added where a chunk would stay under it.
    fn prefill_seconds(&self, factors: &Factors, shape: &PrefillShape) -> f64 {
        let &PrefillShape { new_tokens, cached_tokens, budget_tokens, decodes, context_tokens } = shape;
        let chunk = shape.chunk_tokens();
        let (full, rest) = (new_tokens / chunk, new_tokens % chunk);
        let (new, cached) = (f64::from(new_tokens), f64::from(cached_tokens));
        let context = context_tokens as f64;
        let tokens = |prompt: u32| prompt.saturating_add(decodes);
        // Of a step but for its attention.
        let flat = |prompt: u32| {
            let first = self.launch.first();
            factors[LAUNCH] * first
                + factors[TOKENS] * (self.launch.at(tokens(prompt)) - first)
                + factors[CONTEXT] * self.context_token * context
                + factors[MIX] * self.mixed_context_token * context
        };
        let attention = factors[PREFILL] * self.attention;
        let (flat_full, flat_rest) = (flat(chunk), if rest > 0 { flat(rest) } else { 0.0 });
        let sum = f64::from(full) * flat_full + flat_rest + attention * (new * (cached + new / 2.0));

        let least = factors[TOKENS] * self.token_min(budget_tokens);
        if least == 0.0 {
            return sum;
        }
        let (m, r) = (f64::from(chunk), f64::from(rest));
        let start = flat_full + attention * (m * (cached + m / 2.0));
        let short = shortfall(least * f64::from(tokens(chunk)), start, attention * m * m, full);
        let last = flat_rest + attention * (r * (cached + f64::from(full) * m + r / 2.0));
        let short_rest = if rest > 0 { (least * f64::from(tokens(rest)) - last).max(0.0) } else { 0.0 };
        sum + short + short_rest
    }
}

impl GroupCost {
    fn row(&self, factors: &Factors, shape: &StepShape) -> [f64; TERMS] {
        let sequences = self.sequences.at(shape.group_decodes.max(shape.decodes));
        let mut row = [0.0; TERMS];
        row[LAUNCH] = self.sequences.first();
        row[TOKENS] = sequences - self.sequences.first();
        if shape.prefill_tokens > 0 {
            let prefill = self.prefill_step + self.fullest_prefill_token * f64::from(shape.prefill_tokens);
            if factors[PREFILL] * prefill > total(factors, &row) {
                row = [0.0; TERMS];
                row[PREFILL] = prefill;
            }
        }
        row[TOKENS] += self.fullest_decode * f64::from(shape.decodes);
        row[CONTEXT] = self.fullest_context_token * shape.context_tokens as f64;
        row
    }

    fn prefill_seconds(&self, factors: &Factors, shape: &PrefillShape) -> f64 {
        let &PrefillShape { new_tokens, cached_tokens: _, budget_tokens, decodes, context_tokens } = shape;
        let chunk = shape.chunk_tokens();
        let step = |prefill_tokens: u32| {
            let shape = StepShape {
                prefill_tokens,
                prefill_attention: 0.0,
                decodes,
                context_tokens,
                group_decodes: decodes,
                budget_tokens,
            };
            total(factors, &self.row(factors, &shape))
        };
        let rest = new_tokens % chunk;
        f64::from(new_tokens / chunk) * step(chunk) + if rest > 0 { step(rest) } else { 0.0 }
    }
}

/// By how much `steps` numbers, `start`, `start + rise`, `start + 2·rise`, …, together fall short of `least` each.
fn shortfall(least: f64, start: f64, rise: f64, steps: u32) -> f64 {
    let gap = least - start;
    if gap <= 0.0 || steps == 0 {
        return 0.0;
    }
    // A quotient beyond the steps, and that of a rise of 0, end at the number of steps.
    let short = (gap / rise).ceil().min(f64::from(steps));
    (short * gap - rise * (short * (short - 1.0) / 2.0)).max(0.0)
}

fn total(factors: &Factors, row: &[f64; TERMS]) -> f64 {
    factors.iter().zip(row).map(|(factor, term)| factor * term).sum()
}
