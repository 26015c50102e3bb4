//! A recording replayed: what was predicted beside what was measured.

use serde::Serialize;

use crate::{
    metrics::{Outcome, percentile},
    workload::Observed,
};

/// One figure, measured and predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Compared {
    /// Its name, with the unit.
    pub figure: &'static str,
    /// Of the recording.
    pub measured: f64,
    /// Of the replay.
    pub predicted: f64,
}

impl Compared {
    /// The prediction's error as a share of what was measured; 0 where both are nothing.
    pub fn error(&self) -> f64 {
        match self.measured {
            0.0 if self.predicted == 0.0 => 0.0,
            measured => self.predicted / measured - 1.0,
        }
    }
}

/// Predicted against measured, of requests of which both are known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fidelity {
    /// How many those are.
    pub requests: usize,
    /// The distributions' figures.
    pub figures: Vec<Compared>,
    /// Median over requests of how far each one's TTFT was off, seconds.
    pub ttft_off_p50_seconds: f64,
}

impl Fidelity {
    /// Compares requests one by one: `observed` and `outcomes` are in the same order.
    pub fn of(observed: &[Option<Observed>], outcomes: &[Outcome]) -> Self {
        let pairs: Vec<(&Observed, &Outcome)> = observed
            .iter()
            .zip(outcomes)
            .filter_map(|(observed, outcome)| Some((observed.as_ref()?, outcome)))
            .filter(|(_, outcome)| outcome.is_finished())
            .collect();
        type Real = fn(&Observed, u32) -> Option<f64>;
        type Ours = fn(&Outcome) -> Option<f64>;
        let itl = |observed: &Observed, tokens: u32| {
            let gaps = f64::from(tokens.checked_sub(2)? + 1);
            Some(1e3 * (observed.e2e_seconds - observed.ttft_seconds) / gaps)
        };
        let kinds: [([&'static str; 3], Real, Ours); 3] = [
            (
                ["TTFT P50, ms", "TTFT P90, ms", "TTFT P99, ms"],
                |observed, _| Some(1e3 * observed.ttft_seconds),
                |outcome| Some(1e3 * outcome.seen.ttft()?),
            ),
            (["ITL P50, ms", "ITL P90, ms", "ITL P99, ms"], itl, |outcome| Some(1e3 * outcome.seen.itl()?)),
            (
                ["E2E P50, s", "E2E P90, s", "E2E P99, s"],
                |observed, _| Some(observed.e2e_seconds),
                |outcome| Some(outcome.seen.last.since(outcome.seen.arrived).seconds()),
            ),
        ];
        let mut figures = Vec::new();
        for (names, real, ours) in kinds {
            let real =
                sorted(pairs.iter().filter_map(|(observed, outcome)| real(observed, outcome.seen.tokens)));
            let ours = sorted(pairs.iter().filter_map(|(_, outcome)| ours(outcome)));
            for (figure, share) in names.into_iter().zip([0.5, 0.9, 0.99]) {
                let (measured, predicted) = (percentile(&real, share), percentile(&ours, share));
                figures.push(Compared { figure, measured, predicted });
            }
        }
        let prompt: f64 = pairs.iter().map(|(_, outcome)| f64::from(outcome.prompt_tokens)).sum();
        let share = |cached: f64| 100.0 * cached / prompt.max(1.0);
        figures.push(Compared {
            figure: "found in caches, %",
            measured: share(pairs.iter().map(|(observed, _)| f64::from(observed.cached_tokens)).sum()),
            predicted: share(pairs.iter().map(|(_, outcome)| f64::from(outcome.cached_tokens)).sum()),
        });
        let off = |(observed, outcome): &(&Observed, &Outcome)| {
            Some((outcome.seen.ttft()? - observed.ttft_seconds).abs())
        };
        let off = sorted(pairs.iter().filter_map(off));
        Self { requests: pairs.len(), figures, ttft_off_p50_seconds: percentile(&off, 0.5) }
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Ending, outcome_of_tests as outcome};

    #[test]
    fn what_was_predicted_stands_beside_what_was_measured() {
        let observed =
            |ttft_seconds, e2e_seconds| Some(Observed { ttft_seconds, e2e_seconds, cached_tokens: 25 });
        let finished = |ttft| outcome(ttft, 0.01);
        let fidelity = Fidelity::of(
            &[observed(0.1, 0.18), None, observed(0.1, 0.18), observed(9.0, 9.0)],
            &[
                finished(0.11),
                finished(5.0),
                finished(0.11),
                Outcome { ending: Ending::Failed, ..outcome(0.1, 0.01) },
            ],
        );
        assert_eq!(fidelity.requests, 2);
        let of = |name: &str| *fidelity.figures.iter().find(|it| it.figure == name).unwrap();
        assert!((of("TTFT P50, ms").error() - 0.1).abs() < 1e-6);
        assert!((of("ITL P90, ms").error() + 0.5).abs() < 1e-6, "{:?}", of("ITL P90, ms"));
        assert!((of("E2E P50, s").predicted - 0.15).abs() < 1e-6);
        assert_eq!((of("found in caches, %").measured, of("found in caches, %").predicted), (25.0, 50.0));
        assert!((fidelity.ttft_off_p50_seconds - 0.01).abs() < 1e-6);
        assert_eq!(Fidelity::of(&[], &[]).requests, 0);
    }
}
