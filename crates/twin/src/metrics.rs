//! What a run was like for clients, and for the engines.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::clock::Time;

/// What a client is promised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slo {
    /// Time to the first token, at most this many seconds ...
    pub ttft_seconds: f64,
    /// ... and this many times what an idle engine takes for the whole prompt.
    pub ttft_prefills: f64,
    /// Mean time between tokens of one answer.
    pub itl_seconds: f64,
}

/// What a client saw of one request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// When the request was sent.
    pub arrived: Time,
    /// When its first token was seen.
    pub first: Option<Time>,
    /// When its last token was seen.
    pub last: Time,
    /// The longest time between two tokens.
    pub worst_gap: Time,
    /// Tokens that were seen.
    pub tokens: u32,
}

impl Seen {
    /// A token came.
    pub fn token(&mut self, at: Time) {
        self.tokens += 1;
        if self.first.is_none() {
            self.first = Some(at);
        } else {
            // Tokens of a step that was overtaken by the next one come with it, not before.
            let gap = at.since(self.last);
            self.worst_gap = self.worst_gap.max(gap);
        }
        self.last = self.last.max(at);
    }

    /// Seconds to the first token.
    pub fn ttft(&self) -> Option<f64> {
        self.first.map(|first| first.since(self.arrived).seconds())
    }

    /// Mean time between tokens; `None` for an answer of one.
    pub fn itl(&self) -> Option<f64> {
        let first = self.first.filter(|_| self.tokens > 1)?;
        Some(self.last.since(first).seconds() / f64::from(self.tokens - 1))
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Nothing yet.
    #[default]
    Open,
    /// Its answer is complete.
    Finished,
    /// Nobody took it.
    Rejected,
    /// It was lost, or took too long.
    Failed,
    /// Its client went away.
    Left,
}

/// One request that counts.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// When its tokens came.
    pub seen: Seen,
    /// What became of it.
    pub ending: Ending,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens that the prefilling engine had.
    pub cached_tokens: u32,
    /// An idle engine's time for the whole prompt, none of it cached.
    pub alone_seconds: f64,
    /// The time that no step accounts for: client, tokeniser, network.
    pub request_seconds: f64,
    /// Seconds to the first token, as placement expected them.
    pub ttft_predicted: Option<f64>,
    /// Whether two engines served it.
    pub split: bool,
    /// Placements beyond the first, before its first token.
    pub retries: u32,
    /// Placements after its first token: its answer went on elsewhere.
    pub migrations: u32,
    /// Whose it was.
    pub tenant: u32,
}

impl Outcome {
    /// Whether its answer is complete.
    pub fn is_finished(&self) -> bool {
        self.ending == Ending::Finished
    }

    /// Whether the promise was kept.
    pub fn meets(&self, slo: &Slo) -> bool {
        let ttft_max = slo.ttft_seconds + slo.ttft_prefills * self.alone_seconds;
        self.is_finished()
            && self.seen.ttft().is_some_and(|ttft| ttft <= ttft_max)
            && self.seen.itl().is_none_or(|itl| itl <= slo.itl_seconds)
    }

    /// By how much the prediction was short, seconds. It knows nothing of the way to the engine and back.
    fn prediction_error(&self) -> Option<f64> {
        if self.retries > 0 {
            return None; // the prediction is of its last place alone
        }
        Some(self.seen.ttft()? - self.request_seconds - self.ttft_predicted?)
    }
}

/// What the engines did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct EngineSide {
    /// Steps' seconds of the busiest engine over the mean.
    pub busiest_over_mean: f64,
    /// Tokens computed by the rank with most over the mean.
    pub most_tokens_over_mean: f64,
    /// Share of the time that the mean engine computed.
    pub busy: f64,
    /// Sequences that gave their blocks back, of all ranks.
    pub preemptions: u64,
    /// Hand-overs that were done.
    pub transfers: u64,
    /// Hand-overs that broke off.
    pub transfers_failed: u64,
    /// Bytes that they moved.
    pub transfer_bytes: u64,
    /// GPUs times seconds, from the beginning to the end of the run.
    pub gpu_seconds: f64,
    /// Those of them in which a step ran.
    pub gpu_seconds_busy: f64,
}

/// A run in numbers. Milliseconds but for `e2e_p50_s`; of finished requests, except where it says share.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// That count.
    pub requests: usize,
    /// Of those, without a complete answer.
    pub unfinished: usize,
    /// Of those, nobody took them.
    pub rejected: usize,
    /// Of those without a complete answer, lost or too slow.
    pub failed: usize,
    /// Requests whose clients went away; they are not among `requests`.
    pub left: usize,
    /// Placements beyond the first, before the first token.
    pub retries: u64,
    /// Answers that went on elsewhere.
    pub migrations: u64,
    /// Why it was given up, if it was.
    pub given_up: Option<&'static str>,
    /// Time to the first token.
    pub ttft_mean_ms: f64,
    /// Its median.
    pub ttft_p50_ms: f64,
    /// Its 90th percentile.
    pub ttft_p90_ms: f64,
    /// Its 99th percentile.
    pub ttft_p99_ms: f64,
    /// Mean time between tokens of one answer, over answers.
    pub itl_mean_ms: f64,
    /// Its median.
    pub itl_p50_ms: f64,
    /// Its 90th percentile.
    pub itl_p90_ms: f64,
    /// Its 99th percentile.
    pub itl_p99_ms: f64,
    /// 99th percentile over requests of the longest gap between two tokens.
    pub worst_gap_p99_ms: f64,
    /// From sending to the last token, seconds.
    pub e2e_mean_s: f64,
    /// Its median.
    pub e2e_p50_s: f64,
    /// Its 90th percentile.
    pub e2e_p90_s: f64,
    /// Its 99th percentile.
    pub e2e_p99_s: f64,
    /// Of all prompt tokens, those that the prefilling engine had.
    pub cached_share: f64,
    /// Of all requests, those within the SLO; unfinished ones are not.
    pub slo_share: f64,
    /// Of all requests, those that two engines served.
    pub split_share: f64,
    /// Jain's index over tenants of their shares within the SLO: 1 where all are served alike, 1/n where one of n is served
    /// and the others are not.
    pub tenants_jain: f64,
    /// TTFT beyond what placement predicted, the way to the engine and back left out: median, and 90th percentile of
    /// the magnitude.
    pub ttft_beyond_prediction_p50_ms: f64,
    /// See above.
    pub ttft_prediction_error_p90_ms: f64,
    /// What the engines did.
    pub engines: EngineSide,
}

impl Summary {
    /// Sums up what clients saw.
    pub fn of(outcomes: &[Outcome], slo: &Slo, engines: EngineSide, given_up: Option<&'static str>) -> Self {
        let with = |ending| outcomes.iter().filter(move |outcome| outcome.ending == ending);
        let finished = || with(Ending::Finished);
        let requests = outcomes.len() - with(Ending::Left).count();
        let sorted = |values: &mut dyn Iterator<Item = f64>| {
            let mut values: Vec<f64> = values.collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let ttft = sorted(&mut finished().filter_map(|outcome| outcome.seen.ttft()));
        let itl = sorted(&mut finished().filter_map(|outcome| outcome.seen.itl()));
        let gaps = sorted(&mut finished().map(|outcome| outcome.seen.worst_gap.seconds()));
        let e2e =
            sorted(&mut finished().map(|outcome| outcome.seen.last.since(outcome.seen.arrived).seconds()));
        let beyond = sorted(&mut finished().filter_map(Outcome::prediction_error));
        let errors = sorted(&mut beyond.iter().map(|error| error.abs()));
        let share = |of: usize| of as f64 / requests.max(1) as f64;
        let tokens =
            |of: fn(&Outcome) -> u32| outcomes.iter().map(|outcome| u64::from(of(outcome))).sum::<u64>();
        let cached = tokens(|outcome| outcome.cached_tokens) as f64;
        Self {
            requests,
            unfinished: requests - finished().count(),
            rejected: with(Ending::Rejected).count(),
            failed: with(Ending::Failed).count(),
            left: with(Ending::Left).count(),
            retries: outcomes.iter().map(|outcome| u64::from(outcome.retries)).sum(),
            migrations: outcomes.iter().map(|outcome| u64::from(outcome.migrations)).sum(),
            given_up,
            ttft_mean_ms: 1e3 * mean(&ttft),
            ttft_p50_ms: 1e3 * percentile(&ttft, 0.5),
            ttft_p90_ms: 1e3 * percentile(&ttft, 0.9),
            ttft_p99_ms: 1e3 * percentile(&ttft, 0.99),
            itl_mean_ms: 1e3 * mean(&itl),
            itl_p50_ms: 1e3 * percentile(&itl, 0.5),
            itl_p90_ms: 1e3 * percentile(&itl, 0.9),
            itl_p99_ms: 1e3 * percentile(&itl, 0.99),
            worst_gap_p99_ms: 1e3 * percentile(&gaps, 0.99),
            e2e_mean_s: mean(&e2e),
            e2e_p50_s: percentile(&e2e, 0.5),
            e2e_p90_s: percentile(&e2e, 0.9),
            e2e_p99_s: percentile(&e2e, 0.99),
            cached_share: cached / tokens(|outcome| outcome.prompt_tokens).max(1) as f64,
            slo_share: share(outcomes.iter().filter(|outcome| outcome.meets(slo)).count()),
            tenants_jain: jain(&tenant_shares(outcomes, slo)),
            split_share: share(outcomes.iter().filter(|outcome| outcome.split).count()),
            ttft_beyond_prediction_p50_ms: 1e3 * percentile(&beyond, 0.5),
            ttft_prediction_error_p90_ms: 1e3 * percentile(&errors, 0.9),
            engines,
        }
    }
}

/// Of each tenant that asked anything, the share of requests within the SLO.
fn tenant_shares(outcomes: &[Outcome], slo: &Slo) -> Vec<f64> {
    let mut tenants: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for outcome in outcomes.iter().filter(|outcome| outcome.ending != Ending::Left) {
        let (met, asked) = tenants.entry(outcome.tenant).or_default();
        *met += f64::from(u8::from(outcome.meets(slo)));
        *asked += 1.0;
    }
    tenants.into_values().map(|(met, asked)| met / asked).collect()
}

/// Jain, Chiu and Hawe (1984): `(Σx)² / (n Σx²)`; 1 of nothing, or where nobody got anything.
fn jain(values: &[f64]) -> f64 {
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares > 0.0 { sum * sum / (values.len() as f64 * squares) } else { 1.0 }
}

/// 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Of sorted values, between the two nearest ones; 0 of nothing.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
pub(crate) const SLO_OF_TESTS: Slo = Slo { ttft_seconds: 0.5, ttft_prefills: 2.0, itl_seconds: 0.025 };

/// A finished request of 100 tokens, half of them cached, and an answer of five.
#[cfg(test)]
pub(crate) fn outcome_of_tests(ttft: f64, itl: f64) -> Outcome {
    let mut seen = Seen { arrived: Time::ZERO, ..Seen::default() };
    (0..5).for_each(|token| seen.token(Time::from_seconds(ttft + itl * f64::from(token))));
    Outcome {
        seen,
        ending: Ending::Finished,
        prompt_tokens: 100,
        cached_tokens: 50,
        alone_seconds: 0.1,
        request_seconds: 0.0,
        ttft_predicted: None,
        split: false,
        retries: 0,
        migrations: 0,
        tenant: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::{SLO_OF_TESTS as SLO, *};

    #[test]
    fn percentiles_lie_between_the_nearest_values() {
        let values: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|share| percentile(&values, share)), [0.0, 50.0, 99.0, 100.0]);
        assert_eq!(percentile(&[1.0, 2.0], 0.25), 1.25);
        assert_eq!((percentile(&[], 0.5), mean(&[]), mean(&[1.0, 2.0])), (0.0, 0.0, 1.5));
    }

    fn outcome(ttft: f64, itl: f64) -> Outcome {
        let mut seen = Seen { arrived: Time::from_seconds(1.0), ..Seen::default() };
        (0..5).for_each(|token| seen.token(Time::from_seconds(1.0 + ttft + itl * f64::from(token))));
        Outcome {
            seen,
            ending: Ending::Finished,
            prompt_tokens: 1000,
            cached_tokens: 250,
            alone_seconds: 0.1,
            request_seconds: 0.01,
            ttft_predicted: Some(ttft - 0.02),
            split: false,
            retries: 0,
            migrations: 0,
            tenant: 0,
        }
    }

    #[test]
    fn the_slo_counts_ttft_itl_and_the_end() {
        assert!(outcome(0.69, 0.024).meets(&SLO));
        assert!(!outcome(0.71, 0.024).meets(&SLO));
        assert!(!outcome(0.69, 0.026).meets(&SLO));
        assert!(!Outcome { ending: Ending::Failed, ..outcome(0.1, 0.01) }.meets(&SLO));
    }

    #[test]
    fn a_summary_says_what_was_seen() {
        let outcomes = [outcome(0.1, 0.01), outcome(0.2, 0.01), outcome(0.3, 0.04)];
        let summary = Summary::of(&outcomes, &SLO, EngineSide::default(), None);
        let near = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-6, "{value} {expected}");
        near(summary.ttft_p50_ms, 200.0);
        near(summary.itl_mean_ms, 20.0);
        near(summary.slo_share, 2.0 / 3.0);
        near(summary.cached_share, 0.25);
        near(summary.ttft_beyond_prediction_p50_ms, 10.0);
        near(summary.e2e_p50_s, 0.24);
    }

    #[test]
    fn jains_index_says_how_alike_tenants_are_served() {
        assert_eq!((jain(&[1.0, 1.0, 1.0]), jain(&[1.0, 0.0, 0.0, 0.0]), jain(&[])), (1.0, 0.25, 1.0));
        let slow = Outcome { tenant: 1, ..outcome(9.0, 0.01) };
        let summary = Summary::of(&[outcome(0.1, 0.01), slow], &SLO, EngineSide::default(), None);
        assert_eq!(summary.tenants_jain, 0.5);
    }
}
