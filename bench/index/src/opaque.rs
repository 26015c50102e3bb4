//! Our index behind engines' own hashes: each rank's map from them to ours, and the index that it feeds.

use std::collections::HashMap;

use forebay_engine_events::{
    BLOCKS_MAX_DEFAULT, EngineEvent, EngineHash, EventBatch, RankCache, RankSettings, Removed, Stored,
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_index::{Applied, KvIndex, Overlaps};
use forebay_types::{BlockHash, KvEventBatch, Tier, TokenId};

use crate::{
    contender::{Contender, EventTimes, Reported},
    forebay::{new_index, rank_id},
    workload::{Change, Event, Query, Workload},
};

/// Tokens in a block: as many as hold a block's own hash, so that what is hashed is what the others get.
const BLOCK_TOKENS: u32 = 2;

/// `RankCache`s in front of a `KvIndex`, as a gateway has them for engines that it listens to itself.
pub struct Opaque {
    index: KvIndex,
    hasher: BlockHasher,
    ranks: HashMap<u32, Rank>,
    batches: Vec<(u32, EventBatch)>,
    queries: Vec<Vec<BlockHash>>,
    answer: Overlaps,
    faults: u64,
}

struct Rank {
    cache: RankCache,
    sequence_next: u64,
}

impl Opaque {
    pub fn new() -> Self {
        Self {
            index: new_index(),
            hasher: BlockHasher::new(HashKey::GOLDEN, BLOCK_TOKENS),
            ranks: HashMap::new(),
            batches: vec![],
            queries: vec![],
            answer: Overlaps::default(),
            faults: 0,
        }
    }

    fn apply_batch(&mut self, number: u32, batch: &EventBatch) {
        let rank = self.ranks.entry(number).or_insert_with(|| Rank {
            cache: RankCache::new(RankSettings {
                hasher: self.hasher.clone(),
                model: "m".into(),
                engine_block_size_tokens: Some(BLOCK_TOKENS),
                blocks_max: 4 * BLOCKS_MAX_DEFAULT,
            }),
            sequence_next: 0,
        });
        let translated = rank.cache.apply(batch);
        self.faults += translated.faults.len() as u64;
        let sequence = rank.sequence_next;
        rank.sequence_next += 1;
        let batch = KvEventBatch { rank: rank_id(number.into()), sequence, events: translated.events };
        assert_eq!(self.index.apply(&batch), Applied::Ok, "batch {sequence} of rank {number}");
    }

    fn chain(&self, locals: &[u64]) -> Vec<BlockHash> {
        self.hasher.chain(self.hasher.root("m", ""), &tokens(locals))
    }
}

fn tokens(locals: &[u64]) -> Vec<TokenId> {
    locals.iter().flat_map(|&local| [local as TokenId, (local >> 32) as TokenId]).collect()
}

fn change(workload: &Workload, event: &Event) -> EngineEvent {
    let sequence = &workload.sequences[event.sequence as usize];
    let range = event.from as usize..event.to as usize;
    let hashes = sequence.chained[range.clone()].iter().copied().map(EngineHash);
    let (tier, group) = (Tier::Device, None);
    match event.change {
        Change::Store => EngineEvent::Stored(Stored {
            hashes: hashes.collect(),
            parent: range.start.checked_sub(1).map(|before| EngineHash(sequence.chained[before])),
            tokens: tokens(&sequence.local[range]),
            block_size_tokens: BLOCK_TOKENS,
            lora_id: None,
            lora_name: None,
            salt: None,
            extra_keys: None,
            tier,
            group,
            kind: None,
            window_tokens: None,
        }),
        Change::Remove => EngineEvent::Removed(Removed { hashes: hashes.rev().collect(), tier, group }),
    }
}

impl Contender for Opaque {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.batches.extend(events.iter().map(|event| {
            let events = vec![change(workload, event)];
            (event.rank, EventBatch { time_seconds: 0.0, events, dp_rank: None })
        }));
    }

    fn apply(&mut self) {
        for (number, batch) in std::mem::take(&mut self.batches) {
            self.apply_batch(number, &batch);
        }
    }

    fn apply_timed(&mut self, times: &mut EventTimes) -> bool {
        for (number, batch) in std::mem::take(&mut self.batches) {
            times.time(|| {
                self.apply_batch(number, &batch);
                drop(batch);
            });
        }
        true
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = queries.iter().map(|query| self.chain(&workload.query_local(query))).collect();
    }

    fn look_up(&mut self) -> u64 {
        let mut found = 0;
        for query in &self.queries {
            self.index.overlaps(query, &mut self.answer);
            found += self.answer.iter().count() as u64;
        }
        found
    }

    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>> {
        self.index.overlaps(&self.chain(&workload.query_local(query)), &mut self.answer);
        let answer = self.answer.iter().map(|(rank, blocks)| (rank.incarnation.0 as u32, blocks));
        let mut listed: Vec<(u32, u32)> = answer.collect();
        listed.sort_unstable();
        Some(listed)
    }

    fn reported(&self) -> Option<Reported> {
        let stats = self.index.stats();
        Some(Reported { bytes: stats.bytes, bytes_names: self.index.bytes_of_names(), blocks: stats.blocks })
    }

    fn check(&self) -> Result<(), String> {
        let refused = self.index.stats().refused;
        if (refused, self.faults) == (0, 0) {
            Ok(())
        } else {
            Err(format!("{refused} refused, {} faults", self.faults))
        }
    }
}
