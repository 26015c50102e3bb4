//! Portable code: what other processors run, and the definition of what the other instruction sets must compute.

use super::{ActivationBlock, LANES, Simd};
use crate::quant::{BLOCK, Q4Panel, Q8Panel, f16_to_f32};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (i, x) in out.iter_mut().enumerate() {
        *x = f(i);
    }
    out
}

/// Weights as signed bytes, `[quad][output][input in quad]`.
type Quads = [[i8; 4 * LANES]; BLOCK / 4];

#[inline(always)]
fn dot(weights: &Quads, x: &ActivationBlock) -> [f32; LANES] {
    let mut sums = [0_i32; LANES];
    for (line, x) in weights.iter().zip(x.quants.as_chunks::<4>().0) {
        for (sum, w) in sums.iter_mut().zip(line.as_chunks::<4>().0) {
            for i in 0..4 {
                *sum += i32::from(w[i]) * i32::from(x[i]);
            }
        }
    }
    each(|i| sums[i] as f32)
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type Quads = Quads;
    const ROW_TILE: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        each(|i| x[i].abs())
    }
    #[inline(always)]
    fn power_of_two(self, n: Self::F) -> Self::F {
        // The low bits of such a number are `n`: moved to the exponent's place and biased, they are `2^n`.
        each(|i| f32::from_bits((n[i].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::F {
        each(|i| f16_to_f32(from[i]))
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut columns = [[0.0; LANES]; LANES];
        for (j, row) in rows.iter().enumerate() {
            for (i, x) in row.iter().enumerate() {
                columns[i][j] = *x;
            }
        }
        columns
    }
    #[inline(always)]
    fn quads_q4(self, panel: &Q4Panel) -> Quads {
        let mut quads = [[0; 4 * LANES]; BLOCK / 4];
        for (i, line) in panel.quants.iter().enumerate() {
            for (j, pair) in line.iter().enumerate() {
                quads[i][j] = (pair & 15).cast_signed();
                quads[i + 4][j] = (pair >> 4).cast_signed();
            }
        }
        quads
    }
    #[inline(always)]
    fn quads_q8(self, panel: &Q8Panel) -> Quads {
        let mut quads = [[0; 4 * LANES]; BLOCK / 4];
        for (quad, line) in quads.iter_mut().zip(&panel.quants) {
            for (signed, byte) in quad.iter_mut().zip(line) {
                *signed = (byte ^ 0x80).cast_signed();
            }
        }
        quads
    }
    #[inline(always)]
    fn dot_q4(self, weights: &Quads, x: &ActivationBlock) -> Self::F {
        dot(weights, x)
    }
    #[inline(always)]
    fn dot_q8(self, weights: &Quads, x: &ActivationBlock) -> Self::F {
        dot(weights, x)
    }
}
