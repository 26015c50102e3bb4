//! The record of why: one bounded entry a request, kept in a ring, shown by `/fleet/v1/decisions` and
//! `forebay explain`.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use forebay_placement::Explanation;
use forebay_types::{EngineName, RequestId, TenantId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Everything that was decided for one request and what came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// The request.
    pub id: RequestId,
    /// When it arrived, milliseconds since the Unix epoch.
    pub arrived_unix_ms: u64,
    /// Whose it was.
    pub tenant: TenantId,
    /// The model that it asked for.
    pub model: Arc<str>,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Answers asked for.
    pub choices: u32,
    /// Each placement, in order: the first one, then retries and migrations.
    pub placements: Vec<Placement>,
    /// Each leg, in the order in which they were started.
    pub legs: Vec<LegRecord>,
    /// Each hand-over of KV.
    pub transfers: Vec<TransferRecord>,
    /// Seconds from arrival to the first token handed to the client.
    pub ttft_seconds: Option<f64>,
    /// Seconds from arrival to the end.
    pub e2e_seconds: Option<f64>,
    /// Prompt tokens that the first leg served from its prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated over all choices.
    pub output_tokens: u32,
    /// `running`, `finished`, `cancelled`, or the failure's sentence.
    pub outcome: String,
}

/// One call of the placement core.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Placement {
    /// `first`, `retry` or `migration`.
    pub purpose: String,
    /// Seconds after arrival.
    pub at_seconds: f64,
    /// Time that the placement core took.
    pub took_microseconds: f64,
    /// Why.
    pub explanation: Explanation,
}

/// One piece of work on one engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LegRecord {
    /// Unique in the process.
    pub leg: u64,
    /// `aggregated`, `prefill` or `decode`.
    pub work: String,
    /// Where.
    pub engine: EngineName,
    /// Which life of that engine.
    pub incarnation: u64,
    /// Seconds after arrival at which it was handed to the engine.
    pub at_seconds: f64,
    /// Seconds after arrival at which the engine began to compute it.
    pub started_seconds: Option<f64>,
    /// Seconds after arrival at which it ended.
    pub ended_seconds: Option<f64>,
    /// Prompt tokens served from the engine's prefix cache.
    pub cached_tokens: u32,
    /// Tokens that it produced.
    pub output_tokens: u32,
    /// `running`, `ended`, `cancelled`, `refused`, `lost`.
    pub outcome: String,
}

/// One hand-over of KV from one engine to another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransferRecord {
    /// The prefill engine.
    pub from: EngineName,
    /// The decode engine.
    pub to: EngineName,
    /// Blocks that moved (those that the decode engine had cached did not).
    pub blocks: u32,
    /// Bytes that moved.
    pub bytes: u64,
    /// Copies that it took after merging neighbours.
    pub pieces: u32,
    /// Duration of the copy.
    pub seconds: f64,
    /// `done`, or why it failed; then the decode engine recomputed.
    pub outcome: String,
}

/// The newest decisions, bounded.
#[derive(Debug)]
pub struct DecisionLog {
    inner: Mutex<Inner>,
    records_max: usize,
}

#[derive(Debug, Default)]
struct Inner {
    order: VecDeque<RequestId>,
    by_id: HashMap<RequestId, Arc<DecisionRecord>>,
}

impl DecisionLog {
    /// Keeps `records_max` records; an older one goes when a newer comes.
    pub fn new(records_max: usize) -> Self {
        Self { inner: Mutex::new(Inner::default()), records_max: records_max.max(1) }
    }

    /// Adds or replaces the record of one request.
    pub fn put(&self, record: DecisionRecord) {
        let mut inner = self.inner.lock();
        let id = record.id.clone();
        if inner.by_id.insert(id.clone(), Arc::new(record)).is_none() {
            inner.order.push_back(id);
            if inner.order.len() > self.records_max
                && let Some(oldest) = inner.order.pop_front()
            {
                inner.by_id.remove(&oldest);
            }
        }
    }

    /// The newest records, newest first.
    pub fn newest(&self, limit: usize) -> Vec<Arc<DecisionRecord>> {
        let inner = self.inner.lock();
        inner.order.iter().rev().take(limit).filter_map(|id| inner.by_id.get(id).cloned()).collect()
    }

    /// One record.
    pub fn get(&self, id: &RequestId) -> Option<Arc<DecisionRecord>> {
        self.inner.lock().by_id.get(id).cloned()
    }
}
