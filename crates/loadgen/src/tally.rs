//! What many requests come to.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    histogram::{Histogram, Quantiles},
    record::{Outcome, Promise},
};

/// Kinds of errors that are told apart; the rest counts as `other`.
const KINDS_MAX: usize = 32;

/// Errors of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub first_message: String,
}

/// Sums of outcomes.
#[derive(Debug, Clone)]
pub struct Tally {
    promise: Option<Promise>,
    requests: u64,
    answered: u64,
    kept: u64,
    output_tokens: u64,
    prompt_tokens: u64,
    /// Prompt tokens of answers that say how many were cached, and those.
    cached_of: (u64, u64),
    first_sent: f64,
    last_ended: f64,
    /// Seconds of earlier slices, which lie apart.
    earlier_seconds: f64,
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    worst_gap: Histogram,
    lateness: Histogram,
    errors: BTreeMap<String, ErrorCount>,
}

/// Requests that kept what was promised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Goodput {
    /// A second.
    pub requests_per_second: f64,
    /// Of all requests, errors included.
    pub share: f64,
}

/// What a tally comes to. Times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Requests that ended.
    pub requests: u64,
    /// Those with a whole answer.
    pub answered: u64,
    /// The others by kind.
    pub errors: BTreeMap<String, ErrorCount>,
    /// From the first request to the end of the last.
    pub seconds: f64,
    /// Answers a second.
    pub requests_per_second: f64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// A second.
    pub output_tokens_per_second: f64,
    /// Tokens of prompts, as the server counts them.
    pub prompt_tokens: u64,
    /// Share of them that was cached, where the server says.
    pub cached_share: Option<f64>,
    /// Within the promise, if there is one.
    pub goodput: Option<Goodput>,
    /// To the first token.
    pub ttft: Option<Quantiles>,
    /// Between tokens.
    pub itl: Option<Quantiles>,
    /// To the end.
    pub e2e: Option<Quantiles>,
    /// The longest time between tokens of each answer.
    pub worst_gap: Option<Quantiles>,
    /// Of the generator: how long after they were due requests were sent.
    pub lateness: Option<Quantiles>,
}

impl Tally {
    /// Of nothing yet.
    pub fn new(promise: Option<Promise>) -> Self {
        Self {
            promise,
            requests: 0,
            answered: 0,
            kept: 0,
            output_tokens: 0,
            prompt_tokens: 0,
            cached_of: (0, 0),
            first_sent: f64::INFINITY,
            last_ended: f64::NEG_INFINITY,
            earlier_seconds: 0.0,
            ttft: Histogram::default(),
            itl: Histogram::default(),
            e2e: Histogram::default(),
            worst_gap: Histogram::default(),
            lateness: Histogram::default(),
            errors: BTreeMap::new(),
        }
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Those of them that failed.
    pub fn failed(&self) -> u64 {
        self.requests - self.answered
    }

    /// Takes a request. Times of one that failed count only for the length of the run: errors are quick.
    pub fn add(&mut self, outcome: &Outcome) {
        self.requests += 1;
        self.first_sent = self.first_sent.min(outcome.sent);
        self.last_ended = self.last_ended.max(outcome.ended);
        self.lateness.add(outcome.lateness);
        if let Some(failure) = &outcome.failure {
            self.add_error(&failure.kind, 1, &failure.message);
            return;
        }
        self.answered += 1;
        self.kept += u64::from(self.promise.is_some_and(|promise| outcome.keeps(&promise)));
        self.output_tokens += outcome.output_tokens;
        if let Some(usage) = &outcome.usage {
            self.prompt_tokens += usage.prompt_tokens;
            if let Some(cached) = usage.cached_tokens {
                self.cached_of = (self.cached_of.0 + cached, self.cached_of.1 + usage.prompt_tokens);
            }
        }
        self.e2e.add(outcome.e2e());
        if let Some(ttft) = outcome.ttft {
            self.ttft.add(ttft);
        }
        outcome.gaps.iter().for_each(|gap| self.itl.add(f64::from(*gap)));
        if let Some(worst) = outcome.gaps.iter().copied().max_by(f32::total_cmp) {
            self.worst_gap.add(f64::from(worst));
        }
    }

    /// Takes all of a later slice, which need not follow at once.
    pub fn merge(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.kept += other.kept;
        self.output_tokens += other.output_tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_of = (self.cached_of.0 + other.cached_of.0, self.cached_of.1 + other.cached_of.1);
        self.earlier_seconds += other.seconds();
        self.ttft.merge(&other.ttft);
        self.itl.merge(&other.itl);
        self.e2e.merge(&other.e2e);
        self.worst_gap.merge(&other.worst_gap);
        self.lateness.merge(&other.lateness);
        for (kind, errors) in &other.errors {
            self.add_error(kind, errors.count, &errors.first_message);
        }
    }

    fn add_error(&mut self, kind: &str, count: u64, message: &str) {
        let full = self.errors.len() >= KINDS_MAX && !self.errors.contains_key(kind);
        let kind = if full { "other" } else { kind };
        let first = || ErrorCount { count: 0, first_message: message.to_owned() };
        self.errors.entry(kind.to_owned()).or_insert_with(first).count += count;
    }

    fn seconds(&self) -> f64 {
        self.earlier_seconds + (self.last_ended - self.first_sent).max(0.0)
    }

    /// What it comes to.
    pub fn figures(&self) -> Figures {
        let seconds = self.seconds();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Figures {
            requests: self.requests,
            answered: self.answered,
            errors: self.errors.clone(),
            seconds,
            requests_per_second: rate(self.answered),
            output_tokens: self.output_tokens,
            output_tokens_per_second: rate(self.output_tokens),
            prompt_tokens: self.prompt_tokens,
            cached_share: share(self.cached_of.0, self.cached_of.1),
            goodput: self.promise.map(|_| Goodput {
                requests_per_second: rate(self.kept),
                share: share(self.kept, self.requests).unwrap_or(0.0),
            }),
            ttft: self.ttft.quantiles(),
            itl: self.itl.quantiles(),
            e2e: self.e2e.quantiles(),
            worst_gap: self.worst_gap.quantiles(),
            lateness: self.lateness.quantiles(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Failure, Recorder, Usage};

    fn answer(sent: f64) -> Outcome {
        let mut recorder = Recorder::new(sent, sent);
        recorder.content(sent + 0.5);
        recorder.content(sent + 1.0);
        let usage = Usage { prompt_tokens: 10, cached_tokens: Some(5), output_tokens: 2 };
        recorder.end(sent + 1.0, Some(usage), None)
    }

    fn error(sent: f64, kind: &str, message: &str) -> Outcome {
        let failure = Failure { kind: kind.to_owned(), message: message.to_owned() };
        Recorder::new(sent, sent).end(sent + 0.1, None, Some(failure))
    }

    #[test]
    fn rates_count_answers_and_errors_are_kept_by_kind() {
        let mut tally = Tally::new(Some(Promise { ttft_seconds: 0.6, itl_seconds: f64::INFINITY }));
        [answer(0.0), answer(1.0), error(0.5, "status 429", "slow down"), error(0.6, "status 429", "again")]
            .iter()
            .for_each(|outcome| tally.add(outcome));
        let figures = tally.figures();
        assert_eq!((figures.requests, figures.answered, figures.seconds), (4, 2, 2.0));
        assert_eq!((figures.requests_per_second, figures.output_tokens_per_second), (1.0, 2.0));
        assert_eq!(figures.goodput, Some(Goodput { requests_per_second: 1.0, share: 0.5 }));
        assert_eq!(figures.cached_share, Some(0.5));
        let expected = ErrorCount { count: 2, first_message: "slow down".to_owned() };
        assert_eq!(figures.errors.into_iter().collect::<Vec<_>>(), [("status 429".to_owned(), expected)]);
    }

    #[test]
    fn slices_add_up_without_the_time_between_them() {
        let mut total = Tally::new(None);
        for start in [0.0, 100.0] {
            let mut slice = Tally::new(None);
            slice.add(&answer(start));
            total.merge(&slice);
        }
        assert_eq!((total.figures().seconds, total.figures().requests_per_second), (2.0, 1.0));
    }
}
