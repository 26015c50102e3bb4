//! What may happen between readers and the writer, tried with a scheduler that chooses every step.
//!
//! `cargo nextest run -p forebay-kv-index --features shuttle`. Every run tries the same interleavings;
//! `SHUTTLE_RANDOM_SEED` chooses others, and `RACES` multiplies how many. The checker orders all steps one after the
//! other: weaker orderings than that are argued where they are used. Freed blocks are overwritten and kept, so that a
//! reader that still looks there is found out.
#![allow(clippy::print_stdout, reason = "the seed of a test")]

mod heads;
mod history;
mod index;
mod reclaim;

use std::sync::Arc;

use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
};

const SEED: u64 = 0x5eed;

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.silence_warnings = true;
    config
}

/// Tries `iterations` interleavings of each kind: any next step, and few changes of who goes on. The second kind leaves
/// a reader in the middle of its look-up for a long time.
fn check(iterations: usize, test: impl Fn() + Send + Sync + 'static) {
    let test = Arc::new(test);
    let times = option_env!("RACES").and_then(|times| times.parse().ok()).unwrap_or(1);
    let iterations = iterations * times;
    println!("seed {SEED:#x}, unless SHUTTLE_RANDOM_SEED says another; {iterations} iterations each");
    let run = Arc::clone(&test);
    let tried = Runner::new(RandomScheduler::new_from_seed(SEED, iterations), config()).run(move || run());
    assert_eq!(tried, iterations);
    for depth in [2, 3, 5] {
        let run = Arc::clone(&test);
        Runner::new(PctScheduler::new_from_seed(SEED + depth as u64, depth, iterations), config())
            .run(move || run());
    }
}
