//! Our index. The one file that follows its interface, with `churn.rs`.

use std::hint::black_box;

use forebay_kv_index::{Applied, IndexLimits, IndexStats, KvIndex, Overlaps};
use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};

use crate::{
    contender::{Contender, EventTimes, Reported},
    workload::{Change, Event, Query, Workload},
};

/// Room for everything the bench stores: a refused block fails the run.
pub fn new_index() -> KvIndex {
    KvIndex::new(IndexLimits { bytes_max: 64 << 30, ranks_max: 4096, ..Default::default() })
}

pub fn rank_id(rank: u64) -> RankId {
    RankId { incarnation: Incarnation(rank), dp_rank: 0 }
}

pub fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    numbers.into_iter().map(BlockHash).collect()
}

pub fn stored(parent: Option<u64>, hashes: Vec<BlockHash>) -> KvEvent {
    KvEvent::Stored { parent: parent.map(BlockHash), hashes, tier: Tier::Device, group: 0 }
}

pub fn removed(hashes: Vec<BlockHash>) -> KvEvent {
    KvEvent::Removed { hashes, tier: Tier::Device, group: 0 }
}

/// One event of the workload.
fn change(workload: &Workload, event: &Event) -> KvEvent {
    let chain = &workload.sequences[event.sequence as usize].chained;
    let blocks = chain[event.from as usize..event.to as usize].iter().copied();
    match event.change {
        Change::Store => stored(event.from.checked_sub(1).map(|at| chain[at as usize]), hashes(blocks)),
        Change::Remove => removed(hashes(blocks.rev())),
    }
}

/// One event of the workload, as batch `sequence` of its rank.
pub fn batch(workload: &Workload, event: &Event, sequence: u64) -> KvEventBatch {
    KvEventBatch { rank: rank_id(event.rank.into()), sequence, events: vec![change(workload, event)] }
}

/// Numbers each rank's batches and keeps those not yet applied.
struct Queue {
    batches: Vec<KvEventBatch>,
    sequence_next: Vec<u64>,
    /// Consecutive events of one rank that go into one batch, as an engine sends those of a step.
    events_max: usize,
}

impl Queue {
    fn new(events_max: usize) -> Self {
        Self { batches: vec![], sequence_next: vec![], events_max }
    }

    fn push(&mut self, workload: &Workload, events: &[Event]) {
        for event in events {
            let rank = event.rank as usize;
            let change = change(workload, event);
            if let Some(last) = self.batches.last_mut()
                && last.rank == rank_id(event.rank.into())
                && last.events.len() < self.events_max
            {
                last.events.push(change);
                continue;
            }
            self.sequence_next.resize(self.sequence_next.len().max(rank + 1), 0);
            let sequence = self.sequence_next[rank];
            self.batches.push(KvEventBatch {
                rank: rank_id(event.rank.into()),
                sequence,
                events: vec![change],
            });
            self.sequence_next[rank] += 1;
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self::new(1)
    }
}

/// `KvIndex` with its answer and the work prepared for it.
pub struct Forebay {
    index: KvIndex,
    queue: Queue,
    queries: Vec<Vec<BlockHash>>,
    answer: Overlaps,
}

impl Forebay {
    pub fn new() -> Self {
        Self::with_steps(1)
    }

    /// Takes up to `events_max` events in a batch.
    pub fn with_steps(events_max: usize) -> Self {
        let queue = Queue::new(events_max);
        Self { index: new_index(), queue, queries: vec![], answer: Overlaps::default() }
    }

    pub fn index(&self) -> &KvIndex {
        &self.index
    }

    pub fn apply_batch(&mut self, batch: &KvEventBatch) {
        let applied = self.index.apply(batch);
        assert!(matches!(applied, Applied::Ok), "batch {} of {}: {applied:?}", batch.sequence, batch.rank);
    }

    pub fn remove_rank(&mut self, rank: RankId) {
        self.index.remove_rank(rank);
    }

    pub fn stats(&self) -> IndexStats {
        self.index.stats()
    }
}

impl Contender for Forebay {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
    }

    fn apply(&mut self) {
        for batch in std::mem::take(&mut self.queue.batches) {
            self.apply_batch(&batch);
        }
    }

    fn apply_timed(&mut self, times: &mut EventTimes) -> bool {
        for batch in std::mem::take(&mut self.queue.batches) {
            times.time(|| {
                self.apply_batch(&batch);
                drop(batch);
            });
        }
        true
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = queries.iter().map(|query| hashes(workload.query_chained(query))).collect();
    }

    fn look_up(&mut self) -> u64 {
        let mut found = 0;
        for query in &self.queries {
            self.index.overlaps(query, &mut self.answer);
            found += black_box(&self.answer).iter().count() as u64;
        }
        found
    }

    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>> {
        self.index.overlaps(&hashes(workload.query_chained(query)), &mut self.answer);
        let answer = self.answer.iter().map(|(rank, blocks)| (rank.incarnation.0 as u32, blocks));
        let mut listed: Vec<(u32, u32)> = answer.collect();
        listed.sort_unstable();
        Some(listed)
    }

    fn reported(&self) -> Option<Reported> {
        let stats = self.stats();
        Some(Reported { bytes: stats.bytes, bytes_names: self.index.bytes_of_names(), blocks: stats.blocks })
    }

    fn check(&self) -> Result<(), String> {
        let stats = self.stats();
        let sound = (stats.refused, stats.gaps, stats.duplicates) == (0, 0, 0);
        if sound { Ok(()) } else { Err(format!("refused, lost or repeated: {stats:?}")) }
    }
}

/// Reads and frees our events and queries.
#[derive(Default)]
pub struct Floor {
    queue: Queue,
    queries: Vec<Vec<BlockHash>>,
}

impl Contender for Floor {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
    }

    fn apply(&mut self) {
        for batch in std::mem::take(&mut self.queue.batches) {
            for event in &batch.events {
                if let KvEvent::Stored { hashes, .. } | KvEvent::Removed { hashes, .. } = event {
                    black_box(hashes.iter().fold(0, |sum, hash| sum ^ hash.0));
                }
            }
        }
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = queries.iter().map(|query| hashes(workload.query_chained(query))).collect();
    }

    fn look_up(&mut self) -> u64 {
        self.queries.iter().map(|query| query.iter().fold(0, |sum, hash| sum ^ hash.0)).fold(0, |a, b| a ^ b)
    }

    fn overlaps(&mut self, _workload: &Workload, _query: &Query) -> Option<Vec<(u32, u32)>> {
        None
    }

    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}
