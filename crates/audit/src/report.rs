//! Predictions beside what was measured, with error bars.
//!
//! A band has two parts: how far seeds lie apart (twice their standard deviation), and by how much the twin missed what was
//! measured when it replayed the fleet as it is. The second part is the honest one: it holds whatever is wrong with the
//! profile, the inference and the twin, and it is added to every way's figures alike.
//!
//! Where two ways are compared the same error is in both and mostly cancels, so the change has a band of its own, of the
//! seeds' differences.

use serde::Serialize;

use crate::{
    meter::Measured,
    replay::{Predicted, Way},
};

/// What is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean time to the first token, seconds.
    TtftMean,
    /// Its median.
    TtftP50,
    /// Its 90th percentile.
    TtftP90,
    /// Mean time between two tokens, seconds.
    ItlMean,
    /// Share of prompt tokens found cached.
    CachedShare,
    /// GPUs times seconds in which a step ran.
    GpuSeconds,
}

impl Metric {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::TtftMean, Self::TtftP50, Self::TtftP90, Self::ItlMean, Self::CachedShare, Self::GpuSeconds];

    /// Whether errors of it are differences, not shares of it.
    pub fn is_share(self) -> bool {
        self == Self::CachedShare
    }

    fn predicted(self, run: &Predicted) -> f64 {
        match self {
            Self::TtftMean => run.ttft_mean,
            Self::TtftP50 => run.ttft_p50,
            Self::TtftP90 => run.ttft_p90,
            Self::ItlMean => run.itl_mean,
            Self::CachedShare => run.cached_share,
            Self::GpuSeconds => run.gpu_seconds,
        }
    }

    /// What was measured of it; `None`: engines do not tell.
    pub fn measured(self, measured: &Measured) -> Option<f64> {
        match self {
            Self::TtftMean => measured.ttft.mean(),
            Self::TtftP50 => measured.ttft.quantile(0.5),
            Self::TtftP90 => measured.ttft.quantile(0.9),
            Self::ItlMean => measured.itl.mean(),
            Self::CachedShare => measured.cached_share(),
            Self::GpuSeconds => None,
        }
    }

    /// As it is to be compared with what was measured: percentiles read off buckets, as the measured ones are.
    fn comparable(self, run: &Predicted) -> f64 {
        match self {
            Self::TtftP50 => run.ttft_in_buckets[0],
            Self::TtftP90 => run.ttft_in_buckets[1],
            _ => self.predicted(run),
        }
    }
}

/// A figure and how far it may be off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Band {
    /// The mean over seeds.
    pub mean: f64,
    /// To either side.
    pub within: f64,
}

impl Band {
    fn of(values: &[f64]) -> Self {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance =
            values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
        Self { mean, within: 2.0 * variance.sqrt() }
    }

    /// Whether all of it lies on one side of 0.
    pub fn is_certain(self) -> bool {
        self.mean.abs() > self.within
    }
}

/// One way's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Which.
    pub way: Way,
    /// Of each metric, in the order of [`Metric::ALL`].
    pub figures: Vec<Band>,
    /// By how much each is above that of the fleet as it is: a share of it, or a difference of shares.
    pub change: Vec<Band>,
    /// Requests without a complete answer, of all seeds.
    pub unfinished: usize,
}

/// The report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What was measured, in the order of [`Metric::ALL`].
    pub measured: Vec<Option<f64>>,
    /// How far the twin missed it: a share of it, or a difference of shares. `None`: it was not measured.
    pub error: Vec<Option<f64>>,
    /// In the order of [`Way::ALL`].
    pub rows: Vec<Row>,
}

impl Comparison {
    /// Of runs by way, in the order of [`Way::ALL`], each of the same seeds.
    pub fn of(runs: &[Vec<Predicted>], measured: &Measured) -> Self {
        let seen = &runs[0];
        let found: Vec<Option<f64>> = Metric::ALL.iter().map(|metric| metric.measured(measured)).collect();
        let error: Vec<Option<f64>> = Metric::ALL
            .iter()
            .zip(&found)
            .map(|(metric, found)| {
                let predicted = Band::of(&values(seen, |run| metric.comparable(run))).mean;
                let off = predicted - (*found)?;
                if metric.is_share() {
                    Some(off)
                } else {
                    found.filter(|found| *found > 0.0).map(|found| off / found)
                }
            })
            .collect();
        // What nobody measured is as wrong as the time that steps take.
        let steps =
            Metric::ALL.iter().position(|metric| *metric == Metric::ItlMean).and_then(|nth| error[nth]);
        let rows = Way::ALL.iter().zip(runs).map(|(&way, runs)| {
            let figures = Metric::ALL.iter().zip(&error).map(|(metric, error)| {
                let band = Band::of(&values(runs, |run| metric.predicted(run)));
                let error = error.or(steps).unwrap_or(0.0).abs();
                let missed = if metric.is_share() { error } else { error * band.mean };
                Band { within: band.within + missed, ..band }
            });
            let change = Metric::ALL.iter().map(|metric| {
                let pairs = runs.iter().zip(seen).map(|(run, seen)| {
                    let (run, seen) = (metric.predicted(run), metric.predicted(seen));
                    if metric.is_share() { run - seen } else { run / seen.max(1e-12) - 1.0 }
                });
                Band::of(&pairs.collect::<Vec<_>>())
            });
            Row {
                way,
                figures: figures.collect(),
                change: change.collect(),
                unfinished: runs.iter().map(|run| run.unfinished).sum(),
            }
        });
        Self { measured: found, rows: rows.collect(), error }
    }

    /// The error of a metric, if it was measured.
    pub fn error_of(&self, metric: Metric) -> Option<f64> {
        Metric::ALL.iter().zip(&self.error).find(|(one, _)| **one == metric).and_then(|(_, error)| *error)
    }
}

fn values(runs: &[Predicted], of: impl Fn(&Predicted) -> f64) -> Vec<f64> {
    runs.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use forebay_engine_wire::metrics::Histogram;

    use super::*;

    fn run(ttft: f64, cached_share: f64) -> Predicted {
        Predicted {
            requests: 10,
            unfinished: 1,
            ttft_mean: ttft,
            ttft_p50: ttft,
            ttft_p90: ttft,
            itl_mean: 0.011,
            cached_share,
            gpu_seconds: 50.0,
            ttft_in_buckets: [ttft; 2],
        }
    }

    #[test]
    fn every_way_is_as_uncertain_as_the_one_that_can_be_checked() {
        let mut ttft = Histogram::with_bounds(&[0.1, 0.2]);
        (0..10).for_each(|_| ttft.observe(0.1));
        let mut itl = Histogram::with_bounds(&[0.1]);
        itl.observe(0.01);
        let measured =
            Measured { ttft, itl, prompt_tokens: 100.0, cached_tokens: 50.0, ..Measured::default() };
        let near = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-9, "{value} {expected}");
        let runs = [
            vec![run(0.11, 0.4), run(0.11, 0.4)],
            vec![run(0.22, 0.2), run(0.22, 0.2)],
            vec![run(0.05, 0.7), run(0.06, 0.7)],
        ];
        let report = Comparison::of(&runs, &measured);
        near(report.error_of(Metric::TtftMean).unwrap(), 0.1);
        near(report.error_of(Metric::CachedShare).unwrap(), -0.1);
        assert_eq!(report.error_of(Metric::GpuSeconds), None);
        let [seen, round_robin, forebay] = &report.rows[..] else { panic!("three ways") };
        near(seen.figures[0].within, 0.011);
        near(round_robin.figures[0].within, 0.022);
        near(round_robin.change[0].mean, 1.0);
        near(forebay.change[4].mean, 0.3);
        near(forebay.figures[4].within, 0.1);
        near(forebay.figures[5].within, 5.0);
        assert!(forebay.change[0].is_certain() && forebay.change[0].within > 0.0);
        assert!(!seen.change[0].is_certain(), "it is compared with itself");
        assert_eq!(forebay.unfinished, 2);
    }
}
