//! Operations on one row at a time: normalisation, activation function, quantisation, exponential.

use super::{LANES, Operation, Simd, lanes, lanes_mut, scalar::Scalar, sum_lanes};
use crate::quant::BLOCK;

/// 32 activations as signed bytes in -127..=127: value = `scale * quant`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(16))]
pub(crate) struct ActivationBlock {
    pub(crate) quants: [i8; BLOCK],
    pub(crate) scale: f32,
    /// `scale * sum`: what a weight format with a minimum multiplies it with.
    pub(crate) scaled_sum: f32,
    /// Of the quants.
    pub(crate) sum: i32,
}

impl ActivationBlock {
    pub(crate) const ZERO: Self = Self { quants: [0; BLOCK], scale: 0.0, scaled_sum: 0.0, sum: 0 };
}

/// Adding and subtracting it rounds to a whole number, ties to even, for |x| < 2^22: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;

/// e^x, to 2 units in the last place, for x clamped to -87..=88. A polynomial, because `f32::exp` is the platform's
/// library and does not vectorise.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    const LN2_HIGH: f32 = 355.0 / 512.0; // so few enough bits that n * LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = simd.min(simd.max(x, simd.splat(-87.0)), simd.splat(88.0));
    let shifted = simd.add(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)), simd.splat(ROUND));
    let n = simd.sub(shifted, simd.splat(ROUND));
    let rest = simd.sub(x, simd.mul(n, simd.splat(LN2_HIGH)));
    let rest = simd.sub(rest, simd.mul(n, simd.splat(LN2_LOW)));
    // Taylor to degree 6: |rest| <= ln(2) / 2, so what is left out is below 1.2e-7 of the value.
    let mut sum = simd.splat(1.0 / 720.0);
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = simd.add(simd.mul(sum, rest), simd.splat(coefficient));
    }
    simd.mul(sum, simd.power_of_two(shifted))
}

/// Replaces each number by its exponential: for the sampler, on any instruction set.
pub(crate) fn exp_each(values: &mut [f32]) {
    let (vectors, rest) = values.as_chunks_mut::<LANES>();
    for vector in vectors {
        *vector = exp(Scalar, *vector);
    }
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    rest.copy_from_slice(&exp(Scalar, last)[..rest.len()]);
}

#[inline(always)]
fn quantise_block<S: Simd>(simd: S, values: [S::F; BLOCK / LANES], out: &mut ActivationBlock) {
    let mut sizes = [0.0; LANES];
    simd.store(simd.max(simd.abs(values[0]), simd.abs(values[1])), &mut sizes);
    let mut largest = 0.0_f32;
    for size in sizes {
        largest = if size > largest { size } else { largest };
    }
    let scale = largest / 127.0;
    // Below this the reciprocal overflows; such a block is zero for every purpose.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    let mut rounded = [0.0; BLOCK];
    for (i, value) in values.into_iter().enumerate() {
        let shifted = simd.add(simd.mul(value, simd.splat(inverse)), simd.splat(ROUND));
        simd.store(shifted, lanes_mut(&mut rounded, i));
    }
    // The low byte of such a number is its whole part. A value that is no number gives some byte, and never a panic.
    let mut sum = 0;
    for (quant, rounded) in out.quants.iter_mut().zip(rounded) {
        *quant = (rounded.to_bits() as i8).max(-127);
        sum += i32::from(*quant);
    }
    out.scale = scale;
    out.sum = sum;
    out.scaled_sum = scale * sum as f32;
}

/// Quantises numbers, 32 to a block; rows need no telling apart.
pub(crate) struct Quantise<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) out: &'a mut [ActivationBlock],
}

impl Operation for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, out) in self.x.as_chunks::<BLOCK>().0.iter().zip(self.out) {
            quantise_block(simd, [simd.load(lanes(x, 0)), simd.load(lanes(x, 1))], out);
        }
    }
}

/// Root-mean-square normalisation of each row, times `weight`, quantised.
pub(crate) struct NormAndQuantise<'a> {
    /// Rows as long as `weight`.
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
    pub(crate) out: &'a mut [ActivationBlock],
}

impl Operation for NormAndQuantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width / BLOCK)) {
            let mut squares = simd.splat(0.0);
            for i in 0..width / LANES {
                let x = simd.load(lanes(x, i));
                squares = simd.add(squares, simd.mul(x, x));
            }
            let mean = sum_lanes(simd, squares) / width as f32;
            let factor = simd.splat(1.0 / (mean + self.epsilon).sqrt());
            for (block, out) in out.iter_mut().enumerate() {
                let mut values = [factor; 2];
                for (half, value) in values.iter_mut().enumerate() {
                    let i = 2 * block + half;
                    let scaled = simd.mul(simd.load(lanes(x, i)), factor);
                    *value = simd.mul(scaled, simd.load(lanes(self.weight, i)));
                }
                quantise_block(simd, values, out);
            }
        }
    }
}

/// `silu(gate) * up`, quantised; rows need no telling apart.
pub(crate) struct GateAndQuantise<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [ActivationBlock],
}

impl Operation for GateAndQuantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (block, out) in self.out.iter_mut().enumerate() {
            let mut values = [simd.splat(0.0); 2];
            for (half, value) in values.iter_mut().enumerate() {
                let i = 2 * block + half;
                let gate = simd.load(lanes(self.gate, i));
                let decay = exp(simd, simd.sub(simd.splat(0.0), gate));
                let silu = simd.div(gate, simd.add(simd.splat(1.0), decay));
                *value = simd.mul(silu, simd.load(lanes(self.up, i)));
            }
            quantise_block(simd, values, out);
        }
    }
}
