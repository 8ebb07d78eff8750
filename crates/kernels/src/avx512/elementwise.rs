//! Ops between products on AVX-512, where what the compiler makes of the plain ones costs.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for.

use std::arch::x86_64::*;

use crate::lanes::{EXP_2, LANES, ROUND};

/// `gate = silu(gate) * up`, one row.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn silu_mul_row(up: &[f32], gate: &mut [f32]) {
    for (gate, up) in gate.chunks_mut(LANES).zip(up.chunks(LANES)) {
        let mask = (u32::MAX >> (32 - gate.len())) as u16;
        // SAFETY: the mask keeps loads and stores to the chunks, which are of one length.
        unsafe {
            let (x, up) = (_mm512_maskz_loadu_ps(mask, gate.as_ptr()), _mm512_maskz_loadu_ps(mask, up.as_ptr()));
            _mm512_mask_storeu_ps(gate.as_mut_ptr(), mask, _mm512_mul_ps(silu(x), up));
        }
    }
}

/// `x = silu(x)`, one row.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn silu_row(x: &mut [f32]) {
    for x in x.chunks_mut(LANES) {
        let mask = (u32::MAX >> (32 - x.len())) as u16;
        // SAFETY: the mask keeps loads and stores to the chunk.
        unsafe { _mm512_mask_storeu_ps(x.as_mut_ptr(), mask, silu(_mm512_maskz_loadu_ps(mask, x.as_ptr()))) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn silu(x: __m512) -> __m512 {
    let down = exp_2(_mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E)));
    _mm512_mul_ps(x, inverse(_mm512_add_ps(_mm512_set1_ps(1.0), down)))
}

/// `lanes::exp_2` of sixteen values, with 125 in place of what is larger. What is no number stays none: of two operands of which one
/// is none, the second is the larger and the smaller.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp_2(x: __m512) -> __m512 {
    let x = _mm512_min_ps(_mm512_set1_ps(125.0), _mm512_max_ps(_mm512_set1_ps(-126.0), x));
    let n = _mm512_roundscale_ps::<0>(x);
    _mm512_scalef_ps(power(_mm512_sub_ps(x, n)), n)
}

/// 2^r for r within half an octave.
#[inline]
#[target_feature(enable = "avx512f")]
fn power(r: __m512) -> __m512 {
    let mut p = _mm512_set1_ps(EXP_2[0]);
    for c in &EXP_2[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    p
}

/// `exp_2` of what is at most 0, in the lanes of `mask`; zeros in the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn exp_2_up_to_0(mask: u16, x: __m512) -> __m512 {
    // Two additions go to either pipe, the machine's rounding to one.
    let round = _mm512_set1_ps(ROUND);
    let x = _mm512_max_ps(_mm512_set1_ps(-126.0), x);
    let n = _mm512_sub_ps(_mm512_add_ps(x, round), round);
    _mm512_maskz_scalef_ps(mask, power(_mm512_sub_ps(x, n)), n)
}

/// 1 / x to within 2e-7 of itself, for normal numbers below 2^126: an estimate of 14 bits and one of Newton's steps, which the
/// divider would be slower than.
#[inline]
#[target_feature(enable = "avx512f")]
fn inverse(x: __m512) -> __m512 {
    let y = _mm512_rcp14_ps(x);
    _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0)))
}
