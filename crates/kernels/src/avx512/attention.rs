//! One tile of attention on AVX-512: up to 8 queries share each vector of keys and of values.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{arch::x86_64::*, ops::Range};

use super::elementwise::exp_2;
use crate::{
    attention::{HEAD_DIM_MAX, Partial, TILE_QUERIES, Tile},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    kv_form::KvForm,
    lanes::LANES,
};

/// One chunk's inner values, and the running sums of the span.
struct State {
    largest: [f32; TILE_QUERIES],
    total: [f32; TILE_QUERIES],
    /// (queries, 64)
    scores: [[f32; PAGE_TOKENS]; TILE_QUERIES],
    /// Weights as the steps over values take them, (queries, 64 / S)
    words: [[u32; PAGE_TOKENS]; TILE_QUERIES],
    /// What the chunk's merge multiplies: the running result, and the chunk's.
    old: [f32; TILE_QUERIES],
    new: [f32; TILE_QUERIES],
}

/// The tile's results over `chunks`.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
pub(crate) unsafe fn span<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    // SAFETY: the caller's promise, and what is asked of the machine here.
    unsafe {
        if is_x86_feature_detected!("avx512bf16") {
            native(tile, chunks, out);
        } else {
            spread(tile, chunks, out);
        }
    }
}

/// With the machine's product of bf16 pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma,avx2")]
unsafe fn native<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    // SAFETY: the caller's promise.
    unsafe { any_count::<F, true>(tile, chunks, out) }
}

/// Without it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2")]
unsafe fn spread<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    // SAFETY: the caller's promise.
    unsafe { any_count::<F, false>(tile, chunks, out) }
}

#[inline(always)]
unsafe fn any_count<F: KvForm, const NATIVE: bool>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    // SAFETY: the caller's promise; Q is the number of queries.
    unsafe {
        match tile.ranges.len() {
            1 => queries::<F, NATIVE, 1>(tile, chunks, out),
            2 => queries::<F, NATIVE, 2>(tile, chunks, out),
            3 => queries::<F, NATIVE, 3>(tile, chunks, out),
            4 => queries::<F, NATIVE, 4>(tile, chunks, out),
            5 => queries::<F, NATIVE, 5>(tile, chunks, out),
            6 => queries::<F, NATIVE, 6>(tile, chunks, out),
            7 => queries::<F, NATIVE, 7>(tile, chunks, out),
            _ => queries::<F, NATIVE, 8>(tile, chunks, out),
        }
    }
}

#[inline(always)]
unsafe fn queries<F: KvForm, const NATIVE: bool, const Q: usize>(
    tile: &Tile<'_, F>,
    chunks: Range<usize>,
    out: &mut Partial<'_>,
) {
    let dim = tile.value_dim;
    let prepared = F::queries(tile.queries, tile.head_dim);
    let mut state = State {
        largest: [f32::NEG_INFINITY; TILE_QUERIES],
        total: [0.0; TILE_QUERIES],
        scores: [[0.0; PAGE_TOKENS]; TILE_QUERIES],
        words: [[0; PAGE_TOKENS]; TILE_QUERIES],
        old: [0.0; TILE_QUERIES],
        new: [0.0; TILE_QUERIES],
    };
    debug_assert!(tile.ranges.len() == Q && dim <= HEAD_DIM_MAX && out.values.len() == Q * dim);
    out.values.fill(0.0);
    for c in chunks.clone() {
        let (keys, scales, values) = tile.head(c);
        let end = (0..Q).map(|i| tile.seen(i, c).end).max().unwrap_or(0);
        // A head's keys and values are one piece of memory, and the next chunk's are of the same length.
        let next = if tile.ahead && c + 1 < chunks.end { Some(tile.head(c + 1)) } else { None };
        // SAFETY: `keys` and `values` are a page's, of 64 keys of K and 64 values of K'.
        unsafe {
            scores::<F, Q>(&prepared, tile.head_dim, (keys, scales), next.map(|n| n.0.as_ptr()), end, &mut state);
            weigh::<F, NATIVE, Q>(tile, c, &mut state);
            merge_values::<F, NATIVE, Q>(values, next.map(|n| n.2.as_ptr()), end, dim, &state, out.values);
        }
    }
    (out.largest, out.total) = (state.largest, state.total);
}

/// Scores of the chunk's keys up to `end`.
#[inline(always)]
unsafe fn scores<F: KvForm, const Q: usize>(
    queries: &F::Queries,
    dim: usize,
    (keys, scales): (&[F::Key], &[f32]),
    next: Option<*const F::Key>,
    end: usize,
    state: &mut State,
) {
    for block in 0..end.div_ceil(KEY_BLOCK) {
        // SAFETY: block < 4, so the loads stay in the page's keys; queries hold `dim` values each. Prefetches read nothing.
        unsafe {
            let start = block * KEY_BLOCK * dim;
            if let Some(next) = next {
                ask_for(next.add(start).cast(), KEY_BLOCK * dim * size_of::<F::Key>());
            }
            // Where there are no scales, nothing is read from behind their end.
            let scales = scales.as_ptr().wrapping_add(block * KEY_BLOCK);
            let acc = F::scores_512::<Q>(queries, dim, keys.as_ptr().add(start), scales);
            for i in 0..Q {
                _mm512_storeu_ps(state.scores[i].as_mut_ptr().add(block * KEY_BLOCK), acc[i]);
            }
        }
    }
}

/// Asks for `len` bytes of memory into the second-level cache.
#[inline(always)]
unsafe fn ask_for(from: *const i8, len: usize) {
    for at in (0..len).step_by(64) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(at)) };
    }
}

/// Which of the 64 keys are `seen`, in four vectors.
#[inline(always)]
fn masks(seen: &Range<usize>) -> [u16; 4] {
    let upto = |n: usize| if n < PAGE_TOKENS { (1u64 << n) - 1 } else { u64::MAX };
    let bits = upto(seen.end) & !upto(seen.start);
    std::array::from_fn(|b| (bits >> (b * LANES)) as u16)
}

/// Turns every query's scores of the keys that it sees into weights, all others into zeros, and prepares the merges: those of
/// all queries share their exponentials.
#[inline(always)]
unsafe fn weigh<F: KvForm, const NATIVE: bool, const Q: usize>(tile: &Tile<'_, F>, chunk: usize, state: &mut State) {
    // SAFETY: AVX-512 F is there, BF16 if NATIVE; loads and stores are of 64 scores and weights, and of 8 queries' values.
    unsafe {
        let none = _mm512_set1_ps(f32::NEG_INFINITY);
        let (mut largest, mut total) = ([f32::NEG_INFINITY; TILE_QUERIES], [0.0; TILE_QUERIES]);
        for i in 0..Q {
            let seen = tile.seen(i, chunk);
            if seen.is_empty() {
                state.words[i] = [0; PAGE_TOKENS];
                continue;
            }
            let (masks, from) = (masks(&seen), state.scores[i].as_ptr());
            let mut scores = [none; 4];
            for b in 0..4 {
                scores[b] = _mm512_mask_loadu_ps(none, masks[b], from.add(b * LANES));
            }
            let pairs = (_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3]));
            largest[i] = _mm512_reduce_max_ps(_mm512_max_ps(pairs.0, pairs.1));
            let own = _mm512_set1_ps(largest[i]);
            let mut weights = [_mm512_setzero_ps(); 4];
            for b in 0..4 {
                weights[b] = _mm512_maskz_mov_ps(masks[b], exp_2(_mm512_sub_ps(scores[b], own)));
            }
            total[i] = _mm512_reduce_add_ps(F::weights_512::<NATIVE>(weights, state.words[i].as_mut_ptr()));
        }
        let (before, own) = (_mm256_loadu_ps(state.largest.as_ptr()), _mm256_loadu_ps(largest.as_ptr()));
        let new_largest = _mm256_max_ps(before, own);
        let both = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(before), own);
        let from = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(new_largest), new_largest);
        let both = exp_2(_mm512_sub_ps(both, from));
        // A query that sees nothing of this chunk keeps what it has; what is no number is not nothing.
        let some = _mm256_cmp_ps_mask::<_CMP_NEQ_UQ>(own, _mm256_set1_ps(f32::NEG_INFINITY));
        let old = _mm256_mask_mov_ps(_mm256_set1_ps(1.0), some, _mm512_castps512_ps256(both));
        let new = _mm256_maskz_mov_ps(some, _mm512_extractf32x8_ps::<1>(both));
        let own = _mm256_mul_ps(_mm256_loadu_ps(total.as_ptr()), new);
        let total = _mm256_fmadd_ps(_mm256_loadu_ps(state.total.as_ptr()), old, own);
        _mm256_storeu_ps(state.old.as_mut_ptr(), old);
        _mm256_storeu_ps(state.new.as_mut_ptr(), new);
        _mm256_storeu_ps(state.total.as_mut_ptr(), total);
        _mm256_storeu_ps(state.largest.as_mut_ptr(), new_largest);
    }
}

/// out = out * old + (weights by values) * new, for the queries that see the chunk.
#[inline(always)]
unsafe fn merge_values<F: KvForm, const NATIVE: bool, const Q: usize>(
    values: &[F::Value],
    next: Option<*const F::Value>,
    end: usize,
    dim: usize,
    state: &State,
    out: &mut [f32],
) {
    let steps = end.div_ceil(F::SIDE);
    for d in (0..dim).step_by(LANES) {
        // SAFETY: step < 64 / S and d + 16 <= dim, so loads stay in the page's values; `out` has `dim` values for each query.
        // Prefetches read nothing.
        unsafe {
            if let Some(next) = next {
                ask_for(next.add(d * PAGE_TOKENS).cast(), LANES * PAGE_TOKENS * size_of::<F::Value>());
            }
            let mut acc = [_mm512_setzero_ps(); Q];
            for step in 0..steps {
                let values = _mm512_loadu_si512(values.as_ptr().add((step * dim + d) * F::SIDE).cast());
                for i in 0..Q {
                    acc[i] = F::step_512::<NATIVE>(acc[i], values, state.words[i].as_ptr().add(step));
                }
            }
            for i in 0..Q {
                if state.new[i] != 0.0 {
                    let out = out.as_mut_ptr().add(i * dim + d);
                    let old = _mm512_mul_ps(_mm512_loadu_ps(out), _mm512_set1_ps(state.old[i]));
                    _mm512_storeu_ps(out, _mm512_fmadd_ps(acc[i], _mm512_set1_ps(state.new[i]), old));
                }
            }
        }
    }
}
