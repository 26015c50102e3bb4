//! The record of why: one bounded entry a request, kept in a ring, shown by `/fleet/v1/decisions` and
//! `forebay explain`.

mod accuracy;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use forebay_placement::Explanation;
use forebay_types::{EngineName, RequestId, TenantId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub use self::accuracy::Accuracy;
pub use crate::lines::SinkPlan;

/// Writes decision records to files.
pub type DecisionSink = crate::lines::LineSink<DecisionRecord>;

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

/// What was predicted of a request, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Seconds from arrival to the first token, as the placement that gave it predicted.
    pub ttft_seconds: f64,
    /// As it was.
    pub ttft_seconds_real: f64,
    /// Mean time between tokens; `None` for an answer of one token, and for one that went on elsewhere after its first.
    pub itl: Option<Pace>,
    /// Prompt tokens from cache, as predicted.
    pub cached_tokens: u32,
    /// As it was.
    pub cached_tokens_real: u32,
}

/// Mean seconds between the tokens of one choice's answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// As the placement that led to the first token predicted.
    pub seconds: f64,
    /// As it was.
    pub seconds_real: f64,
}

impl Pace {
    /// How far off it was, in seconds: above 0 the prediction was too long.
    pub fn error_seconds(&self) -> f64 {
        self.seconds - self.seconds_real
    }
}

impl Prediction {
    /// How far off the time was, in seconds: above 0 the prediction was too long.
    pub fn error_seconds(&self) -> f64 {
        self.ttft_seconds - self.ttft_seconds_real
    }
}

impl DecisionRecord {
    /// Of the placement that led to the first token. `None` if none did, yet.
    pub fn prediction(&self) -> Option<Prediction> {
        let ttft_seconds_real = self.ttft_seconds?;
        let led = self.placements.iter().rev().find(|placement| placement.at_seconds <= ttft_seconds_real)?;
        let chosen = led.explanation.candidates.get(led.explanation.chosen as usize)?;
        let went_on_here = self.placements.last().is_some_and(|last| last.at_seconds <= ttft_seconds_real);
        Some(Prediction {
            ttft_seconds: led.at_seconds + chosen.ttft_seconds,
            ttft_seconds_real,
            itl: chosen
                .itl_seconds
                .filter(|_| went_on_here)
                .zip(self.itl_seconds())
                .map(|(seconds, seconds_real)| Pace { seconds, seconds_real }),
            cached_tokens: chosen.cached_tokens,
            cached_tokens_real: self.cached_tokens,
        })
    }

    /// Mean seconds between tokens of each choice's answer, from the first token to the end. `None` while it runs, and of
    /// answers of one token.
    pub fn itl_seconds(&self) -> Option<f64> {
        let gaps = (self.output_tokens / self.choices.max(1)).checked_sub(1).filter(|&gaps| gaps > 0)?;
        Some(((self.e2e_seconds? - self.ttft_seconds?) / f64::from(gaps)).max(0.0))
    }

    /// Whether a leg of it was given to this engine.
    pub fn ran_on(&self, engine: &str) -> bool {
        self.legs.iter().any(|leg| leg.engine.as_str() == engine)
    }
}

/// Which of the decisions that are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionQuery {
    /// Which come first.
    pub order: DecisionOrder,
    /// Only those with a leg on this engine.
    pub engine: Option<String>,
    /// How many at most.
    pub limit: usize,
}

/// Which decisions come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecisionOrder {
    /// The newest.
    #[default]
    Newest,
    /// Those whose time to the first token was predicted worst.
    WorstError,
    /// Those with the longest time to the first token.
    Slowest,
}

impl DecisionOrder {
    /// What it sorts by, the greatest first. `None` for records that have it not and are left out.
    fn key(self, record: &DecisionRecord) -> Option<f64> {
        match self {
            Self::Newest => Some(0.0),
            Self::WorstError => record.prediction().map(|prediction| prediction.error_seconds().abs()),
            Self::Slowest => record.ttft_seconds,
        }
    }
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
    sink: Option<Arc<DecisionSink>>,
}

#[derive(Debug, Default)]
struct Inner {
    order: VecDeque<RequestId>,
    by_id: HashMap<RequestId, Arc<DecisionRecord>>,
}

impl DecisionLog {
    /// Keeps `records_max` records; an older one goes when a newer comes. All go to `sink`, too.
    pub fn new(records_max: usize, sink: Option<Arc<DecisionSink>>) -> Self {
        Self { inner: Mutex::new(Inner::default()), records_max: records_max.max(1), sink }
    }

    /// Adds or replaces the record of one request.
    pub fn put(&self, record: DecisionRecord) {
        let (id, record) = (record.id.clone(), Arc::new(record));
        if let Some(sink) = &self.sink {
            sink.put(record.clone());
        }
        let mut inner = self.inner.lock();
        if inner.by_id.insert(id.clone(), record).is_none() {
            inner.order.push_back(id);
            if inner.order.len() > self.records_max
                && let Some(oldest) = inner.order.pop_front()
            {
                inner.by_id.remove(&oldest);
            }
        }
    }

    /// The records that are asked for; among equals the newest first.
    pub fn find(&self, query: &DecisionQuery) -> Vec<Arc<DecisionRecord>> {
        let DecisionQuery { order, engine, limit } = query;
        let newest: Vec<Arc<DecisionRecord>> = {
            let inner = self.inner.lock();
            inner.order.iter().rev().filter_map(|id| inner.by_id.get(id).cloned()).collect()
        };
        let asked =
            newest.into_iter().filter(|record| engine.as_ref().is_none_or(|engine| record.ran_on(engine)));
        if *order == DecisionOrder::Newest {
            return asked.take(*limit).collect();
        }
        let mut keyed: Vec<_> = asked.filter_map(|record| Some((order.key(&record)?, record))).collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
        keyed.into_iter().take(*limit).map(|(_, record)| record).collect()
    }

    /// How far predictions were off, by model, over the records that are kept.
    pub fn accuracy(&self) -> Vec<Accuracy> {
        let records: Vec<Arc<DecisionRecord>> = self.inner.lock().by_id.values().cloned().collect();
        Accuracy::of(records.iter())
    }

    /// One record.
    pub fn get(&self, id: &RequestId) -> Option<Arc<DecisionRecord>> {
        self.inner.lock().by_id.get(id).cloned()
    }
}

#[cfg(test)]
pub(crate) mod tests;
