//! A tile of a product of f32 matrices on AVX-512: up to 8 rows by 32 columns in registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the tile's slices hold its rows
//! and steps.

use std::arch::x86_64::*;

use crate::product::{Sums, Tile};

/// The tile's sums for its first `count` rows and the columns up to `width`.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for; `tile.a` has `count` rows of `steps` values, `tile.b` `steps` rows of 32.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn sum(tile: &Tile<'_>, count: usize, width: usize, sums: &mut Sums) {
    // SAFETY: the caller's promise; every piece stays below `count` rows.
    unsafe {
        let mut row = 0;
        while row < count {
            row += match (count - row, width > 16) {
                (8.., true) => rows::<8, 2>(tile, row, sums),
                (4.., true) => rows::<4, 2>(tile, row, sums),
                (_, true) => rows::<1, 2>(tile, row, sums),
                (8.., false) => rows::<8, 1>(tile, row, sums),
                (4.., false) => rows::<4, 1>(tile, row, sums),
                (_, false) => rows::<1, 1>(tile, row, sums),
            };
        }
    }
}

/// Rows `row..row + M` by V vectors of columns; returns M.
#[inline(always)]
unsafe fn rows<const M: usize, const V: usize>(tile: &Tile<'_>, row: usize, sums: &mut Sums) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); V]; M];
        let (mut a, mut b) = (tile.a.as_ptr().add(row * tile.a_row), tile.b.as_ptr());
        for _ in 0..tile.steps {
            let mut b_values = [_mm512_setzero_ps(); V];
            for v in 0..V {
                b_values[v] = _mm512_loadu_ps(b.add(16 * v));
            }
            for i in 0..M {
                let x = _mm512_set1_ps(*a.add(i * tile.a_row));
                for v in 0..V {
                    acc[i][v] = _mm512_fmadd_ps(x, b_values[v], acc[i][v]);
                }
            }
            // The pointers of the step after the last one are not followed.
            a = a.wrapping_add(tile.a_k);
            b = b.wrapping_add(tile.b_k);
        }
        for i in 0..M {
            for v in 0..V {
                _mm512_storeu_ps(sums[row + i].as_mut_ptr().add(16 * v), acc[i][v]);
            }
        }
    }
    M
}
