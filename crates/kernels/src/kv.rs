//! The key/value cache of one layer, in pages of 64 positions.
//!
//! A page holds, for each kv head, keys as `[4 blocks][K][16 positions]` - so that one vector holds the same component
//! of 16 keys - and values as `[64 positions][K']`, K' being K rounded up to whole vectors. Elements are f16, or f32 for models with f32 weights. Which page is
//! whose is the engine's business; here a sequence is a list of page numbers.

use half::{f16, slice::HalfFloatSliceExt};
use qwenkit_tensor::{AllocError, HugeBuf};

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
    /// Full precision, for models with f32 weights.
    F32,
    /// Half precision, for all others.
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

/// An element that a cache can hold.
pub(crate) trait KvElement: bytemuck::Pod + Send + Sync {
    fn from_f32(x: f32) -> Self;

    /// Sixteen consecutive elements.
    fn lanes(from: &[Self; LANES]) -> Lanes;

    /// Sixteen consecutive elements.
    ///
    /// # Safety
    /// AVX-512 F; `from` points at sixteen elements.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_512(from: *const Self) -> std::arch::x86_64::__m512;
}

impl KvElement for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn lanes(from: &[f32; LANES]) -> Lanes {
        *from
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_512(from: *const f32) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }

    #[inline(always)]
    fn lanes(from: &[f16; LANES]) -> Lanes {
        let mut to = [0.0; LANES];
        from.convert_to_f32_slice(&mut to);
        to
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_512(from: *const f16) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_cvtph_ps(std::arch::x86_64::_mm256_loadu_si256(from.cast())) }
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

    /// K': the length of a cached value.
    pub(crate) fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a head's keys and values in a page.
    fn head_elements(&self) -> usize {
        PAGE_TOKENS * (self.head_dim + self.value_dim())
    }

    /// Keys `[4][K][16]` and values `[64][K']` of `head` in `page`.
    pub(crate) fn head<E: KvElement>(&self, page: u32, head: usize) -> (&[E], &[E]) {
        let n = self.head_elements();
        let start = (page as usize * self.kv_heads + head) * n;
        self.data.as_slice::<E>()[start..start + n].split_at(PAGE_TOKENS * self.head_dim)
    }

    /// Stores keys and values, both (T, G, K), at positions `first..first + T` of the sequence whose pages are `pages`.
    ///
    /// # Panics
    /// If the positions lie outside the pages given.
    pub fn write(&mut self, compute: &Compute, pages: &[u32], first: usize, k: &[f32], v: &[f32]) {
        match self.kv_type {
            KvType::F32 => self.write_as::<f32>(compute, pages, first, k, v),
            KvType::F16 => self.write_as::<f16>(compute, pages, first, k, v),
        }
    }

    fn write_as<E: KvElement>(&mut self, compute: &Compute, pages: &[u32], first: usize, k: &[f32], v: &[f32]) {
        let (heads, dim, n) = (self.kv_heads, self.head_dim, self.head_elements());
        let value_dim = self.value_dim();
        let tokens = k.len() / (heads * dim);
        assert!(k.len() == v.len() && k.len() == tokens * heads * dim, "keys and values of (T, {heads}, {dim})");
        assert!((first + tokens).div_ceil(PAGE_TOKENS) <= pages.len(), "positions past the sequence's pages");
        let data = SharedOut::new(self.data.as_mut_slice::<E>());
        let write_head = |head: usize| {
            for t in 0..tokens {
                let (page, slot) = (pages[(first + t) / PAGE_TOKENS] as usize, (first + t) % PAGE_TOKENS);
                // SAFETY: each head of a page is written by the one thread that has this head.
                let head_data = unsafe { data.slice((page * heads + head) * n, n) };
                let (keys, values) = head_data.split_at_mut(PAGE_TOKENS * dim);
                let from = (t * heads + head) * dim;
                let block = &mut keys[slot / KEY_BLOCK * KEY_BLOCK * dim..];
                for (d, &x) in k[from..from + dim].iter().enumerate() {
                    block[d * KEY_BLOCK + slot % KEY_BLOCK] = E::from_f32(x);
                }
                for (value, &x) in values[slot * value_dim..].iter_mut().zip(&v[from..from + dim]) {
                    *value = E::from_f32(x);
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
