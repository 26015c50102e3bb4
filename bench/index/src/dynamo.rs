//! The indexes of dynamo-kv-router 1.6.1, each driven as cheaply as its public interface allows.

mod compressed;

use std::hint::black_box;

use dynamo_kv_router::{RadixTree, protocols::*};

use crate::{
    contender::{Contender, EventTimes},
    workload::{Change, Event, Query, Workload},
};

pub use compressed::{Compressed, Pooled};

/// Hashes given all blocks before, from the blocks' own: the published crate's function.
pub fn chain(local: &[u64]) -> Vec<u64> {
    compute_seq_hash_for_block(&local_hashes(local.to_vec()))
}

fn local_hashes(numbers: Vec<u64>) -> Vec<LocalBlockHash> {
    numbers.into_iter().map(LocalBlockHash).collect()
}

fn router_event(workload: &Workload, event: &Event, id: u64) -> RouterEvent {
    let sequence = &workload.sequences[event.sequence as usize];
    let (from, to) = (event.from as usize, event.to as usize);
    let external = |at: usize| ExternalSequenceBlockHash(sequence.chained[at]);
    let block = |at: usize| KvCacheStoredBlockData {
        block_hash: external(at),
        tokens_hash: LocalBlockHash(sequence.local[at]),
        mm_extra_info: None,
    };
    let data = match event.change {
        Change::Store => KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: from.checked_sub(1).map(external),
            start_position: Some(event.from),
            blocks: (from..to).map(block).collect(),
        }),
        Change::Remove => KvCacheEventData::Removed(KvCacheRemoveData {
            block_hashes: (from..to).rev().map(external).collect(),
        }),
    };
    RouterEvent::new(event.rank.into(), KvCacheEvent { event_id: id, data, dp_rank: 0 })
}

/// Numbers events and keeps those not yet applied.
#[derive(Default)]
struct Queue {
    events: Vec<RouterEvent>,
    id_next: u64,
}

impl Queue {
    fn push(&mut self, workload: &Workload, events: &[Event]) {
        for event in events {
            self.events.push(router_event(workload, event, self.id_next));
            self.id_next += 1;
        }
    }
}

fn local_queries(workload: &Workload, queries: &[Query]) -> Vec<Vec<LocalBlockHash>> {
    queries.iter().map(|query| local_hashes(workload.query_local(query))).collect()
}

fn sorted(scores: &OverlapScores) -> Vec<(u32, u32)> {
    let mut listed: Vec<(u32, u32)> =
        scores.scores.iter().map(|(worker, &blocks)| (worker.worker_id as u32, blocks)).collect();
    listed.sort_unstable();
    listed
}

/// `RadixTree`, called directly. It takes a query by value: the prepared ones are handed over, not copied.
#[derive(Default)]
pub struct Radix {
    tree: RadixTree,
    queue: Queue,
    queries: Vec<Vec<LocalBlockHash>>,
    failed: usize,
}

impl Contender for Radix {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
    }

    fn apply(&mut self) {
        for event in std::mem::take(&mut self.queue.events) {
            self.failed += usize::from(self.tree.apply_event(event).is_err());
        }
    }

    fn apply_timed(&mut self, times: &mut EventTimes) -> bool {
        for event in std::mem::take(&mut self.queue.events) {
            times.time(|| self.failed += usize::from(self.tree.apply_event(event).is_err()));
        }
        true
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = local_queries(workload, queries);
    }

    fn look_up(&mut self) -> u64 {
        let queries = std::mem::take(&mut self.queries);
        queries
            .into_iter()
            .map(|query| black_box(self.tree.find_matches(query, false)).scores.len() as u64)
            .sum()
    }

    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>> {
        Some(sorted(&self.tree.find_matches(local_hashes(workload.query_local(query)), false)))
    }

    fn check(&self) -> Result<(), String> {
        if self.failed == 0 { Ok(()) } else { Err(format!("{} events failed", self.failed)) }
    }
}

/// Reads and frees Dynamo's events and queries.
#[derive(Default)]
pub struct Floor {
    queue: Queue,
    queries: Vec<Vec<LocalBlockHash>>,
}

impl Contender for Floor {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
    }

    fn apply(&mut self) {
        for event in std::mem::take(&mut self.queue.events) {
            match &event.event.data {
                KvCacheEventData::Stored(store) => {
                    let read = |block: &KvCacheStoredBlockData| block.block_hash.0 ^ block.tokens_hash.0;
                    black_box(store.blocks.iter().fold(0, |sum, block| sum ^ read(block)));
                }
                KvCacheEventData::Removed(remove) => {
                    black_box(remove.block_hashes.iter().fold(0, |sum, hash| sum ^ hash.0));
                }
                KvCacheEventData::Cleared => {}
            }
        }
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = local_queries(workload, queries);
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
