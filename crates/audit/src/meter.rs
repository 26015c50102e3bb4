//! What counters and histograms of a rank say of a stretch of time.
//!
//! In: [`Reading`]s, each of all since the engine began. Out: what came between them, by interval and summed up.

use forebay_engine_wire::metrics::{Figures, Histogram, Histograms};
use serde::Serialize;

/// Intervals of one rank; when there are as many, each two become one.
const INTERVALS_MAX: usize = 4096;

/// What a rank said at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reading {
    /// Seconds since the recording began.
    pub at_seconds: f64,
    /// Counters and gauges.
    pub figures: Figures,
    /// Distributions.
    pub histograms: Histograms,
}

/// What came between two readings.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Interval {
    pub(crate) from_seconds: f64,
    pub(crate) to_seconds: f64,
    /// Requests that had their first token.
    pub(crate) begun: f64,
    pub(crate) prompt_tokens: f64,
    pub(crate) cached_tokens: f64,
    pub(crate) output_tokens: f64,
    pub(crate) histograms: Histograms,
}

impl Interval {
    fn between(before: &Reading, after: &Reading) -> Self {
        // Of a process that began in between, everything is new.
        let began_anew = after.figures.prompt_tokens < before.figures.prompt_tokens
            || after.figures.output_tokens < before.figures.output_tokens
            || after.histograms.ttft.count < before.histograms.ttft.count;
        let nothing = Reading { at_seconds: before.at_seconds, ..Reading::default() };
        let before = if began_anew { &nothing } else { before };
        let more = |of: fn(&Figures) -> f64| (of(&after.figures) - of(&before.figures)).max(0.0);
        let (one, other) = (&after.histograms, &before.histograms);
        let histograms = Histograms {
            ttft: one.ttft.since(&other.ttft),
            itl: one.itl.since(&other.itl),
            prompts: one.prompts.since(&other.prompts),
            answers: one.answers.since(&other.answers),
        };
        Self {
            from_seconds: before.at_seconds,
            to_seconds: after.at_seconds,
            begun: histograms.ttft.count,
            prompt_tokens: more(|figures| figures.prompt_tokens),
            cached_tokens: more(|figures| figures.cached_tokens),
            output_tokens: more(|figures| figures.output_tokens),
            histograms,
        }
    }

    fn merge(&mut self, other: &Self) {
        let Self { from_seconds, to_seconds, begun, prompt_tokens, cached_tokens, output_tokens, histograms } =
            other;
        self.from_seconds = self.from_seconds.min(*from_seconds);
        self.to_seconds = self.to_seconds.max(*to_seconds);
        self.begun += begun;
        self.prompt_tokens += prompt_tokens;
        self.cached_tokens += cached_tokens;
        self.output_tokens += output_tokens;
        let Histograms { ttft, itl, prompts, answers } = histograms;
        self.histograms.ttft.merge(ttft);
        self.histograms.itl.merge(itl);
        self.histograms.prompts.merge(prompts);
        self.histograms.answers.merge(answers);
    }
}

/// The intervals of one rank.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    last: Option<Reading>,
    pub(crate) intervals: Vec<Interval>,
}

impl Meter {
    /// Takes a reading. The mean time between tokens since the last one, if there were any.
    pub(crate) fn read(&mut self, reading: Reading) -> Option<f64> {
        let interval = self.last.as_ref().map(|last| Interval::between(last, &reading));
        self.last = Some(reading);
        let interval = interval?;
        let itl = interval.histograms.itl.mean();
        self.intervals.push(interval);
        if self.intervals.len() >= INTERVALS_MAX {
            let pairs = self.intervals.chunks(2).map(|pair| {
                let mut both = pair[0].clone();
                pair[1..].iter().for_each(|other| both.merge(other));
                both
            });
            self.intervals = pairs.collect();
        }
        itl
    }

    /// What came from `from_seconds` on.
    pub(crate) fn sum(&self, from_seconds: f64) -> Interval {
        let mut sum = Interval { from_seconds: f64::INFINITY, ..Interval::default() };
        let intervals = self.intervals.iter().filter(|interval| interval.to_seconds > from_seconds);
        intervals.for_each(|interval| sum.merge(interval));
        sum
    }
}

/// What one rank did.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct SeatMeasured {
    /// Requests that had their first token.
    pub requests: f64,
    /// Tokens of their prompts.
    pub prompt_tokens: f64,
    /// Tokens generated.
    pub output_tokens: f64,
}

/// What was measured of a fleet from some moment on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Measured {
    /// From which moment on, seconds since the recording began.
    pub from_seconds: f64,
    /// Until when.
    pub to_seconds: f64,
    /// Requests that had their first token.
    pub requests: f64,
    /// Tokens of their prompts.
    pub prompt_tokens: f64,
    /// Of those, found cached.
    pub cached_tokens: f64,
    /// Tokens generated.
    pub output_tokens: f64,
    /// Seconds to the first token.
    pub ttft: Histogram,
    /// Seconds between two tokens.
    pub itl: Histogram,
    /// By rank.
    pub seats: Vec<SeatMeasured>,
}

impl Measured {
    pub(crate) fn of(meters: &[Meter], from_seconds: f64) -> Self {
        let mut all = Self { from_seconds: f64::INFINITY, ..Self::default() };
        for meter in meters {
            let sum = meter.sum(from_seconds);
            all.from_seconds = all.from_seconds.min(sum.from_seconds);
            all.to_seconds = all.to_seconds.max(sum.to_seconds);
            all.requests += sum.begun;
            all.prompt_tokens += sum.prompt_tokens;
            all.cached_tokens += sum.cached_tokens;
            all.output_tokens += sum.output_tokens;
            all.ttft.merge(&sum.histograms.ttft);
            all.itl.merge(&sum.histograms.itl);
            all.seats.push(SeatMeasured {
                requests: sum.begun,
                prompt_tokens: sum.prompt_tokens,
                output_tokens: sum.output_tokens,
            });
        }
        if !all.from_seconds.is_finite() {
            all.from_seconds = from_seconds;
        }
        all
    }

    /// Share of prompt tokens that was found cached; `None` of nothing.
    pub fn cached_share(&self) -> Option<f64> {
        (self.prompt_tokens > 0.0).then(|| (self.cached_tokens / self.prompt_tokens).min(1.0))
    }
}
