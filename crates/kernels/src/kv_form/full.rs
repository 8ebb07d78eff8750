//! Keys and values in f32.

// Loops over the registers of a tile index several arrays at once.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{KvForm, Weights};
use crate::{
    attention::{HEAD_DIM_MAX, TILE_QUERIES},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    lanes::{self, LANES, Lanes},
};

/// f32 throughout.
pub(crate) struct Full;

/// Queries of a tile in f32, (queries, K).
pub(crate) struct FullQueries {
    dim: usize,
    values: [f32; TILE_QUERIES * HEAD_DIM_MAX],
}

impl KvForm for Full {
    type Key = f32;
    type Value = f32;
    type Weight = f32;
    type Sum = f32;
    const COMPONENTS: usize = 1;
    const SCALES: usize = 0;
    const SIDE: usize = 1;
    type Queries = FullQueries;

    #[inline(always)]
    fn write_key(x: &[f32], at: usize, block: &mut [f32], _: Option<&mut f32>) {
        block.iter_mut().skip(at).step_by(KEY_BLOCK).zip(x).for_each(|(to, x)| *to = *x);
    }

    #[inline(always)]
    fn write_value(x: &[f32], _: usize, side_by_side: &mut [f32], _: Option<&mut f32>) {
        side_by_side.iter_mut().zip(x).for_each(|(to, x)| *to = *x);
    }

    #[inline(always)]
    fn queries(x: &[f32], dim: usize) -> FullQueries {
        let mut values = [0.0; _];
        values[..x.len()].copy_from_slice(x);
        FullQueries { dim, values }
    }

    #[inline(always)]
    fn scores(queries: &FullQueries, i: usize, keys: &[f32], _: &[f32]) -> Lanes {
        let mut scores = [0.0; LANES];
        let query = &queries.values[i * queries.dim..][..queries.dim];
        for (key, q) in keys.as_chunks::<LANES>().0.iter().zip(query) {
            scores.iter_mut().zip(key).for_each(|(s, k)| *s += k * q);
        }
        scores
    }

    #[inline(always)]
    fn weights(x: &[f32; PAGE_TOKENS], _: &[f32], out: &mut [f32; PAGE_TOKENS]) -> Weights {
        *out = *x;
        Weights { total: lanes::sum_by(x, |x| x), factor: 1.0 }
    }

    #[inline(always)]
    fn add_values(sum: &mut [f32], weights: &[f32], values: &[f32]) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += weights[0] * v);
    }

    #[inline(always)]
    fn number(sum: f32) -> f32 {
        sum
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scores_256<const Q: usize>(
        queries: &FullQueries,
        first: usize,
        dim: usize,
        keys: *const f32,
        _: *const f32,
    ) -> [[__m256; 2]; Q] {
        debug_assert!(queries.dim == dim && first + Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX);
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; Q];
            for d in 0..dim {
                let key = keys.add(d * KEY_BLOCK);
                let key = [_mm256_loadu_ps(key), _mm256_loadu_ps(key.add(LANES / 2))];
                for i in 0..Q {
                    let q = _mm256_set1_ps(*queries.values.as_ptr().add((first + i) * dim + d));
                    acc[i][0] = _mm256_fmadd_ps(key[0], q, acc[i][0]);
                    acc[i][1] = _mm256_fmadd_ps(key[1], q, acc[i][1]);
                }
            }
            acc
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_256<const Q: usize>(acc: &mut [[__m256; 2]; Q], values: *const f32, weights: [*const f32; Q]) {
        // SAFETY: the caller's promise.
        unsafe {
            let values = [_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(LANES / 2))];
            for i in 0..Q {
                let weight = _mm256_set1_ps(*weights[i]);
                acc[i][0] = _mm256_fmadd_ps(values[0], weight, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(values[1], weight, acc[i][1]);
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn numbers_256(sums: __m256) -> __m256 {
        sums
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scores_512<const Q: usize, const B: usize>(
        queries: &FullQueries,
        dim: usize,
        keys: *const f32,
        _: *const f32,
    ) -> [[__m512; B]; Q] {
        debug_assert!(queries.dim == dim && Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX);
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); B]; Q];
            for d in 0..dim {
                let mut key = [_mm512_setzero_ps(); B];
                for b in 0..B {
                    key[b] = _mm512_loadu_ps(keys.add((b * dim + d) * KEY_BLOCK));
                }
                for i in 0..Q {
                    let q = _mm512_set1_ps(*queries.values.as_ptr().add(i * dim + d));
                    for b in 0..B {
                        acc[i][b] = _mm512_fmadd_ps(key[b], q, acc[i][b]);
                    }
                }
            }
            acc
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scaled_512(weights: __m512, _: u16, _: *const f32) -> __m512 {
        weights
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn of_sums_256(_: __m256) -> (__m256, __m256) {
        // SAFETY: the caller's promise.
        unsafe { (_mm256_set1_ps(1.0), _mm256_set1_ps(1.0)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words_512(scaled: [__m512; 4], _: __m512, words: *mut u32) {
        // SAFETY: the caller's promise; a position takes a word.
        unsafe { (0..4).for_each(|b| _mm512_storeu_ps(words.add(b * LANES).cast(), scaled[b])) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_512(acc: __m512, values: __m512i, word: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(values), _mm512_castsi512_ps(word), acc) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn numbers_512(sums: __m512) -> __m512 {
        sums
    }
}
