//! A tile of a product of f32 matrices on AVX-512: up to 8 rows by 32 columns in registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the tile's slices hold its rows
//! and steps.

use std::arch::x86_64::*;

use crate::product::{SKINNY_COLS, SKINNY_ROWS, Skinny, Sums, Tile};

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
        // Without steps there are no rows to point at.
        let (mut a, mut b) = (tile.a.as_ptr().wrapping_add(row * tile.a_row), tile.b.as_ptr());
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

/// Tokens between which sums are in registers: sixteen times sixteen products stand against the loads and stores of sixteen sums.
const RUN: usize = 16;

/// Sums of up to 16 rows over many columns.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for; `a` has `rows` rows and `steps` columns, `b` `steps` rows of `cols`.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn skinny(part: &Skinny<'_>, sums: &mut [[f32; SKINNY_COLS]; SKINNY_ROWS]) {
    // SAFETY: the caller's promise; every piece stays below `rows` rows.
    unsafe {
        let mut row = 0;
        while row < part.rows {
            row += match part.rows - row {
                16.. => strip::<16>(part, row, sums),
                8.. => strip::<8>(part, row, sums),
                4.. => strip::<4>(part, row, sums),
                _ => strip::<1>(part, row, sums),
            };
        }
    }
}

/// Rows `row..row + M`; returns M.
#[inline(always)]
unsafe fn strip<const M: usize>(part: &Skinny<'_>, row: usize, sums: &mut [[f32; SKINNY_COLS]; SKINNY_ROWS]) -> usize {
    // SAFETY: the caller's promise; `sums` has whole vectors up to the last column.
    unsafe {
        let a = part.a.as_ptr().add(row * part.a_row);
        for first in (0..part.steps).step_by(RUN) {
            let end = (first + RUN).min(part.steps);
            for col in (0..part.cols).step_by(16) {
                let mask = (u32::MAX >> (32 - (part.cols - col).min(16))) as u16;
                let mut acc: [__m512; M] = std::array::from_fn(|i| match first {
                    0 => _mm512_setzero_ps(),
                    _ => _mm512_loadu_ps(sums[row + i].as_ptr().add(col)),
                });
                for k in first..end {
                    let b = _mm512_maskz_loadu_ps(mask, part.b.as_ptr().add(k * part.b_k + col));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(i * part.a_row + k * part.a_k)), b, *acc);
                    }
                }
                for (i, acc) in acc.into_iter().enumerate() {
                    _mm512_storeu_ps(sums[row + i].as_mut_ptr().add(col), acc);
                }
            }
        }
    }
    M
}
