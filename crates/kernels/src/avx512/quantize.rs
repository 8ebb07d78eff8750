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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn row(x: &[[f32; UNIT]], place: &mut Place<'_>) {
    for (u, x) in x.iter().enumerate() {
        let (quants, facts) = place.unit(u);
        // SAFETY: the caller's promise.
        unsafe { unit(x, quants, facts) }
    }
}

/// Quantises 32 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unit(x: &[f32; UNIT], quants: &mut [i8; UNIT], facts: &mut UnitFacts) {
    const { assert!(size_of::<UnitFacts>() == 32) }
    // SAFETY: loads and stores are of the 32 values, the 32 quants and the facts, which are two vectors without gaps.
    unsafe {
        let x = [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(UNIT / 2))];
        let (scale, inverse) = scale_of(_mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1]))));
        let [first, last] = x.map(|x| {
            let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
            // Rounds to the nearest, ties to even; a NaN becomes 0.
            let q = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(scaled, scaled), scaled);
            _mm512_cvtepi32_epi8(q)
        });
        let q = _mm256_set_m128i(last, first);
        _mm256_storeu_si256(quants.as_mut_ptr().cast(), q);
        // Sums of four, of eight and of all sixteen quants of a half, in each of its lanes.
        let fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
        let eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32::<0b10_11_00_01>(fours));
        let halves = _mm256_add_epi32(eights, _mm256_shuffle_epi32::<0b01_00_11_10>(eights));
        let (first, last) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
        // Lanes: both halves, the first, the last.
        let both = _mm_add_epi32(first, last);
        let sums = _mm_blend_epi32::<0b0100>(_mm_blend_epi32::<0b0010>(both, first), last);
        let minus = _mm_sub_epi32(_mm_setzero_si128(), _mm_shuffle_epi32::<0b10_01_00_00>(sums));
        let scale = _mm_set1_ps(scale);
        let to: *mut f32 = (facts as *mut UnitFacts).cast();
        _mm_storeu_ps(to, _mm_blend_ps::<1>(_mm_castsi128_ps(minus), scale));
        _mm_storeu_ps(to.add(4), _mm_maskz_mul_ps(0b0111, scale, _mm_cvtepi32_ps(sums)));
    }
}
