//! Products of many tokens on AVX2: some units of a group, taken apart once into the first-level cache, go through all tokens
//! of a panel, whose sums wait in memory meanwhile.
//!
//! Sixteen registers hold the sums of four tokens; to take quants apart anew for every four costs as much as to multiply
//! them. Without AVX-VNNI, products of small quants are added up in 16 bits for as many steps as cannot overflow. Order of operations as in
//! `portable::matmul`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{arch::x86_64::*, ops::Range};

use super::matmul::{HALF_ROWS, add_products, factors, offset, shifted, step, store};
use crate::{
    activations::tile_of,
    layout::{Layout, UNIT},
    matmul::Task,
};

/// Tokens from which this way is taken: two tiles.
pub(super) const TOKENS_MIN: usize = 8;
/// Units taken apart at a time: 4 KiB of quants and 2 KiB of factors, beside which a tile's activations and a panel's sums
/// stay in a first-level cache of 32 KiB.
const UNITS: usize = 8;
/// Tokens of a panel, with sums of 8 KiB.
const PANEL_TOKENS: usize = 128;
/// Steps of a unit.
const STEPS: usize = 8;

/// Some units of a group, taken apart.
#[repr(C, align(64))]
struct Apart {
    /// As `step` gives them, (unit, half, step, 32)
    quants: [[[[u8; 32]; STEPS]; 2]; UNITS],
    /// Scale and addend of each part of a unit, (unit, part, half, 8)
    factors: [[[[[f32; HALF_ROWS]; 2]; 2]; 2]; UNITS],
}

/// One group of a quantised weight by `tokens`; not for types that `step` gives as signed values.
#[inline(always)]
pub(super) unsafe fn quantized<const D: usize, const VNNI: bool>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    for first in tokens.clone().step_by(PANEL_TOKENS) {
        // SAFETY: the panel stays inside `tokens`.
        unsafe { panel::<D, VNNI>(task, g, first..(first + PANEL_TOKENS).min(tokens.end)) };
    }
}

#[inline(always)]
unsafe fn panel<const D: usize, const VNNI: bool>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    let units = task.x.cols / UNIT;
    let mut apart = Apart { quants: [[[[0; 32]; STEPS]; 2]; UNITS], factors: [[[[[0.0; HALF_ROWS]; 2]; 2]; 2]; UNITS] };
    let mut sums = [[[0.0; HALF_ROWS]; 2]; PANEL_TOKENS];
    for first in (0..units).step_by(UNITS) {
        let own = first..(first + UNITS).min(units);
        // SAFETY: the units exist, and each tile stays inside `tokens`.
        unsafe {
            apart.fill::<D, VNNI>(task, g, own.clone());
            let mut t = tokens.start;
            while t < tokens.end {
                let sums = &mut sums[t - tokens.start..];
                t += match tokens.end - t {
                    4.. => tile::<D, VNNI, 4>(task, &apart, own.clone(), t, sums),
                    2.. => tile::<D, VNNI, 2>(task, &apart, own.clone(), t, sums),
                    _ => tile::<D, VNNI, 1>(task, &apart, own.clone(), t, sums),
                };
            }
        }
    }
    for (t, sums) in tokens.zip(&sums) {
        for (half, sums) in sums.iter().enumerate() {
            // SAFETY: this thread alone computes group `g`.
            unsafe { store(task, g, half, t, _mm256_loadu_ps(sums.as_ptr())) };
        }
    }
}

impl Apart {
    #[inline(always)]
    unsafe fn fill<const D: usize, const VNNI: bool>(&mut self, task: &Task<'_>, g: usize, units: Range<usize>) {
        let layout = const { Layout::at::<D>() };
        let group = task.group(g).as_ptr();
        // SAFETY: the group has these units; stores are of 32 bytes.
        unsafe {
            for ((u, quants), own) in units.zip(&mut self.quants).zip(&mut self.factors) {
                let unit = group.add(layout.quants_at(u));
                for half in 0..2 {
                    for s in 0..STEPS {
                        _mm256_storeu_si256(quants[half][s].as_mut_ptr().cast(), step::<D, VNNI>(unit, s, half));
                    }
                    for part in 0..1 + usize::from(layout.has_half_scales()) {
                        let (scale, addend) = factors::<D>(group, u, part, half);
                        _mm256_storeu_ps(own[part][half][0].as_mut_ptr(), scale);
                        _mm256_storeu_ps(own[part][half][1].as_mut_ptr(), addend);
                    }
                }
            }
        }
    }
}

/// Steps whose products' sums of pairs fit 16 bits together, activations being 127 at most.
const fn steps_of_16_bits(layout: &Layout) -> usize {
    match layout.low_bits + layout.high_bits {
        0..=4 => 8,
        5 => 4,
        _ => 2,
    }
}

/// Units `units` of a group by tokens `t..t + C`, on top of `sums`; returns C.
#[inline(always)]
unsafe fn tile<const D: usize, const VNNI: bool, const C: usize>(
    task: &Task<'_>,
    apart: &Apart,
    units: Range<usize>,
    t: usize,
    sums: &mut [[[f32; HALF_ROWS]; 2]],
) -> usize {
    let layout = const { Layout::at::<D>() };
    let (parts, steps) = if layout.has_half_scales() { (2, STEPS / 2) } else { (1, STEPS) };
    let together = const { steps_of_16_bits(&Layout::at::<D>()) }.min(steps);
    // The tile of activations is as wide as this one or twice as wide.
    let (first, width) = tile_of(task.x.widest, t, task.x.rows);
    let at = first * (task.x.cols / UNIT) + (t - first);
    assert!(sums.len() >= C);
    // SAFETY: rows t..t + C of the activations exist, and `apart` has the units.
    unsafe {
        let (x, facts) = (task.x.quants.as_ptr().add(at * UNIT), task.x.facts.as_ptr().add(at));
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); C];
            for c in 0..C {
                acc[c] = _mm256_loadu_ps(sums[c][half].as_ptr());
            }
            for ((u, quants), factors) in units.clone().zip(&apart.quants).zip(&apart.factors) {
                let (x, facts) = (x.add(u * width * UNIT), facts.add(u * width));
                for part in 0..parts {
                    let which = if parts == 1 { 0 } else { 1 + part };
                    let mut sum = [_mm256_setzero_si256(); C];
                    if let Some(log2) = const { offset::<D>(VNNI) } {
                        for c in 0..C {
                            sum[c] = shifted((*facts.add(c)).minus_sum[which], log2);
                        }
                    }
                    if VNNI {
                        for s in part * steps..(part + 1) * steps {
                            let q = _mm256_load_si256(quants[half][s].as_ptr().cast());
                            for (c, sum) in sum.iter_mut().enumerate() {
                                let four = _mm256_set1_epi32(x.add(c * UNIT + 4 * s).cast::<i32>().read_unaligned());
                                *sum = add_products::<D, VNNI>(*sum, q, four);
                            }
                        }
                    }
                    let in_16_bits = if VNNI { 0..0 } else { part * steps..(part + 1) * steps };
                    for some in in_16_bits.step_by(together) {
                        let mut pairs = [_mm256_setzero_si256(); C];
                        for s in some..some + together {
                            let q = _mm256_load_si256(quants[half][s].as_ptr().cast());
                            for (c, pairs) in pairs.iter_mut().enumerate() {
                                let four = _mm256_set1_epi32(x.add(c * UNIT + 4 * s).cast::<i32>().read_unaligned());
                                let products = _mm256_maddubs_epi16(q, four);
                                *pairs = if s == some { products } else { _mm256_add_epi16(*pairs, products) };
                            }
                        }
                        for (sum, pairs) in sum.iter_mut().zip(pairs) {
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                        }
                    }
                    let [scale, addend] = &factors[part][half];
                    let (scale, addend) = (_mm256_loadu_ps(scale.as_ptr()), _mm256_loadu_ps(addend.as_ptr()));
                    for c in 0..C {
                        let facts = &*facts.add(c);
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(facts.scale));
                        acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), scale, acc[c]);
                        if layout.has_addend() {
                            acc[c] = _mm256_fmadd_ps(addend, _mm256_set1_ps(facts.sum[which]), acc[c]);
                        }
                    }
                }
            }
            for (sums, acc) in sums.iter_mut().zip(acc) {
                _mm256_storeu_ps(sums[half].as_mut_ptr(), acc);
            }
        }
    }
    C
}
