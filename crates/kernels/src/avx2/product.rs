//! A tile of a product of f32 matrices on AVX2: up to 4 rows by 16 columns in registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the tile's slices hold its rows
//! and steps.

use std::arch::x86_64::*;

use crate::product::{Sums, TILE_COLS, Tile};

/// Values of a vector.
const LANES: usize = 8;
/// Vectors of columns at once: with four rows eight sums, which hide the latency of the multiply-add.
const VECTORS: usize = 2;

/// The tile's sums for its first `count` rows and the columns up to `width`.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for; `tile.a` has `count` rows of `steps` values, `tile.b` `steps` rows of 32.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn sum(tile: &Tile<'_>, count: usize, width: usize, sums: &mut Sums) {
    // SAFETY: the caller's promise; every piece stays below `count` rows and 32 columns.
    unsafe {
        for col in (0..width.min(TILE_COLS)).step_by(VECTORS * LANES) {
            let mut row = 0;
            while row < count {
                row += match count - row {
                    4.. => rows::<4>(tile, row, col, sums),
                    2.. => rows::<2>(tile, row, col, sums),
                    _ => rows::<1>(tile, row, col, sums),
                };
            }
        }
    }
}

/// Rows `row..row + M` by the columns from `col`; returns M.
#[inline(always)]
unsafe fn rows<const M: usize>(tile: &Tile<'_>, row: usize, col: usize, sums: &mut Sums) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); VECTORS]; M];
        let (mut a, mut b) = (tile.a.as_ptr().wrapping_add(row * tile.a_row), tile.b.as_ptr().wrapping_add(col));
        for _ in 0..tile.steps {
            let b_values: [__m256; VECTORS] = std::array::from_fn(|v| _mm256_loadu_ps(b.add(LANES * v)));
            for i in 0..M {
                let x = _mm256_set1_ps(*a.add(i * tile.a_row));
                for v in 0..VECTORS {
                    acc[i][v] = _mm256_fmadd_ps(x, b_values[v], acc[i][v]);
                }
            }
            // The pointers of the step after the last one are not followed.
            a = a.wrapping_add(tile.a_k);
            b = b.wrapping_add(tile.b_k);
        }
        for i in 0..M {
            for v in 0..VECTORS {
                _mm256_storeu_ps(sums[row + i].as_mut_ptr().add(col + LANES * v), acc[i][v]);
            }
        }
    }
    M
}
