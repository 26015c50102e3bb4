//! What one request adds to the metrics: gathered in its own memory, merged once at its end.

use std::{sync::Arc, time::Duration};

use super::app::Clock;
use crate::{
    metrics::{Endpoint, LocalHistogram, Metrics, ModelLabel, Outcome, RequestLabels},
    orchestrator::api::Usage,
};

/// Watches one request to a generating route. Counts it exactly once: by [`Observation::conclude`], or as
/// disconnected when it is dropped before that.
pub(crate) struct Observation {
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    endpoint: Endpoint,
    /// Empty until the request named a served model.
    model: Arc<str>,
    arrived: Duration,
    first_token_at: Option<Duration>,
    gaps: Option<LocalHistogram>,
    output_tokens: u32,
    concluded: bool,
}

impl std::fmt::Debug for Observation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observation").field("model", &self.model).finish_non_exhaustive()
    }
}

impl Observation {
    /// A request has arrived.
    pub(crate) fn new(metrics: Arc<Metrics>, clock: Arc<dyn Clock>, endpoint: Endpoint) -> Self {
        metrics.requests_in_flight.inc();
        let arrived = clock.now();
        Self {
            metrics,
            clock,
            endpoint,
            model: "".into(),
            arrived,
            first_token_at: None,
            gaps: None,
            output_tokens: 0,
            concluded: false,
        }
    }

    /// The request names this served model. (Names of other models would let a client add labels.)
    pub(crate) fn names_model(&mut self, model: Arc<str>) {
        self.model = model;
    }

    /// The time, to be asked once for each batch of events.
    pub(crate) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// A token arrived for a choice whose last one came at `previous`.
    pub(crate) fn token(&mut self, now: Duration, previous: Option<Duration>) {
        self.output_tokens += 1;
        self.first_token_at.get_or_insert(now);
        if let Some(previous) = previous {
            let gaps = match &mut self.gaps {
                Some(gaps) => gaps,
                None => {
                    let label = ModelLabel { model: self.model.clone() };
                    self.gaps.insert(self.metrics.itl.get_or_create(&label).local())
                }
            };
            gaps.observe(now.saturating_sub(previous));
        }
    }

    /// The first piece of an engine's own answer arrived.
    pub(crate) fn first_words(&mut self, now: Duration) {
        self.first_token_at.get_or_insert(now);
    }

    /// How many tokens an engine counted in its own answer.
    pub(crate) fn passed_on(&mut self, output_tokens: u32) {
        self.output_tokens = output_tokens;
    }

    /// Tokens so far, over all choices.
    pub(crate) fn output_tokens(&self) -> u32 {
        self.output_tokens
    }

    /// The answer is complete.
    pub(crate) fn succeed(&mut self, usage: Usage) {
        let label = ModelLabel { model: self.model.clone() };
        self.metrics.prompt_tokens.get_or_create(&label).inc_by(u64::from(usage.prompt_tokens));
        self.metrics.cached_tokens.get_or_create(&label).inc_by(u64::from(usage.cached_tokens));
        let took = self.clock.now().saturating_sub(self.arrived);
        self.metrics.e2e.get_or_create(&label).observe(took);
        self.conclude(Outcome::Ok);
    }

    /// The request ended so. Only the first call counts.
    pub(crate) fn conclude(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.concluded, true) {
            return;
        }
        self.metrics.requests_in_flight.dec();
        let labels = RequestLabels { model: self.model.clone(), endpoint: self.endpoint, outcome };
        self.metrics.requests.get_or_create(&labels).inc();
        let label = ModelLabel { model: self.model.clone() };
        if let Some(first) = self.first_token_at {
            self.metrics.ttft.get_or_create(&label).observe(first.saturating_sub(self.arrived));
            self.metrics.output_tokens.get_or_create(&label).inc_by(u64::from(self.output_tokens));
        }
        if let Some(gaps) = &mut self.gaps {
            self.metrics.itl.get_or_create(&label).merge(gaps);
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if !self.concluded {
            self.metrics.disconnects.inc();
            self.conclude(Outcome::Disconnected);
        }
    }
}
