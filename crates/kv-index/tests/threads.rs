//! Readers on threads of their own while everything changes: what a rank holds all along is found in full, always.
//!
//! The interleavings of few steps are tried in `src/races`; this is about many blocks, real caches and real memory.
#![cfg(not(feature = "shuttle"))]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use forebay_kv_index::{Applied, BYTES_MIN, IndexLimits, KvIndex, Overlaps};
use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, RankId, Tier};

/// Numbers that look like hashes.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

const PERMANENT: RankId = RankId { incarnation: Incarnation(1), dp_rank: 0 };

/// Chains of the permanent rank: of many segments, and of few blocks.
const CHAIN_LENS: [usize; 6] = [1, 3, 63, 64, 200, 1000];

/// A chain begins with some of what the permanent rank holds, and goes on alone.
fn chain(which: usize, shared: usize, own: u64, len: usize) -> Vec<BlockHash> {
    let front = (0..shared as u64).map(|block| mix((which as u64) << 32 | block));
    let tail = (0..len as u64).map(|block| mix(1 << 60 | own << 20 | block));
    front.chain(tail).map(BlockHash).collect()
}

fn stored(parent: Option<BlockHash>, hashes: &[BlockHash]) -> KvEvent {
    KvEvent::Stored { parent, hashes: hashes.to_vec(), tier: Tier::Device, group: 0 }
}

fn apply(index: &KvIndex, rank: RankId, sequence: u64, events: Vec<KvEvent>) {
    assert_eq!(index.apply(&KvEventBatch { rank, sequence, events }), Applied::Ok);
}

/// How much happens.
struct Load {
    bytes_max: usize,
    chain_lens: &'static [usize],
    readers: usize,
    ranks: u64,
    blocks_per_rank: u64,
    rounds: u64,
}

/// Sends the readers home, also if the writer fails: a failure must not wait for them.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Ranks come, store chains of their own beside and on top of the permanent ones, remove some and leave. `exact` says
/// that there is room for all.
fn churn(load: &Load, exact: bool) {
    let index = KvIndex::new(IndexLimits { bytes_max: load.bytes_max, ranks_max: 1000 });
    let permanent: Vec<Vec<BlockHash>> =
        load.chain_lens.iter().enumerate().map(|(which, &len)| chain(which, len, 0, 0)).collect();
    apply(&index, PERMANENT, 0, permanent.iter().map(|chain| stored(None, chain)).collect());
    let (done, looked_up, rounds) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..load.readers)
            .map(|_| {
                scope.spawn(|| {
                    let mut out = Overlaps::default();
                    while !done.load(Relaxed) {
                        for chain in &permanent {
                            let gone = rounds.load(Relaxed);
                            index.overlaps(chain, &mut out);
                            let depth = out.get(PERMANENT) as usize;
                            assert!(depth == chain.len() || (!exact && depth < chain.len()), "{depth}");
                            for (rank, depth) in out.iter() {
                                assert!(rank == PERMANENT || rank.incarnation.0 > 1 + gone, "{rank:?} left");
                                assert!((1..=chain.len()).contains(&(depth as usize)), "{depth} of {rank:?}");
                            }
                            looked_up.fetch_add(1, Relaxed);
                        }
                    }
                })
            })
            .collect();
        let _done = Done(&done);
        for round in 0..load.rounds {
            let id = |number: u64| RankId { incarnation: Incarnation(2 + round), dp_rank: number as u16 };
            for number in 0..load.ranks {
                let (own, which) = (round << 10 | number, number as usize % permanent.len());
                // From the middle of a permanent chain on, so that segments divide and holders come and go.
                let shared = load.chain_lens[which] * (number as usize % 4) / 3;
                let own = chain(which, shared, own, load.blocks_per_rank as usize);
                apply(&index, id(number), 0, vec![stored(None, &own)]);
                let tail = own[own.len() / 2..].iter().rev().copied().collect();
                let removed = KvEvent::Removed { hashes: tail, tier: Tier::Device, group: 0 };
                apply(&index, id(number), 1, vec![removed]);
                if number % 3 == 0 {
                    let again = stored(own.len().checked_sub(2).map(|before| own[before / 2]), &own);
                    apply(&index, id(number), 2, vec![again]);
                }
                if number % 5 == 0 {
                    index.remove_rank(id(number));
                }
            }
            index.remove_incarnation(Incarnation(2 + round));
            rounds.fetch_add(1, Relaxed);
            index.tidy();
        }
        // At least once in what is left.
        let before = looked_up.load(Relaxed);
        while looked_up.load(Relaxed) < before + 100 && !readers.iter().any(|reader| reader.is_finished()) {
            std::hint::spin_loop();
        }
    });
    while index.tidy() {}
    let stats = index.stats();
    let held: usize = load.chain_lens.iter().sum();
    assert_eq!(stats.ranks, 1, "{stats:?}");
    assert!(stats.blocks == held as u64 || (!exact && stats.blocks < held as u64), "{stats:?}");
    index.remove_rank(PERMANENT);
    while index.tidy() {}
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.entries, stats.segments), (0, 0, 0), "{stats:?}");
    // The links of segments stay, and little else.
    assert!(stats.bytes <= (512 << 10), "{stats:?}");
}

#[test]
fn chains_that_a_rank_holds_all_along_are_found_in_full() {
    let load = Load {
        bytes_max: 256 << 20,
        chain_lens: &CHAIN_LENS,
        readers: 2,
        ranks: 100,
        blocks_per_rank: 2500,
        rounds: 4,
    };
    churn(&load, true);
}

#[test]
fn short_of_room_claims_are_less_and_never_wrong() {
    let load = Load {
        bytes_max: BYTES_MIN,
        chain_lens: &CHAIN_LENS,
        readers: 2,
        ranks: 100,
        blocks_per_rank: 1000,
        rounds: 4,
    };
    churn(&load, false);
}

/// Small enough for an interpreter that checks every access: `cargo miri test --test threads few_steps`.
#[test]
fn few_steps_of_every_kind() {
    let load = Load {
        bytes_max: BYTES_MIN,
        chain_lens: &[1, 5, 70],
        readers: 1,
        ranks: 6,
        blocks_per_rank: 20,
        rounds: 2,
    };
    churn(&load, true);
}

/// Several threads of changes take turns; look-ups on each go on.
#[test]
fn ranks_that_report_from_different_threads_do_not_disturb_each_other() {
    let index = KvIndex::new(IndexLimits::default());
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let index = &index;
            scope.spawn(move || {
                let rank = RankId { incarnation: Incarnation(10 + thread), dp_rank: 0 };
                let mut out = Overlaps::default();
                for step in 0..300u64 {
                    let own = chain(0, 64, thread << 10 | step, 100);
                    apply(index, rank, 2 * step, vec![stored(None, &own)]);
                    index.overlaps(&own, &mut out);
                    assert_eq!(out.get(rank), 164);
                    let removed = KvEvent::Removed { hashes: own, tier: Tier::Device, group: 0 };
                    apply(index, rank, 2 * step + 1, vec![removed]);
                    index.overlaps(&chain(0, 64, thread << 10 | step, 100), &mut out);
                    assert_eq!(out.get(rank), 0);
                }
            });
        }
    });
    while index.tidy() {}
    assert_eq!((index.stats().blocks, index.stats().entries), (0, 0));
}
