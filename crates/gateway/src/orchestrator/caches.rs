//! What ranks cache, beside the lock of the cores: the two indexes and the chains of recent prompts. Requests look up and
//! reports change them at the same time.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_kv_hash::{BlockHasher, ChainLimits, SessionChains};
use forebay_kv_index::{IndexLimits, IndexStats, KvIndex};
use forebay_routing::{Known, PromptUnit};
use forebay_types::{BlockHash, Incarnation, KvEventBatch, TokenId};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Shared;
use crate::metrics::Metrics;

/// Between two rounds of tidying.
const ROUND: Duration = Duration::from_secs(1);
/// Between two lines of log about what was left out.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Indexes and chains.
pub(super) struct Caches {
    /// What ranks say that they cache.
    pub(super) index: KvIndex,
    /// What was routed to ranks lately, as far as `index` cannot tell.
    pub(super) routed: KvIndex,
    /// Hashes of recent prompts.
    pub(super) chains: SessionChains,
}

impl Caches {
    pub(super) fn new(index: IndexLimits, chains: ChainLimits, hasher: BlockHasher) -> Arc<Self> {
        Arc::new(Self {
            index: KvIndex::new(index),
            routed: KvIndex::new(index),
            chains: SessionChains::new(hasher, chains),
        })
    }

    /// The hashes of a prompt's full blocks.
    pub(super) fn hashes(&self, root: BlockHash, tokens: &[TokenId]) -> Arc<[BlockHash]> {
        let mut hashes = Vec::new();
        self.chains.chain_into(root, tokens, &mut hashes);
        hashes.into()
    }

    /// Looks a prompt up. Waits for nothing.
    pub(super) fn look_up(&self, unit: PromptUnit, hashes: &[BlockHash], known: &mut Known) {
        let announced = if unit == PromptUnit::Tokens { hashes } else { &[] };
        self.index.overlaps(announced, &mut known.announced);
        self.routed.overlaps(hashes, &mut known.routed);
    }

    /// What was routed to a rank changed.
    pub(super) fn note_routed(&self, batch: &KvEventBatch) {
        // In the router's order: only a full index refuses, and then it claims less.
        let _ = self.routed.apply(batch);
    }

    /// Forgets what was cached there.
    pub(super) fn forget(&self, incarnation: Incarnation) {
        self.index.remove_incarnation(incarnation);
        self.routed.remove_incarnation(incarnation);
    }
}

/// Takes out what engines that left had cached, keeps the figures, and says what had no room, for as long as the
/// orchestrator lives.
pub(super) async fn keep_tidy(shared: Weak<Shared>) {
    let mut said = (Instant::now(), [IndexStats::default(); 2]);
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let caches = &shared.caches;
        for index in [&caches.index, &caches.routed] {
            while index.tidy() {
                tokio::task::yield_now().await;
            }
        }
        let stats = [caches.index.stats(), caches.routed.stats()];
        publish(&shared.metrics, caches, &stats);
        if said.0.elapsed() >= SAY_AGAIN {
            for (name, (now, before)) in ["announced", "routed"].iter().zip(stats.iter().zip(&said.1)) {
                say(name, now, before);
            }
            said = (Instant::now(), stats);
        }
    }
}

fn publish(metrics: &Metrics, caches: &Caches, [announced, routed]: &[IndexStats; 2]) {
    metrics.set_index("announced", announced);
    metrics.set_index("routed", routed);
    metrics.set_chains(&caches.chains.stats());
}

/// One line if anything was left out since the last one.
fn say(index: &str, now: &IndexStats, before: &IndexStats) {
    let since = |figure: fn(&IndexStats) -> u64| figure(now) - figure(before);
    let (evicted, refused, gaps) = (since(|s| s.evicted), since(|s| s.refused), since(|s| s.gaps));
    let (duplicates, unknown) = (since(|s| s.duplicates), since(|s| s.removals_unknown));
    if evicted + refused > 0 {
        tracing::warn!(
            index,
            evicted,
            refused,
            bytes = now.bytes,
            "blocks were left out of the KV index for lack of room; a larger index_bytes_max finds more prefixes"
        );
    }
    if gaps + duplicates + unknown > 0 {
        tracing::info!(
            index,
            gaps,
            duplicates,
            unknown,
            "KV events were lost, came twice or removed what was not known"
        );
    }
}
