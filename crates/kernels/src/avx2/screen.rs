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
    layout::{GROUP_ROWS, UNIT},
    planes::{COARSE, OFFSET_TIMES_16},
    prefetch,
    screen::{CoarseTile, coarse_by_tiles},
};

/// The type as which first parts lie.
const D: usize = DType::Q5_0 as usize;

coarse_by_tiles!("avx2,fma,f16c");

/// The results of C tokens.
#[inline(always)]
unsafe fn tile<const C: usize>(first: &CoarseTile<'_>, out: &mut [[f32; GROUP_ROWS]]) {
    let CoarseTile { group, x, facts, units, width, .. } = *first;
    assert!(out.len() >= C);
    // SAFETY: the group holds quants and scales of `units` units, and C tokens of the activations exist.
    unsafe {
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for u in 0..units {
                let unit = group.add(COARSE.quants_at(u));
                if half == 0 {
                    // The second half reads the same lines again.
                    let before = COARSE.bytes_before(u);
                    prefetch::ahead(unit.wrapping_sub(before), before + COARSE.unit_bytes());
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
                let scale = factors::<D>(group, u, 0, half).0;
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
}
