//! AVX2 and F16C: a vector is two registers.
//!
//! Every intrinsic in here needs only AVX2 or F16C. SAFETY, for all of the blocks below: a value of [`Avx2`] exists only
//! where [`Avx2::detect`] found both, and loads and stores go through references to arrays of the right size.

use std::arch::x86_64::*;

use super::{ActivationBlock, LANES, Operation, Simd};
use crate::quant::{Q4Panel, Q8Panel};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    pub(crate) fn run(self, operation: impl Operation) {
        // SAFETY: `self` exists, so the processor has the features.
        unsafe { enter(self, operation) }
    }
}

/// Where the operation is compiled with these features on.
#[target_feature(enable = "avx2,f16c")]
fn enter(simd: Avx2, operation: impl Operation) {
    operation.run(simd);
}

type F = [__m256; 2];

macro_rules! lanewise {
    ($instruction:ident, $a:ident, $b:ident) => {
        // SAFETY: as above.
        unsafe { [$instruction($a[0], $b[0]), $instruction($a[1], $b[1])] }
    };
}

/// Eight rows of eight lanes, transposed.
#[inline(always)]
fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: as above.
    unsafe {
        let mut pairs = rows;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = pairs;
        for i in 0..2 {
            let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
            fours[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        let mut columns = fours;
        for i in 0..4 {
            columns[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
            columns[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        }
        columns
    }
}

/// Four activations, in every 32-bit lane.
#[inline(always)]
fn broadcast(x: &ActivationBlock, quad: usize) -> __m256i {
    // SAFETY: as above.
    unsafe { _mm256_set1_epi32(i32::from_ne_bytes(x.quants.as_chunks::<4>().0[quad].map(i8::cast_unsigned))) }
}

#[inline(always)]
fn load_bytes(line: &[u8; 4 * LANES]) -> [__m256i; 2] {
    let (halves, _) = line.as_chunks::<32>();
    // SAFETY: as above; each half is 32 bytes.
    unsafe { [_mm256_loadu_si256(halves[0].as_ptr().cast()), _mm256_loadu_si256(halves[1].as_ptr().cast())] }
}

impl Simd for Avx2 {
    type F = F;
    type Quads = [[__m256i; 2]; 8];
    const ROW_TILE: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: as above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> F {
        let (halves, _) = from.as_chunks::<8>();
        // SAFETY: as above; each half is eight floats.
        unsafe { [_mm256_loadu_ps(halves[0].as_ptr()), _mm256_loadu_ps(halves[1].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; LANES]) {
        let (halves, _) = to.as_chunks_mut::<8>();
        // SAFETY: as above; each half is eight floats.
        unsafe {
            _mm256_storeu_ps(halves[0].as_mut_ptr(), x[0]);
            _mm256_storeu_ps(halves[1].as_mut_ptr(), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        lanewise!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        lanewise!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        lanewise!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        lanewise!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        lanewise!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        lanewise!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn abs(self, x: F) -> F {
        let sign = self.splat(-0.0);
        lanewise!(_mm256_andnot_ps, sign, x)
    }
    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        // SAFETY: as above.
        n.map(|n| unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
            _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)))
        })
    }
    #[inline(always)]
    fn prefetch(self, values: &[f32]) {
        for line in values.chunks(LANES) {
            // SAFETY: a hint, which any address may be given to; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
        }
    }
    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> F {
        let (halves, _) = from.as_chunks::<8>();
        // SAFETY: as above; each half is 16 bytes.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(halves[0].as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(halves[1].as_ptr().cast())),
            ]
        }
    }
    #[inline(always)]
    fn transpose(self, rows: [F; LANES]) -> [F; LANES] {
        let quarter = |row: usize, half: usize| transpose8(std::array::from_fn(|i| rows[row + i][half]));
        let (upper, lower) = ([quarter(0, 0), quarter(0, 1)], [quarter(8, 0), quarter(8, 1)]);
        std::array::from_fn(|i| [upper[i / 8][i % 8], lower[i / 8][i % 8]])
    }
    #[inline(always)]
    fn quads_q4(self, panel: &Q4Panel) -> Self::Quads {
        // SAFETY: as above.
        let nibbles = unsafe { _mm256_set1_epi8(15) };
        let lines: [_; 4] = std::array::from_fn(|i| load_bytes(&panel.quants[i]));
        std::array::from_fn(|i| {
            lines[i % 4].map(|line| {
                // SAFETY: as above.
                unsafe {
                    let shifted = if i < 4 { line } else { _mm256_srli_epi16::<4>(line) };
                    _mm256_and_si256(shifted, nibbles)
                }
            })
        })
    }
    #[inline(always)]
    fn quads_q8(self, panel: &Q8Panel) -> Self::Quads {
        // SAFETY: as above.
        let offset = unsafe { _mm256_set1_epi8(-128) };
        // SAFETY: as above.
        std::array::from_fn(|i| {
            load_bytes(&panel.quants[i]).map(|line| unsafe { _mm256_xor_si256(line, offset) })
        })
    }
    #[inline(always)]
    fn dot_q4(self, weights: &Self::Quads, x: &ActivationBlock) -> F {
        // SAFETY: as above. A 16-bit lane takes 16 products of at most 15 * 127: 30,480 fits.
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 2];
            for (quad, weights) in weights.iter().enumerate() {
                let x = broadcast(x, quad);
                for half in 0..2 {
                    sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(weights[half], x));
                }
            }
            let ones = _mm256_set1_epi16(1);
            sums.map(|sum| _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, ones)))
        }
    }
    #[inline(always)]
    fn dot_q8(self, weights: &Self::Quads, x: &ActivationBlock) -> F {
        // SAFETY: as above. The sign moves to the activation, which is never -128; a 16-bit lane takes two products of
        // at most 128 * 127: 32,512 fits.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [_mm256_setzero_si256(); 2];
            for (quad, weights) in weights.iter().enumerate() {
                let x = broadcast(x, quad);
                for half in 0..2 {
                    let size = _mm256_abs_epi8(weights[half]);
                    let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, weights[half]));
                    sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                }
            }
            sums.map(|sum| _mm256_cvtepi32_ps(sum))
        }
    }
}
