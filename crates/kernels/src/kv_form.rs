//! How a cache holds keys and values, and the steps of attention over them: f32 throughout, or 16 bits a number.
//!
//! Not here: where a page's memory lies (`kv`), and the order in which steps follow each other (`attention` and the folders of
//! the instruction sets).

mod full;
mod half;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

pub(crate) use self::{full::Full, half::Half};
use crate::{kv::PAGE_TOKENS, lanes::Lanes};

/// One head's part of a page.
pub(crate) struct Head<'a, F: KvForm> {
    /// `[4][K / C][16][C]`
    pub(crate) keys: &'a [F::Key],
    /// 64, or none
    pub(crate) key_scales: &'a [f32],
    /// `[64 / S][K'][S]`
    pub(crate) values: &'a [F::Value],
    /// 64, or none
    pub(crate) value_scales: &'a [f32],
}

/// As `Head`, to be written.
pub(crate) struct HeadMut<'a, F: KvForm> {
    pub(crate) keys: &'a mut [F::Key],
    pub(crate) key_scales: &'a mut [f32],
    pub(crate) values: &'a mut [F::Value],
    pub(crate) value_scales: &'a mut [f32],
}

/// What a chunk's weights of one query come to.
pub(crate) struct Weights {
    /// Their sum.
    pub(crate) total: f32,
    /// What the sum over values is to be multiplied by.
    pub(crate) factor: f32,
}

/// How a cache holds keys and values, and what the weighted sum of values takes in one step: sixteen components of `SIDE`
/// positions, 64 bytes, times one 32-bit word that holds the weights of these positions.
pub(crate) trait KvForm: Sized {
    type Key: bytemuck::Pod + Send + Sync;
    type Value: bytemuck::Pod + Send + Sync;
    /// A weight as the sum over values takes it.
    type Weight: bytemuck::Pod;
    /// A component's sum over values, before it is a number.
    type Sum: Copy + Default;
    /// C
    const COMPONENTS: usize;
    /// Scales of a page's keys, and of its values: 64 or none.
    const SCALES: usize;
    /// S
    const SIDE: usize;
    /// A tile's queries as scores take them.
    type Queries;

    /// The pieces of a head's bytes in a page.
    fn pieces(bytes: &[u8], head_dim: usize) -> Head<'_, Self> {
        let (keys, rest) = bytes.split_at(PAGE_TOKENS * head_dim * size_of::<Self::Key>());
        let (key_scales, rest) = rest.split_at(Self::SCALES * size_of::<f32>());
        let (value_scales, values) = rest.split_at(Self::SCALES * size_of::<f32>());
        Head {
            keys: bytemuck::cast_slice(keys),
            key_scales: bytemuck::cast_slice(key_scales),
            values: bytemuck::cast_slice(values),
            value_scales: bytemuck::cast_slice(value_scales),
        }
    }
    /// As `pieces`, to be written.
    fn pieces_mut(bytes: &mut [u8], head_dim: usize) -> HeadMut<'_, Self> {
        let (keys, rest) = bytes.split_at_mut(PAGE_TOKENS * head_dim * size_of::<Self::Key>());
        let (key_scales, rest) = rest.split_at_mut(Self::SCALES * size_of::<f32>());
        let (value_scales, values) = rest.split_at_mut(Self::SCALES * size_of::<f32>());
        HeadMut {
            keys: bytemuck::cast_slice_mut(keys),
            key_scales: bytemuck::cast_slice_mut(key_scales),
            values: bytemuck::cast_slice_mut(values),
            value_scales: bytemuck::cast_slice_mut(value_scales),
        }
    }

    /// Lays `x`: (K) as key `at` of the block of sixteen: (K / C, 16, C), and its scale.
    fn write_key(x: &[f32], at: usize, block: &mut [Self::Key], scale: Option<&mut f32>);
    /// Lays `x`: (K) as value `at` of the S side by side: (K', S), and its scale.
    fn write_value(x: &[f32], at: usize, side_by_side: &mut [Self::Value], scale: Option<&mut f32>);

    /// Prepares queries, (n, K).
    fn queries(x: &[f32], dim: usize) -> Self::Queries;
    /// Query `i` by sixteen keys: (K / C, 16, C).
    fn scores(queries: &Self::Queries, i: usize, keys: &[Self::Key], scales: &[f32]) -> Lanes;
    /// Makes weights of 64 numbers from 0 to 1, those of keys that are not seen being 0 whatever their values' scales.
    fn weights(x: &[f32; PAGE_TOKENS], scales: &[f32], out: &mut [Self::Weight; PAGE_TOKENS]) -> Weights;
    /// sum += weights: (S) by values: (16, S)
    fn add_values(sum: &mut [Self::Sum], weights: &[Self::Weight], values: &[Self::Value]);
    /// A sum as a number.
    fn number(sum: Self::Sum) -> f32;

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

    /// acc + one step's values by the weights of each query. Sums of integers are kept in the bits of `acc`.
    ///
    /// # Safety
    /// AVX2 and FMA; 64 bytes can be read at `values`, and each query's weights of the step's S positions at `weights`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn step_256<const Q: usize>(
        acc: &mut [[__m256; 2]; Q],
        values: *const Self::Value,
        weights: [*const Self::Weight; Q],
    );

    /// Sums of `step_256` as numbers.
    ///
    /// # Safety
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn numbers_256(sums: __m256) -> __m256;

    /// Q queries by B blocks of sixteen keys.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI; `keys` points at (B, dim / C, 16, C) elements, `scales` at 16 B, where there are scales; `queries`
    /// are of `dim`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scores_512<const Q: usize, const B: usize>(
        queries: &Self::Queries,
        dim: usize,
        keys: *const Self::Key,
        scales: *const f32,
    ) -> [[__m512; B]; Q];

    /// Sixteen weights times their values' scales, of those that `mask` says are seen.
    ///
    /// # Safety
    /// AVX-512 F; sixteen scales can be read at `scales`, where there are scales.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scaled_512(weights: __m512, mask: u16, scales: *const f32) -> __m512;

    /// Of sums of eight queries' scaled weights: what these are multiplied by as they become words, and the factors.
    ///
    /// # Safety
    /// AVX.
    #[cfg(target_arch = "x86_64")]
    unsafe fn of_sums_256(sums: __m256) -> (__m256, __m256);

    /// Makes words of 64 scaled weights.
    ///
    /// # Safety
    /// AVX-512 F and BW; `words` has room for 64 positions.
    #[cfg(target_arch = "x86_64")]
    unsafe fn words_512(scaled: [__m512; 4], inverse: __m512, words: *mut u32);

    /// acc + one step's values by `word`, in every lane. Sums of integers are kept in the bits of `acc`.
    ///
    /// # Safety
    /// AVX-512 F and VNNI.
    #[cfg(target_arch = "x86_64")]
    unsafe fn step_512(acc: __m512, values: __m512i, word: __m512i) -> __m512;

    /// Sums of `step_512` as numbers.
    ///
    /// # Safety
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn numbers_512(sums: __m512) -> __m512;
}
