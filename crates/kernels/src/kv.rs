//! The key/value cache of one layer, in pages of 64 positions.
//!
//! A page holds, for each kv head, keys as `[4 blocks][K / C][16 positions][C]` - so that one vector holds the same C components
//! of 16 keys -, the keys' scales and the values' (64 each), and values as `[64 / S][K'][S positions]`, K' being K rounded up to
//! whole vectors and S the positions whose values one step of the weighted sum takes. Models with f32 or f16 weights have f32 keys
//! and values (C = S = 1, no scales); all others integers under a scale for each position, keys of 14 bits and values of 16 (C =
//! S = 2). Which page is whose is the engine's business; here a sequence is a list of page numbers.

use std::ops::Range;

use qwenkit_tensor::{AllocError, HugeBuf};

use crate::{
    kv_form::{Full, Half, Head, HeadMut, KvForm},
    lanes::LANES,
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
    /// Full precision, for models with f32 or f16 weights.
    F32,
    /// 16 bits a number, for all others: integers under a scale for each key and each value; processors multiply them in pairs.
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

impl KvType {
    fn size_bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
        }
    }

    /// Bytes of the scales of a head's keys and values in a page.
    fn scale_bytes(self) -> usize {
        match self {
            KvType::F32 => 0,
            KvType::F16 => 2 * PAGE_TOKENS * size_of::<f32>(),
        }
    }

    /// Bytes of a head's keys, values and their scales in a page.
    fn head_bytes(self, head_dim: usize) -> usize {
        PAGE_TOKENS * (head_dim + head_dim.next_multiple_of(LANES)) * self.size_bytes() + self.scale_bytes()
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
        kv_heads * kv_type.head_bytes(head_dim)
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Copies a page's keys and values over another's.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (self.bytes_of(from), self.bytes_of(to));
        self.data.as_mut_slice::<u8>().copy_within(from, to.start);
    }

    /// The bytes of a page's keys and values, to be kept elsewhere.
    pub fn page(&self, page: u32) -> &[u8] {
        &self.data.as_slice::<u8>()[self.bytes_of(page)]
    }

    /// The same, to be put back.
    pub fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let bytes = self.bytes_of(page);
        &mut self.data.as_mut_slice::<u8>()[bytes]
    }

    fn bytes_of(&self, page: u32) -> Range<usize> {
        let bytes = self.head_bytes() * self.kv_heads;
        let start = page as usize * bytes;
        start..start + bytes
    }

    /// K': the length of a cached value.
    pub(crate) fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn head_bytes(&self) -> usize {
        self.kv_type.head_bytes(self.head_dim)
    }

    /// Keys, scales and values of `head` in `page`.
    pub(crate) fn head<F: KvForm>(&self, page: u32, head: usize) -> Head<'_, F> {
        let n = self.head_bytes();
        let start = (page as usize * self.kv_heads + head) * n;
        F::pieces(&self.data.as_slice::<u8>()[start..start + n], self.head_dim)
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
            let HeadMut { keys, key_scales, values, value_scales } = F::pieces_mut(bytes, dim);
            for (slot, position) in positions.iter().enumerate() {
                let (there, at) = (*position as usize / PAGE_TOKENS, *position as usize % PAGE_TOKENS);
                let from = self.head::<F>(pages[there], head);
                let to = keys[slot / KEY_BLOCK * KEY_BLOCK * dim..].chunks_exact_mut(F::COMPONENTS);
                let of = from.keys[at / KEY_BLOCK * KEY_BLOCK * dim..].chunks_exact(F::COMPONENTS);
                let (to, of) = (to.skip(slot % KEY_BLOCK), of.skip(at % KEY_BLOCK));
                for (to, of) in to.step_by(KEY_BLOCK).zip(of.step_by(KEY_BLOCK)).take(dim / F::COMPONENTS) {
                    to.copy_from_slice(of);
                }
                for (to, of) in [(&mut *key_scales, from.key_scales), (&mut *value_scales, from.value_scales)] {
                    to.iter_mut().skip(slot).zip(of.iter().skip(at)).take(1).for_each(|(to, of)| *to = *of);
                }
                let to = values[slot / F::SIDE * F::SIDE * value_dim..].chunks_exact_mut(F::SIDE);
                let of = from.values[at / F::SIDE * F::SIDE * value_dim..].chunks_exact(F::SIDE);
                for (to, of) in to.zip(of).take(dim) {
                    to[slot % F::SIDE] = of[at % F::SIDE];
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
        assert!(dim.is_multiple_of(F::COMPONENTS), "heads of {dim}");
        let data = SharedOut::new(self.data.as_mut_slice::<u8>());
        let write_head = |head: usize| {
            for t in 0..tokens {
                let (page, slot) = (pages[(first + t) / PAGE_TOKENS] as usize, (first + t) % PAGE_TOKENS);
                // SAFETY: each head of a page is written by the one thread that has this head.
                let bytes = unsafe { data.slice((page * heads + head) * n, n) };
                let HeadMut { keys, key_scales, values, value_scales } = F::pieces_mut(bytes, dim);
                let from = (t * heads + head) * dim;
                let block = &mut keys[slot / KEY_BLOCK * KEY_BLOCK * dim..][..KEY_BLOCK * dim];
                F::write_key(&k[from..from + dim], slot % KEY_BLOCK, block, key_scales.get_mut(slot));
                let side_by_side = &mut values[slot / F::SIDE * F::SIDE * value_dim..][..F::SIDE * value_dim];
                F::write_value(&v[from..from + dim], slot % F::SIDE, side_by_side, value_scales.get_mut(slot));
            }
        };
        if tokens < 4 {
            (0..heads).for_each(write_head);
        } else {
            compute.pool.run_split(heads, 1, |range| range.for_each(&write_head));
        }
    }
}
