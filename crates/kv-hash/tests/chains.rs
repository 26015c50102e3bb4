//! Session chains under many threads: the answers are those of plain hashing and the bound holds throughout.

use std::thread;

use forebay_kv_hash::{BlockHasher, ChainLimits, HashKey, SessionChains};
use forebay_types::TokenId;

const THREADS: u32 = 8;
const ROUNDS: u32 = 60;

/// Every thread walks through the same conversations, each from another one on, with and without room for all.
#[test]
fn threads_agree_with_plain_hashing_and_with_the_bound() {
    for bytes_max in [600, 20_000, 200_000, 16 << 20] {
        let hasher = BlockHasher::new(HashKey::GOLDEN, 4);
        let chains = SessionChains::new(hasher, ChainLimits { bytes_max });
        thread::scope(|scope| {
            for own in 0..THREADS {
                let chains = &chains;
                scope.spawn(move || converse(chains, own, bytes_max));
            }
        });
        let stats = chains.stats();
        let blocks: u64 =
            (0..THREADS).flat_map(|own| (0..ROUNDS).map(move |round| length(own, round) as u64 / 4)).sum();
        assert_eq!(stats.blocks_reused + stats.blocks_hashed, blocks);
        assert!(stats.pieces <= stats.pieces_max && stats.pieces > 0);
    }
}

fn length(own: u32, round: u32) -> usize {
    ((own * 7 + round) % 20 * 500) as usize
}

fn converse(chains: &SessionChains, own: u32, bytes_max: usize) {
    let hasher = chains.hasher();
    let mut out = Vec::new();
    for round in 0..ROUNDS {
        let conversation = (own + round) % 5;
        let tokens: Vec<TokenId> =
            (0..length(own, round) as u32).map(|index| index / 900 * conversation).collect();
        let root = hasher.root("m", ["a", "b"][conversation as usize % 2]);
        chains.chain_into(root, &tokens, &mut out);
        assert!(out == hasher.chain(root, &tokens), "thread {own}, round {round}");
        assert!(chains.stats().bytes <= bytes_max);
    }
}
