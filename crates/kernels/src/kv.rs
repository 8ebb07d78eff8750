//! The key/value cache of one layer, in pages of 64 positions.
//!
//! A page holds, for each kv head, keys as `[4 blocks][K][16 positions]` - so that one vector holds the same component
//! of 16 keys - and values as `[64 / S][K'][S positions]`, K' being K rounded up to whole vectors and S the positions whose
//! values one step of the weighted sum takes. Models with f32 or f16 weights have f32 keys and values (S = 1); all others f16
//! keys and bf16 values (S = 2). Which page is whose is the engine's business; here a sequence is a list of page numbers.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use qwenkit_tensor::{AllocError, HugeBuf};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::{
    lanes::{LANES, Lanes},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Positions in a page, and keys in a chunk of the attention's running softmax.
pub const PAGE_TOKENS: usize = 64;
/// Keys whose components lie side by side.
pub(crate) const KEY_BLOCK: usize = 16;

/// The element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// Full precision, for models whose activations stay in f32: those with f32 or f16 weights.
    F32,
    /// Half precision, for all others: keys in f16, whose larger mantissa the scores need; values in bf16, which processors
    /// multiply in pairs.
    F16,
}

/// One layer's pages.
pub struct KvCache {
    pub(crate) kv_type: KvType,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pages: usize,
    data: HugeBuf,
}

/// How a cache holds keys and values, and what the weighted sum of values takes in one step: sixteen components of `SIDE`
/// positions, 64 bytes, times one 32-bit word that holds the weights of these positions.
pub(crate) trait KvForm: Sized {
    type Key: bytemuck::Pod + Send + Sync;
    type Value: bytemuck::Pod + Send + Sync;
    /// S
    const SIDE: usize;

    fn key(x: f32) -> Self::Key;
    fn value(x: f32) -> Self::Value;
    /// A weight as the sum over values takes it.
    fn weight(x: f32) -> f32;

    /// Sixteen consecutive key elements.
    fn keys(from: &[Self::Key; LANES]) -> Lanes;
    /// sum += weights: (S) by values: (16, S)
    fn add_values(sum: &mut Lanes, weights: &[f32], values: &[Self::Value]);

    /// Sixteen consecutive key elements.
    ///
    /// # Safety
    /// AVX-512 F; `from` points at sixteen elements.
    #[cfg(target_arch = "x86_64")]
    unsafe fn keys_512(from: *const Self::Key) -> __m512;

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
/// f16 keys, bf16 values.
pub(crate) struct Half;

impl KvForm for Full {
    type Key = f32;
    type Value = f32;
    const SIDE: usize = 1;

    #[inline(always)]
    fn key(x: f32) -> f32 {
        x
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
    fn keys(from: &[f32; LANES]) -> Lanes {
        *from
    }

    #[inline(always)]
    fn add_values(sum: &mut Lanes, weights: &[f32], values: &[f32]) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += weights[0] * v);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn keys_512(from: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
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
    type Key = f16;
    type Value = bf16;
    const SIDE: usize = 2;

    #[inline(always)]
    fn key(x: f32) -> f16 {
        f16::from_f32(x)
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
    fn keys(from: &[f16; LANES]) -> Lanes {
        let mut to = [0.0; LANES];
        from.convert_to_f32_slice(&mut to);
        to
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
    unsafe fn keys_512(from: *const f16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
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

impl KvType {
    fn size_bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
        }
    }
}

impl KvCache {
    /// A cache of `pages` pages for G = `kv_heads` heads of K = `head_dim`. Memory is used as pages are written.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(kv_type: KvType, kv_heads: usize, head_dim: usize, pages: usize) -> Result<KvCache, AllocError> {
        let page_bytes = KvCache::page_bytes(kv_type, kv_heads, head_dim);
        let bytes = pages.checked_mul(page_bytes).ok_or(AllocError { wanted_bytes: usize::MAX })?;
        Ok(KvCache { kv_type, kv_heads, head_dim, pages, data: HugeBuf::zeroed(bytes)? })
    }

    /// Bytes of one page of one layer.
    pub fn page_bytes(kv_type: KvType, kv_heads: usize, head_dim: usize) -> usize {
        PAGE_TOKENS * kv_heads * (head_dim + head_dim.next_multiple_of(LANES)) * kv_type.size_bytes()
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Copies a page's keys and values over another's.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let bytes = self.head_bytes() * self.kv_heads;
        let start = from as usize * bytes;
        self.data.as_mut_slice::<u8>().copy_within(start..start + bytes, to as usize * bytes);
    }

    /// K': the length of a cached value.
    pub(crate) fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of a head's keys and values in a page.
    fn head_bytes(&self) -> usize {
        PAGE_TOKENS * (self.head_dim + self.value_dim()) * self.kv_type.size_bytes()
    }

    /// Keys `[4][K][16]` and values `[64 / S][K'][S]` of `head` in `page`.
    pub(crate) fn head<F: KvForm>(&self, page: u32, head: usize) -> (&[F::Key], &[F::Value]) {
        let n = self.head_bytes();
        let start = (page as usize * self.kv_heads + head) * n;
        let bytes = &self.data.as_slice::<u8>()[start..start + n];
        let (keys, values) = bytes.split_at(PAGE_TOKENS * self.head_dim * size_of::<F::Key>());
        (bytemuck::cast_slice(keys), bytemuck::cast_slice(values))
    }

    /// Copies keys and values of one head at `positions` of the sequence whose pages are `pages` to positions 0, 1, ... of
    /// pages `own` of `data`, the bytes of another cache of this shape.
    ///
    /// # Safety
    /// Nobody else touches this head of these pages of `data` meanwhile.
    pub(crate) unsafe fn gather<F: KvForm>(
        &self,
        (pages, positions): (&[u32], &[u32]),
        head: usize,
        data: &SharedOut<'_, u8>,
        own: Range<usize>,
    ) {
        let (dim, n, value_dim) = (self.head_dim, self.head_bytes(), self.value_dim());
        for (page, positions) in own.zip(positions.chunks(PAGE_TOKENS)) {
            // SAFETY: the caller's promise.
            let bytes = unsafe { data.slice((page * self.kv_heads + head) * n, n) };
            let (keys, values) = bytes.split_at_mut(PAGE_TOKENS * dim * size_of::<F::Key>());
            let (keys, values): (&mut [F::Key], &mut [F::Value]) =
                (bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(values));
            for (slot, position) in positions.iter().enumerate() {
                let (there, at) = (*position as usize / PAGE_TOKENS, *position as usize % PAGE_TOKENS);
                let (from_keys, from_values) = self.head::<F>(pages[there], head);
                let to = keys[slot / KEY_BLOCK * KEY_BLOCK * dim..].iter_mut().skip(slot % KEY_BLOCK);
                let of = from_keys[at / KEY_BLOCK * KEY_BLOCK * dim..].iter().skip(at % KEY_BLOCK);
                for (to, of) in to.step_by(KEY_BLOCK).zip(of.step_by(KEY_BLOCK)).take(dim) {
                    *to = *of;
                }
                let to = values[slot / F::SIDE * F::SIDE * value_dim..].chunks_exact_mut(F::SIDE);
                let of = from_values[at / F::SIDE * F::SIDE * value_dim..].chunks_exact(F::SIDE);
                for (to, of) in to.zip(of).take(dim) {
                    to[slot % F::SIDE] = of[at % F::SIDE];
                    // As in `write`.
                    to[slot % F::SIDE + 1..].fill(F::value(0.0));
                }
            }
        }
    }

    /// All bytes, for threads that each write their own heads of pages.
    pub(crate) fn shared(&mut self) -> SharedOut<'_, u8> {
        SharedOut::new(self.data.as_mut_slice::<u8>())
    }

    /// Stores keys and values, both (T, G, K), at positions `first..first + T` of the sequence whose pages are `pages`.
    ///
    /// # Panics
    /// If the positions lie outside the pages given.
    pub fn write(&mut self, compute: &Compute, pages: &[u32], first: usize, k: &[f32], v: &[f32]) {
        match self.kv_type {
            KvType::F32 => self.write_as::<Full>(compute, pages, first, k, v),
            KvType::F16 => self.write_as::<Half>(compute, pages, first, k, v),
        }
    }

    fn write_as<F: KvForm>(&mut self, compute: &Compute, pages: &[u32], first: usize, k: &[f32], v: &[f32]) {
        let (heads, dim, n) = (self.kv_heads, self.head_dim, self.head_bytes());
        let value_dim = self.value_dim();
        let tokens = k.len() / (heads * dim);
        assert!(k.len() == v.len() && k.len() == tokens * heads * dim, "keys and values of (T, {heads}, {dim})");
        assert!((first + tokens).div_ceil(PAGE_TOKENS) <= pages.len(), "positions past the sequence's pages");
        let data = SharedOut::new(self.data.as_mut_slice::<u8>());
        let write_head = |head: usize| {
            for t in 0..tokens {
                let (page, slot) = (pages[(first + t) / PAGE_TOKENS] as usize, (first + t) % PAGE_TOKENS);
                // SAFETY: each head of a page is written by the one thread that has this head.
                let bytes = unsafe { data.slice((page * heads + head) * n, n) };
                let (keys, values) = bytes.split_at_mut(PAGE_TOKENS * dim * size_of::<F::Key>());
                let (keys, values): (&mut [F::Key], &mut [F::Value]) =
                    (bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(values));
                let from = (t * heads + head) * dim;
                let block = &mut keys[slot / KEY_BLOCK * KEY_BLOCK * dim..];
                for (d, &x) in k[from..from + dim].iter().enumerate() {
                    block[d * KEY_BLOCK + slot % KEY_BLOCK] = F::key(x);
                }
                let side_by_side = &mut values[slot / F::SIDE * F::SIDE * value_dim..];
                for (group, &x) in side_by_side.chunks_exact_mut(F::SIDE).zip(&v[from..from + dim]) {
                    group[slot % F::SIDE] = F::value(x);
                    // A step takes the next position's value too, with weight 0 until it is written: what an earlier owner of
                    // the page left there might be no number.
                    group[slot % F::SIDE + 1..].fill(F::value(0.0));
                }
            }
        };
        if tokens < 4 {
            (0..heads).for_each(write_head);
        } else {
            compute.pool.run_split(heads, 1, |range| range.for_each(&write_head));
        }
    }
}
