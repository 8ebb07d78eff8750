//! The first part of a weight in two parts on AVX2: a tile of 16 rows, in two registers, by up to 4 tokens.
//!
//! Quants are below 32, so that products of four steps add up in 16 bits. Order of operations as in `portable::screen`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the group and the rows it is given
//! exist in the weight and the activations it is given.

use std::arch::x86_64::*;

use qwenkit_tensor::DType;

use super::matmul::{HALF_ROWS, factors, step};
use crate::{
    activations::tile_of,
    layout::{GROUP_ROWS, UNIT},
    matmul::Rows,
    planes::{COARSE, OFFSET_TIMES_16},
    prefetch,
    weight::Weight,
};

/// The type as which first parts lie.
const D: usize = DType::Q5_0 as usize;

/// Coarse results of group `g` for all rows of `x`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn coarse(weight: &Weight, g: usize, x: &Rows<'_>, sums: &mut [[f32; GROUP_ROWS]]) {
    let group = weight.coarse(g).0;
    let mut t = 0;
    while t < x.rows {
        // SAFETY: each tile stays inside the rows.
        t += unsafe {
            match x.rows - t {
                4.. => tile::<4>(group, x, t, &mut sums[t..]),
                2.. => tile::<2>(group, x, t, &mut sums[t..]),
                _ => tile::<1>(group, x, t, &mut sums[t..]),
            }
        };
    }
}

/// Tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn tile<const C: usize>(group: &[u8], x: &Rows<'_>, t: usize, out: &mut [[f32; GROUP_ROWS]]) -> usize {
    let units = x.cols / UNIT;
    // The tile of activations is as wide as this one or twice as wide.
    let (first, width) = tile_of(x.widest, t, x.rows);
    let at = first * units + (t - first);
    assert!(out.len() >= C && group.len() >= COARSE.group_bytes(x.cols));
    // SAFETY: the group holds quants and scales of `units` units, and rows t..t + C of the activations exist.
    unsafe {
        let (group, plane) = (group.as_ptr(), group.as_ptr().add(COARSE.quant_plane_bytes(x.cols)));
        let (x, facts) = (x.quants.as_ptr().add(at * UNIT), x.facts.as_ptr().add(at));
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for u in 0..units {
                let unit = group.add(u * COARSE.unit_bytes());
                if half == 0 {
                    // The second half reads the same lines again.
                    prefetch::ahead(unit, COARSE.unit_bytes());
                    prefetch::ahead(plane.wrapping_add(COARSE.scale_offsets(u).0), 1);
                }
                let mut sum = [_mm256_setzero_si256(); C];
                for four in 0..2 {
                    let mut pairs = [_mm256_setzero_si256(); C];
                    for s in 4 * four..4 * four + 4 {
                        let q = step::<D, false>(unit, s, half);
                        for c in 0..C {
                            let own = x.add((u * width + c) * UNIT + 4 * s).cast::<i32>().read_unaligned();
                            pairs[c] = _mm256_add_epi16(pairs[c], _mm256_maddubs_epi16(q, _mm256_set1_epi32(own)));
                        }
                    }
                    for c in 0..C {
                        sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(pairs[c], _mm256_set1_epi16(1)));
                    }
                }
                let scale = factors::<D>(plane, u, 0, half).0;
                for c in 0..C {
                    let facts = &*facts.add(u * width + c);
                    let offset = _mm256_set1_epi32(OFFSET_TIMES_16 * facts.minus_sum[0]);
                    let twice = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32::<4>(sum[c]), offset));
                    acc[c] = _mm256_fmadd_ps(twice, _mm256_mul_ps(scale, _mm256_set1_ps(0.5 * facts.scale)), acc[c]);
                }
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                _mm256_storeu_ps(out[HALF_ROWS * half..].as_mut_ptr(), acc);
            }
        }
    }
    C
}
