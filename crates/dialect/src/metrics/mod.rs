//! `/metrics` under vLLM's names.
//!
//! Counting is in [`Metrics`], whose methods say what happened; how it reads is in [`render`](self::render). What the
//! engine itself knows (load, cache) comes from its reports.

mod histogram;
mod render;

use std::time::Duration;

use forebay_types::{FinishReason, RankLoad};
use parking_lot::Mutex;

pub(crate) use self::histogram::Histogram;
pub(crate) use self::render::{Facts, render};

/// Bounds of latencies of whole requests and their phases, as vLLM has them.
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Bounds of the time to the first token, as vLLM has them.
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Bounds of the time between tokens, as vLLM has them.
const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Everything that is counted. One lock, taken once for each batch of a leg's events.
#[derive(Debug)]
pub(crate) struct Metrics(Mutex<Counters>);

/// See the metrics of the same names; tokens unless a name says otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Counters {
    pub(crate) load: RankLoad,
    pub(crate) prompt: u64,
    pub(crate) from_cache: u64,
    pub(crate) from_transfer: u64,
    pub(crate) from_compute: u64,
    pub(crate) cache_queries: u64,
    pub(crate) transfer_queries: u64,
    pub(crate) generated: u64,
    pub(crate) ended_stop: u64,
    pub(crate) ended_length: u64,
    pub(crate) ended_abort: u64,
    pub(crate) ended_error: u64,
    pub(crate) rejected: u64,
    /// Decode legs whose KV is on its way.
    pub(crate) fetching: u64,
    /// KV events that were left out, since the tokens of their blocks were not known.
    pub(crate) blocks_unpublished: u64,
    pub(crate) first_token_seconds: Histogram,
    pub(crate) token_seconds: Histogram,
    pub(crate) queue_seconds: Histogram,
    pub(crate) prefill_seconds: Histogram,
    pub(crate) decode_seconds: Histogram,
    pub(crate) request_seconds: Histogram,
}

/// Where a prompt's KV came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PromptSources {
    /// Length of the prompt.
    pub(crate) prompt: u32,
    /// Found in the engine's own prefix cache.
    pub(crate) cached: u32,
    /// `Some` for decode legs: whether the rest was fetched from the prefill engine.
    pub(crate) fetched: Option<bool>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self(Mutex::new(Counters {
            load: RankLoad::default(),
            prompt: 0,
            from_cache: 0,
            from_transfer: 0,
            from_compute: 0,
            cache_queries: 0,
            transfer_queries: 0,
            generated: 0,
            ended_stop: 0,
            ended_length: 0,
            ended_abort: 0,
            ended_error: 0,
            rejected: 0,
            fetching: 0,
            blocks_unpublished: 0,
            first_token_seconds: Histogram::new(FIRST_TOKEN_SECONDS),
            token_seconds: Histogram::new(TOKEN_SECONDS),
            queue_seconds: Histogram::new(REQUEST_SECONDS),
            prefill_seconds: Histogram::new(REQUEST_SECONDS),
            decode_seconds: Histogram::new(REQUEST_SECONDS),
            request_seconds: Histogram::new(REQUEST_SECONDS),
        }))
    }
}

impl Metrics {
    /// Changes several at once.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.0.lock());
    }

    pub(crate) fn read(&self) -> Counters {
        self.0.lock().clone()
    }
}

impl Counters {
    /// The prompt of one leg is there.
    pub(crate) fn prompt_ready(&mut self, sources: PromptSources) {
        let PromptSources { prompt, cached, fetched } = sources;
        let (prompt, cached) = (u64::from(prompt), u64::from(cached));
        let rest = prompt.saturating_sub(cached);
        self.prompt += prompt;
        self.cache_queries += prompt;
        self.from_cache += cached;
        match fetched {
            None => self.from_compute += rest,
            Some(arrived) => {
                self.transfer_queries += rest;
                *if arrived { &mut self.from_transfer } else { &mut self.from_compute } += rest;
            }
        }
    }

    /// A choice is complete.
    pub(crate) fn ended(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.ended_stop += 1,
            FinishReason::Length => self.ended_length += 1,
        }
    }

    /// `tokens` tokens of one choice came within `since`, the time since the one before them.
    pub(crate) fn tokens_came(&mut self, tokens: u32, since: Duration) {
        let each = since.as_secs_f64() / f64::from(tokens.max(1));
        self.token_seconds.observe_many(each, u64::from(tokens));
    }
}
