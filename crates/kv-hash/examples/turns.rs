//! Processor time of hashing a conversation's prompt, with and without what was remembered of it:
//! `cargo run --release -p forebay-kv-hash --example turns [tokens of the prompt] [new tokens a turn]`.
//!
//! Prints one JSON object a line. `plain_cold` hashes the prompt with `BlockHasher`; `chains_cold` is the first time that
//! `SessionChains` sees it (full memory: every piece takes another's place); `turn_warm` is the prompt with a turn's new
//! tokens, one conversation after itself; `turn_among_others` the same in turn with 600 more conversations of that length,
//! so that tokens and hashes come from main memory.
//!
//! `median_ns` and `best_ns` are of single calls by the monotonic clock, which counts what others take of the processor;
//! `cpu_ns` is the time that this thread ran, over all calls. What comes between calls is not counted.
#![allow(clippy::print_stdout, reason = "its output is what an example is for")]

use std::{hint::black_box, time::Instant};

use forebay_kv_hash::{BlockHasher, ChainLimits, HashKey, SessionChains};
use forebay_types::{BlockHash, TokenId};

const BLOCK_SIZE_TOKENS: u32 = 16;
const CALLS: usize = 3_000;
/// Enough that their tokens (240 MB) and hashes (30 MB) fit no cache of one core.
const OTHERS: usize = 600;

fn main() {
    let mut arguments =
        std::env::args().skip(1).map(|word| word.parse::<usize>().expect("a number of tokens"));
    let (tokens, new) = (arguments.next().unwrap_or(100_000), arguments.next().unwrap_or(500));
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK_SIZE_TOKENS);
    let root = hasher.root("m", "tenant");
    let mut out = Vec::new();

    let prompt = text(0, tokens + new);
    let calls = (0..CALLS).map(|_| timed(|| hasher.chain_into(root, black_box(&prompt[..tokens]), &mut out)));
    report("plain_cold", tokens, calls.collect(), || {
        hasher.chain_into(root, &prompt[..tokens], black_box(&mut vec![]))
    });

    let chains = SessionChains::new(hasher, ChainLimits { bytes_max: 8 << 20 });
    let mut seed = 1;
    let mut strange = || {
        seed += 1;
        text(seed, tokens)
    };
    // Filled first, so that what is measured evicts.
    while chains.stats().evictions == 0 {
        chains.chain_into(root, &strange(), &mut out);
    }
    let calls = (0..CALLS / 10).map(|_| {
        let prompt = strange();
        timed(|| chains.chain_into(root, black_box(&prompt), &mut out))
    });
    let calls = calls.collect();
    // A root of its own for each call makes the same tokens new.
    let mut roots = (0..).map(BlockHash);
    report("chains_cold", tokens, calls, || {
        chains.chain_into(roots.next().unwrap_or(root), &prompt[..tokens], black_box(&mut out));
    });

    let chains = SessionChains::new(hasher, ChainLimits::default());
    let mut turns = Turns { chains: &chains, root, tokens, new, out };
    turns.begin(&prompt);
    let calls = (0..CALLS).map(|_| turns.timed(&prompt)).collect();
    report("turn_warm", tokens + new, calls, || turns.run(&prompt));

    let others: Vec<_> = (0..OTHERS as u64).map(|seed| text(1_000_000 + seed, tokens + new)).collect();
    others.iter().for_each(|prompt| turns.begin(prompt));
    let calls = others.iter().chain(&others).map(|prompt| turns.timed(prompt)).collect();
    let mut next = others.iter().cycle();
    report("turn_among_others", tokens + new, calls, || {
        next.by_ref().take(1).for_each(|prompt| turns.run(prompt))
    });
    let stats = chains.stats();
    println!(
        "{{\"pieces\":{},\"pieces_max\":{},\"bytes\":{},\"bytes_a_block_remembered\":{:.2},\"bytes_a_block_when_full\":{:.2},\
         \"evictions\":{}}}",
        stats.pieces,
        stats.pieces_max,
        stats.bytes,
        stats.bytes as f64 / (stats.pieces * stats.piece_blocks) as f64,
        ChainLimits::default().bytes_max as f64 / (stats.pieces_max * stats.piece_blocks) as f64,
        stats.evictions,
    );
}

/// Turns of conversations of one length.
struct Turns<'a> {
    chains: &'a SessionChains,
    root: BlockHash,
    tokens: usize,
    new: usize,
    out: Vec<BlockHash>,
}

impl Turns<'_> {
    /// What comes before the turn that is measured.
    fn begin(&mut self, prompt: &[TokenId]) {
        self.chains.chain_into(self.root, &prompt[..self.tokens], &mut self.out);
    }

    fn run(&mut self, prompt: &[TokenId]) {
        self.chains.chain_into(self.root, black_box(&prompt[..self.tokens + self.new]), &mut self.out);
        black_box(&self.out);
    }

    fn timed(&mut self, prompt: &[TokenId]) -> u64 {
        timed(|| self.run(prompt))
    }
}

fn report(case: &str, tokens: usize, mut calls: Vec<u64>, mut call: impl FnMut()) {
    calls.sort_unstable();
    // The scheduler's account is good to a few milliseconds, so it is read around many calls.
    let repeats = 2_000;
    let start = thread_nanoseconds();
    (0..repeats).for_each(|_| call());
    let cpu = (thread_nanoseconds() - start) / repeats;
    println!(
        "{{\"case\":\"{case}\",\"tokens\":{tokens},\"blocks\":{},\"best_ns\":{},\"median_ns\":{},\"cpu_ns\":{cpu},\"calls\":{}}}",
        tokens / BLOCK_SIZE_TOKENS as usize,
        calls[0],
        calls[calls.len() / 2],
        calls.len(),
    );
}

/// Nanoseconds that one call takes.
fn timed<T>(call: impl FnOnce() -> T) -> u64 {
    let start = Instant::now();
    black_box(call());
    start.elapsed().as_nanos() as u64
}

/// Nanoseconds that this thread ran.
fn thread_nanoseconds() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux keeps it");
    text.split(' ').next().and_then(|field| field.parse().ok()).expect("its first field is a number")
}

/// Tokens of a text that `seed` names.
fn text(seed: u64, tokens: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as TokenId % 128_000
    };
    (0..tokens).map(|_| next()).collect()
}
