//! How far predictions were off: what placement decides by, held against what came of it.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::{ModelLabel, SecondsHistogram};
use crate::decisions::Prediction;

/// Upper bounds of how far a time to the first token was off, seconds.
const ERROR_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// The same of a mean time between tokens.
const ITL_ERROR_SECONDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    model: Arc<str>,
    /// `late`: it took longer than was predicted; `early`: less, or as long.
    side: &'static str,
}

/// Metrics of predictions, by model.
#[derive(Debug)]
pub(super) struct PredictionMetrics {
    /// `forebay_ttft_error_seconds{model,side}`.
    ttft_error: Family<ErrorLabels, SecondsHistogram, fn() -> SecondsHistogram>,
    /// `forebay_itl_error_seconds{model,side}`.
    itl_error: Family<ErrorLabels, SecondsHistogram, fn() -> SecondsHistogram>,
    /// `forebay_cached_tokens_predicted_total{model}` and `forebay_cached_tokens_missed_total{model}`.
    cached: Family<ModelLabel, Counter>,
    missed: Family<ModelLabel, Counter>,
}

fn error_seconds() -> SecondsHistogram {
    SecondsHistogram::new(ERROR_SECONDS)
}

fn itl_error_seconds() -> SecondsHistogram {
    SecondsHistogram::new(ITL_ERROR_SECONDS)
}

impl Default for PredictionMetrics {
    fn default() -> Self {
        Self {
            ttft_error: Family::new_with_constructor(error_seconds),
            itl_error: Family::new_with_constructor(itl_error_seconds),
            cached: Family::default(),
            missed: Family::default(),
        }
    }
}

impl PredictionMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "forebay_ttft_error_seconds",
            "By how much the time to the first token was predicted wrong; late: it came after the prediction",
            self.ttft_error.clone(),
        );
        registry.register(
            "forebay_itl_error_seconds",
            "By how much the mean time between an answer's tokens was predicted wrong; late: it was longer",
            self.itl_error.clone(),
        );
        registry.register(
            "forebay_cached_tokens_predicted",
            "Prompt tokens that placement expected in a prefix cache",
            self.cached.clone(),
        );
        registry.register(
            "forebay_cached_tokens_missed",
            "Of those, tokens that the engine had to compute",
            self.missed.clone(),
        );
    }

    pub(super) fn note(&self, model: &Arc<str>, prediction: &Prediction) {
        let itl = prediction.itl.map(|pace| (&self.itl_error, pace.error_seconds()));
        for (family, error) in
            [Some((&self.ttft_error, prediction.error_seconds())), itl].into_iter().flatten()
        {
            let side = if error < 0.0 { "late" } else { "early" };
            if let Ok(off) = Duration::try_from_secs_f64(error.abs()) {
                family.get_or_create(&ErrorLabels { model: model.clone(), side }).observe(off);
            }
        }
        let label = ModelLabel { model: model.clone() };
        let Prediction { cached_tokens, cached_tokens_real, .. } = *prediction;
        self.cached.get_or_create(&label).inc_by(cached_tokens.into());
        self.missed.get_or_create(&label).inc_by(cached_tokens.saturating_sub(cached_tokens_real).into());
    }
}
