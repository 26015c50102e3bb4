//! What the gateway counts: one declaration a metric, used through a typed field, so a name is never retyped.
//!
//! Labels are closed sets (models, engines, endpoints, outcomes); nothing that a client controls is a label.
//! Nothing here takes a lock per token: a response gathers its token gaps in a [`LocalHistogram`] and merges it once.

mod caches;
mod histogram;
mod labels;
mod predictions;

use std::sync::{Arc, atomic::AtomicU64};

use forebay_kv_hash::ChainStats;
use forebay_kv_index::IndexStats;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

pub use histogram::{LocalHistogram, SecondsHistogram};
pub use labels::{
    AuditLabels, Audited, DecisionKind, DecisionLabels, Endpoint, EngineLabel, ModelLabel, Outcome,
    PhaseLabels, RankLabels, RequestLabels, Saved, SavedLabels, StateLabels, TransferLabels, TransferOutcome,
};

use forebay_placement::Savings;
use forebay_text::PrefixCacheStats;
use forebay_types::Leaning;

use self::{caches::CacheMetrics, predictions::PredictionMetrics};
use crate::{decisions::Prediction, orchestrator::api::EngineStatus};

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One histogram of seconds for each model.
pub type SecondsByModel = Family<ModelLabel, SecondsHistogram, fn() -> SecondsHistogram>;

/// Every metric of the gateway.
#[derive(Debug)]
pub struct Metrics {
    /// `forebay_requests_total{model,endpoint,outcome}`: rises exactly once for each request to a generating route.
    pub requests: Family<RequestLabels, Counter>,
    /// `forebay_requests_in_flight`: requests to generating routes that are not answered to the end.
    pub requests_in_flight: Gauge,
    /// `forebay_connections`: open client connections, public and admin.
    pub connections: Gauge,
    /// `forebay_connections_closed_for_room_total`: idle ones that were closed at `connections_max` for a new client.
    pub connections_closed_for_room: Counter,
    /// `forebay_body_bytes`: what of large bodies is held, of those that `bodies_bytes_max` bounds.
    pub body_bytes: Gauge,
    /// `forebay_ttft_seconds{model}`: arrival to the first token, ready to be sent.
    pub ttft: SecondsByModel,
    /// `forebay_itl_seconds{model}`: time between two tokens of one choice.
    pub itl: SecondsByModel,
    /// `forebay_e2e_seconds{model}`: arrival to the end of a good answer.
    pub e2e: SecondsByModel,
    /// `forebay_queue_seconds{model}`: hand-over to an engine until it begins to compute. Set by the orchestrator.
    pub queue: SecondsByModel,
    /// `forebay_prompt_tokens_total{model}`: prompt tokens of good answers.
    pub prompt_tokens: Family<ModelLabel, Counter>,
    /// `forebay_output_tokens_total{model}`: tokens delivered, of unfinished answers too.
    pub output_tokens: Family<ModelLabel, Counter>,
    /// `forebay_cached_tokens_total{model}`: prompt tokens of good answers that a prefix cache served.
    pub cached_tokens: Family<ModelLabel, Counter>,
    /// `forebay_transfers_total{outcome}`: hand-overs of KV. Set by the orchestrator.
    pub transfers: Family<TransferLabels, Counter>,
    /// `forebay_transfer_bytes_total`: bytes of KV that moved between engines. Set by the orchestrator.
    pub transfer_bytes: Counter,
    /// `forebay_transfer_seconds`: duration of one hand-over that was done. Set by the orchestrator.
    pub transfer: SecondsHistogram,
    /// `forebay_gather_seconds`: how long a prompt waited for others to share a step with. Set by the orchestrator.
    pub gathered: SecondsHistogram,
    /// `forebay_decisions_total{policy,kind}`: placements. Set by the orchestrator.
    pub decisions: Family<DecisionLabels, Counter>,
    /// `forebay_split_saved_seconds{model,what}`: sum over split requests against the cheapest engine alone; falls where a
    /// split costs. Set by the orchestrator.
    pub split_saved: Family<SavedLabels, Gauge<f64, AtomicU64>>,
    /// `forebay_decisions_unwritten`: records that `decisions_file` did not take. Set by the orchestrator.
    pub decisions_unwritten: Gauge,
    /// `forebay_tokenizer_audits_total{outcome}`: requests whose tokens an engine was asked for. Set by the orchestrator.
    pub tokenizer_audits: Family<AuditLabels, Counter>,
    /// `forebay_retries_total`: requests placed again before their first token. Set by the orchestrator.
    pub retries: Counter,
    /// `forebay_migrations_total`: responses continued on another engine. Set by the orchestrator.
    pub migrations: Counter,
    /// `forebay_disconnects_total`: clients that left before their answer's end.
    pub disconnects: Counter,
    engine_running: Family<EngineLabel, Gauge>,
    engine_waiting: Family<EngineLabel, Gauge>,
    engine_blocks_used: Family<EngineLabel, Gauge>,
    engine_blocks: Family<EngineLabel, Gauge>,
    engine_state: Family<StateLabels, Gauge>,
    engine_leaning: Family<PhaseLabels, Gauge>,
    engine_restarts: Family<EngineLabel, Gauge>,
    rank_running: Family<RankLabels, Gauge>,
    rank_waiting: Family<RankLabels, Gauge>,
    rank_blocks_used: Family<RankLabels, Gauge>,
    rank_cached_tokens: Family<RankLabels, Gauge>,
    rank_indexed_blocks: Family<RankLabels, Gauge>,
    rank_load_age: Family<RankLabels, Gauge<f64, AtomicU64>>,
    caches: CacheMetrics,
    predictions: PredictionMetrics,
    registry: Registry,
}

/// Upper bounds of request-scale durations: a cached short prompt on a GPU to a long answer on a CPU.
const REQUEST_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0, 600.0];
/// Upper bounds of token gaps: unpaced simulation to a decode that a long prefill held up.
const TOKEN_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5];
/// Upper bounds of hand-overs: one block over shared memory to a long prompt over a slow link.
const TRANSFER_SECONDS: &[f64] =
    &[0.000_01, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

fn request_seconds() -> SecondsHistogram {
    SecondsHistogram::new(REQUEST_SECONDS)
}

fn token_seconds() -> SecondsHistogram {
    SecondsHistogram::new(TOKEN_SECONDS)
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Counts what splitting a request saves and costs.
    pub fn note_split(&self, model: &Arc<str>, savings: Savings) {
        let Savings { ttft_seconds, decode_seconds, transfer_seconds } = savings;
        let all = [
            (Saved::Ttft, ttft_seconds),
            (Saved::Decode, decode_seconds),
            (Saved::Transfer, transfer_seconds),
        ];
        for (what, seconds) in all {
            self.split_saved.get_or_create(&SavedLabels { model: model.clone(), what }).inc_by(seconds);
        }
    }

    /// Counts by how much a prediction was wrong.
    pub fn note_prediction(&self, model: &Arc<str>, prediction: &Prediction) {
        self.predictions.note(model, prediction);
    }

    /// All at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            requests: Family::default(),
            requests_in_flight: Gauge::default(),
            connections: Gauge::default(),
            connections_closed_for_room: Counter::default(),
            body_bytes: Gauge::default(),
            ttft: Family::new_with_constructor(request_seconds),
            itl: Family::new_with_constructor(token_seconds),
            e2e: Family::new_with_constructor(request_seconds),
            queue: Family::new_with_constructor(request_seconds),
            prompt_tokens: Family::default(),
            output_tokens: Family::default(),
            cached_tokens: Family::default(),
            transfers: Family::default(),
            transfer_bytes: Counter::default(),
            transfer: SecondsHistogram::new(TRANSFER_SECONDS),
            gathered: request_seconds(),
            decisions: Family::default(),
            split_saved: Family::default(),
            decisions_unwritten: Gauge::default(),
            tokenizer_audits: Family::default(),
            retries: Counter::default(),
            migrations: Counter::default(),
            disconnects: Counter::default(),
            engine_running: Family::default(),
            engine_waiting: Family::default(),
            engine_blocks_used: Family::default(),
            engine_blocks: Family::default(),
            engine_state: Family::default(),
            engine_leaning: Family::default(),
            engine_restarts: Family::default(),
            rank_running: Family::default(),
            rank_waiting: Family::default(),
            rank_blocks_used: Family::default(),
            rank_cached_tokens: Family::default(),
            rank_indexed_blocks: Family::default(),
            rank_load_age: Family::default(),
            caches: CacheMetrics::default(),
            predictions: PredictionMetrics::default(),
            registry: Registry::default(),
        };
        metrics.register();
        metrics
    }

    /// Gives every field its name. The library appends `_total` to counters.
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "forebay_requests",
            "Requests to generating routes, by their end",
            self.requests.clone(),
        );
        registry.register(
            "forebay_requests_in_flight",
            "Requests not yet answered to the end",
            self.requests_in_flight.clone(),
        );
        registry.register("forebay_connections", "Open client connections", self.connections.clone());
        registry.register(
            "forebay_connections_closed_for_room",
            "Idle connections that were closed at connections_max for a new client",
            self.connections_closed_for_room.clone(),
        );
        registry.register(
            "forebay_body_bytes",
            "Bytes of large request bodies that are held, of bodies_bytes_max",
            self.body_bytes.clone(),
        );
        registry.register("forebay_ttft_seconds", "Arrival to first token", self.ttft.clone());
        registry.register("forebay_itl_seconds", "Time between two tokens of one choice", self.itl.clone());
        registry.register("forebay_e2e_seconds", "Arrival to the end of a good answer", self.e2e.clone());
        registry.register(
            "forebay_queue_seconds",
            "Hand-over to an engine until it computes",
            self.queue.clone(),
        );
        registry.register(
            "forebay_prompt_tokens",
            "Prompt tokens of good answers",
            self.prompt_tokens.clone(),
        );
        registry.register("forebay_output_tokens", "Tokens delivered", self.output_tokens.clone());
        registry.register(
            "forebay_cached_tokens",
            "Prompt tokens of good answers that a prefix cache served",
            self.cached_tokens.clone(),
        );
        registry.register(
            "forebay_tokenizer_audits",
            "Requests whose tokens an engine was asked for",
            self.tokenizer_audits.clone(),
        );
        registry.register("forebay_transfers", "Hand-overs of KV between engines", self.transfers.clone());
        registry.register(
            "forebay_transfer_bytes",
            "Bytes of KV moved between engines",
            self.transfer_bytes.clone(),
        );
        registry.register(
            "forebay_transfer_seconds",
            "Duration of one hand-over of KV",
            self.transfer.clone(),
        );
        registry.register(
            "forebay_gather_seconds",
            "How long a prompt waited for others to share a step with",
            self.gathered.clone(),
        );
        registry.register("forebay_decisions", "Placements, by policy and choice", self.decisions.clone());
        registry.register(
            "forebay_split_saved_seconds",
            "Predicted seconds that splits saved against the cheapest engine alone, since the start; transfer_cost: what they cost",
            self.split_saved.clone(),
        );
        registry.register(
            "forebay_decisions_unwritten",
            "Decision records that decisions_file did not take, since the start",
            self.decisions_unwritten.clone(),
        );
        registry.register(
            "forebay_retries",
            "Requests placed again before their first token",
            self.retries.clone(),
        );
        registry.register(
            "forebay_migrations",
            "Responses continued on another engine",
            self.migrations.clone(),
        );
        registry.register("forebay_disconnects", "Clients gone before the end", self.disconnects.clone());
        registry.register(
            "forebay_engine_running",
            "Sequences in the running batch",
            self.engine_running.clone(),
        );
        registry.register("forebay_engine_waiting", "Sequences not yet begun", self.engine_waiting.clone());
        registry.register(
            "forebay_engine_kv_blocks_used",
            "KV blocks that running sequences hold",
            self.engine_blocks_used.clone(),
        );
        registry.register("forebay_engine_kv_blocks", "Size of the KV pool", self.engine_blocks.clone());
        registry.register("forebay_engine_state", "1 for the state that it is in", self.engine_state.clone());
        registry.register(
            "forebay_engine_leaning",
            "1 for the phase that it is kept for, if it is kept for one",
            self.engine_leaning.clone(),
        );
        registry.register("forebay_engine_restarts", "Lives after the first", self.engine_restarts.clone());
        self.register_ranks();
    }

    /// Those of DP ranks: what the engine says of itself, and how old that is.
    fn register_ranks(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "forebay_rank_running",
            "Sequences in its running batch",
            self.rank_running.clone(),
        );
        registry.register("forebay_rank_waiting", "Sequences not yet begun", self.rank_waiting.clone());
        registry.register(
            "forebay_rank_kv_blocks_used",
            "KV blocks that running sequences hold",
            self.rank_blocks_used.clone(),
        );
        registry.register(
            "forebay_rank_cached_tokens",
            "Prompt tokens served from its prefix cache in this life",
            self.rank_cached_tokens.clone(),
        );
        registry.register(
            "forebay_rank_indexed_blocks",
            "KV blocks of it that the index knows",
            self.rank_indexed_blocks.clone(),
        );
        registry.register(
            "forebay_rank_load_age_seconds",
            "Age of its load report",
            self.rank_load_age.clone(),
        );
        self.caches.register(registry);
        self.predictions.register(registry);
    }

    /// Notes the figures of an index: `announced` or `routed`.
    pub fn set_index(&self, index: &'static str, stats: &IndexStats) {
        self.caches.set_index(index, stats);
    }

    /// Notes the figures of the chains of recent prompts.
    pub fn set_chains(&self, stats: &ChainStats) {
        self.caches.set_chains(stats);
    }

    /// Notes the figures of the cache of recent prompts' texts.
    pub fn set_text_cache(&self, stats: &PrefixCacheStats) {
        self.caches.set_text_cache(stats);
    }

    /// Everything as OpenMetrics text; see [`CONTENT_TYPE`]. The gauges of engines are taken from `engines`, so they
    /// cost nothing between scrapes and an engine that left disappears.
    pub fn render(&self, engines: &[EngineStatus]) -> String {
        let gauges =
            [&self.engine_running, &self.engine_waiting, &self.engine_blocks_used, &self.engine_blocks];
        gauges.iter().for_each(|gauge| gauge.clear());
        for engine in engines {
            let label = EngineLabel { engine: engine.engine.0.clone() };
            let load = &engine.load;
            let used = load.blocks_total.saturating_sub(load.blocks_free);
            let values = [load.running, load.waiting, used, load.blocks_total];
            for (gauge, value) in gauges.iter().zip(values) {
                gauge.get_or_create(&label).set(i64::from(value));
            }
        }
        self.set_states(engines);
        self.set_ranks(engines);
        let mut out = String::with_capacity(16 * 1024);
        text::encode(&mut out, &self.registry).expect("writing to a string does not fail");
        out
    }
}

impl Metrics {
    fn set_states(&self, engines: &[EngineStatus]) {
        self.engine_state.clear();
        self.engine_leaning.clear();
        self.engine_restarts.clear();
        for engine in engines {
            let name = engine.engine.0.clone();
            let labels = StateLabels { engine: name.clone(), state: engine.state.clone() };
            self.engine_state.get_or_create(&labels).set(1);
            let phase = match engine.leaning {
                Leaning::Neither => None,
                Leaning::Prefill => Some("prefill"),
                Leaning::Decode => Some("decode"),
            };
            if let Some(phase) = phase {
                self.engine_leaning.get_or_create(&PhaseLabels { engine: name.clone(), phase }).set(1);
            }
            let restarts = i64::try_from(engine.restarts).unwrap_or(i64::MAX);
            self.engine_restarts.get_or_create(&EngineLabel { engine: name }).set(restarts);
        }
    }

    fn set_ranks(&self, engines: &[EngineStatus]) {
        let gauges = [
            &self.rank_running,
            &self.rank_waiting,
            &self.rank_blocks_used,
            &self.rank_cached_tokens,
            &self.rank_indexed_blocks,
        ];
        gauges.iter().for_each(|gauge| gauge.clear());
        self.rank_load_age.clear();
        for engine in engines {
            for rank in &engine.ranks {
                let labels = RankLabels { engine: engine.engine.0.clone(), dp_rank: rank.dp_rank.into() };
                let load = &rank.load;
                let used = load.blocks_total.saturating_sub(load.blocks_free);
                let values = [
                    u64::from(load.running),
                    u64::from(load.waiting),
                    u64::from(used),
                    load.cached_tokens,
                    rank.indexed_blocks,
                ];
                for (gauge, value) in gauges.iter().zip(values) {
                    gauge.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
                }
                self.rank_load_age.get_or_create(&labels).set(rank.load_age_seconds);
            }
        }
    }
}

#[cfg(test)]
mod tests;
