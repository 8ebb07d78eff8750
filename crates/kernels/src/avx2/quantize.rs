//! Activations to 8 bits on AVX2.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for.

use std::arch::x86_64::*;

use crate::{
    activations::{Place, UnitFacts, scale_of},
    layout::UNIT,
};

/// Quantises a row: x (K/32, 32).
#[target_feature(enable = "avx2")]
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
#[target_feature(enable = "avx2")]
unsafe fn unit(x: &[f32; UNIT], quants: &mut [i8; UNIT]) -> (f32, [i32; 2]) {
    // SAFETY: loads and stores are of the 32 values and the 32 quants.
    unsafe {
        let x: [__m256; 4] = std::array::from_fn(|i| _mm256_loadu_ps(x.as_ptr().add(8 * i)));
        let sign = _mm256_set1_ps(-0.0);
        let size = x.map(|x| _mm256_andnot_ps(sign, x));
        let largest = _mm256_max_ps(_mm256_max_ps(size[0], size[1]), _mm256_max_ps(size[2], size[3]));
        let (scale, inverse) = scale_of(largest_of(largest));
        let q = x.map(|x| {
            let scaled = _mm256_mul_ps(x, _mm256_set1_ps(inverse));
            // Rounds to the nearest, ties to even; a NaN becomes 0.
            let ordered = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(scaled, scaled));
            _mm256_and_si256(_mm256_cvtps_epi32(scaled), ordered)
        });
        // Packing works within halves of registers; the last step puts the groups of four back in order.
        let pairs = (_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        let bytes = _mm256_packs_epi16(pairs.0, pairs.1);
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(quants.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(bytes, order));
        (scale, [sum_of(_mm256_add_epi32(q[0], q[1])), sum_of(_mm256_add_epi32(q[2], q[3]))])
    }
}

/// The largest of eight values.
#[target_feature(enable = "avx2")]
fn largest_of(x: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// The sum of eight integers.
#[target_feature(enable = "avx2")]
fn sum_of(x: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b0100_1110>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}
