//! AVX-512 F, BW and VNNI: a vector is one register, and one instruction multiplies and adds 64 pairs of bytes.
//!
//! SAFETY, for all of the blocks below: a value of [`Avx512`] exists only where [`Avx512::detect`] found the features,
//! and loads and stores go through references to arrays of the right size.

use std::arch::x86_64::*;

use super::{ActivationBlock, LANES, Operation, Simd};
use crate::quant::{Q4Panel, Q8Panel};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni"))
        .then_some(Self(()))
    }

    pub(crate) fn run(self, operation: impl Operation) {
        // SAFETY: `self` exists, so the processor has the features.
        unsafe { enter(self, operation) }
    }
}

/// Where the operation is compiled with these features on.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn enter(simd: Avx512, operation: impl Operation) {
    operation.run(simd);
}

type F = __m512;

#[inline(always)]
fn load_line(line: &[u8; 4 * LANES]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

/// Adds all products of weight bytes and activations to `start`, for 16 outputs.
#[inline(always)]
fn dot(start: __m512i, weights: &[__m512i; 8], x: &ActivationBlock) -> F {
    // SAFETY: as above.
    unsafe {
        let mut sum = start;
        for (weights, x) in weights.iter().zip(x.quants.as_chunks::<4>().0) {
            let x = _mm512_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned)));
            sum = _mm512_dpbusd_epi32(sum, *weights, x);
        }
        _mm512_cvtepi32_ps(sum)
    }
}

impl Simd for Avx512 {
    type F = F;
    type Quads = [__m512i; 8];
    const ROW_TILE: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> F {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; LANES]) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, x: F) -> F {
        // SAFETY: as above.
        unsafe { _mm512_abs_ps(x) }
    }
    #[inline(always)]
    fn power_of_two(self, n: F) -> F {
        // SAFETY: as above.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
        }
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
        // SAFETY: as above; 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn transpose(self, rows: [F; LANES]) -> [F; LANES] {
        // SAFETY: as above.
        unsafe {
            // Within each quarter of 4 lanes: columns of 4 rows become registers, as two rounds of interleaving.
            let mut fours = rows;
            for i in 0..4 {
                let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
                let (low_ab, high_ab) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (low_cd, high_cd) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                fours[4 * i] = _mm512_shuffle_ps::<0x44>(low_ab, low_cd);
                fours[4 * i + 1] = _mm512_shuffle_ps::<0xee>(low_ab, low_cd);
                fours[4 * i + 2] = _mm512_shuffle_ps::<0x44>(high_ab, high_cd);
                fours[4 * i + 3] = _mm512_shuffle_ps::<0xee>(high_ab, high_cd);
            }
            // Then quarters change places: register `4 i + k` holds, in quarter `q`, column `4 q + k` of rows `4 i..`.
            let mut columns = fours;
            for k in 0..4 {
                let [a, b, c, d] = [fours[k], fours[4 + k], fours[8 + k], fours[12 + k]];
                let (even_ab, odd_ab) =
                    (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even_cd, odd_cd) =
                    (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                columns[k] = _mm512_shuffle_f32x4::<0x88>(even_ab, even_cd);
                columns[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd);
                columns[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even_ab, even_cd);
                columns[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_cd);
            }
            columns
        }
    }
    #[inline(always)]
    fn quads_q4(self, panel: &Q4Panel) -> Self::Quads {
        // SAFETY: as above.
        unsafe {
            let nibbles = _mm512_set1_epi8(15);
            let mut quads = [_mm512_setzero_si512(); 8];
            for (i, line) in panel.quants.iter().enumerate() {
                let line = load_line(line);
                quads[i] = _mm512_and_si512(line, nibbles);
                quads[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibbles);
            }
            quads
        }
    }
    #[inline(always)]
    fn quads_q8(self, panel: &Q8Panel) -> Self::Quads {
        // SAFETY: as above.
        let mut quads = unsafe { [_mm512_setzero_si512(); 8] };
        for (quad, line) in quads.iter_mut().zip(&panel.quants) {
            *quad = load_line(line);
        }
        quads
    }
    #[inline(always)]
    fn dot_q4(self, weights: &Self::Quads, x: &ActivationBlock) -> F {
        // SAFETY: as above.
        dot(unsafe { _mm512_setzero_si512() }, weights, x)
    }
    #[inline(always)]
    fn dot_q8(self, weights: &Self::Quads, x: &ActivationBlock) -> F {
        // Starting below by 128 times the sum of activations takes the bytes' offset away.
        // SAFETY: as above.
        dot(unsafe { _mm512_set1_epi32(-128 * x.sum) }, weights, x)
    }
}
