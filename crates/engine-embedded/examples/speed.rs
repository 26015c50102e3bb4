//! Measures a model on this machine, one thread: `speed [MODEL.gguf]` prints one JSON object for each instruction set
//! (of random-tiny without a file). Times are the thread's CPU seconds where the system tells them (Linux), so a busy
//! machine disturbs them less; elsewhere wall seconds.

#![allow(clippy::print_stdout, reason = "an example's output")]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use forebay_engine_embedded::{ChunkInput, Executor, InstructionSet, Logits, ModelError, VecPool, Weights};

const BLOCK_SIZE: u32 = 16;
/// Each figure's steps are repeated for so long: the system counts CPU time in ticks of a few milliseconds.
const MEASURED: Duration = Duration::from_millis(500);

fn main() -> Result<(), ModelError> {
    let start = Instant::now();
    let weights = match std::env::args().nth(1) {
        Some(path) => Weights::load(Path::new(&path))?,
        None => Weights::random_tiny(1),
    };
    let load_seconds = start.elapsed().as_secs_f64();
    for set in InstructionSet::available() {
        let Some(mut executor) = Executor::with_instruction_set(weights.clone(), BLOCK_SIZE, set) else {
            continue;
        };
        let prefill =
            |executor: &mut Executor, tokens| median(3, || seconds(executor, &weights, 1, 0, tokens));
        let (short, long) = (prefill(&mut executor, 256), prefill(&mut executor, 1024));
        let decode = |executor: &mut Executor, sequences, context| {
            median(3, || seconds(executor, &weights, sequences, context, 1))
        };
        println!(
            "{{\"model\":\"{}\",\"instruction_set\":\"{set}\",\"weights_bytes\":{},\"load_seconds\":{load_seconds:.3},\
             \"prefill_256_tokens_per_second\":{:.0},\"prefill_1024_tokens_per_second\":{:.0},\
             \"decode_1_at_64_tokens_per_second\":{:.1},\"decode_1_at_512_tokens_per_second\":{:.1},\
             \"decode_16_at_512_tokens_per_second\":{:.1}}}",
            weights.config().name,
            weights.bytes(),
            256.0 / short,
            1024.0 / long,
            1.0 / decode(&mut executor, 1, 64),
            1.0 / decode(&mut executor, 1, 512),
            16.0 / decode(&mut executor, 16, 512),
        );
    }
    Ok(())
}

fn median(times: usize, mut measure: impl FnMut() -> f64) -> f64 {
    let mut seconds: Vec<f64> = (0..times).map(|_| measure()).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[times / 2]
}

/// Seconds of one step: `tokens` more for each of `sequences` sequences that have `context` behind them.
fn seconds(executor: &mut Executor, weights: &Weights, sequences: u32, context: u32, tokens: u32) -> f64 {
    let blocks = (context + tokens).div_ceil(BLOCK_SIZE);
    let mut pool = VecPool::new(sequences * blocks, weights.kv_block_bytes(BLOCK_SIZE), BLOCK_SIZE);
    for block in 0..sequences * blocks {
        pool.payload_mut(block).fill(0.01); // also touches the memory, which is not what is measured
    }
    let tokens: Vec<u32> = (0..tokens).map(|i| 97 + i % 26).collect();
    let tables: Vec<Vec<u32>> = (0..sequences).map(|s| (s * blocks..(s + 1) * blocks).collect()).collect();
    let chunk = |table| ChunkInput { start: context, tokens: &tokens, blocks: table, want_logits: true };
    let chunks: Vec<_> = tables.iter().map(|table| chunk(table)).collect();
    let mut logits = Logits::new();
    let mut step = || executor.execute(&mut pool, &chunks, &mut logits);
    step(); // buffers grow
    let (start, cpu_start) = (Instant::now(), cpu_seconds());
    let mut steps = 0.0;
    while steps == 0.0 || start.elapsed() < MEASURED {
        step();
        steps += 1.0;
    }
    match (cpu_start, cpu_seconds()) {
        (Some(start), Some(end)) => (end - start) / steps,
        _ => start.elapsed().as_secs_f64() / steps,
    }
}

/// CPU seconds of this thread so far.
fn cpu_seconds() -> Option<f64> {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(statistics.split(' ').next()?.parse::<f64>().ok()? / 1e9)
}
