//! Bytes that following one rank takes for each block: `cargo run --release -p forebay-engine-events --example rank_memory`.
//!
//! Stores sequences of 64 blocks of 16 tokens under opaque hashes, as vLLM announces them, and prints by how much the
//! process has grown. Tables double as they grow, so the figure is taken at several sizes. Linux only.

#![expect(clippy::print_stdout, reason = "its output is what it is run for")]

use forebay_engine_events::{EngineEvent, EngineHash, EventBatch, RankCache, RankSettings, Stored};
use forebay_kv_hash::{BlockHasher, HashKey};

const BLOCK_TOKENS: u32 = 16;
const SEQUENCE: u64 = 64;

fn sequence(number: u64) -> EventBatch {
    let hashes = (number * SEQUENCE..(number + 1) * SEQUENCE).map(opaque).map(EngineHash).collect();
    let tokens = (0..SEQUENCE as u32 * BLOCK_TOKENS).map(|token| token ^ (number as u32) << 12).collect();
    let stored = Stored::plain(None, hashes, tokens, BLOCK_TOKENS);
    EventBatch { time_seconds: 0.0, events: vec![EngineEvent::Stored(stored)], dp_rank: None }
}

/// A number that says nothing of the block that it stands for.
fn opaque(block: u64) -> u64 {
    let mixed = (block ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb)
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("its second figure is the pages that are resident") * 4_096
}

fn main() {
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK_TOKENS);
    let settings =
        RankSettings { hasher, model: "m".to_owned(), engine_block_size_tokens: None, blocks_max: 1 << 21 };
    let before = resident_bytes();
    let mut rank = RankCache::new(settings);
    for number in 0..1_600_000 / SEQUENCE {
        let applied = rank.apply(&sequence(number));
        assert!(applied.faults.is_empty(), "{:?}", applied.faults);
        let blocks = (number + 1) * SEQUENCE;
        if blocks.is_multiple_of(200_000) {
            let bytes = (resident_bytes() - before) as f64 / blocks as f64;
            println!("{blocks} blocks: {bytes:.1} bytes each");
        }
    }
    println!("{:?}", rank.stats());
}
