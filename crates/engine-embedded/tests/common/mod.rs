//! An engine without a scheduler: one executor, one pool, sequences one at a time or together.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::sync::Arc;

use forebay_engine_embedded::{ChunkInput, Executor, Logits, SampleParams, VecPool, Weights, sample};

pub const BLOCK_SIZE: u32 = 16;

/// The sequence of splitmix64, for prompts and choices.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit)) as u32
    }
}

/// One engine and one sequence in it.
#[derive(Clone)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    /// Of `tokens`, those whose KV is in the pool.
    pub computed: u32,
    pub table: Vec<u32>,
    pub pool: VecPool,
}

impl Sequence {
    /// A sequence with room for `room` tokens, whose blocks lie in the pool in order.
    pub fn new(weights: &Weights, prompt: &[u32], room: u32) -> Self {
        let blocks = room.div_ceil(BLOCK_SIZE);
        let pool = VecPool::new(blocks, weights.kv_block_bytes(BLOCK_SIZE), BLOCK_SIZE);
        Self { tokens: prompt.to_vec(), computed: 0, table: (0..blocks).collect(), pool }
    }

    /// Computes what is not computed, in chunks of at most `chunk` tokens; returns the last token's logits.
    pub fn compute(&mut self, executor: &mut Executor, chunk: u32) -> Vec<f32> {
        let mut logits = Logits::new();
        let end = self.tokens.len() as u32;
        while self.computed < end {
            let next = end.min(self.computed + chunk);
            let chunk = ChunkInput {
                start: self.computed,
                tokens: &self.tokens[self.computed as usize..next as usize],
                blocks: &self.table,
                want_logits: next == end,
            };
            executor.execute(&mut self.pool, &[chunk], &mut logits);
            self.computed = next;
        }
        logits.row(0).to_vec()
    }

    /// Appends `count` tokens, each the most likely.
    pub fn continue_greedily(&mut self, executor: &mut Executor, count: usize) -> &[u32] {
        for _ in 0..count {
            let logits = self.compute(executor, 512);
            self.tokens.push(sample(&logits, &greedy()).0);
        }
        &self.tokens[self.tokens.len() - count..]
    }

    /// Exchanges the contents of two blocks.
    pub fn swap(&mut self, a: u32, b: u32) {
        let kept = self.pool.payload(a).to_vec();
        let other = self.pool.payload(b).to_vec();
        self.pool.payload_mut(a).copy_from_slice(&other);
        self.pool.payload_mut(b).copy_from_slice(&kept);
    }
}

pub fn greedy() -> SampleParams {
    SampleParams { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, choice: 0, position: 0, logprobs: None }
}

/// What happens to a prompt's KV before the continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Damage {
    /// One block becomes zero.
    Zero,
    /// Two blocks of the prompt change places.
    Swap,
    /// One block is replaced by the block in the same place of another prompt.
    Foreign,
}

/// Shares of prompts whose greedy continuation of `tokens` (the first of them from undamaged KV, as after a prefill
/// elsewhere) changes when one block is damaged: zeroed, swapped, replaced; and the mean number of different tokens in an
/// undamaged continuation.
#[derive(Debug)]
pub struct Sensitivity {
    pub zero: f64,
    pub swap: f64,
    pub foreign: f64,
    pub distinct: f64,
}

impl Sensitivity {
    pub fn least(&self) -> f64 {
        self.zero.min(self.swap).min(self.foreign)
    }
}

pub fn sensitivity(weights: &Arc<Weights>, prompts: &[Vec<u32>], tokens: usize) -> Sensitivity {
    let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
    let mut random = Random(99);
    let (mut changed, mut tried, mut distinct) = ([0_u32; 3], [0_u32; 3], 0);
    for (i, prompt) in prompts.iter().enumerate() {
        let length = prompt.len() as u32;
        let room = length + tokens as u32;
        let mut intact = Sequence::new(weights, prompt, room);
        intact.continue_greedily(&mut executor, 1);
        let other: Vec<u32> =
            prompts[(i + 1) % prompts.len()].iter().cycle().take(prompt.len()).copied().collect();
        let mut foreign = Sequence::new(weights, &other, room);
        foreign.compute(&mut executor, 512);

        let mut whole = intact.clone();
        let expected = whole.continue_greedily(&mut executor, tokens - 1).to_vec();
        let mut kinds = expected.clone();
        kinds.sort_unstable();
        kinds.dedup();
        distinct += kinds.len();
        for (kind, damage) in [Damage::Zero, Damage::Swap, Damage::Foreign].into_iter().enumerate() {
            let blocks = length.div_ceil(BLOCK_SIZE);
            let full = length / BLOCK_SIZE;
            let block = random.below(blocks);
            let mut damaged = intact.clone();
            match damage {
                Damage::Zero => damaged.pool.payload_mut(if full < 2 { 0 } else { block }).fill(0.0),
                Damage::Swap if full < 2 => continue,
                Damage::Swap => {
                    let first = random.below(full);
                    damaged.swap(first, (first + 1 + random.below(full - 1)) % full);
                }
                Damage::Foreign => {
                    let block = if full < 2 { 0 } else { block };
                    damaged.pool.payload_mut(block).copy_from_slice(foreign.pool.payload(block));
                }
            }
            tried[kind] += 1;
            changed[kind] += u32::from(damaged.continue_greedily(&mut executor, tokens - 1) != expected);
        }
    }
    let share = |kind: usize| f64::from(changed[kind]) / f64::from(tried[kind]);
    Sensitivity {
        zero: share(0),
        swap: share(1),
        foreign: share(2),
        distinct: distinct as f64 / prompts.len() as f64,
    }
}
