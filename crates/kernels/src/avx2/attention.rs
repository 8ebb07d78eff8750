//! Tiles of attention on AVX2: up to 4 queries share each load of keys and of values.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    attention::{Partial, Tile},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    kv_form::{Head, KvForm},
    lanes::{self, EXP_2, LANES},
};

/// Queries that share a load: two registers of sums each, of sixteen.
const QUERIES: usize = 4;

/// The tiles' results over `chunks`.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn span<F: KvForm>(tiles: &[Tile<'_, F>], chunks: Range<usize>, outs: &mut [Partial<'_>]) {
    for c in chunks {
        for (tile, out) in tiles.iter().zip(&mut *outs).filter(|(tile, _)| tile.seen_end(c) > 0) {
            for first in (0..tile.count).step_by(QUERIES) {
                // SAFETY: the caller's promise; these queries and this chunk exist.
                unsafe {
                    match tile.count - first {
                        1 => chunk::<F, 1>(tile, first, c, out),
                        2 => chunk::<F, 2>(tile, first, c, out),
                        3 => chunk::<F, 3>(tile, first, c, out),
                        _ => chunk::<F, QUERIES>(tile, first, c, out),
                    }
                }
            }
        }
    }
}

/// Adds chunk `c` to the results of queries `first..first + Q`.
#[inline(always)]
unsafe fn chunk<F: KvForm, const Q: usize>(tile: &Tile<'_, F>, first: usize, c: usize, out: &mut Partial<'_>) {
    let (dim, value_dim) = (tile.head_dim, tile.value_dim);
    let Head { keys, key_scales, values, value_scales } = tile.head(c);
    let end = tile.seen_end(c);
    let mut scores = [[0.0; PAGE_TOKENS]; Q];
    let mut words = [[bytemuck::Zeroable::zeroed(); PAGE_TOKENS]; Q];
    // SAFETY: loads stay in the page's 64 keys and values, and in what is computed of them here.
    unsafe {
        for block in 0..end.div_ceil(KEY_BLOCK) {
            let at = block * KEY_BLOCK;
            // Where there are no scales, nothing is read from behind their end.
            let scales = key_scales.as_ptr().wrapping_add(at);
            let found = F::scores_256::<Q>(&tile.queries, first, dim, keys.as_ptr().add(at * dim), scales);
            for i in 0..Q {
                _mm256_storeu_ps(scores[i].as_mut_ptr().add(at), found[i][0]);
                _mm256_storeu_ps(scores[i].as_mut_ptr().add(at + LANES / 2), found[i][1]);
            }
        }
        let (mut old, mut new, mut factors) = ([1.0; Q], [0.0; Q], [0.0; Q]);
        for i in 0..Q {
            let seen = tile.seen(first + i, c);
            scores[i][..seen.start].fill(f32::NEG_INFINITY);
            scores[i][seen.end..].fill(f32::NEG_INFINITY);
            if seen.is_empty() {
                continue;
            }
            let largest = exponentials(&mut scores[i]);
            let weights = F::weights(&scores[i], value_scales, &mut words[i]);
            let (before, now) = (out.largest[first + i], f32::max(out.largest[first + i], largest));
            (old[i], new[i]) = (lanes::exp_2(before - now), lanes::exp_2(largest - now));
            out.total[first + i] = out.total[first + i] * old[i] + weights.total * new[i];
            factors[i] = new[i] * weights.factor;
            out.largest[first + i] = now;
        }
        for d in (0..value_dim).step_by(LANES) {
            let mut acc = [[_mm256_setzero_ps(); 2]; Q];
            for step in 0..end.div_ceil(F::SIDE) {
                let mut weights = [words[0].as_ptr(); Q];
                for i in 0..Q {
                    weights[i] = words[i].as_ptr().add(step * F::SIDE);
                }
                F::step_256::<Q>(&mut acc, values.as_ptr().add((step * value_dim + d) * F::SIDE), weights);
            }
            for i in (0..Q).filter(|&i| new[i] != 0.0) {
                for (h, acc) in acc[i].into_iter().enumerate() {
                    let to = out.values.as_mut_ptr().add((first + i) * value_dim + d + h * LANES / 2);
                    let kept = _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_set1_ps(old[i]));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(F::numbers_256(acc), _mm256_set1_ps(factors[i]), kept));
                }
            }
        }
    }
}

/// Turns scores into 2^(score - largest), and returns the largest score.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exponentials(scores: &mut [f32; PAGE_TOKENS]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in scores.as_chunks::<LANES>().0 {
        largest.iter_mut().zip(block).for_each(|(m, s)| *m = f32::max(*m, *s));
    }
    let largest = lanes::max(largest);
    for eight in scores.as_chunks_mut::<{ LANES / 2 }>().0 {
        // SAFETY: loads and stores are of the eight.
        unsafe {
            let score = _mm256_loadu_ps(eight.as_ptr());
            // A masked key weighs exactly nothing.
            let masked = _mm256_cmp_ps::<_CMP_EQ_OQ>(score, _mm256_set1_ps(f32::NEG_INFINITY));
            let weight = exp_2(_mm256_sub_ps(score, _mm256_set1_ps(largest)));
            _mm256_storeu_ps(eight.as_mut_ptr(), _mm256_andnot_ps(masked, weight));
        }
    }
    largest
}

/// `lanes::exp_2` of eight values that are no larger than 0. What is no number stays none: it has to be the second operand.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp_2(x: __m256) -> __m256 {
    let x = _mm256_max_ps(_mm256_set1_ps(-126.0), x);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm256_sub_ps(x, n);
    let mut p = _mm256_set1_ps(EXP_2[0]);
    for c in &EXP_2[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_mul_ps(p, _mm256_castsi256_ps(power))
}
