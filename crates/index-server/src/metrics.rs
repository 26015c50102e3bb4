//! What the server counts: one declaration a metric. Names that the gateway has too mean the same there.

use std::{fmt::Write as _, time::Duration};

use forebay_kv_hash::ChainStats;
use forebay_kv_index::IndexStats;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::service::{EngineStatus, State, Stats};

/// Content type of [`Metrics::render`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of the buckets of look-ups, in seconds: from a few blocks to a million tokens.
const QUERY_SECONDS: [f64; 10] = [2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 1e-3, 1e-2, 1e-1];

/// How a call came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Door {
    Http,
    Grpc,
}

impl EncodeLabelValue for Door {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        })
    }
}

/// What was called, and how that ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    door: Door,
    call: &'static str,
    /// `ok`, or the code of the refusal.
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IndexLabel {
    index: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LeftOutLabels {
    index: &'static str,
    why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// The index of what engines say, as the gateway calls it.
const INDEX: &str = "announced";

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    query_seconds: Histogram,
    figures: Figures,
    /// Two scrapes at a time would mix their figures.
    scrape: Mutex<()>,
}

/// Set at each scrape.
#[derive(Debug, Default)]
struct Figures {
    blocks: Family<IndexLabel, Gauge>,
    entries: Family<IndexLabel, Gauge>,
    bytes: Family<IndexLabel, Gauge>,
    ranks: Family<IndexLabel, Gauge>,
    ranks_stale: Family<IndexLabel, Gauge>,
    left_out: Family<LeftOutLabels, Gauge>,
    chain_bytes: Gauge,
    chain_blocks_reused: Gauge,
    chain_blocks_hashed: Gauge,
    chain_evictions: Gauge,
    engines: Family<StateLabel, Gauge>,
    batches_lost: Gauge,
}

impl Figures {
    fn register(&self, registry: &mut Registry) {
        let families = [
            ("forebay_index_blocks", "Distinct KV blocks in the index", &self.blocks),
            ("forebay_index_entries", "Pairs of a block and a place where a rank holds it", &self.entries),
            ("forebay_index_bytes", "Bytes that the index takes", &self.bytes),
            ("forebay_index_ranks", "Ranks that the index follows", &self.ranks),
            ("forebay_index_ranks_stale", "Ranks among them that await a snapshot", &self.ranks_stale),
        ];
        for (name, help, family) in families {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "forebay_index_left_out",
            "Since the start: blocks evicted or refused for lack of room, event batches lost (gap) or repeated, removals of unknown blocks",
            self.left_out.clone(),
        );
        registry.register(
            "forebay_index_engines",
            "Registered engines by the state of their worst rank",
            self.engines.clone(),
        );
        let gauges = [
            ("forebay_chains_bytes", "Bytes of remembered hashes of recent prompts", &self.chain_bytes),
            (
                "forebay_chains_blocks_reused",
                "Prompt blocks whose hashes were remembered, since the start",
                &self.chain_blocks_reused,
            ),
            (
                "forebay_chains_blocks_hashed",
                "Prompt blocks that were hashed, since the start",
                &self.chain_blocks_hashed,
            ),
            (
                "forebay_chains_evictions",
                "Pieces of 64 hashes forgotten to make room, since the start",
                &self.chain_evictions,
            ),
            (
                "forebay_index_batches_lost",
                "Event batches that registered engines published and that could not be had again",
                &self.batches_lost,
            ),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
    }

    fn set(&self, stats: &Stats, engines: &[EngineStatus]) {
        let IndexStats {
            blocks,
            entries,
            segments: _,
            bytes,
            ranks,
            ranks_stale,
            refused,
            evicted,
            removals_unknown,
            gaps,
            duplicates,
        } = stats.index;
        let families = [
            (&self.blocks, blocks),
            (&self.entries, entries),
            (&self.bytes, bytes),
            (&self.ranks, ranks),
            (&self.ranks_stale, ranks_stale),
        ];
        for (family, value) in families {
            family.get_or_create(&IndexLabel { index: INDEX }).set(value as i64);
        }
        let left_out = [
            ("evicted", evicted),
            ("refused", refused),
            ("gap", gaps),
            ("repeated", duplicates),
            ("removed_unknown", removals_unknown),
        ];
        for (why, value) in left_out {
            self.left_out.get_or_create(&LeftOutLabels { index: INDEX, why }).set(value as i64);
        }
        let ChainStats { bytes, blocks_reused, blocks_hashed, evictions, .. } = stats.chains;
        let lost: u64 = engines.iter().flat_map(|engine| &engine.ranks).map(|rank| rank.batches_lost).sum();
        let gauges = [
            (&self.chain_bytes, bytes as u64),
            (&self.chain_blocks_reused, blocks_reused),
            (&self.chain_blocks_hashed, blocks_hashed),
            (&self.chain_evictions, evictions),
            (&self.batches_lost, lost),
        ];
        for (gauge, value) in gauges {
            gauge.set(value as i64);
        }
        for state in State::ALL {
            let count = engines.iter().filter(|engine| engine.state == state).count();
            self.engines.get_or_create(&StateLabel { state: state.name() }).set(count as i64);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let (calls, figures) = (Family::<CallLabels, Counter>::default(), Figures::default());
        let query_seconds = Histogram::new(QUERY_SECONDS);
        let mut registry = Registry::default();
        figures.register(&mut registry);
        registry.register("forebay_index_calls", "Calls by how they ended", calls.clone());
        registry.register(
            "forebay_index_query_seconds",
            "Time of a look-up: hashing its tokens, asking the index, sorting the answer",
            query_seconds.clone(),
        );
        Self { registry, calls, query_seconds, figures, scrape: Mutex::new(()) }
    }
}

impl Metrics {
    /// A call ended.
    pub(crate) fn called(&self, door: Door, call: &'static str, outcome: &'static str) {
        self.calls.get_or_create(&CallLabels { door, call, outcome }).inc();
    }

    /// A look-up took so long.
    pub(crate) fn queried(&self, took: Duration) {
        self.query_seconds.observe(took.as_secs_f64());
    }

    /// All of them, as Prometheus reads them.
    pub(crate) fn render(&self, stats: &Stats, engines: &[EngineStatus]) -> String {
        let _alone = self.scrape.lock();
        self.figures.set(stats, engines);
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a string takes all that is written to it");
        out
    }
}
