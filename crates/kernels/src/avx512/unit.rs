//! One unit of a quantised group (32 k-values of 16 rows) in registers: eight vectors of unsigned quants, and factors.
//!
//! Generic over the type through `D`, the index of the `DType`, so that each type's unpacking is straight-line code.
//! Functions here are inlined into kernels that enable the instruction set.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::arch::x86_64::*;

use crate::{
    blocks::{Encoding, IQ4_VALUES},
    layout::{Layout, Scales},
};

/// The eight steps of a unit: byte `4 r + j` of vector `s` is the quant of row `r` at k-value `4 s + j`.
///
/// # Safety
/// AVX-512 F, BW; `unit` points at the unit's `unit_bytes` bytes.
#[inline(always)]
pub(crate) unsafe fn quants<const D: usize>(unit: *const u8) -> [__m512i; 8] {
    let layout = const { Layout::at::<D>() };
    // SAFETY: the loads stay within the unit: `low_bits` vectors and then `high_bits` vectors of 64 bytes.
    unsafe {
        let load = |i: usize| _mm512_loadu_si512(unit.add(64 * i).cast());
        let mut q = [_mm512_setzero_si512(); 8];
        match layout.low_bits {
            8 => (0..8).for_each(|s| q[s] = load(s)),
            4 => {
                let mask = _mm512_set1_epi8(15);
                for v in 0..4 {
                    let bytes = load(v);
                    q[v] = _mm512_and_si512(bytes, mask);
                    q[v + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
                }
            }
            _ => {
                let mask = _mm512_set1_epi8(3);
                for v in 0..2 {
                    let bytes = load(v);
                    q[4 * v] = _mm512_and_si512(bytes, mask);
                    q[4 * v + 1] = _mm512_and_si512(_mm512_srli_epi16::<2>(bytes), mask);
                    q[4 * v + 2] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
                    q[4 * v + 3] = _mm512_and_si512(_mm512_srli_epi16::<6>(bytes), mask);
                }
            }
        }
        match layout.high_bits {
            0 => {}
            1 => {
                let high = load(layout.low_bits);
                let bit = _mm512_set1_epi8(1 << layout.low_bits);
                // Bit s moves to bit `low_bits`; what crosses into the neighbouring byte is masked away.
                let shift = |s: usize| {
                    let (at, to) = (s as u32, layout.low_bits as u32);
                    let left = _mm_cvtsi32_si128(to.saturating_sub(at) as i32);
                    let right = _mm_cvtsi32_si128(at.saturating_sub(to) as i32);
                    _mm512_srl_epi16(_mm512_sll_epi16(high, left), right)
                };
                // 0xf8: a | (b & c)
                (0..8).for_each(|s| q[s] = _mm512_ternarylogic_epi32::<0xf8>(q[s], shift(s), bit));
            }
            _ => {
                let bits = _mm512_set1_epi8(0x30);
                for v in 0..2 {
                    let high = load(layout.low_bits + v);
                    let moved = [
                        _mm512_slli_epi16::<4>(high),
                        _mm512_slli_epi16::<2>(high),
                        high,
                        _mm512_srli_epi16::<2>(high),
                    ];
                    (0..4).for_each(|i| {
                        q[4 * v + i] = _mm512_ternarylogic_epi32::<0xf8>(q[4 * v + i], moved[i], bits);
                    });
                }
            }
        }
        if matches!(layout.encoding, Encoding::Codebook) {
            let values = _mm512_broadcast_i32x4(_mm_loadu_si128(CODEBOOK.as_ptr().cast()));
            q.iter_mut().for_each(|q| *q = _mm512_shuffle_epi8(values, *q));
        }
        q
    }
}

/// `IQ4_VALUES` plus 128, as unsigned bytes.
const CODEBOOK: [u8; 16] = {
    let mut values = [0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = (IQ4_VALUES[i] as u8) ^ 0x80;
        i += 1;
    }
    values
};

/// Scales and addends of 16 rows, for the first and the last 16 k-values of a unit (equal where the type has one).
pub(crate) struct Factors {
    pub(crate) scale: [__m512; 2],
    pub(crate) addend: [__m512; 2],
}

/// What the units of a super-block share: its factors, zero where the type has none.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    d: __m512,
    dmin: __m512,
}

/// What unit `u` shares with the others of its super-block.
///
/// # Safety
/// AVX-512 F, F16C; `group` points at a group that has unit `u`.
#[inline(always)]
pub(crate) unsafe fn head<const D: usize>(group: *const u8, u: usize) -> Head {
    let layout = const { Layout::at::<D>() };
    // SAFETY: offsets are those of the layout; every load is 32 bytes of a field that long.
    unsafe {
        let at = layout.scales_at(u).0;
        match layout.scales {
            Scales::Unit | Scales::UnitMin => Head { d: _mm512_setzero_ps(), dmin: _mm512_setzero_ps() },
            Scales::Super | Scales::SuperHalf => Head { d: f16s(group.add(at)), dmin: _mm512_setzero_ps() },
            Scales::SuperMin | Scales::SuperHalfMin => Head { d: f16s(group.add(at)), dmin: f16s(group.add(at + 32)) },
        }
    }
}

/// The factors of unit `u`, `head` being what it shares with others.
///
/// # Safety
/// AVX-512 F, BW, F16C; `group` points at a group that has unit `u`.
#[inline(always)]
pub(crate) unsafe fn factors<const D: usize>(head: &Head, group: *const u8, u: usize) -> Factors {
    let layout = const { Layout::at::<D>() };
    // SAFETY: offsets are those of the layout; every load is 32 or 16 bytes of a field that long.
    unsafe {
        let own = group.add(layout.scales_at(u).1);
        let bytes = |at: usize| _mm_loadu_si128(own.add(at).cast());
        let unsigned = |b: __m128i| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
        let signed = |b: __m128i| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
        let none = [_mm512_setzero_ps(); 2];
        match layout.scales {
            Scales::Unit => Factors { scale: [f16s(own); 2], addend: none },
            Scales::UnitMin => Factors { scale: [f16s(own); 2], addend: [f16s(own.add(32)); 2] },
            Scales::SuperMin => {
                let scale = _mm512_mul_ps(head.d, unsigned(bytes(0)));
                let min = _mm512_mul_ps(head.dmin, unsigned(bytes(16)));
                Factors { scale: [scale; 2], addend: [negate(min); 2] }
            }
            Scales::Super => Factors { scale: [_mm512_mul_ps(head.d, signed(bytes(0))); 2], addend: none },
            Scales::SuperHalf => {
                let scale = |at| _mm512_mul_ps(head.d, signed(bytes(at)));
                Factors { scale: [scale(0), scale(16)], addend: none }
            }
            Scales::SuperHalfMin => {
                let low = _mm_set1_epi8(15);
                let scale = |at| _mm512_mul_ps(head.d, unsigned(_mm_and_si128(bytes(at), low)));
                let min = |at| {
                    let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes(at)), low);
                    negate(_mm512_mul_ps(head.dmin, unsigned(high)))
                };
                Factors { scale: [scale(0), scale(16)], addend: [min(0), min(16)] }
            }
        }
    }
}

/// Sixteen f16 as f32.
///
/// # Safety
/// AVX-512 F, F16C; 32 bytes can be read at `from`.
#[inline(always)]
unsafe fn f16s(from: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
}

/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn negate(x: __m512) -> __m512 {
    // SAFETY: the caller has AVX-512 F.
    unsafe { _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MIN))) }
}
