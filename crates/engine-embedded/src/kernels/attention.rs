//! Causal attention of some rows of one sequence over its paged KV.
//!
//! A row at position `p` attends to positions 0..=p, in order, in tiles of 16 positions counted from 0: what it computes
//! depends on its query, `p` and the KV alone. K comes from the pool rotated and with the signs of the place where it was
//! stored; it is multiplied with those of the place where it lies.

use super::{LANES, Operation, Simd, lanes, lanes_mut, rows::exp, sum_lanes};
use crate::{model::KeySigns, pool::SequenceKv};

/// Buffers that attention keeps between calls. They grow with the context.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    /// K of one KV head, turned to columns: `[tile][dimension][position in tile]`.
    keys: Vec<f32>,
    /// Scores, then probabilities, of the query heads computed together: `[head][position]`.
    scores: Vec<f32>,
}

/// Attention of consecutive rows of one sequence, all heads, one layer.
pub(crate) struct Attention<'a> {
    /// Rows of `heads * head_dim`, rotated and scaled.
    pub(crate) queries: &'a [f32],
    pub(crate) out: &'a mut [f32],
    /// Position of the first row.
    pub(crate) start: usize,
    pub(crate) kv: SequenceKv<'a>,
    pub(crate) key_signs: &'a KeySigns,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scratch: &'a mut AttentionScratch,
}

impl Operation for Attention<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let width = self.heads * self.head_dim;
        let rows = self.queries.len() / width;
        let tiles = (self.start + rows).div_ceil(LANES);
        let group = self.heads / self.kv_heads;
        grow(&mut self.scratch.keys, tiles * LANES * self.head_dim);
        grow(&mut self.scratch.scores, HEAD_TILE * tiles * LANES);
        for kv_head in 0..self.kv_heads {
            self.gather_keys(simd, kv_head, self.start + rows);
            for row in 0..rows {
                let mut head = kv_head * group;
                while head < (kv_head + 1) * group {
                    let first = row * width + head * self.head_dim;
                    head += match (kv_head + 1) * group - head {
                        1 => self.attend::<S, 1>(simd, first, self.start + row, kv_head),
                        2 => self.attend::<S, 2>(simd, first, self.start + row, kv_head),
                        _ => self.attend::<S, HEAD_TILE>(simd, first, self.start + row, kv_head),
                    };
                }
            }
        }
    }
}

/// Query heads of one KV head that are computed together, to hide latencies and share loads: SmolLM2's group.
const HEAD_TILE: usize = 3;
/// Vectors of V accumulated together: registers for three heads at once.
const WIDE: usize = 4;

fn grow(buffer: &mut Vec<f32>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
}

impl Attention<'_> {
    /// Fills `scratch.keys` for the first `length` positions of a KV head; slots beyond them become zero.
    #[inline(always)]
    fn gather_keys<S: Simd>(&mut self, simd: S, kv_head: usize, length: usize) {
        let dims = self.head_dim;
        let first = kv_head * dims;
        let tiles = self.scratch.keys.chunks_exact_mut(LANES * dims).take(length.div_ceil(LANES));
        for (tile, keys) in tiles.enumerate() {
            let position = tile * LANES;
            let valid = LANES.min(length - position);
            let signs = &self.key_signs.tile(tile)[first..first + dims];
            // The next tile may lie in another block, anywhere: the processor's own prefetching does not see it coming,
            // and a decode step at long context waits for nothing else.
            for next in (position + LANES..length).take(LANES) {
                simd.prefetch(&self.kv.k(next)[first..first + dims]);
            }
            for part in 0..dims / LANES {
                let mut rows = [simd.splat(0.0); LANES];
                for (i, row) in rows[..valid].iter_mut().enumerate() {
                    *row = simd.load(lanes(&self.kv.k(position + i)[first..first + dims], part));
                }
                for (i, column) in simd.transpose(rows).into_iter().enumerate() {
                    let dim = part * LANES + i;
                    simd.store(simd.mul(column, simd.splat(signs[dim])), lanes_mut(keys, dim));
                }
            }
        }
    }

    /// `HEADS` query heads of one row, whose first number is at `first`. Returns `HEADS`.
    #[inline(always)]
    fn attend<S: Simd, const HEADS: usize>(
        &mut self,
        simd: S,
        first: usize,
        position: usize,
        kv_head: usize,
    ) -> usize {
        let dims = self.head_dim;
        let length = position + 1;
        let padded = length.next_multiple_of(LANES);
        let scores = &mut self.scratch.scores[..HEADS * padded];
        let queries: [&[f32]; HEADS] =
            std::array::from_fn(|i| &self.queries[first + i * dims..first + (i + 1) * dims]);

        score(simd, &queries, &self.scratch.keys, scores, padded);
        let mut factors = [0.0; HEADS];
        for (factor, scores) in factors.iter_mut().zip(scores.chunks_exact_mut(padded)) {
            scores[length..].fill(f32::NEG_INFINITY);
            *factor = 1.0 / exponentiate(simd, scores);
        }

        let out = &mut self.out[first..first + HEADS * dims];
        let vectors = dims / LANES;
        let mut vector = 0;
        while vector < vectors {
            let column = kv_head * dims + vector * LANES;
            let at = vector * LANES;
            vector += if vectors - vector >= WIDE {
                blend::<S, HEADS, WIDE>(
                    simd,
                    &self.kv,
                    length,
                    column,
                    scores,
                    padded,
                    factors,
                    &mut out[at..],
                    dims,
                )
            } else {
                blend::<S, HEADS, 1>(
                    simd,
                    &self.kv,
                    length,
                    column,
                    scores,
                    padded,
                    factors,
                    &mut out[at..],
                    dims,
                )
            };
        }
        HEADS
    }
}

/// Dot products of each query with every key of the first `padded` positions.
#[inline(always)]
fn score<S: Simd, const HEADS: usize>(
    simd: S,
    queries: &[&[f32]; HEADS],
    keys: &[f32],
    scores: &mut [f32],
    padded: usize,
) {
    let dims = queries[0].len();
    for (tile, keys) in keys.chunks_exact(LANES * dims).take(padded / LANES).enumerate() {
        let mut sums = [simd.splat(0.0); HEADS];
        for (dim, key) in keys.as_chunks::<LANES>().0.iter().enumerate() {
            let key = simd.load(key);
            for head in 0..HEADS {
                sums[head] = simd.add(sums[head], simd.mul(simd.splat(queries[head][dim]), key));
            }
        }
        for head in 0..HEADS {
            simd.store(sums[head], lanes_mut(&mut scores[head * padded..], tile));
        }
    }
}

/// Replaces scores by `exp(score - largest)` and returns their sum. Masked scores are minus infinity; what `exp`'s floor
/// makes of them is too small to change a sum that is at least 1.
#[inline(always)]
fn exponentiate<S: Simd>(simd: S, scores: &mut [f32]) -> f32 {
    let mut most = simd.splat(f32::NEG_INFINITY);
    for vector in scores.as_chunks::<LANES>().0 {
        most = simd.max(simd.load(vector), most);
    }
    let mut vector = [0.0; LANES];
    simd.store(most, &mut vector);
    let largest = vector.into_iter().fold(f32::NEG_INFINITY, |most, x| if x > most { x } else { most });
    let mut sums = simd.splat(0.0);
    for vector in scores.as_chunks_mut::<LANES>().0 {
        let weight = exp(simd, simd.sub(simd.load(vector), simd.splat(largest)));
        simd.store(weight, vector);
        sums = simd.add(sums, weight);
    }
    sum_lanes(simd, sums)
}

/// `VECTORS` vectors of the weighted sum of V, from column `column` of a token's V, for `HEADS` heads. Returns `VECTORS`.
#[allow(
    clippy::too_many_arguments,
    reason = "an inner loop: a struct of these would only be taken apart again"
)]
#[allow(
    clippy::needless_range_loop,
    reason = "the same indices run through several arrays, and constants unroll"
)]
#[inline(always)]
fn blend<S: Simd, const HEADS: usize, const VECTORS: usize>(
    simd: S,
    kv: &SequenceKv<'_>,
    length: usize,
    column: usize,
    weights: &[f32],
    padded: usize,
    factors: [f32; HEADS],
    out: &mut [f32],
    dims: usize,
) -> usize {
    let mut sums = [[simd.splat(0.0); VECTORS]; HEADS];
    for position in 0..length {
        let v = &kv.v(position)[column..column + VECTORS * LANES];
        if position + LANES < length {
            simd.prefetch(&kv.v(position + LANES)[column..column + VECTORS * LANES]);
        }
        for vector in 0..VECTORS {
            let v = simd.load(lanes(v, vector));
            for head in 0..HEADS {
                let weight = simd.splat(weights[head * padded + position]);
                sums[head][vector] = simd.add(sums[head][vector], simd.mul(weight, v));
            }
        }
    }
    for head in 0..HEADS {
        for vector in 0..VECTORS {
            let scaled = simd.mul(sums[head][vector], simd.splat(factors[head]));
            simd.store(scaled, lanes_mut(&mut out[head * dims..], vector));
        }
    }
    VECTORS
}
