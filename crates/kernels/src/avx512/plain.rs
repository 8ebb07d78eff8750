//! Products of weights in plain types on AVX-512: a tile of 32 output rows by up to 8 tokens in registers.
//!
//! A weight's vector of sixteen rows is multiplied by one token's value, or pair of bf16 values, in every lane. An output
//! element is the sum over ascending k of one accumulator, for any number of tokens and of groups at once. Quantised weights
//! are in `matmul`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the group and the rows it is given
//! exist in the weight and the activations it is given.

use std::{arch::x86_64::*, ops::Range};

use qwenkit_tensor::DType;

use super::matmul::{PANEL_BYTES, TILE_TOKENS, store};
use crate::{Isa, layout::GROUP_ROWS, matmul::Task, prefetch};

/// Groups of a tile: a bf16 product's latency is six cycles and two begin in one, so that twelve must be under way; and a value
/// of a token is read once for both.
const TILE_GROUPS: usize = 2;

/// Computes the task's groups for all its rows.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
pub(super) unsafe fn run(task: &Task<'_>) {
    // SAFETY: the caller's promise; `plain_bf16` where the machine has bf16 products.
    unsafe {
        match task.weight.dtype() {
            DType::F32 => panels(task, 4, |g, t| plain::<F32>(task, g, t)),
            DType::F16 => panels(task, 4, |g, t| plain::<F16>(task, g, t)),
            DType::BF16 if Isa::Avx512.pairs_bf16() => panels(task, 2, |g, t| plain_bf16(task, g, t)),
            DType::BF16 => panels(task, 4, |g, t| plain::<Bf16Spread>(task, g, t)),
            other => unreachable!("{other} is not a weight type"),
        }
    }
}

/// Calls `f(groups, tokens)` for all groups, as many as a tile takes, and tokens, in panels of values of so many bytes.
fn panels(task: &Task<'_>, value_bytes: usize, f: impl FnMut(Range<usize>, Range<usize>)) {
    task.panels_of(TILE_GROUPS, PANEL_BYTES / value_bytes, TILE_TOKENS, f);
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

/// Some groups, at most `TILE_GROUPS`, of a plain weight by `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,avx2")]
unsafe fn plain<P: Plain>(task: &Task<'_>, groups: Range<usize>, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<P>(task, groups, tokens) }
}

/// As `plain`, with bf16 products.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,fma,avx2")]
unsafe fn plain_bf16(task: &Task<'_>, groups: Range<usize>, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<Bf16>(task, groups, tokens) }
}

#[inline(always)]
unsafe fn tiles<P: Plain>(task: &Task<'_>, groups: Range<usize>, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe {
        if groups.len() == TILE_GROUPS && task.x.rows > prefetch::TOKENS_MAX {
            return tiles_of::<P, TILE_GROUPS>(task, groups.start, tokens);
        }
        groups.for_each(|g| tiles_of::<P, 1>(task, g, tokens.clone()));
    }
}

/// Groups `g..g + G` by `tokens`.
#[inline(always)]
unsafe fn tiles_of<P: Plain, const G: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    let mut t = tokens.start;
    // SAFETY: each tile stays inside `tokens`.
    unsafe {
        while t < tokens.end {
            t += match tokens.end - t {
                TILE_TOKENS.. => tile::<P, G, 8>(task, g, t),
                4.. => tile::<P, G, 4>(task, g, t),
                2.. => tile::<P, G, 2>(task, g, t),
                _ => tile::<P, G, 1>(task, g, t),
            };
        }
    }
}

/// Groups `g..g + G` by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn tile<P: Plain, const G: usize, const C: usize>(task: &Task<'_>, g: usize, t: usize) -> usize {
    let groups: [_; G] = std::array::from_fn(|i| task.group(g + i).as_ptr());
    // SAFETY: a group holds every step of K, zero-padded, and rows t..t + C of the activations exist.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); C]; G];
        let ahead = task.asks_ahead();
        for s in 0..task.x.cols.div_ceil(P::STEP) {
            if ahead {
                groups.iter().for_each(|group| prefetch::ahead(group.wrapping_add(s * P::STEP_BYTES), 1));
            }
            let w: [_; G] = std::array::from_fn(|i| P::load(groups[i], s));
            for c in 0..C {
                for i in 0..G {
                    acc[i][c] = P::add(acc[i][c], w[i], task, t + c, s);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            store(task, g + i, t, acc);
        }
    }
    C
}
