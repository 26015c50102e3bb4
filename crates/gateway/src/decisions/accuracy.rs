//! How far predictions were off, over the decisions that are kept.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{DecisionRecord, Prediction};

/// Predictions of one model's requests against what came of them, as `/fleet/v1/predictions` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Which model.
    pub model: String,
    /// Requests that were answered and are remembered.
    pub requests: usize,
    /// Median of how far the time to the first token was off, seconds.
    pub ttft_error_p50_seconds: f64,
    /// Its 90th percentile.
    pub ttft_error_p90_seconds: f64,
    /// Its 99th percentile.
    pub ttft_error_p99_seconds: f64,
    /// Median of the signed error: above 0, predictions are too long.
    pub ttft_bias_seconds: f64,
    /// Median time to the first token, for comparison.
    pub ttft_p50_seconds: f64,
    /// Median of how far the mean time between tokens was off, seconds, of answers of several tokens.
    #[serde(default)]
    pub itl_error_p50_seconds: f64,
    /// Its 90th percentile.
    #[serde(default)]
    pub itl_error_p90_seconds: f64,
    /// Its 99th percentile.
    #[serde(default)]
    pub itl_error_p99_seconds: f64,
    /// Median of the signed error: above 0, predictions are too long.
    #[serde(default)]
    pub itl_bias_seconds: f64,
    /// Median time between tokens, for comparison; 0: of no request is it known.
    #[serde(default)]
    pub itl_p50_seconds: f64,
    /// Prompt tokens that were expected in a prefix cache.
    pub cached_tokens_predicted: u64,
    /// Of those, tokens that had to be computed.
    pub cached_tokens_missed: u64,
}

impl Accuracy {
    /// Of each model, in order of names.
    pub(crate) fn of<'a>(records: impl Iterator<Item = &'a Arc<DecisionRecord>>) -> Vec<Self> {
        let mut models: BTreeMap<&str, Vec<Prediction>> = BTreeMap::new();
        for record in records.filter(|record| record.outcome == "finished") {
            if let Some(prediction) = record.prediction() {
                models.entry(&record.model).or_default().push(prediction);
            }
        }
        models.into_iter().map(|(model, predictions)| Self::of_model(model, &predictions)).collect()
    }

    fn of_model(model: &str, predictions: &[Prediction]) -> Self {
        let sorted = |of: fn(&Prediction) -> Option<f64>| {
            let mut values: Vec<f64> = predictions.iter().filter_map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let off = sorted(|prediction| Some(prediction.error_seconds().abs()));
        let itl_off = sorted(|prediction| Some(prediction.itl?.error_seconds().abs()));
        let missed = |it: &Prediction| u64::from(it.cached_tokens.saturating_sub(it.cached_tokens_real));
        Self {
            model: model.to_owned(),
            requests: predictions.len(),
            ttft_error_p50_seconds: quantile(&off, 0.5),
            ttft_error_p90_seconds: quantile(&off, 0.9),
            ttft_error_p99_seconds: quantile(&off, 0.99),
            ttft_bias_seconds: quantile(&sorted(|prediction| Some(prediction.error_seconds())), 0.5),
            ttft_p50_seconds: quantile(&sorted(|prediction| Some(prediction.ttft_seconds_real)), 0.5),
            itl_error_p50_seconds: quantile(&itl_off, 0.5),
            itl_error_p90_seconds: quantile(&itl_off, 0.9),
            itl_error_p99_seconds: quantile(&itl_off, 0.99),
            itl_bias_seconds: quantile(&sorted(|prediction| Some(prediction.itl?.error_seconds())), 0.5),
            itl_p50_seconds: quantile(&sorted(|prediction| Some(prediction.itl?.seconds_real)), 0.5),
            cached_tokens_predicted: predictions.iter().map(|it| u64::from(it.cached_tokens)).sum(),
            cached_tokens_missed: predictions.iter().map(missed).sum(),
        }
    }
}

/// Of sorted values, the nearest one; 0 of nothing.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((share * last as f64).round() as usize).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::{super::Pace, *};

    #[test]
    fn errors_are_summed_up() {
        let prediction = |late: f64, cached_tokens, cached_tokens_real| Prediction {
            ttft_seconds: 1.0,
            ttft_seconds_real: 1.0 + late,
            itl: (late > 0.0).then_some(Pace { seconds: 0.02, seconds_real: 0.02 - late / 100.0 }),
            cached_tokens,
            cached_tokens_real,
        };
        let predictions: Vec<Prediction> =
            (0..101_u32).map(|n| prediction(f64::from(n) / 100.0, 32, 16 * (n % 2 + 1))).collect();
        let accuracy = Accuracy::of_model("m", &predictions);
        let near = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-9, "{value} {expected}");
        near(accuracy.ttft_error_p50_seconds, 0.5);
        near(accuracy.ttft_error_p90_seconds, 0.9);
        near(accuracy.ttft_bias_seconds, -0.5);
        near(accuracy.ttft_p50_seconds, 1.5);
        // Of a hundred, from a tenth of a millisecond to ten.
        near(accuracy.itl_error_p90_seconds, 0.009);
        near(accuracy.itl_bias_seconds, accuracy.itl_error_p50_seconds);
        near(accuracy.itl_p50_seconds, 0.015);
        assert_eq!((accuracy.cached_tokens_predicted, accuracy.cached_tokens_missed), (101 * 32, 51 * 16));
        assert_eq!(Accuracy::of_model("m", &[]).ttft_error_p99_seconds, 0.0);
    }
}
