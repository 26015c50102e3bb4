//! What the index takes for stores, removals and look-ups: `cargo bench -p forebay-kv-index`.
//!
//! The stream of `bench/index`, which compares with others: sequences of 64 blocks, the first 16 from one of 64 groups,
//! over 8 ranks. Figures are for 64 blocks.
#![allow(missing_docs, reason = "what the macros of the harness make")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use forebay_kv_index::{Applied, IndexLimits, KvIndex, Overlaps};
use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};

const SEQUENCES: u64 = 8_192;
const RANKS: u64 = 8;
const SHARED: u64 = 16;
const BLOCKS: u64 = 64;

/// SplitMix64: numbers that look like hashes.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

fn sequence(number: u64) -> Vec<BlockHash> {
    let shared = (0..SHARED).map(|block| mix(number % 64 * SHARED + block));
    shared.chain((SHARED..BLOCKS).map(|block| mix(1 << 40 | number << 8 | block))).map(BlockHash).collect()
}

fn rank(number: u64) -> RankId {
    RankId { incarnation: Incarnation(number % RANKS), dp_rank: 0 }
}

fn apply(index: &KvIndex, rank: RankId, event: KvEvent) {
    let sequence = index.rank(rank).map_or(0, |known| known.sequence_next);
    assert_eq!(index.apply(&KvEventBatch { rank, sequence, events: vec![event] }), Applied::Ok);
}

fn stored(number: u64) -> KvEvent {
    KvEvent::Stored { parent: None, hashes: sequence(number), tier: Tier::Device, group: 0 }
}

/// The blocks that no other sequence has, last first.
fn removed(number: u64) -> KvEvent {
    let own = sequence(number)[SHARED as usize..].iter().rev().copied().collect();
    KvEvent::Removed { hashes: own, tier: Tier::Device, group: 0 }
}

fn filled() -> KvIndex {
    let index = KvIndex::new(IndexLimits::default());
    (0..SEQUENCES).for_each(|number| apply(&index, rank(number), stored(number)));
    index
}

fn changes(criterion: &mut Criterion) {
    let index = filled();
    let mut number = 0;
    // Each sequence in turn leaves and comes back, so that the index keeps its size.
    criterion.bench_function("remove 48 blocks and store 64", |bencher| {
        bencher.iter_batched(
            || {
                number = (number + 1) % SEQUENCES;
                (rank(number), removed(number), stored(number))
            },
            |(rank, removed, stored)| {
                apply(&index, rank, removed);
                apply(&index, rank, stored);
            },
            BatchSize::SmallInput,
        );
    });
    criterion.bench_function("add and remove a rank of 8,192 blocks", |bencher| {
        let rank = RankId { incarnation: Incarnation(u64::MAX), dp_rank: 0 };
        let blocks: Vec<BlockHash> = (0..8192).map(|block| BlockHash(mix(1 << 50 | block))).collect();
        bencher.iter(|| {
            let stored =
                KvEvent::Stored { parent: None, hashes: blocks.clone(), tier: Tier::Device, group: 0 };
            apply(&index, rank, stored);
            index.remove_rank(rank);
            while index.tidy() {}
        });
    });
}

fn look_ups(criterion: &mut Criterion) {
    let index = filled();
    let mut answer = Overlaps::default();
    let unknown = |number: u64| (0..BLOCKS).map(move |block| BlockHash(mix(1 << 60 | number << 8 | block)));
    let all: Vec<_> = (0..SEQUENCES).map(sequence).collect();
    let shared: Vec<Vec<_>> = (0..SEQUENCES)
        .map(|number| {
            let own = unknown(number).skip(SHARED as usize);
            all[number as usize][..SHARED as usize].iter().copied().chain(own).collect()
        })
        .collect();
    let none: Vec<Vec<_>> = (0..SEQUENCES).map(|number| unknown(number).collect()).collect();
    for (name, queries) in [("all 64 held", all), ("16 of 64 held", shared), ("none held", none)] {
        let mut next = (0..queries.len()).cycle();
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| {
                index.overlaps(&queries[next.next().unwrap_or(0)], &mut answer);
                black_box(answer.as_slice().len())
            });
        });
    }
}

criterion_group!(benches, changes, look_ups);
criterion_main!(benches);
