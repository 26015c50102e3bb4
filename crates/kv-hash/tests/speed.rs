//! The crate's speed claim: `cargo test --release -p forebay-kv-hash --test speed -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::TokenId;

#[test]
#[ignore = "a timing: release build, quiet machine"]
fn hashing_32k_tokens_takes_less_than_150_microseconds() {
    let hasher = BlockHasher::new(HashKey::GOLDEN, 16);
    let root = hasher.root("m", "");
    let tokens: Vec<TokenId> = (0..32_768).collect();
    let mut out = Vec::new();
    let best = (0..200).map(|_| {
        let start = Instant::now();
        hasher.chain_into(root, std::hint::black_box(&tokens), &mut out);
        std::hint::black_box(&out);
        start.elapsed()
    });
    let best = best.min().unwrap();
    println!("32768 tokens, blocks of 16: {best:?}");
    assert!(best < Duration::from_micros(150), "{best:?}");
}
