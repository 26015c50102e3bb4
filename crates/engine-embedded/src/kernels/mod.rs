//! Arithmetic. Each operation is written once over vectors of 16 lanes ([`Simd`]) and compiled for each instruction
//! set; only loads, lane arithmetic, a transposition and the integer dot product differ between them.
//!
//! Invariants, which make rows independent of batch and machine:
//! - an operation on a row reads that row (and, for attention, its sequence's KV) and nothing else;
//! - f32 additions, subtractions, multiplications and divisions happen in an order fixed by the row's own shape and
//!   position, each rounded by itself: no fused multiply-add, no reassociation, no library functions;
//! - integer dot products are exact, so their order is free.
//!
//! Hence all instruction sets give the same bits; `tests` holds them to it.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod matmul;
mod rows;
mod scalar;

use std::fmt;

pub(crate) use attention::{Attention, AttentionScratch};
pub(crate) use matmul::MatMul;
pub(crate) use rows::{ActivationBlock, GateAndQuantise, NormAndQuantise, Quantise, exp_each};

use crate::quant::{Q4Panel, Q8Panel};

/// Lanes of a vector: the width of the widest instruction set; the others use several registers for one vector.
pub(crate) const LANES: usize = 16;

/// Which instructions compute. Never changes a result, only the time it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionSet {
    /// What the compiler makes of portable code for the build's baseline.
    Scalar,
    /// AVX2 and F16C.
    Avx2,
    /// AVX-512 F, BW and VNNI.
    Avx512,
}

impl InstructionSet {
    /// Those that this processor has, slowest first.
    pub fn available() -> Vec<Self> {
        let all = [Self::Scalar, Self::Avx2, Self::Avx512];
        all.into_iter().filter(|set| set.kernels().is_some()).collect()
    }

    /// The fastest that this processor has.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }

    /// The kernels of this instruction set; `None` if the processor lacks it.
    pub(crate) fn kernels(self) -> Option<Kernels> {
        match self {
            Self::Scalar => Some(Kernels(Which::Scalar(scalar::Scalar))),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::detect().map(|simd| Kernels(Which::Avx2(simd))),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::detect().map(|simd| Kernels(Which::Avx512(simd))),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => None,
        }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512-vnni",
        })
    }
}

/// Runs operations with one instruction set, which the processor has: its existence is the proof.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernels(Which);

#[derive(Debug, Clone, Copy)]
enum Which {
    Scalar(scalar::Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

impl Kernels {
    pub(crate) fn run(self, operation: impl Operation) {
        match self.0 {
            Which::Scalar(simd) => operation.run(simd),
            #[cfg(target_arch = "x86_64")]
            Which::Avx2(simd) => simd.run(operation),
            #[cfg(target_arch = "x86_64")]
            Which::Avx512(simd) => simd.run(operation),
        }
    }
}

/// One operation over whole tensors. `run` is `#[inline(always)]`, as is all that it calls, so that it is compiled
/// anew, with all the instructions allowed, inside each instruction set's entry point.
pub(crate) trait Operation {
    fn run<S: Simd>(self, simd: S);
}

/// 16 lanes of f32 and the integer dot product. An implementor's value proves that the processor has the instructions.
/// All lane operations are single IEEE 754 operations.
pub(crate) trait Simd: Copy {
    /// 16 lanes of f32.
    type F: Copy;
    /// One panel's weights, unpacked to bytes: 32 inputs of 16 outputs.
    type Quads: Copy;
    /// Rows that one unpacked panel is multiplied with: what the registers allow.
    const ROW_TILE: usize;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` where either is no number, as the instruction does.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    /// `2^n` of each lane that holds `n + 1.5 * 2^23`, for whole `n` in -126..=127.
    fn power_of_two(self, n: Self::F) -> Self::F;
    /// Asks for memory that will be read soon. Computes nothing.
    #[inline(always)]
    fn prefetch(self, _values: &[f32]) {}
    /// Half precision to single.
    fn load_f16(self, from: &[u16; LANES]) -> Self::F;
    /// Lane `j` of result `i` is lane `i` of row `j`.
    fn transpose(self, rows: [Self::F; LANES]) -> [Self::F; LANES];

    fn quads_q4(self, panel: &Q4Panel) -> Self::Quads;
    fn quads_q8(self, panel: &Q8Panel) -> Self::Quads;
    /// For each output the exact sum over 32 inputs of nibble times activation.
    fn dot_q4(self, weights: &Self::Quads, x: &ActivationBlock) -> Self::F;
    /// For each output the exact sum over 32 inputs of (byte - 128) times activation.
    fn dot_q8(self, weights: &Self::Quads, x: &ActivationBlock) -> Self::F;
}

/// The vector at `index` (in vectors) of a slice.
#[inline(always)]
fn lanes(values: &[f32], index: usize) -> &[f32; LANES] {
    &values.as_chunks().0[index]
}

/// The vector at `index` (in vectors) of a slice, to write.
#[inline(always)]
fn lanes_mut(values: &mut [f32], index: usize) -> &mut [f32; LANES] {
    &mut values.as_chunks_mut().0[index]
}

/// The sum of the lanes, as a tree: halves onto halves.
#[inline(always)]
fn sum_lanes<S: Simd>(simd: S, x: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    simd.store(x, &mut lanes);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests;
