//! The first part of a weight in two parts on AVX-512: sixteen rows a vector by up to 4 tokens. Order of operations as in
//! `portable::screen`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the group and the rows it is given
//! exist in the weight and the activations it is given.

use std::arch::x86_64::*;

use qwenkit_tensor::DType;

use super::unit;
use crate::{
    layout::{GROUP_ROWS, UNIT},
    planes::{COARSE, OFFSET_TIMES_16},
    prefetch,
    screen::{CoarseTile, coarse_by_tiles},
};

/// The type as which first parts lie.
const D: usize = DType::Q5_0 as usize;

coarse_by_tiles!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2");

/// The results of C tokens.
#[inline(always)]
unsafe fn tile<const C: usize>(first: &CoarseTile<'_>, out: &mut [[f32; GROUP_ROWS]]) {
    let CoarseTile { group, x, facts, units, width, .. } = *first;
    assert!(out.len() >= C);
    // SAFETY: the group holds quants and scales of `units` units, and C tokens of the activations exist.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); C];
        for u in 0..units {
            let (quants, before) = (group.add(COARSE.quants_at(u)), COARSE.bytes_before(u));
            prefetch::ahead(quants.wrapping_sub(before), before + COARSE.unit_bytes());
            let scale = unit::factors::<D>(&unit::head::<D>(group, u), group, u).scale[0];
            let quants = unit::quants::<D>(quants);
            for c in 0..C {
                let own = x.add((u * width + c) * UNIT);
                let facts = &*facts.add(u * width + c);
                // Two sums of four steps each wait half as long as one of eight.
                let mut dots = [_mm512_setzero_si512(); 2];
                for s in 0..8 {
                    let four = _mm512_set1_epi32(own.add(4 * s).cast::<i32>().read_unaligned());
                    dots[s % 2] = _mm512_dpbusd_epi32(dots[s % 2], quants[s], four);
                }
                let offset = _mm512_set1_epi32(OFFSET_TIMES_16 * facts.minus_sum[0]);
                let sum = _mm512_slli_epi32::<4>(_mm512_add_epi32(dots[0], dots[1]));
                let twice = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset));
                acc[c] = _mm512_fmadd_ps(twice, _mm512_mul_ps(scale, _mm512_set1_ps(0.5 * facts.scale)), acc[c]);
            }
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            _mm512_storeu_ps(out.as_mut_ptr(), acc);
        }
    }
}
