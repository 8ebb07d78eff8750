//! W^T in 8 bits on AVX-512; the same values as `turned`'s plain form.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit or block it is given
//! exists.

use std::arch::x86_64::*;

use qwenkit_tensor::DType;

use super::{transpose, unit};
use crate::{
    layout::{GROUP_ROWS, Layout, UNIT, offset_log2},
    turned::{Bits, HALF, Row, Spread, Step, scale_of_bits},
};

/// Values of unit `u` of a group of `dtype`, and what becomes the largest of each column.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for; the type is a quantised one, and the group has this unit.
pub(crate) unsafe fn spread(
    dtype: DType,
    group: &[u8],
    u: usize,
    values: &mut [Row; UNIT],
    largest: &mut [Bits; UNIT],
) {
    macro_rules! by_type {
        ($($dtype:ident)*) => {
            match dtype {
                // SAFETY: the caller's promise.
                $(DType::$dtype => unsafe { spread_of::<{ DType::$dtype as usize }>(group, u, values, largest) },)*
                other => unreachable!("{other} is not quantised"),
            }
        };
    }
    by_type!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,avx2")]
unsafe fn spread_of<const D: usize>(group: &[u8], u: usize, values: &mut [Row; UNIT], largest: &mut [Bits; UNIT]) {
    let positive = _mm512_set1_epi32(i32::MAX);
    // SAFETY: the caller's promise; stores are of whole rows of a column.
    unsafe {
        columns::<D>(group, u, |column, x| {
            _mm512_store_ps(values[column].0.as_mut_ptr(), x);
            let at = largest[column].0.as_mut_ptr().cast();
            let bits = _mm512_and_si512(_mm512_castps_si512(x), positive);
            _mm512_store_si512(at, _mm512_max_epu32(_mm512_load_si512(at.cast()), bits));
        });
    }
}

/// Calls `f(column, its sixteen values)` for the 32 columns of unit `u` of a group.
///
/// # Safety
/// AVX-512 F, BW, F16C; the group has this unit.
#[inline(always)]
pub(crate) unsafe fn columns<const D: usize>(group: &[u8], u: usize, mut f: impl FnMut(usize, __m512)) {
    let layout = const { Layout::at::<D>() };
    debug_assert!(layout.quants_at(u) + layout.unit_bytes() <= group.len());
    // SAFETY: the group holds quants and scales of all units of its rows.
    unsafe {
        let group = group.as_ptr();
        let quants = unit::quants::<D>(group.add(layout.quants_at(u)));
        let factors = unit::factors::<D>(&unit::head::<D>(group, u), group, u);
        let offset = _mm512_set1_epi32(match const { offset_log2(Layout::at::<D>().encoding) } {
            Some(log2) => 1 << log2,
            None => 0,
        });
        let byte = _mm512_set1_epi32(255);
        for (s, q) in quants.into_iter().enumerate() {
            let (scale, addend) = (factors.scale[s / 4], factors.addend[s / 4]);
            let four = [
                _mm512_and_si512(q, byte),
                _mm512_and_si512(_mm512_srli_epi32::<8>(q), byte),
                _mm512_and_si512(_mm512_srli_epi32::<16>(q), byte),
                _mm512_srli_epi32::<24>(q),
            ];
            for (j, q) in four.into_iter().enumerate() {
                let q = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, offset));
                let mut x = _mm512_mul_ps(scale, q);
                if layout.has_addend() {
                    x = _mm512_add_ps(x, addend);
                }
                f(4 * s + j, x);
            }
        }
    }
}

/// Rounds the columns `16 half..` of a block.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for; `steps` are a block's.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn round(spread: &Spread, half: usize, steps: &mut [Step], scales: &mut [f32; HALF]) {
    let first = HALF * half;
    let mut inverse = [0.0f32; HALF];
    // SAFETY: loads are of whole rows of a column, stores of whole steps.
    unsafe {
        for c in 0..HALF {
            let largest = _mm512_reduce_max_epu32(_mm512_load_si512(spread.largest[first + c].0.as_ptr().cast()));
            (scales[c], inverse[c]) = scale_of_bits(largest);
        }
        let flip = _mm512_set1_epi8(-128);
        for (values, steps) in spread.values.iter().zip(steps.as_chunks_mut::<{ GROUP_ROWS / 4 }>().0) {
            // Four columns: in each 128-bit lane the four rows of a step, column after column.
            let columns: [__m512i; 4] = std::array::from_fn(|i| {
                let [a, b, c, d]: [__m512i; 4] = std::array::from_fn(|j| {
                    let c = 4 * i + j;
                    let x = _mm512_load_ps(values[first + c].0.as_ptr());
                    _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse[c])))
                });
                let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
                _mm512_xor_si512(bytes, flip)
            });
            // Lanes turned: a step of all sixteen columns in one vector.
            for (Step(step), turned) in steps.iter_mut().zip(transpose::lanes(columns)) {
                _mm512_store_si512(step.as_mut_ptr().cast(), turned);
            }
        }
    }
}

/// Columns of sixteen rows, row by row.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn rows(values: &[Row; UNIT], out: &mut [[f32; UNIT]; GROUP_ROWS]) {
    for half in 0..2 {
        // SAFETY: loads and stores are of whole rows of a column and whole halves of a row.
        unsafe {
            let columns = std::array::from_fn(|c| _mm512_load_si512(values[16 * half + c].0.as_ptr().cast()));
            for (row, out) in transpose::square(columns).into_iter().zip(out.iter_mut()) {
                _mm512_storeu_si512(out.as_mut_ptr().add(16 * half).cast(), row);
            }
        }
    }
}
