//! Backward of quantised matrix products on AVX2: a tile of 16 columns of W, in two registers, by up to 4 tokens.
//!
//! Order of operations as in `portable::matmul_back`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for.

use std::arch::x86_64::*;

use crate::{
    activations::{TILE_ROWS, tile_of},
    matmul_back::{BackTask, GradFacts},
    portable,
    turned::{BLOCK, HALF, STEPS, SUBS},
};

/// Tokens of a tile: with the step's two halves and their absolute values, no more sums fit 16 registers.
const TILE_TOKENS: usize = 4;
/// Columns in one register.
const QUARTER: usize = HALF / 2;

/// Computes the task's 32 columns for all rows.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn run(task: &BackTask<'_>) {
    let rows = task.grads.rows;
    let mut t = 0;
    // SAFETY: each tile stays inside the rows.
    unsafe {
        while t < rows {
            t += match rows - t {
                TILE_TOKENS.. => tile::<4>(task, t),
                2.. => tile::<2>(task, t),
                _ => tile::<1>(task, t),
            };
        }
    }
}

/// All four vectors of columns by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn tile<const C: usize>(task: &BackTask<'_>, t: usize) -> usize {
    let (turned, grads) = (task.turned, task.grads);
    let blocks = turned.blocks;
    // The tile of gradients is as wide as this one or twice as wide.
    let (first, width) = tile_of(TILE_ROWS, t, grads.rows);
    let at = first * blocks + (t - first);
    assert!(
        (first + width) * blocks <= grads.facts.len()
            && grads.facts.len() * BLOCK <= grads.quants.len()
            && 2 * blocks <= turned.scales.len()
            && 2 * blocks * STEPS <= turned.quants.len()
    );
    // SAFETY: tokens `t..t + C` lie in the tile, and all columns have all blocks, by the assertion.
    unsafe {
        let (x, facts) = (grads.quants.as_ptr().add(at * BLOCK), grads.facts.as_ptr().add(at));
        for quarter in 0..4 {
            let (half, own) = (quarter / 2, quarter % 2);
            let steps = turned.quants.as_ptr().add(half * blocks * STEPS).cast::<u8>().add(32 * own);
            let scales = turned.scales.as_ptr().add(half * blocks).cast::<f32>().add(QUARTER * own);
            let mut acc = [_mm256_setzero_ps(); C];
            for b in 0..blocks {
                let (steps, x) = (steps.add(b * STEPS * 64), x.add(b * width * BLOCK));
                let mut part = [_mm256_setzero_ps(); C];
                for sub in 0..SUBS {
                    let mut sum = [_mm256_setzero_si256(); C];
                    for s in sub * STEPS / SUBS..(sub + 1) * STEPS / SUBS {
                        // Signed again: two products of 128 by 127 fit 16 bits, of 255 they would not.
                        let q = _mm256_xor_si256(_mm256_loadu_si256(steps.add(64 * s).cast()), _mm256_set1_epi8(-128));
                        let size = _mm256_abs_epi8(q);
                        for c in 0..C {
                            let four = _mm256_set1_epi32(x.add(c * BLOCK + 4 * s).cast::<i32>().read_unaligned());
                            let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four, q));
                            sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                        }
                    }
                    for c in 0..C {
                        let scale = _mm256_set1_ps((*facts.add(b * width + c)).scale[sub]);
                        part[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), scale, part[c]);
                    }
                }
                let scale = _mm256_loadu_ps(scales.add(b * HALF));
                for c in 0..C {
                    acc[c] = _mm256_fmadd_ps(part[c], scale, acc[c]);
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                let out = task.out.slice((t + c) * task.width + task.first + quarter * QUARTER, QUARTER);
                let mut x = _mm256_mul_ps(acc, _mm256_set1_ps(task.into.alpha));
                if task.into.add {
                    x = _mm256_add_ps(_mm256_loadu_ps(out.as_ptr()), x);
                }
                _mm256_storeu_ps(out.as_mut_ptr(), x);
            }
        }
    }
    C
}

/// Quantises a block: the portable form, whose registers the compiler fills.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn quantize(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> GradFacts {
    portable::matmul_back::quantize(x, quants)
}
