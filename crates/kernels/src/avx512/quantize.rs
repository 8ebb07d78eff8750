//! Activations to 8 bits on AVX-512.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for.

use std::arch::x86_64::*;

use crate::{
    activations::{Place, UnitFacts, scale_of},
    layout::UNIT,
};

/// Quantises a row: x (K/32, 32).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn row(x: &[[f32; UNIT]], place: &mut Place<'_>) {
    for (u, x) in x.iter().enumerate() {
        let (quants, facts) = place.unit(u);
        // SAFETY: the caller's promise.
        let (scale, sums) = unsafe { unit(x, quants) };
        *facts = UnitFacts::new(scale, sums);
    }
}

/// Quantises 32 values; returns their scale and the sums of the first and the last 16 quants.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn unit(x: &[f32; UNIT], quants: &mut [i8; UNIT]) -> (f32, [i32; 2]) {
    // SAFETY: loads and stores are of the 32 values and the 32 quants.
    unsafe {
        let x = [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(UNIT / 2))];
        let (scale, inverse) = scale_of(_mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1]))));
        let mut sums = [0; 2];
        for (half, x) in x.into_iter().enumerate() {
            let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
            // Rounds to the nearest, ties to even; a NaN becomes 0.
            let q = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(scaled, scaled), scaled);
            _mm_storeu_si128(quants.as_mut_ptr().add(half * UNIT / 2).cast(), _mm512_cvtepi32_epi8(q));
            sums[half] = _mm512_reduce_add_epi32(q);
        }
        (scale, sums)
    }
}
