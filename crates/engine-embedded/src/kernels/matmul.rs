//! Rows of quantised activations times a matrix of panels.

use super::{ActivationBlock, LANES, Operation, Simd};
use crate::quant::{BLOCK, Matrix, Panels, Q4Panel, Q8Panel};

/// `out[row][output] = sum over blocks of (scale * dot) * x.scale [+ min * x.scaled_sum]`, blocks in order.
///
/// Rows of `x` have `inputs / 32` blocks each; rows of `out` have `outputs` numbers each.
pub(crate) struct MatMul<'a> {
    pub(crate) matrix: &'a Matrix,
    pub(crate) x: &'a [ActivationBlock],
    pub(crate) out: &'a mut [f32],
}

/// A panel format: how its weights unpack and what a block adds to the sum.
trait Panel: Sized {
    fn quads<S: Simd>(&self, simd: S) -> S::Quads;
    /// The factors of a block: scale and, where the format has one, minimum.
    fn factors<S: Simd>(&self, simd: S) -> (S::F, S::F);
    fn accumulate<S: Simd>(
        simd: S,
        sum: S::F,
        quads: &S::Quads,
        factors: (S::F, S::F),
        x: &ActivationBlock,
    ) -> S::F;
}

impl Panel for Q4Panel {
    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S) -> S::Quads {
        simd.quads_q4(self)
    }
    #[inline(always)]
    fn factors<S: Simd>(&self, simd: S) -> (S::F, S::F) {
        (simd.load_f16(&self.scale), simd.load_f16(&self.min))
    }
    #[inline(always)]
    fn accumulate<S: Simd>(
        simd: S,
        sum: S::F,
        quads: &S::Quads,
        (scale, min): (S::F, S::F),
        x: &ActivationBlock,
    ) -> S::F {
        let product = simd.mul(simd.mul(simd.dot_q4(quads, x), scale), simd.splat(x.scale));
        simd.add(simd.add(sum, product), simd.mul(min, simd.splat(x.scaled_sum)))
    }
}

impl Panel for Q8Panel {
    #[inline(always)]
    fn quads<S: Simd>(&self, simd: S) -> S::Quads {
        simd.quads_q8(self)
    }
    #[inline(always)]
    fn factors<S: Simd>(&self, simd: S) -> (S::F, S::F) {
        let scale = simd.load(&self.scale);
        (scale, scale)
    }
    #[inline(always)]
    fn accumulate<S: Simd>(
        simd: S,
        sum: S::F,
        quads: &S::Quads,
        (scale, _): (S::F, S::F),
        x: &ActivationBlock,
    ) -> S::F {
        simd.add(sum, simd.mul(simd.mul(simd.dot_q8(quads, x), scale), simd.splat(x.scale)))
    }
}

impl Operation for MatMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match &self.matrix.panels {
            Panels::Q4(panels) => multiply(simd, panels, self.matrix, self.x, self.out),
            Panels::Q8(panels) => multiply(simd, panels, self.matrix, self.x, self.out),
        }
    }
}

/// Group by group, so that a group's weights come from memory once and then serve every tile of rows from cache.
#[inline(always)]
fn multiply<S: Simd, P: Panel>(
    simd: S,
    panels: &[P],
    matrix: &Matrix,
    x: &[ActivationBlock],
    out: &mut [f32],
) {
    let blocks = matrix.inputs / BLOCK;
    let rows = x.len() / blocks;
    assert_eq!((x.len(), out.len()), (rows * blocks, rows * matrix.outputs), "shapes agree");
    for (group, panels) in panels.chunks_exact(blocks).enumerate() {
        let column = group * LANES;
        let width = LANES.min(matrix.outputs - column);
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            let x = &x[row * blocks..];
            let mut sums = [[0.0; LANES]; 8];
            let done = if left >= 8 && S::ROW_TILE >= 8 {
                tile::<S, P, 8>(simd, panels, x, &mut sums)
            } else if left >= 4 {
                tile::<S, P, 4>(simd, panels, x, &mut sums)
            } else if left >= 2 {
                tile::<S, P, 2>(simd, panels, x, &mut sums)
            } else {
                tile::<S, P, 1>(simd, panels, x, &mut sums)
            };
            for (i, sums) in sums[..done].iter().enumerate() {
                let start = (row + i) * matrix.outputs + column;
                out[start..start + width].copy_from_slice(&sums[..width]);
            }
            row += done;
        }
    }
}

/// One group's outputs for the first `ROWS` rows of `x`. What a row gets does not depend on `ROWS`.
#[inline(always)]
fn tile<S: Simd, P: Panel, const ROWS: usize>(
    simd: S,
    panels: &[P],
    x: &[ActivationBlock],
    out: &mut [[f32; LANES]; 8],
) -> usize {
    let blocks = panels.len();
    let x: [&[ActivationBlock]; ROWS] = std::array::from_fn(|row| &x[row * blocks..(row + 1) * blocks]);
    let mut sums = [simd.splat(0.0); ROWS];
    for (block, panel) in panels.iter().enumerate() {
        let quads = panel.quads(simd);
        let factors = panel.factors(simd);
        for row in 0..ROWS {
            sums[row] = P::accumulate(simd, sums[row], &quads, factors, &x[row][block]);
        }
    }
    for (sum, out) in sums.into_iter().zip(out) {
        simd.store(sum, out);
    }
    ROWS
}
