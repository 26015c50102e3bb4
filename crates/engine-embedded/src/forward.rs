//! The forward pass: chunks of tokens with block tables in, KV in the pool and logits out.
//!
//! Start at [`Executor::execute`]. It cuts the rows of all chunks into passes of bounded size and runs each through all
//! layers; within a layer, all rows' K and V are stored before any row attends.
//!
//! Invariant: what a row computes depends on its token, its position and the KV of the positions before it. How many
//! rows are with it, and in which pass, changes nothing, not in the last bit.

use std::{ptr::NonNull, sync::Arc};

use forebay_types::TokenId;

use crate::{
    InstructionSet, KvPool, Weights,
    kernels::{
        ActivationBlock, Attention, AttentionScratch, GateAndQuantise, Kernels, LANES, MatMul,
        NormAndQuantise, Quantise,
    },
    model::{Layer, ModelConfig},
    pool::SequenceKv,
    quant::{BLOCK, Matrix},
};

/// Rows of one pass: enough that a matrix's trip from memory is shared by many, few enough that activations stay in a
/// core's second-level cache and scratch in a few megabytes.
const PASS_ROWS: usize = 128;

/// Consecutive tokens of one sequence, to compute in one step.
#[derive(Debug, Clone, Copy)]
pub struct ChunkInput<'a> {
    /// Position of the first token: all positions before it have their KV in the pool, or in an earlier chunk of the
    /// same step.
    pub start: u32,
    /// What to compute; a decode step has one token.
    pub tokens: &'a [TokenId],
    /// The sequence's block table from position 0, at least through the last token.
    pub blocks: &'a [u32],
    /// Whether to produce the logits that follow the last token.
    pub want_logits: bool,
}

/// Rows of logits over the vocabulary, one for each chunk that wanted them, in the chunks' order.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    values: Vec<f32>,
    vocab: usize,
}

impl Logits {
    /// No rows; a step fills it and it keeps its memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many rows the last step left.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.vocab).unwrap_or(0)
    }

    /// The logits of the `index`th chunk that wanted them.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..(index + 1) * self.vocab]
    }
}

/// One engine's means to compute: the shared weights and buffers of its own. One thread uses it at a time.
#[derive(Debug)]
pub struct Executor {
    weights: Arc<Weights>,
    kernels: Kernels,
    instruction_set: InstructionSet,
    block_size: usize,
    scratch: Scratch,
}

/// Consecutive rows of one pass that belong to one sequence.
struct Segment {
    /// First row in the pass.
    row: usize,
    rows: usize,
    /// Position of the first row.
    start: usize,
    /// Where its block table lies among the step's pointers.
    blocks: std::ops::Range<usize>,
}

impl Executor {
    /// An executor with the fastest instructions of this processor.
    ///
    /// # Panics
    /// If `block_size_tokens` is not a power of two, or less than 16.
    pub fn new(weights: Arc<Weights>, block_size_tokens: u32) -> Self {
        let detected = InstructionSet::detect();
        Self::with_instruction_set(weights, block_size_tokens, detected).expect("the processor was asked")
    }

    /// An executor with given instructions, for comparing them; `None` if the processor lacks them.
    ///
    /// # Panics
    /// If `block_size_tokens` is not a power of two, or less than 16.
    pub fn with_instruction_set(
        weights: Arc<Weights>,
        block_size_tokens: u32,
        instruction_set: InstructionSet,
    ) -> Option<Self> {
        let possible = block_size_tokens.is_power_of_two() && block_size_tokens >= 16;
        assert!(possible, "a block size of {block_size_tokens} tokens: 16, 32, 64 and so on are possible");
        let kernels = instruction_set.kernels()?;
        let scratch = Scratch::new(weights.config());
        Some(Self { weights, kernels, instruction_set, block_size: block_size_tokens as usize, scratch })
    }

    /// The instructions it computes with.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// Computes the chunks in order: stores their KV in the pool and leaves the logits that they want in `logits`.
    ///
    /// Costs time in proportion to tokens, and to tokens times the context before them; allocates a list of block
    /// pointers and, when a context is longer than any before, room for its keys.
    ///
    /// # Panics
    /// If the pool's blocks have another size than the weights and block size ask for, a chunk is empty, a block table is
    /// too short or names a block outside the pool, a token is outside the vocabulary, or a position outside the context.
    /// All are the scheduler's mistakes; nothing is written before they are checked.
    pub fn execute(&mut self, pool: &mut dyn KvPool, chunks: &[ChunkInput<'_>], logits: &mut Logits) {
        self.check(pool, chunks);
        logits.vocab = self.weights.config().vocab as usize;
        logits.values.clear();
        let mut pointers = Vec::with_capacity(chunks.iter().map(|chunk| chunk.blocks.len()).sum());
        let mut tables = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let first = pointers.len();
            pointers.extend(chunk.blocks.iter().map(|index| pool.block(*index)));
            tables.push(first..pointers.len());
        }
        let mut pass = Pass::default();
        for (chunk, table) in chunks.iter().zip(tables) {
            let mut done = 0;
            while done < chunk.tokens.len() {
                let count = (chunk.tokens.len() - done).min(PASS_ROWS - pass.tokens.len());
                pass.segments.push(Segment {
                    row: pass.tokens.len(),
                    rows: count,
                    start: chunk.start as usize + done,
                    blocks: table.clone(),
                });
                pass.tokens.extend_from_slice(&chunk.tokens[done..done + count]);
                done += count;
                if chunk.want_logits && done == chunk.tokens.len() {
                    pass.wanted.push(pass.tokens.len() - 1);
                }
                if pass.tokens.len() == PASS_ROWS {
                    self.run_pass(&pass, &pointers, logits);
                    pass.clear();
                }
            }
        }
        if !pass.tokens.is_empty() {
            self.run_pass(&pass, &pointers, logits);
        }
    }

    fn check(&self, pool: &dyn KvPool, chunks: &[ChunkInput<'_>]) {
        let config = self.weights.config();
        assert_eq!(pool.block_size_tokens() as usize, self.block_size, "tokens in a block of the pool");
        let block_bytes = self.weights.kv_block_bytes(pool.block_size_tokens());
        assert_eq!(pool.block_bytes(), block_bytes, "bytes in a block of the pool");
        for chunk in chunks {
            assert!(!chunk.tokens.is_empty(), "a chunk computes something");
            let end = chunk.start as usize + chunk.tokens.len();
            assert!(end <= config.context_tokens_max as usize, "position {end} is beyond the context");
            assert!(
                chunk.blocks.len() * self.block_size >= end,
                "the block table ends before position {end}"
            );
            for token in chunk.tokens {
                assert!(*token < config.vocab, "token {token} is outside the vocabulary");
            }
            for block in chunk.blocks {
                assert!(*block < pool.blocks(), "block {block} is outside the pool");
            }
        }
    }

    fn run_pass(&mut self, pass: &Pass, pointers: &[NonNull<f32>], logits: &mut Logits) {
        let Self { weights, kernels, scratch, .. } = self;
        let weights = weights.as_ref();
        let hidden = weights.config.hidden as usize;
        let rows = pass.tokens.len();
        for (token, x) in pass.tokens.iter().zip(scratch.x.chunks_exact_mut(hidden)) {
            weights.embedding.decode_row(*token as usize, x);
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            let mut step = LayerStep { weights, layer, kernels: *kernels, rows, scratch };
            step.queries_keys_values();
            for segment in &pass.segments {
                let config = &weights.config;
                let width = (config.kv_heads * config.head_dim) as usize;
                let blocks = &pointers[segment.blocks.clone()];
                // SAFETY: `check` held the pool's block size to this layout, and the pool's promises hold until
                // `execute` returns. `attend` reads K and V only after `store` wrote them.
                let kv = unsafe { SequenceKv::new(blocks, self.block_size, index, width) };
                step.store(segment, kv);
            }
            for segment in &pass.segments {
                let config = &weights.config;
                let width = (config.kv_heads * config.head_dim) as usize;
                let blocks = &pointers[segment.blocks.clone()];
                // SAFETY: as above; every row of the pass is stored by now.
                let kv = unsafe { SequenceKv::new(blocks, self.block_size, index, width) };
                step.attend(segment, kv);
            }
            step.attention_output();
            step.feed_forward();
        }
        self.read_out(pass, logits);
    }

    /// Logits of the rows that are wanted.
    fn read_out(&mut self, pass: &Pass, logits: &mut Logits) {
        let Self { weights, kernels, scratch, .. } = self;
        let hidden = weights.config.hidden as usize;
        let count = pass.wanted.len();
        if count == 0 {
            return;
        }
        for (row, target) in pass.wanted.iter().zip(scratch.projected.chunks_exact_mut(hidden)) {
            target.copy_from_slice(&scratch.x[row * hidden..(row + 1) * hidden]);
        }
        let quantised = &mut scratch.quantised[..count * hidden / BLOCK];
        kernels.run(NormAndQuantise {
            x: &scratch.projected[..count * hidden],
            weight: &weights.output_norm,
            epsilon: weights.config.norm_eps,
            out: quantised,
        });
        let first = logits.values.len();
        logits.values.resize(first + count * logits.vocab, 0.0);
        let matrix = weights.output.as_ref().unwrap_or(&weights.embedding);
        kernels.run(MatMul { matrix, x: quantised, out: &mut logits.values[first..] });
    }
}

/// The rows that go through the layers together.
#[derive(Default)]
struct Pass {
    tokens: Vec<TokenId>,
    segments: Vec<Segment>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
}

impl Pass {
    fn clear(&mut self) {
        self.tokens.clear();
        self.segments.clear();
        self.wanted.clear();
    }
}

/// Activations of one pass, row by row.
#[derive(Debug)]
struct Scratch {
    /// The residual stream.
    x: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    /// What goes back to the residual stream.
    projected: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// The next matrix's input.
    quantised: Vec<ActivationBlock>,
    attention: AttentionScratch,
}

impl Scratch {
    fn new(config: &ModelConfig) -> Self {
        let rows = |width: u32| vec![0.0; PASS_ROWS * width as usize];
        let attention_width = config.heads * config.head_dim;
        let kv_width = config.kv_heads * config.head_dim;
        let widest = config.hidden.max(attention_width).max(config.ffn) as usize;
        Self {
            x: rows(config.hidden),
            query: rows(attention_width),
            key: rows(kv_width),
            value: rows(kv_width),
            attended: rows(attention_width),
            projected: rows(config.hidden),
            gate: rows(config.ffn),
            up: rows(config.ffn),
            quantised: vec![ActivationBlock::ZERO; PASS_ROWS * widest / BLOCK],
            attention: AttentionScratch::default(),
        }
    }
}

/// One layer over the rows of one pass.
struct LayerStep<'a> {
    weights: &'a Weights,
    layer: &'a Layer,
    kernels: Kernels,
    rows: usize,
    scratch: &'a mut Scratch,
}

impl LayerStep<'_> {
    fn normalise(&mut self, weight: &[f32]) {
        let width = weight.len();
        self.kernels.run(NormAndQuantise {
            x: &self.scratch.x[..self.rows * width],
            weight,
            epsilon: self.weights.config.norm_eps,
            out: &mut self.scratch.quantised[..self.rows * width / BLOCK],
        });
    }

    fn queries_keys_values(&mut self) {
        let Layer { attention_norm, query, key, value, .. } = self.layer;
        self.normalise(attention_norm);
        let Scratch { query: q, key: k, value: v, quantised, .. } = &mut *self.scratch;
        for (matrix, out) in [(query, q), (key, k), (value, v)] {
            multiply(self.kernels, matrix, quantised, self.rows, out);
        }
    }

    /// Rotates a segment's queries and keys and stores its K and V.
    fn store(&mut self, segment: &Segment, kv: SequenceKv<'_>) {
        let Weights { config, rope, key_signs, .. } = self.weights;
        let head_dim = config.head_dim as usize;
        let (width, kv_width) = (config.heads as usize * head_dim, config.kv_heads as usize * head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for i in 0..segment.rows {
            let (row, position) = (segment.row + i, segment.start + i);
            let query = &mut self.scratch.query[row * width..(row + 1) * width];
            rope.rotate(position, query, head_dim);
            query.iter_mut().for_each(|x| *x *= scale);
            let range = row * kv_width..(row + 1) * kv_width;
            let key = &mut self.scratch.key[range.clone()];
            rope.rotate(position, key, head_dim);
            key.iter_mut().zip(key_signs.tile(position / LANES)).for_each(|(x, sign)| *x *= sign);
            kv.write(position, key, &self.scratch.value[range]);
        }
    }

    fn attend(&mut self, segment: &Segment, kv: SequenceKv<'_>) {
        let config = &self.weights.config;
        let width = (config.heads * config.head_dim) as usize;
        let range = segment.row * width..(segment.row + segment.rows) * width;
        let Scratch { query, attended, attention, .. } = &mut *self.scratch;
        self.kernels.run(Attention {
            queries: &query[range.clone()],
            out: &mut attended[range],
            start: segment.start,
            kv,
            key_signs: &self.weights.key_signs,
            heads: config.heads as usize,
            kv_heads: config.kv_heads as usize,
            head_dim: config.head_dim as usize,
            scratch: attention,
        });
    }

    fn attention_output(&mut self) {
        let width = self.layer.attention_output.inputs;
        let Scratch { attended, quantised, .. } = &mut *self.scratch;
        self.kernels.run(Quantise {
            x: &attended[..self.rows * width],
            out: &mut quantised[..self.rows * width / BLOCK],
        });
        self.project(&self.layer.attention_output);
    }

    fn feed_forward(&mut self) {
        let Layer { ffn_norm, gate, up, down, .. } = self.layer;
        self.normalise(ffn_norm);
        let Scratch { gate: gates, up: ups, quantised, .. } = &mut *self.scratch;
        multiply(self.kernels, gate, quantised, self.rows, gates);
        multiply(self.kernels, up, quantised, self.rows, ups);
        let length = self.rows * down.inputs;
        self.kernels.run(GateAndQuantise {
            gate: &gates[..length],
            up: &ups[..length],
            out: &mut quantised[..length / BLOCK],
        });
        self.project(down);
    }

    /// Multiplies what is quantised and adds the product to the residual stream.
    fn project(&mut self, matrix: &Matrix) {
        let Scratch { x, projected, quantised, .. } = &mut *self.scratch;
        multiply(self.kernels, matrix, quantised, self.rows, projected);
        for (x, more) in x[..self.rows * matrix.outputs].iter_mut().zip(projected) {
            *x += *more;
        }
    }
}

fn multiply(kernels: Kernels, matrix: &Matrix, x: &[ActivationBlock], rows: usize, out: &mut [f32]) {
    let x = &x[..rows * matrix.inputs / BLOCK];
    kernels.run(MatMul { matrix, x, out: &mut out[..rows * matrix.outputs] });
}

#[cfg(test)]
mod tests;
