//! A turn of a long conversation: hashing its prompt and looking it up, as a router does for each request.

use std::time::Duration;

use forebay_kv_hash::{BlockHasher, ChainLimits, HashKey, SessionChains};
use forebay_kv_index::Overlaps;
use forebay_types::{BlockHash, KvEventBatch};
use serde_json::{Value, json};

use crate::{
    forebay::{Forebay, rank_id, stored},
    machine,
    options::Options,
    report,
    speed::workload,
};

const CONVERSATION_TOKENS: u32 = 100_000;
const TURN_TOKENS: u32 = 500;
const BLOCK_TOKENS: u32 = 16;
const TURNS: u32 = 400;
/// Ranks of the index; one of them holds the conversation.
const RANKS: usize = 8;

/// Thread CPU time of one turn after another. Each has the same past and new words at its end.
pub fn run(options: &Options) -> Value {
    let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK_TOKENS);
    let chains = SessionChains::new(hasher, ChainLimits::default());
    let root = hasher.root("model", "tenant");
    let mut prompt: Vec<u32> =
        (0..CONVERSATION_TOKENS).map(|token| token.wrapping_mul(0x9e37_79b9) >> 15).collect();
    let index = filled(options, &hasher.chain(root, &prompt));
    let mut hashes = Vec::new();
    let mut answer = Overlaps::default();
    let mut times = Vec::new();
    for turn in 0..TURNS {
        prompt.truncate(CONVERSATION_TOKENS as usize);
        prompt.extend((0..TURN_TOKENS).map(|token| token ^ turn << 12));
        let began = machine::thread_cpu();
        chains.chain_into(root, &prompt, &mut hashes);
        let hashed = machine::thread_cpu();
        index.index().overlaps(&hashes, &mut answer);
        let found = machine::thread_cpu();
        assert_eq!(answer.as_slice(), [(rank_id(0), CONVERSATION_TOKENS / BLOCK_TOKENS)]);
        times.push((hashed - began, found - hashed));
    }
    let us = |time: Duration| time.as_nanos() as f64 / 1e3;
    let cold = times.remove(0);
    let median = |part: fn(&(Duration, Duration)) -> Duration| {
        report::rounded(report::median(&times.iter().map(|each| us(part(each))).collect::<Vec<_>>()), 2)
    };
    let row = json!({
        "conversation_tokens": CONVERSATION_TOKENS, "turn_tokens": TURN_TOKENS, "block_tokens": BLOCK_TOKENS,
        "first_us": us(cold.0 + cold.1), "first_hash_us": us(cold.0), "first_look_up_us": us(cold.1),
        "turn_us": median(|each| each.0 + each.1), "turn_hash_us": median(|each| each.0),
        "turn_look_up_us": median(|each| each.1),
    });
    eprintln!(
        "turn of {TURN_TOKENS} tokens onto {CONVERSATION_TOKENS}: {} us (hashing {}, look-up {}); the first time {:.1} us",
        row["turn_us"],
        row["turn_hash_us"],
        row["turn_look_up_us"],
        us(cold.0 + cold.1),
    );
    row
}

/// An index of other prompts in which one rank also holds `chain`.
fn filled(options: &Options, chain: &[BlockHash]) -> Forebay {
    let mut index = Forebay::new();
    let workload = workload(options, RANKS);
    for events in workload.stores.chunks(1024) {
        crate::contender::Contender::prepare(&mut index, &workload, events);
        crate::contender::Contender::apply(&mut index);
    }
    let sequence = index.index().rank(rank_id(0)).map_or(0, |rank| rank.sequence_next);
    // As an engine announces it: what each of its steps computed.
    let mut parent = None;
    for (number, blocks) in chain.chunks(512).enumerate() {
        let events = vec![stored(parent, blocks.to_vec())];
        index.apply_batch(&KvEventBatch { rank: rank_id(0), sequence: sequence + number as u64, events });
        parent = blocks.last().map(|hash| hash.0);
    }
    index
}
