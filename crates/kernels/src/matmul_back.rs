//! Backward of `matmul`: dx = dy W for frozen weights of every type.
//!
//! The gradient of y = W x towards x is the sum over W's rows of dy times the row. W lies with sixteen rows side by side,
//! so its values are spread tile by tile, sixteen rows of thirty-two columns at a time, and multiplied as f32 by `product`'s
//! tiles. Frozen weights have no gradient of their own here.

use std::ops::Range;

use half::{bf16, f16};
use qwenkit_tensor::DType;

use crate::{
    layout::{GROUP_ROWS, UNIT},
    matmul::Compute,
    product::{Join, Mat, Right, TILE_COLS},
    weight::Weight,
};

/// One product of several whose gradients towards the same x are added.
pub struct BackProduct<'a> {
    /// (N, K)
    pub weight: &'a Weight,
    /// (T, N)
    pub dy: &'a [f32],
}

impl Compute {
    /// Backward of `matmul` towards its `x`: `dx`: (T, K) = the sum of dy W over all products; added to what is there if
    /// `into` says so.
    ///
    /// # Panics
    /// If a product's shapes do not fit `dx`.
    pub fn matmul_backward(&self, products: &[BackProduct<'_>], into: Join, dx: &mut [f32]) {
        let mut into = into;
        for BackProduct { weight, dy } in products {
            let tokens = dx.len() / weight.cols();
            assert!(
                dx.len() == tokens * weight.cols() && dy.len() == tokens * weight.rows(),
                "backward of ({tokens}, {}) by ({}, {})",
                weight.cols(),
                weight.rows(),
                weight.cols()
            );
            self.product_with(Mat::new(dy, tokens, weight.rows()), *weight, into, dx);
            into.add = true;
        }
    }
}

impl Right for Weight {
    fn cols(&self) -> usize {
        Weight::cols(self)
    }

    fn lies(&self, _: usize, _: usize) -> Option<(&[f32], usize)> {
        None
    }

    fn copy(&self, rows: Range<usize>, col: usize, out: &mut [f32]) {
        for (row, out) in rows.zip(out.as_chunks_mut::<TILE_COLS>().0) {
            self.columns(row, col, out);
        }
    }
}

impl Weight {
    /// Values `col..col + 32` of row `row`, zero beyond the last column. `col` is a multiple of 32.
    fn columns(&self, row: usize, col: usize, out: &mut [f32; TILE_COLS]) {
        const { assert!(TILE_COLS == UNIT) };
        let (group, r) = (self.group(row / GROUP_ROWS), row % GROUP_ROWS);
        let count = TILE_COLS.min(self.cols() - col);
        if let Some(layout) = self.layout {
            for (half, out) in out.chunks_exact_mut(UNIT / 2).enumerate() {
                let (scale, addend) = layout.scale(group, self.cols(), col / UNIT, half, r);
                for (i, x) in out.iter_mut().enumerate() {
                    let q = layout.quant_value(layout.quant(group, col + half * UNIT / 2 + i, r));
                    *x = scale * q as f32 + addend;
                }
            }
            return;
        }
        out[count..].fill(0.0);
        for (i, x) in out[..count].iter_mut().enumerate() {
            let k = col + i;
            *x = match self.dtype() {
                DType::F32 => bytemuck::cast_slice::<u8, f32>(group)[k * GROUP_ROWS + r],
                DType::F16 => bytemuck::cast_slice::<u8, f16>(group)[k * GROUP_ROWS + r].to_f32(),
                _ => bytemuck::cast_slice::<u8, bf16>(group)[(k / 2 * GROUP_ROWS + r) * 2 + k % 2].to_f32(),
            };
        }
    }
}
