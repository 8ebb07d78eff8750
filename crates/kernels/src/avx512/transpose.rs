//! Sixteen by sixteen 32-bit values turned in registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has AVX-512 F, and that slices hold what their shapes say.

use std::arch::x86_64::*;

/// Sixteen by sixteen values, a line of memory for each row.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Square<T>(pub(crate) [[T; 16]; 16]);

/// Four by four 128-bit lanes turned: vector i of the result has lane i of each.
#[inline(always)]
pub(super) unsafe fn lanes([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller has AVX-512 F.
    unsafe {
        let (ab, cd) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
        let (ab_high, cd_high) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
        [
            _mm512_shuffle_i32x4::<0x88>(ab, cd),
            _mm512_shuffle_i32x4::<0xdd>(ab, cd),
            _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
            _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
        ]
    }
}

/// Rows become columns.
#[inline(always)]
pub(crate) unsafe fn square(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the caller has AVX-512 F.
    unsafe {
        let mut pairs = rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        // Vector 4 i + j has, in lane l, column 4 l + j of the rows 4 i to 4 i + 3.
        let mut fours = pairs;
        for i in 0..4 {
            let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
            fours[4 * i] = _mm512_unpacklo_epi64(a, c);
            fours[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            fours[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            fours[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        let mut out = fours;
        for j in 0..4 {
            let column = lanes([fours[j], fours[4 + j], fours[8 + j], fours[12 + j]]);
            (0..4).for_each(|l| out[4 * l + j] = column[l]);
        }
        out
    }
}

/// `to`: (cols, `to_step`) = `from`: (rows, `from_step`) turned; `rows` and `cols` are multiples of 16.
///
/// # Safety
/// AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn matrix(from: &[u32], [rows, cols]: [usize; 2], from_step: usize, to: &mut [u32], to_step: usize) {
    assert!(rows.is_multiple_of(16) && cols.is_multiple_of(16) && rows <= to_step && cols <= from_step);
    assert!(from.len() >= rows * from_step && to.len() >= cols * to_step);
    for row in (0..rows).step_by(16) {
        for col in (0..cols).step_by(16) {
            // SAFETY: all rows and columns are inside, by the assertions.
            unsafe {
                let at = from.as_ptr().add(row * from_step + col);
                let block = std::array::from_fn(|i| _mm512_loadu_si512(at.add(i * from_step).cast()));
                let at = to.as_mut_ptr().add(col * to_step + row);
                for (i, x) in square(block).into_iter().enumerate() {
                    _mm512_storeu_si512(at.add(i * to_step).cast(), x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn every_value_finds_its_place() {
        if !Isa::available().contains(&Isa::Avx512) {
            return;
        }
        let (rows, cols) = (32, 48);
        let from: Vec<u32> = (0..rows * 50).map(|i| i as u32).collect();
        let mut to = vec![0; cols * 40];
        // SAFETY: the machine has AVX-512.
        unsafe { matrix(&from, [rows, cols], 50, &mut to, 40) };
        for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
            assert_eq!(to[c * 40 + r], from[r * 50 + c], "({r}, {c})");
        }
    }
}
