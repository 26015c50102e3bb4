//! One step as the shell must carry it out.

use std::ops::Range;

use forebay_types::{LegId, TokenId};

use crate::pool::Generation;

/// One step. Order for the shell: publish `rewritten`, start `imports`, do `copies`, compute `chunks`, draw tokens.
///
/// A reusable buffer: [`crate::Scheduler::plan`] clears and fills it, so that a step with one decode allocates nothing.
#[derive(Debug, Clone, Default)]
pub struct StepPlan {
    /// Blocks with a new owner; their generations must be published before anything is written to them.
    pub rewritten: Vec<(u32, Generation)>,
    /// Transfers to start now, empty ones too: their end must be reported.
    pub imports: Vec<Import>,
    /// Whole blocks to copy inside the pool, before the chunks.
    pub copies: Vec<BlockCopy>,
    /// Rows to compute, `step_tokens_max` tokens at most.
    pub chunks: Vec<Chunk>,
    /// Jobs whose work begins with this step.
    pub started: Vec<Started>,
    /// Prompt tokens among the chunks.
    pub prefill_tokens: u32,
    /// The sum over prompt chunks of `m·c + m²/2`, for `m` tokens on `c` computed ones.
    pub prefill_attention: f64,
    /// Chunks that decode one token.
    pub decodes: u32,
    /// Tokens of context that those read.
    pub context_tokens: u64,
    tokens: Vec<TokenId>,
    tables: Vec<u32>,
    samples: Vec<u32>,
    /// Tokens and tables are left out.
    shapes_only: bool,
}

/// A run of consecutive tokens of one sequence to compute.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Whose.
    pub leg: LegId,
    /// Position of the first token.
    pub start: u32,
    /// How many tokens.
    pub count: u32,
    samples: Range<usize>,
    tokens: Range<usize>,
    table: Range<usize>,
}

/// A whole block to copy inside the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Read.
    pub from: u32,
    /// Written.
    pub to: u32,
}

/// KV to bring in from another pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// For whom.
    pub leg: LegId,
    /// (index in the source's list of blocks, block here).
    pub blocks: Vec<(u32, u32)>,
}

/// A job whose work begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Which.
    pub leg: LegId,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
}

impl StepPlan {
    /// A plan for those who compute nothing: chunks have their lengths and what they sample, and no tokens and no blocks.
    pub fn of_shapes() -> Self {
        Self { shapes_only: true, ..Self::default() }
    }

    /// Choices to draw from a chunk's last row: none in the middle of a prompt, all of them at the end of a shared one.
    pub fn samples(&self, chunk: &Chunk) -> &[u32] {
        &self.samples[chunk.samples.clone()]
    }

    /// The tokens that a chunk computes.
    pub fn tokens(&self, chunk: &Chunk) -> &[TokenId] {
        &self.tokens[chunk.tokens.clone()]
    }

    /// The blocks of a chunk's sequence, from position 0 through the chunk's end.
    pub fn blocks(&self, chunk: &Chunk) -> &[u32] {
        &self.tables[chunk.table.clone()]
    }

    /// Whether there is nothing to compute or copy.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.copies.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        let Self {
            rewritten,
            imports,
            copies,
            chunks,
            started,
            prefill_tokens,
            prefill_attention,
            decodes,
            context_tokens,
            tokens,
            tables,
            samples,
            shapes_only: _,
        } = self;
        rewritten.clear();
        imports.clear();
        copies.clear();
        chunks.clear();
        started.clear();
        (*prefill_tokens, *prefill_attention, *decodes, *context_tokens) = (0, 0.0, 0, 0);
        tokens.clear();
        tables.clear();
        samples.clear();
    }

    pub(crate) fn push_chunk(
        &mut self,
        leg: LegId,
        start: u32,
        tokens: &[TokenId],
        table: &[u32],
        samples: &[u32],
    ) {
        fn keep<T: Copy>(all: &mut Vec<T>, more: &[T]) -> Range<usize> {
            let start = all.len();
            all.extend_from_slice(more);
            start..all.len()
        }
        let count = tokens.len() as u32;
        let (tokens, table) = if self.shapes_only { (&[][..], &[][..]) } else { (tokens, table) };
        let samples = keep(&mut self.samples, samples);
        let (tokens, table) = (keep(&mut self.tokens, tokens), keep(&mut self.tables, table));
        self.chunks.push(Chunk { leg, start, count, samples, tokens, table });
    }
}
