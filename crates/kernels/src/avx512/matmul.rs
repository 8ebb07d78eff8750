//! Matrix products on AVX-512: a tile of 16 output rows by up to 8 tokens in registers.
//!
//! Quantised weights multiply unsigned quants with signed activations (`vpdpbusd`), sixteen rows a vector, the token's
//! four values broadcast from memory; the offset of the quants enters as the accumulator's start value. Order of
//! operations as in `portable::matmul`, for any number of tokens.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{
    arch::{asm, x86_64::*},
    ops::Range,
};

use qwenkit_tensor::DType;

use super::unit;
use crate::{
    Isa,
    layout::{GROUP_ROWS, Layout, SUPER_UNITS, UNIT, offset_log2},
    matmul::Task,
    prefetch,
};

/// Tokens of a tile: eight accumulators hide the latency of the multiply-add, and with the unit's eight vectors of
/// quants they leave registers for sums and factors.
const TILE_TOKENS: usize = 8;
/// Bytes of activations that are gone through before the next group of rows: half of a common 1 MiB second-level cache,
/// the other half being the weights'.
const PANEL_BYTES: usize = 512 << 10;

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
                DType::F32 => task.panels(PANEL_BYTES / 4, TILE_TOKENS, |g, t| unsafe { plain::<F32>(task, g, t) }),
                // SAFETY: the caller's promise.
                DType::F16 => task.panels(PANEL_BYTES / 4, TILE_TOKENS, |g, t| unsafe { plain::<F16>(task, g, t) }),
                DType::BF16 if Isa::Avx512.pairs_bf16() => {
                    // SAFETY: the caller's promise, and the machine has bf16 products.
                    task.panels(PANEL_BYTES / 2, TILE_TOKENS, |g, t| unsafe { plain_bf16(task, g, t) })
                }
                // SAFETY: the caller's promise.
                DType::BF16 => task.panels(PANEL_BYTES / 4, TILE_TOKENS, |g, t| unsafe { plain::<Bf16Spread>(task, g, t) }),
                other => unreachable!("{other} is not a weight type"),
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
unsafe fn store<const C: usize>(task: &Task<'_>, g: usize, t: usize, acc: [__m512; C]) {
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

/// A plain type's inner step: one vector of weights times one token's value or pair of values.
trait Plain {
    /// k-values that one step takes.
    const STEP: usize;
    /// Bytes of a group that one step takes.
    const STEP_BYTES: usize;
    type Vector: Copy;
    /// # Safety
    /// The instruction set, and `group` holds step `s`.
    unsafe fn load(group: *const u8, s: usize) -> Self::Vector;
    /// # Safety
    /// The instruction set, and row `t` of the activations has step `s`.
    unsafe fn add(acc: __m512, w: Self::Vector, task: &Task<'_>, t: usize, s: usize) -> __m512;
}

struct F32;
struct F16;
struct Bf16;
struct Bf16Spread;

impl Plain for F32 {
    const STEP: usize = 1;
    const STEP_BYTES: usize = 4 * GROUP_ROWS;
    type Vector = __m512;
    #[inline(always)]
    unsafe fn load(group: *const u8, s: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(group.cast::<f32>().add(GROUP_ROWS * s)) }
    }
    #[inline(always)]
    unsafe fn add(acc: __m512, w: __m512, task: &Task<'_>, t: usize, s: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(w, _mm512_set1_ps(*task.x.values.as_ptr().add(t * task.x.cols + s)), acc) }
    }
}

impl Plain for F16 {
    const STEP: usize = 1;
    const STEP_BYTES: usize = 2 * GROUP_ROWS;
    type Vector = __m512;
    #[inline(always)]
    unsafe fn load(group: *const u8, s: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(group.add(2 * GROUP_ROWS * s).cast())) }
    }
    #[inline(always)]
    unsafe fn add(acc: __m512, w: __m512, task: &Task<'_>, t: usize, s: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { F32::add(acc, w, task, t, s) }
    }
}

/// The two bf16 values of a step of row `t`, in every 32-bit lane.
#[inline(always)]
unsafe fn pair(task: &Task<'_>, t: usize, s: usize) -> __m512i {
    let padded = task.x.cols.next_multiple_of(2);
    // SAFETY: the caller's promise that row `t` has step `s`.
    unsafe { _mm512_set1_epi32(task.x.bf16.as_ptr().add(t * padded + 2 * s).cast::<i32>().read_unaligned()) }
}

impl Plain for Bf16 {
    const STEP: usize = 2;
    const STEP_BYTES: usize = 4 * GROUP_ROWS;
    type Vector = __m512i;
    #[inline(always)]
    unsafe fn load(group: *const u8, s: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(group.add(4 * GROUP_ROWS * s).cast()) }
    }
    #[inline(always)]
    unsafe fn add(acc: __m512, w: __m512i, task: &Task<'_>, t: usize, s: usize) -> __m512 {
        // SAFETY: the caller's promise; both vectors are 32 bf16 values, whose type has the same size.
        unsafe {
            let (w, x) = (
                std::mem::transmute::<__m512i, __m512bh>(w),
                std::mem::transmute::<__m512i, __m512bh>(pair(task, t, s)),
            );
            _mm512_dpbf16_ps(acc, w, x)
        }
    }
}

/// BF16 where pairs of them are not multiplied: both weights of a pair as f32, times activations in f32.
impl Plain for Bf16Spread {
    const STEP: usize = 2;
    const STEP_BYTES: usize = 4 * GROUP_ROWS;
    type Vector = [__m512; 2];
    #[inline(always)]
    unsafe fn load(group: *const u8, s: usize) -> [__m512; 2] {
        // SAFETY: the caller's promise. A bf16 is the upper half of the f32 of the same value.
        unsafe {
            let pairs = Bf16::load(group, s);
            let (low, high) = (_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
            [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn add(acc: __m512, w: [__m512; 2], task: &Task<'_>, t: usize, s: usize) -> __m512 {
        // SAFETY: the caller's promise. The row ends in the middle of the last pair of an odd number.
        unsafe {
            let x = task.x.values.as_ptr().add(t * task.x.cols + 2 * s);
            let acc = _mm512_fmadd_ps(w[0], _mm512_set1_ps(*x), acc);
            if 2 * s + 1 == task.x.cols { acc } else { _mm512_fmadd_ps(w[1], _mm512_set1_ps(*x.add(1)), acc) }
        }
    }
}

/// One group of a plain weight by `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,avx2")]
unsafe fn plain<P: Plain>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { plain_tiles::<P>(task, g, tokens) }
}

/// As `plain`, with bf16 products.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,fma,avx2")]
unsafe fn plain_bf16(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { plain_tiles::<Bf16>(task, g, tokens) }
}

#[inline(always)]
unsafe fn plain_tiles<P: Plain>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    let mut t = tokens.start;
    // SAFETY: each tile stays inside `tokens`.
    unsafe {
        while t < tokens.end {
            t += match tokens.end - t {
                TILE_TOKENS.. => plain_tile::<P, 8>(task, g, t),
                4.. => plain_tile::<P, 4>(task, g, t),
                2.. => plain_tile::<P, 2>(task, g, t),
                _ => plain_tile::<P, 1>(task, g, t),
            };
        }
    }
}

/// Group `g` by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn plain_tile<P: Plain, const C: usize>(task: &Task<'_>, g: usize, t: usize) -> usize {
    let group = task.group(g).as_ptr();
    // SAFETY: the group holds every step of K, zero-padded, and rows t..t + C of the activations exist.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); C];
        let ahead = task.asks_ahead();
        for s in 0..task.x.cols.div_ceil(P::STEP) {
            if ahead {
                prefetch::ahead(group.wrapping_add(s * P::STEP_BYTES), 1);
            }
            let w = P::load(group, s);
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = P::add(*acc, w, task, t + c, s);
            }
        }
        store(task, g, t, acc);
    }
    C
}
