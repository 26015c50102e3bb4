//! Figures of the KV indexes and of the chains of recent prompts, as they were a second ago at most; of the cache of
//! their texts, as they are.

use forebay_kv_hash::ChainStats;
use forebay_kv_index::IndexStats;
use forebay_text::PrefixCacheStats;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

/// Which index.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IndexLabel {
    index: &'static str,
}

/// One of the two indexes' figures; those since the start only rise.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LeftOutLabels {
    index: &'static str,
    why: &'static str,
}

#[derive(Debug, Default)]
pub(super) struct CacheMetrics {
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
    text_bytes: Gauge,
    text_hits: Gauge,
    text_misses: Gauge,
    text_bytes_reused: Gauge,
    text_bytes_encoded: Gauge,
    text_evictions: Gauge,
}

impl CacheMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
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
                "forebay_text_cache_bytes",
                "Bytes of remembered text and tokens of recent prompts",
                &self.text_bytes,
            ),
            (
                "forebay_text_cache_hits",
                "Pieces of prompts whose tokens were remembered, since the start",
                &self.text_hits,
            ),
            (
                "forebay_text_cache_misses",
                "Pieces of prompts that were new, since the start",
                &self.text_misses,
            ),
            (
                "forebay_text_cache_bytes_reused",
                "Bytes of prompts whose tokens were remembered, since the start",
                &self.text_bytes_reused,
            ),
            (
                "forebay_text_cache_bytes_encoded",
                "Bytes of prompts that were tokenised, since the start",
                &self.text_bytes_encoded,
            ),
            (
                "forebay_text_cache_evictions",
                "Pieces of text forgotten to make room, since the start",
                &self.text_evictions,
            ),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
    }

    pub(super) fn set_index(&self, index: &'static str, stats: &IndexStats) {
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
        } = *stats;
        let families = [
            (&self.blocks, blocks),
            (&self.entries, entries),
            (&self.bytes, bytes),
            (&self.ranks, ranks),
            (&self.ranks_stale, ranks_stale),
        ];
        for (family, value) in families {
            family.get_or_create(&IndexLabel { index }).set(value as i64);
        }
        let left_out = [
            ("evicted", evicted),
            ("refused", refused),
            ("gap", gaps),
            ("repeated", duplicates),
            ("removed_unknown", removals_unknown),
        ];
        for (why, value) in left_out {
            self.left_out.get_or_create(&LeftOutLabels { index, why }).set(value as i64);
        }
    }

    pub(super) fn set_text_cache(&self, stats: &PrefixCacheStats) {
        let PrefixCacheStats { pieces: _, bytes, hits, misses, bytes_reused, bytes_encoded, evictions } =
            *stats;
        let gauges = [
            (&self.text_bytes, bytes as u64),
            (&self.text_hits, hits),
            (&self.text_misses, misses),
            (&self.text_bytes_reused, bytes_reused),
            (&self.text_bytes_encoded, bytes_encoded),
            (&self.text_evictions, evictions),
        ];
        for (gauge, value) in gauges {
            gauge.set(value as i64);
        }
    }

    pub(super) fn set_chains(&self, stats: &ChainStats) {
        let gauges = [
            (&self.chain_bytes, stats.bytes as u64),
            (&self.chain_blocks_reused, stats.blocks_reused),
            (&self.chain_blocks_hashed, stats.blocks_hashed),
            (&self.chain_evictions, stats.evictions),
        ];
        for (gauge, value) in gauges {
            gauge.set(value as i64);
        }
    }
}
