//! Blocks a second that one core takes from raw engine events to index events:
//! `cargo run --release -p forebay-engine-events --example decode_rate [vllm-map|vllm-bytes|vllm-list|sglang|sglang-page-1]`.
//!
//! Payloads are encoded before the clock starts, shaped like the captures in `fixtures/`: each batch removes a prompt of
//! 80 tokens, a removal an event, and stores one in one event, in blocks of 16 tokens (of one in the last shape). A hundred
//! thousand blocks are held throughout. The time is that of this thread on a processor.
#![allow(clippy::print_stdout, reason = "prints its figure")]

use std::hint::black_box;

use forebay_engine_events::{
    EngineEvent, EngineHash, EventBatch, GroupKind, RankCache, RankSettings, Removed, Stored, decode,
    encode::{Dialect, encode},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::{Tier, TokenId};

const TOKENS_A_PROMPT: u64 = 80;
/// Engine blocks of all prompts and of those that are held at a time.
const BLOCKS: u64 = 300_000;
const BLOCKS_HELD: u64 = 100_000;
const ROUNDS: u64 = 10;

/// Spreads bits, so that hashes and tokens look like an engine's. Not for anything else.
fn mix(seed: u64) -> u64 {
    let mixed = (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ mixed >> 32
}

fn hashes(prompt: u64, blocks: u64) -> Vec<EngineHash> {
    (0..blocks).map(|block| EngineHash(mix(prompt << 16 | block))).collect()
}

fn prompt(number: u64, block_size_tokens: u32, is_sglang: bool) -> Stored {
    let blocks = TOKENS_A_PROMPT / u64::from(block_size_tokens);
    Stored {
        hashes: hashes(number, blocks),
        parent: None,
        // A vocabulary of 128 thousand: most ids take three bytes, some five.
        tokens: (0..TOKENS_A_PROMPT)
            .map(|index| (mix(number * TOKENS_A_PROMPT + index) % 128_000) as TokenId)
            .collect(),
        block_size_tokens,
        lora_id: None,
        lora_name: None,
        salt: None,
        extra_keys: (!is_sglang).then(|| vec![Vec::new(); blocks as usize]),
        tier: Tier::Device,
        group: (!is_sglang).then_some(0),
        kind: (!is_sglang).then_some(GroupKind::FullAttention),
        window_tokens: None,
    }
}

fn removals(number: u64, stored: &Stored) -> impl Iterator<Item = EngineEvent> {
    let group = stored.group;
    let old = hashes(number, stored.hashes.len() as u64);
    old.into_iter()
        .rev()
        .map(move |hash| EngineEvent::Removed(Removed { hashes: vec![hash], tier: Tier::Device, group }))
}

/// Nanoseconds that this thread ran.
fn thread_nanoseconds() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux keeps it");
    text.split(' ').next().and_then(|field| field.parse().ok()).expect("its first field is a number")
}

fn main() {
    let shape = std::env::args().nth(1).unwrap_or_else(|| "vllm-map".into());
    let (dialect, block_size_tokens) = match &*shape {
        "vllm-map" => (Dialect::VllmMap, 16),
        "vllm-bytes" => (Dialect::VllmMapBytes, 16),
        "vllm-list" => (Dialect::VllmList, 16),
        "sglang" => (Dialect::Sglang, 16),
        "sglang-page-1" => (Dialect::Sglang, 1),
        other => panic!("no shape is called {other}"),
    };
    let blocks_a_prompt = TOKENS_A_PROMPT / u64::from(block_size_tokens);
    let (prompts, prompts_held) = (BLOCKS / blocks_a_prompt, BLOCKS_HELD / blocks_a_prompt);
    let payloads: Vec<Vec<u8>> = (0..prompts)
        .map(|number| {
            let stored = prompt(number, block_size_tokens, dialect == Dialect::Sglang);
            let oldest = (number + prompts - prompts_held) % prompts;
            let events = removals(oldest, &stored).chain([EngineEvent::Stored(stored.clone())]).collect();
            encode(&EventBatch { time_seconds: 1_795_345_302.5, events, dp_rank: Some(0) }, dialect)
        })
        .collect();
    let mut cache = RankCache::new(RankSettings {
        hasher: BlockHasher::new(HashKey::GOLDEN, 16),
        model: "m".into(),
        engine_block_size_tokens: Some(block_size_tokens),
        blocks_max: 1 << 22,
    });
    // The first round fills it: what is removed there was not stored.
    let mut round = || {
        for payload in &payloads {
            let batch = decode(black_box(payload)).expect("it was encoded here");
            black_box(cache.apply(&batch));
        }
    };
    round();
    let start = thread_nanoseconds();
    (0..ROUNDS).for_each(|_| round());
    let seconds = (thread_nanoseconds() - start) as f64 / 1e9;
    let stats = cache.stats();
    let blocks = ROUNDS * prompts * blocks_a_prompt;
    assert_eq!(stats.engine_blocks, prompts_held * blocks_a_prompt, "the number of held blocks is constant");
    println!(
        "{{\"shape\":\"{shape}\",\"blocks_per_cpu_second\":{:.0},\"tokens_per_cpu_second\":{:.0},\"blocks\":{blocks},\
         \"removals\":{blocks},\"block_size_tokens\":{block_size_tokens},\"blocks_held\":{},\
         \"payload_bytes_mean\":{},\"cpu_seconds\":{seconds:.3}}}",
        blocks as f64 / seconds,
        blocks as f64 * f64::from(block_size_tokens) / seconds,
        stats.engine_blocks,
        payloads.iter().map(Vec::len).sum::<usize>() / payloads.len(),
    );
}
