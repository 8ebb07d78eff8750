//! f32 values as bf16 tiles, in each of the four ways in which a product may want them.
//!
//! A left side is (16, 32), a right side (16, 16, 2): sums are over 32 values, which lie in pairs.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Amx` stands for, and that the rows it is given can be read.

use std::arch::x86_64::*;

use super::tile::{ROWS, Room};

/// Values over which a tile's sums are.
pub(super) const DEPTH: usize = 2 * ROWS;

/// Rows of values, `step` apart.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) first: *const f32,
    pub(super) step: usize,
    /// Those that there are; others count as zeros.
    pub(super) rows: usize,
    /// Values of a row that there are.
    pub(super) width: usize,
}

impl Source {
    #[inline(always)]
    fn row(&self, r: usize) -> *const f32 {
        self.first.wrapping_add(r * self.step)
    }
}

/// Sums are along rows: sixteen rows of 32 values as a left side, or `TURNED` as a right side. Each value becomes `f` of it.
#[inline(always)]
pub(super) unsafe fn along<const TURNED: bool>(from: Source, f: impl Fn(__m512) -> __m512, to: &mut Room<u32>) {
    let mask = u32::MAX >> (DEPTH - from.width.min(DEPTH));
    // SAFETY: the masks keep to the rows; vectors of bf16 and of words have the same size.
    unsafe {
        let words: [__m512i; ROWS] = std::array::from_fn(|r| {
            if r >= from.rows {
                return _mm512_setzero_si512();
            }
            let row = from.row(r);
            let low = _mm512_maskz_loadu_ps(mask as u16, row);
            let high = _mm512_maskz_loadu_ps((mask >> ROWS) as u16, row.wrapping_add(ROWS));
            words(f(low), f(high))
        });
        store::<TURNED>(words, to);
    }
}

/// Sums are over rows: 32 rows of sixteen values as a right side, or `TURNED` as a left side.
#[inline(always)]
pub(super) unsafe fn across<const TURNED: bool>(from: Source, to: &mut Room<u32>) {
    // SAFETY: rows are read where they are.
    unsafe {
        let words: [__m512i; ROWS] = std::array::from_fn(|pair| {
            let row = |r: usize| match r < from.rows {
                true => _mm512_loadu_ps(from.row(r)),
                false => _mm512_setzero_ps(),
            };
            side_by_side(row(2 * pair), row(2 * pair + 1))
        });
        store::<TURNED>(words, to);
    }
}

/// What rounding to bf16 leaves of x.
#[inline(always)]
pub(super) unsafe fn left_over(x: __m512) -> __m512 {
    // SAFETY: the caller's promise; vectors of bf16 and of half words have the same size.
    unsafe {
        let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
        let rounded = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded));
        _mm512_sub_ps(x, _mm512_castsi512_ps(rounded))
    }
}

/// Words of `first[i]` and `second[i]`.
#[inline(always)]
pub(super) unsafe fn side_by_side(first: __m512, second: __m512) -> __m512i {
    const ORDER: [u16; DEPTH] = {
        let mut order = [0; DEPTH];
        let mut i = 0;
        while i < DEPTH {
            order[i] = (i / 2 + i % 2 * ROWS) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: the caller's promise.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), words(first, second)) }
}

/// Words of the neighbours in `low` and then `high`.
#[inline(always)]
unsafe fn words(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the caller's promise; the vectors have the same size.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

#[inline(always)]
unsafe fn store<const TURNED: bool>(words: [__m512i; ROWS], to: &mut Room<u32>) {
    // SAFETY: the caller's promise; a row of the room is a vector.
    unsafe {
        let words = if TURNED { crate::avx512::transpose::square(words) } else { words };
        for (words, to) in words.into_iter().zip(&mut to.0) {
            _mm512_store_si512(to.as_mut_ptr().cast(), words);
        }
    }
}
