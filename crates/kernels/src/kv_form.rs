//! How a cache holds keys and values, and the steps of attention over them: f32 throughout, or 16 bits a number.
//!
//! Not here: where a page's memory lies (`kv`), and the order in which steps follow each other (`attention` and the folders of
//! the instruction sets).

// Loops over the registers of a tile index several arrays at once.
#![allow(clippy::needless_range_loop)]

use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::{
    attention::{HEAD_DIM_MAX, TILE_QUERIES},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    lanes::{self, LANES, Lanes},
};

/// Keys `[4][K / C][16][C]`, their scales (64, or none) and values `[64 / S][K'][S]` of one head in one page.
pub(crate) type Head<'a, F> = (&'a [<F as KvForm>::Key], &'a [f32], &'a [<F as KvForm>::Value]);

/// As `Head`, to be written.
pub(crate) type HeadMut<'a, F> = (&'a mut [<F as KvForm>::Key], &'a mut [f32], &'a mut [<F as KvForm>::Value]);

/// The largest integer that a key is rounded to; keys of 13 bits and a sign leave queries 12 bits in a head of 64.
const KEY_MAX: f32 = 8191.0;

/// How a cache holds keys and values, and what the weighted sum of values takes in one step: sixteen components of `SIDE`
/// positions, 64 bytes, times one 32-bit word that holds the weights of these positions.
pub(crate) trait KvForm: Sized {
    type Key: bytemuck::Pod + Send + Sync;
    type Value: bytemuck::Pod + Send + Sync;
    /// C
    const COMPONENTS: usize;
    /// Scales of a page's keys: 64 or none.
    const KEY_SCALES: usize;
    /// S
    const SIDE: usize;
    /// A tile's queries as scores take them.
    type Queries;

    /// The pieces of a head's bytes in a page.
    fn pieces(bytes: &[u8], head_dim: usize) -> Head<'_, Self> {
        let (keys, rest) = bytes.split_at(PAGE_TOKENS * head_dim * size_of::<Self::Key>());
        let (scales, values) = rest.split_at(Self::KEY_SCALES * size_of::<f32>());
        (bytemuck::cast_slice(keys), bytemuck::cast_slice(scales), bytemuck::cast_slice(values))
    }
    /// As `pieces`, to be written.
    fn pieces_mut(bytes: &mut [u8], head_dim: usize) -> HeadMut<'_, Self> {
        let (keys, rest) = bytes.split_at_mut(PAGE_TOKENS * head_dim * size_of::<Self::Key>());
        let (scales, values) = rest.split_at_mut(Self::KEY_SCALES * size_of::<f32>());
        (bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(scales), bytemuck::cast_slice_mut(values))
    }

    /// Lays `x`: (K) as key `at` of the block of sixteen: (K / C, 16, C), and its scale.
    fn write_key(x: &[f32], at: usize, block: &mut [Self::Key], scale: Option<&mut f32>);
    fn value(x: f32) -> Self::Value;
    /// A weight as the sum over values takes it.
    fn weight(x: f32) -> f32;

    /// Prepares queries, (n, K).
    fn queries(x: &[f32], dim: usize) -> Self::Queries;
    /// Query `i` by sixteen keys: (K / C, 16, C).
    fn scores(queries: &Self::Queries, i: usize, keys: &[Self::Key], scales: &[f32]) -> Lanes;
    /// sum += weights: (S) by values: (16, S)
    fn add_values(sum: &mut Lanes, weights: &[f32], values: &[Self::Value]);

    /// Queries `first..first + Q` by sixteen keys, eight in each register.
    ///
    /// # Safety
    /// AVX2 and FMA; `keys` points at (dim / C, 16, C) elements, `scales` at sixteen, where there are scales; `queries` are of
    /// `dim`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scores_256<const Q: usize>(
        queries: &Self::Queries,
        first: usize,
        dim: usize,
        keys: *const Self::Key,
        scales: *const f32,
    ) -> [[__m256; 2]; Q];

    /// acc + one step's values by the weights of each query.
    ///
    /// # Safety
    /// AVX2 and FMA; 64 bytes can be read at `values`, and each query's weights of the step's S positions at `weights`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn step_256<const Q: usize>(
        acc: &mut [[__m256; 2]; Q],
        values: *const Self::Value,
        weights: [*const f32; Q],
    );

    /// Q queries by sixteen keys.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI; `keys` points at (dim / C, 16, C) elements, `scales` at sixteen, where there are scales; `queries`
    /// are of `dim`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scores_512<const Q: usize>(
        queries: &Self::Queries,
        dim: usize,
        keys: *const Self::Key,
        scales: *const f32,
    ) -> [__m512; Q];

    /// Stores `weight` of 64 weights as words, and returns partial sums of what was stored.
    ///
    /// # Safety
    /// AVX-512 F and BW, and BF16 if `NATIVE`; `words` has room for 64 positions.
    #[cfg(target_arch = "x86_64")]
    unsafe fn weights_512<const NATIVE: bool>(weights: [__m512; 4], words: *mut u32) -> __m512;

    /// acc + one step's values by `word`, in every lane. `NATIVE`: with the machine's own product of bf16 pairs.
    ///
    /// # Safety
    /// AVX-512 F, and BF16 if `NATIVE`; 64 bytes can be read at `values` and four at `word`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn step_512<const NATIVE: bool>(acc: __m512, values: __m512i, word: *const u32) -> __m512;
}

/// f32 throughout.
pub(crate) struct Full;
/// Keys of 14 bits, bf16 values.
pub(crate) struct Half;

/// Queries of a tile in f32, (queries, K).
pub(crate) struct FullQueries {
    dim: usize,
    values: [f32; TILE_QUERIES * HEAD_DIM_MAX],
}

/// Queries of a tile as integers so small that no product with a key overflows 32 bits.
pub(crate) struct HalfQueries {
    values: [[i16; HEAD_DIM_MAX]; TILE_QUERIES],
    scale: [f32; TILE_QUERIES],
}

/// Rounds `x` to integers up to `most` under a scale, and returns that. A scale of what is no number is no number.
#[inline(always)]
fn round_under_scale(x: &[f32], most: f32, mut put: impl FnMut(usize, i16)) -> f32 {
    let largest = lanes::largest(x);
    let inverse = if largest > 0.0 { most / largest } else { 0.0 };
    for (i, x) in x.iter().enumerate() {
        // Adding 1.5 * 2^23 rounds to the nearest, ties to even, and leaves the integer in the low bits.
        put(i, (x * inverse + 12_582_912.0).to_bits() as i16);
    }
    largest / most
}

impl KvForm for Full {
    type Key = f32;
    type Value = f32;
    const COMPONENTS: usize = 1;
    const KEY_SCALES: usize = 0;
    const SIDE: usize = 1;
    type Queries = FullQueries;

    #[inline(always)]
    fn write_key(x: &[f32], at: usize, block: &mut [f32], _: Option<&mut f32>) {
        block.iter_mut().skip(at).step_by(KEY_BLOCK).zip(x).for_each(|(to, x)| *to = *x);
    }

    #[inline(always)]
    fn value(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn weight(x: f32) -> f32 {
        x
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
    fn add_values(sum: &mut Lanes, weights: &[f32], values: &[f32]) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += weights[0] * v);
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
    unsafe fn scores_512<const Q: usize>(
        queries: &FullQueries,
        dim: usize,
        keys: *const f32,
        _: *const f32,
    ) -> [__m512; Q] {
        debug_assert!(queries.dim == dim && Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX);
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [_mm512_setzero_ps(); Q];
            for d in 0..dim {
                let key = _mm512_loadu_ps(keys.add(d * KEY_BLOCK));
                for i in 0..Q {
                    let q = _mm512_set1_ps(*queries.values.as_ptr().add(i * dim + d));
                    acc[i] = _mm512_fmadd_ps(key, q, acc[i]);
                }
            }
            acc
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn weights_512<const NATIVE: bool>(weights: [__m512; 4], words: *mut u32) -> __m512 {
        // SAFETY: the caller's promise; a position takes a word.
        unsafe {
            (0..4).for_each(|b| _mm512_storeu_ps(words.add(b * LANES).cast(), weights[b]));
            let pairs = (_mm512_add_ps(weights[0], weights[1]), _mm512_add_ps(weights[2], weights[3]));
            _mm512_add_ps(pairs.0, pairs.1)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_512<const NATIVE: bool>(acc: __m512, values: __m512i, word: *const u32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(values), _mm512_set1_ps(*word.cast()), acc) }
    }
}

impl KvForm for Half {
    type Key = i16;
    type Value = bf16;
    const COMPONENTS: usize = 2;
    const KEY_SCALES: usize = PAGE_TOKENS;
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
    fn value(x: f32) -> bf16 {
        bf16::from_f32(x)
    }

    /// Weights are numbers from 0 to 1, so rounding needs no case for what is no number.
    #[inline(always)]
    fn weight(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
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
        let mut sums = [0; LANES];
        for (keys, q) in keys.as_chunks::<{ 2 * LANES }>().0.iter().zip(queries.values[i].as_chunks::<2>().0) {
            for (sum, key) in sums.iter_mut().zip(keys.as_chunks::<2>().0) {
                *sum += i32::from(key[0]) * i32::from(q[0]) + i32::from(key[1]) * i32::from(q[1]);
            }
        }
        let mut scores = [0.0; LANES];
        for ((score, sum), scale) in scores.iter_mut().zip(sums).zip(scales) {
            *score = sum as f32 * scale * queries.scale[i];
        }
        scores
    }

    #[inline(always)]
    fn add_values(sum: &mut Lanes, weights: &[f32], values: &[bf16]) {
        let wide = |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16);
        for (s, pair) in sum.iter_mut().zip(values.as_chunks::<2>().0) {
            *s += weights[0] * wide(pair[0]);
            *s += weights[1] * wide(pair[1]);
        }
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
    unsafe fn step_256<const Q: usize>(acc: &mut [[__m256; 2]; Q], values: *const bf16, weights: [*const f32; Q]) {
        // SAFETY: the caller's promise. A bf16 is the upper half of the f32 of the same value.
        unsafe {
            for h in 0..2 {
                let pairs = _mm256_loadu_si256(values.cast::<__m256i>().add(h));
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
                let high = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
                for i in 0..Q {
                    acc[i][h] = _mm256_fmadd_ps(low, _mm256_set1_ps(*weights[i]), acc[i][h]);
                    acc[i][h] = _mm256_fmadd_ps(high, _mm256_set1_ps(*weights[i].add(1)), acc[i][h]);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scores_512<const Q: usize>(
        queries: &HalfQueries,
        dim: usize,
        keys: *const i16,
        scales: *const f32,
    ) -> [__m512; Q] {
        debug_assert!(Q <= TILE_QUERIES && dim <= HEAD_DIM_MAX && dim.is_multiple_of(2));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); Q];
            for d in (0..dim).step_by(2) {
                let key = _mm512_loadu_si512(keys.add(d * KEY_BLOCK).cast());
                for i in 0..Q {
                    let q = queries.values[i].as_ptr().add(d).cast::<i32>().read_unaligned();
                    sums[i] = _mm512_dpwssd_epi32(sums[i], key, _mm512_set1_epi32(q));
                }
            }
            let scales = _mm512_loadu_ps(scales);
            let mut scores = [_mm512_setzero_ps(); Q];
            for i in 0..Q {
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), scales);
                scores[i] = _mm512_mul_ps(scaled, _mm512_set1_ps(queries.scale[i]));
            }
            scores
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn weights_512<const NATIVE: bool>(weights: [__m512; 4], words: *mut u32) -> __m512 {
        // SAFETY: the caller's promise; two positions share a word. Both ways round as `weight` does.
        unsafe {
            if NATIVE {
                let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(0x3f80_3f80));
                let mut sums = _mm512_setzero_ps();
                for b in 0..2 {
                    let pairs = _mm512_cvtne2ps_pbh(weights[2 * b + 1], weights[2 * b]);
                    _mm512_storeu_si512(words.add(b * LANES).cast(), std::mem::transmute::<__m512bh, __m512i>(pairs));
                    sums = _mm512_dpbf16_ps(sums, pairs, ones);
                }
                return sums;
            }
            let mut sums = _mm512_setzero_ps();
            for (b, weights) in weights.into_iter().enumerate() {
                let bits = _mm512_castps_si512(weights);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let high = _mm512_srli_epi32::<16>(up);
                _mm256_storeu_si256(words.add(b * LANES / 2).cast(), _mm512_cvtepi32_epi16(high));
                sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)));
            }
            sums
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn step_512<const NATIVE: bool>(acc: __m512, values: __m512i, word: *const u32) -> __m512 {
        // SAFETY: the caller's promise; vectors of 32 bf16 values have the same size. A bf16 is the upper half of the f32 of
        // the same value.
        unsafe {
            let word = _mm512_set1_epi32(word.cast::<i32>().read());
            if NATIVE {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                return _mm512_dpbf16_ps(acc, pairs(values), pairs(word));
            }
            let low = |v| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v));
            let high = |v| _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
            let acc = _mm512_fmadd_ps(low(values), low(word), acc);
            _mm512_fmadd_ps(high(values), high(word), acc)
        }
    }
}
