//! Random-tiny is a witness: whoever loses or misplaces one block of its KV hears about it.

mod common;

use common::{Random, sensitivity};
use forebay_engine_embedded::Weights;

#[test]
fn every_block_of_kv_matters_to_random_tiny() {
    for seed in [1, 2] {
        let weights = Weights::random_tiny(seed);
        let mut random = Random(seed);
        let mut prompt = |_| (0..8 + random.below(893)).map(|_| random.below(256)).collect();
        let prompts: Vec<Vec<u32>> = (0..64).map(&mut prompt).collect();
        let measured = sensitivity(&weights, &prompts, 16);
        println!("seed {seed}: {measured:?}");
        assert!(measured.least() >= 0.9, "seed {seed}: {measured:?}");
        assert!(measured.distinct >= 8.0, "it repeats itself: {measured:?}");
    }
}
