//! Keys and values of 16 bits: integers under a scale for each position, multiplied in pairs and summed exactly, so that no sum
//! depends on an order.

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

/// The largest integer that a key is rounded to; keys of 13 bits and a sign leave queries 12 bits in a head of 64.
const KEY_MAX: f32 = 8191.0;
/// The largest integer that a value is rounded to.
const VALUE_MAX: f32 = 32767.0;
/// What a chunk's 64 weights are scaled to add up to: one of them may be all of it and has 16 bits. Times `VALUE_MAX` it is half of
/// what 32 bits hold.
const WEIGHTS_SUM: f32 = 32767.0;

/// Keys of 14 bits, values of 16.
pub(crate) struct Half;

/// Queries of a tile as integers so small that no product with a key overflows 32 bits.
pub(crate) struct HalfQueries {
    values: [[i16; HEAD_DIM_MAX]; TILE_QUERIES],
    scale: [f32; TILE_QUERIES],
}

/// Rounds to the nearest integer, ties to even.
#[inline(always)]
fn nearest(x: f32) -> i16 {
    (x + lanes::ROUND).to_bits() as i16
}

/// Rounds `x` to integers up to `most` under a scale, and returns that. A scale of what is no number is no number.
#[inline(always)]
fn round_under_scale(x: &[f32], most: f32, mut put: impl FnMut(usize, i16)) -> f32 {
    let largest = lanes::largest(x);
    let inverse = if largest > 0.0 { most / largest } else { 0.0 };
    x.iter().enumerate().for_each(|(i, x)| put(i, nearest(x * inverse)));
    largest / most
}

/// Integers made of what is no number may be any; that shows in their scale, and their sums may wrap.
#[inline(always)]
fn pair_product(a: [i16; 2], b: [i16; 2]) -> i32 {
    (i32::from(a[0]) * i32::from(b[0])).wrapping_add(i32::from(a[1]) * i32::from(b[1]))
}

/// What weights are multiplied by so that they add up to `WEIGHTS_SUM`. A sum that is no number shows in the factor.
#[inline(always)]
fn to_whole_sum(sum: f32) -> f32 {
    if sum > f32::MIN_POSITIVE * WEIGHTS_SUM { WEIGHTS_SUM / sum } else { 0.0 }
}

impl KvForm for Half {
    type Key = i16;
    type Value = i16;
    type Weight = i16;
    type Sum = i32;
    const COMPONENTS: usize = 2;
    const SCALES: usize = PAGE_TOKENS;
    const SIDE: usize = 2;
    type Queries = HalfQueries;

    #[inline(always)]
    fn write_key(x: &[f32], at: usize, block: &mut [i16], scale: Option<&mut f32>) {
        let found = round_under_scale(x, KEY_MAX, |d, k| block[(d / 2 * KEY_BLOCK + at) * 2 + d % 2] = k);
        if let Some(scale) = scale {
            *scale = found;
        }
    }

    #[inline(always)]
    fn write_value(x: &[f32], at: usize, side_by_side: &mut [i16], scale: Option<&mut f32>) {
        let found = round_under_scale(x, VALUE_MAX, |d, v| side_by_side[2 * d + at] = v);
        if let Some(scale) = scale {
            *scale = found;
        }
    }

    #[inline(always)]
    fn queries(x: &[f32], dim: usize) -> HalfQueries {
        let most = (i32::MAX / KEY_MAX as i32 / dim as i32).min(i32::from(i16::MAX)) as f32;
        let mut queries = HalfQueries { values: [[0; _]; _], scale: [0.0; _] };
        for ((x, values), scale) in x.chunks_exact(dim).zip(&mut queries.values).zip(&mut queries.scale) {
            *scale = round_under_scale(x, most, |d, q| values[d] = q);
        }
        queries
    }

    #[inline(always)]
    fn scores(queries: &HalfQueries, i: usize, keys: &[i16], scales: &[f32]) -> Lanes {
        let mut sums = [0i32; LANES];
        for (keys, q) in keys.as_chunks::<{ 2 * LANES }>().0.iter().zip(queries.values[i].as_chunks::<2>().0) {
            for (sum, key) in sums.iter_mut().zip(keys.as_chunks::<2>().0) {
                *sum = sum.wrapping_add(pair_product([key[0], key[1]], [q[0], q[1]]));
            }
        }
        let mut scores = [0.0; LANES];
        for ((score, sum), scale) in scores.iter_mut().zip(sums).zip(scales) {
            *score = sum as f32 * scale * queries.scale[i];
        }
        scores
    }

    #[inline(always)]
    fn weights(x: &[f32; PAGE_TOKENS], scales: &[f32], out: &mut [i16; PAGE_TOKENS]) -> Weights {
        let mut scaled = [0.0; PAGE_TOKENS];
        for ((scaled, x), scale) in scaled.iter_mut().zip(x).zip(scales) {
            // The scale of a key that is not seen may be anything.
            *scaled = if *x == 0.0 { 0.0 } else { x * scale };
        }
        let sum = lanes::sum_by(&scaled, |x| x);
        let inverse = to_whole_sum(sum);
        out.iter_mut().zip(scaled).for_each(|(out, x)| *out = nearest(x * inverse));
        Weights { total: lanes::sum_by(x, |x| x), factor: sum / WEIGHTS_SUM }
    }

    #[inline(always)]
    fn add_values(sum: &mut [i32], weights: &[i16], values: &[i16]) {
        for (s, pair) in sum.iter_mut().zip(values.as_chunks::<2>().0) {
            *s = s.wrapping_add(pair_product([weights[0], weights[1]], [pair[0], pair[1]]));
        }
    }

    #[inline(always)]
    fn number(sum: i32) -> f32 {
        sum as f32
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scores_256<const Q: usize>(
        queries: &HalfQueries,
        first: usize,
        dim: usize,
        keys: *const i16,
        scales: *const f32,
    ) -> [[__m256; 2]; Q] {
        debug_assert!(first + Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX && dim.is_multiple_of(2));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; Q];
            for d in (0..dim).step_by(2) {
                let key = keys.add(d * KEY_BLOCK).cast::<__m256i>();
                let key = [_mm256_loadu_si256(key), _mm256_loadu_si256(key.add(1))];
                for i in 0..Q {
                    let q = queries.values[first + i].as_ptr().add(d).cast::<i32>().read_unaligned();
                    let q = _mm256_set1_epi32(q);
                    sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(key[0], q));
                    sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(key[1], q));
                }
            }
            let scales = [_mm256_loadu_ps(scales), _mm256_loadu_ps(scales.add(LANES / 2))];
            let mut scores = [[_mm256_setzero_ps(); 2]; Q];
            for i in 0..Q {
                let own = _mm256_set1_ps(queries.scale[first + i]);
                for h in 0..2 {
                    scores[i][h] = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][h]), scales[h]), own);
                }
            }
            scores
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_256<const Q: usize>(acc: &mut [[__m256; 2]; Q], values: *const i16, weights: [*const i16; Q]) {
        // SAFETY: the caller's promise.
        unsafe {
            let values = [_mm256_loadu_si256(values.cast()), _mm256_loadu_si256(values.cast::<__m256i>().add(1))];
            for i in 0..Q {
                let pair = _mm256_set1_epi32(weights[i].cast::<i32>().read_unaligned());
                for h in 0..2 {
                    let products = _mm256_madd_epi16(values[h], pair);
                    acc[i][h] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(acc[i][h]), products));
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn numbers_256(sums: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(sums)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scores_512<const Q: usize, const B: usize>(
        queries: &HalfQueries,
        dim: usize,
        keys: *const i16,
        scales: *const f32,
    ) -> [[__m512; B]; Q] {
        debug_assert!(Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX && dim.is_multiple_of(2));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); B]; Q];
            for d in (0..dim).step_by(2) {
                let mut key = [_mm512_setzero_si512(); B];
                for b in 0..B {
                    key[b] = _mm512_loadu_si512(keys.add((b * dim + d) * KEY_BLOCK).cast());
                }
                for i in 0..Q {
                    let q = queries.values[i].as_ptr().add(d).cast::<i32>().read_unaligned();
                    for b in 0..B {
                        sums[i][b] = _mm512_dpwssd_epi32(sums[i][b], key[b], _mm512_set1_epi32(q));
                    }
                }
            }
            let mut scores = [[_mm512_setzero_ps(); B]; Q];
            for i in 0..Q {
                for b in 0..B {
                    let scales = _mm512_loadu_ps(scales.add(b * LANES));
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][b]), scales);
                    scores[i][b] = _mm512_mul_ps(scaled, _mm512_set1_ps(queries.scale[i]));
                }
            }
            scores
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scaled_512(weights: __m512, mask: u16, scales: *const f32) -> __m512 {
        // SAFETY: the caller's promise. The scale of a key that is not seen may be anything.
        unsafe { _mm512_maskz_mul_ps(mask, weights, _mm512_loadu_ps(scales)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn of_sums_256(sums: __m256) -> (__m256, __m256) {
        // SAFETY: the caller's promise. As `to_whole_sum`.
        unsafe {
            let whole = _mm256_set1_ps(WEIGHTS_SUM);
            let some = _mm256_cmp_ps::<_CMP_GT_OQ>(sums, _mm256_set1_ps(f32::MIN_POSITIVE * WEIGHTS_SUM));
            (_mm256_and_ps(some, _mm256_div_ps(whole, sums)), _mm256_div_ps(sums, whole))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words_512(scaled: [__m512; 4], inverse: __m512, words: *mut u32) {
        // SAFETY: the caller's promise; two positions share a word.
        unsafe {
            // Packing goes by pieces of 128 bits; these pieces in their order again.
            let order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
            for b in 0..2 {
                let whole = |x| _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
                let packed = _mm512_packs_epi32(whole(scaled[2 * b]), whole(scaled[2 * b + 1]));
                _mm512_storeu_si512(words.add(b * LANES).cast(), _mm512_permutexvar_epi64(order, packed));
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_512(acc: __m512, values: __m512i, word: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castsi512_ps(_mm512_dpwssd_epi32(_mm512_castps_si512(acc), values, word)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn numbers_512(sums: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(sums)) }
    }
}
