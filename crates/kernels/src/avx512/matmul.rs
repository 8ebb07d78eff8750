//! Matrix products on AVX-512: a tile of 16 output rows by up to 8 tokens in registers.
//!
//! Quantised weights multiply unsigned quants with signed activations (`vpdpbusd`), sixteen rows a vector, the token's
//! four values broadcast from memory; the offset of the quants enters as the accumulator's start value. Order of
//! operations as in `portable::matmul`, for any number of tokens. Weights in plain types are in `plain`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{
    arch::{asm, x86_64::*},
    ops::Range,
};

use qwenkit_tensor::DType;

use super::{plain, unit};
use crate::{
    layout::{Layout, SUPER_UNITS, UNIT, offset_log2},
    matmul::Task,
    prefetch,
};

/// Tokens of a tile: eight accumulators hide the latency of the multiply-add, and with the unit's eight vectors of
/// quants they leave registers for sums and factors.
pub(super) const TILE_TOKENS: usize = 8;
/// Bytes of activations that are gone through before the next group of rows; the facts of 8-bit ones are as many bytes again,
/// together a common second-level cache of 1 MiB.
pub(super) const PANEL_BYTES: usize = 512 << 10;

/// Computes the task's groups for all its rows.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
pub(crate) unsafe fn run(task: &Task<'_>) {
    macro_rules! quantized {
        ($($dtype:ident)*) => {
            match task.weight.dtype() {
                // SAFETY: the caller's promise.
                $(DType::$dtype => task.panels(PANEL_BYTES, TILE_TOKENS, |g, t| unsafe { quantized::<{ DType::$dtype as usize }>(task, g, t) }),)*
                // SAFETY: the caller's promise.
                _ => unsafe { plain::run(task) },
            }
        };
    }
    quantized!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS);
}

/// One group of a quantised weight by `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2")]
pub(crate) unsafe fn quantized<const D: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    let mut t = tokens.start;
    // SAFETY: each tile stays inside `tokens`.
    unsafe {
        while t < tokens.end {
            t += match tokens.end - t {
                TILE_TOKENS.. => quantized_tile::<D, 8>(task, g, t),
                4.. => quantized_tile::<D, 4>(task, g, t),
                2.. => quantized_tile::<D, 2>(task, g, t),
                _ => quantized_tile::<D, 1>(task, g, t),
            };
        }
    }
}

/// Group `g` by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn quantized_tile<const D: usize, const C: usize>(task: &Task<'_>, g: usize, t: usize) -> usize {
    let layout = const { Layout::at::<D>() };
    let cols = task.x.cols;
    let units = cols / UNIT;
    let group = task.group(g).as_ptr();
    debug_assert!(t + C <= task.x.rows && task.x.quants.len() >= (t + C) * cols);
    // SAFETY: the group holds quants and scales of `units` units, and rows t..t + C of the activations exist.
    unsafe {
        // Tokens `t..t + C` are a tile of the activations.
        let (x, facts) = (task.x.quants.as_ptr().add(t * cols), task.x.facts.as_ptr().add(t * units));
        let ahead = task.asks_ahead();
        let mut head = unit::head::<D>(group, 0);
        let mut acc = [_mm512_setzero_ps(); C];
        for u in 0..units {
            if u.is_multiple_of(SUPER_UNITS) {
                head = unit::head::<D>(group, u);
            }
            let quants = group.add(layout.quants_at(u));
            if ahead {
                let before = layout.bytes_before(u);
                prefetch::ahead(quants.wrapping_sub(before), before + layout.unit_bytes());
            }
            let factors = unit::factors::<D>(&head, group, u);
            let q = unit::quants::<D>(quants);
            let (parts, steps) = if layout.has_half_scales() { (2, 4) } else { (1, 8) };
            for part in 0..parts {
                let which = if parts == 1 { 0 } else { 1 + part };
                let mut sum = [_mm512_setzero_si512(); C];
                if let Some(log2) = const { offset_log2(Layout::at::<D>().encoding) } {
                    for c in 0..C {
                        let minus_sum = &raw const (*facts.add(u * C + c)).minus_sum[which];
                        sum[c] = match log2 {
                            2 => shifted::<2>(minus_sum),
                            3 => shifted::<3>(minus_sum),
                            4 => shifted::<4>(minus_sum),
                            5 => shifted::<5>(minus_sum),
                            _ => shifted::<7>(minus_sum),
                        };
                    }
                }
                for s in part * steps..(part + 1) * steps {
                    dot_step(&mut sum, q[s], x.add(u * C * UNIT + 4 * s));
                }
                for c in 0..C {
                    let facts = &*facts.add(u * C + c);
                    let scale = _mm512_mul_ps(factors.scale[part], _mm512_set1_ps(facts.scale));
                    acc[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[c]), scale, acc[c]);
                    if layout.has_addend() {
                        acc[c] = _mm512_fmadd_ps(factors.addend[part], _mm512_set1_ps(facts.sum[which]), acc[c]);
                    }
                }
            }
        }
        store(task, g, t, acc);
    }
    C
}

/// `*value << LOG2` in every lane. In assembly because the compiler makes three instructions of this one.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn shifted<const LOG2: u32>(value: *const i32) -> __m512i {
    let out: __m512i;
    // SAFETY: the caller's promise that `value` can be read; the assembly does only that.
    unsafe {
        asm!(
            "vpslld {out}, dword ptr [{value}]{{1to16}}, {log2}",
            out = lateout(zmm_reg) out,
            value = in(reg) value,
            log2 = const LOG2,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    out
}

/// One step of a unit: adds the products of `q` with the four values that each token has at `x`, tokens a unit apart.
///
/// Eight tokens are written out in assembly: left to itself the compiler finishes one token's sums before it begins the
/// next one's, and each then waits for its own latency.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_step<const C: usize>(sum: &mut [__m512i; C], q: __m512i, x: *const i8) {
    // SAFETY: the caller's promise that C tokens have four values at `x`; the assembly only reads them.
    unsafe {
        if C == TILE_TOKENS {
            asm!(
                "vpdpbusd {s0}, {q}, dword ptr [{x}]{{1to16}}",
                "vpdpbusd {s1}, {q}, dword ptr [{x} + 32]{{1to16}}",
                "vpdpbusd {s2}, {q}, dword ptr [{x} + 64]{{1to16}}",
                "vpdpbusd {s3}, {q}, dword ptr [{x} + 96]{{1to16}}",
                "vpdpbusd {s4}, {q}, dword ptr [{x} + 128]{{1to16}}",
                "vpdpbusd {s5}, {q}, dword ptr [{x} + 160]{{1to16}}",
                "vpdpbusd {s6}, {q}, dword ptr [{x} + 192]{{1to16}}",
                "vpdpbusd {s7}, {q}, dword ptr [{x} + 224]{{1to16}}",
                s0 = inout(zmm_reg) sum[0],
                s1 = inout(zmm_reg) sum[1],
                s2 = inout(zmm_reg) sum[2],
                s3 = inout(zmm_reg) sum[3],
                s4 = inout(zmm_reg) sum[4],
                s5 = inout(zmm_reg) sum[5],
                s6 = inout(zmm_reg) sum[6],
                s7 = inout(zmm_reg) sum[7],
                q = in(zmm_reg) q,
                x = in(reg) x,
                options(readonly, nostack, preserves_flags),
            );
        } else {
            for (c, sum) in sum.iter_mut().enumerate() {
                let four = _mm512_set1_epi32(x.add(c * UNIT).cast::<i32>().read_unaligned());
                *sum = _mm512_dpbusd_epi32(*sum, q, four);
            }
        }
    }
}

/// Writes sums of group `g` for tokens `t..t + C`.
#[inline(always)]
pub(super) unsafe fn store<const C: usize>(task: &Task<'_>, g: usize, t: usize, acc: [__m512; C]) {
    let rows = task.weight.group_rows(g);
    let mask = (u32::MAX >> (32 - rows)) as u16;
    for (c, acc) in acc.into_iter().enumerate() {
        // SAFETY: this thread alone computes group `g`, so these elements are written once; the mask keeps to them.
        unsafe {
            let out = task.results(g, t + c);
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, acc);
        }
    }
}
