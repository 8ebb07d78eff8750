//! Tiles of attention on AVX-512: up to 8 queries share each vector of keys and of values.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{arch::x86_64::*, array, ops::Range};

use super::{
    elementwise::{exp_2, exp_2_up_to_0},
    reduce,
};
use crate::{
    attention::{HEAD_DIM_MAX, Partial, TILE_QUERIES, Tile},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    kv_form::{Head, KvForm},
    lanes::LANES,
};

/// One chunk's inner values.
struct State {
    /// (queries, 64)
    scores: [[f32; PAGE_TOKENS]; TILE_QUERIES],
    /// Weights as the steps over values take them, (queries, 64 / S)
    words: [[u32; PAGE_TOKENS]; TILE_QUERIES],
    /// What the chunk's merge multiplies: the running result, and the chunk's.
    old: [f32; TILE_QUERIES],
    new: [f32; TILE_QUERIES],
    /// `new` times what makes the chunk's sums numbers.
    factor: [f32; TILE_QUERIES],
}

/// The tiles' results over `chunks`.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2")]
pub(crate) unsafe fn span<F: KvForm>(tiles: &[Tile<'_, F>], chunks: Range<usize>, outs: &mut [Partial<'_>]) {
    let mut state = State {
        scores: [[0.0; PAGE_TOKENS]; TILE_QUERIES],
        words: [[0; PAGE_TOKENS]; TILE_QUERIES],
        old: [0.0; TILE_QUERIES],
        new: [0.0; TILE_QUERIES],
        factor: [0.0; TILE_QUERIES],
    };
    for c in chunks.clone() {
        for (tile, out) in tiles.iter().zip(&mut *outs) {
            // A head's keys and values are one piece of memory, and the next chunk's are of the same length.
            let next = if tiles.len() == 1 && c + 1 < chunks.end { Some(tile.head(c + 1)) } else { None };
            // SAFETY: the caller's promise; Q is the number of queries.
            unsafe {
                match tile.count {
                    1 => chunk::<F, 1>(tile, c, next, &mut state, out),
                    2 => chunk::<F, 2>(tile, c, next, &mut state, out),
                    3 => chunk::<F, 3>(tile, c, next, &mut state, out),
                    4 => chunk::<F, 4>(tile, c, next, &mut state, out),
                    5 => chunk::<F, 5>(tile, c, next, &mut state, out),
                    6 => chunk::<F, 6>(tile, c, next, &mut state, out),
                    7 => chunk::<F, 7>(tile, c, next, &mut state, out),
                    _ => chunk::<F, 8>(tile, c, next, &mut state, out),
                }
            }
        }
    }
}

/// Adds chunk `c` to the results of a tile of Q queries, and asks for the `next` one's memory.
#[inline(always)]
unsafe fn chunk<F: KvForm, const Q: usize>(
    tile: &Tile<'_, F>,
    c: usize,
    next: Option<Head<'_, F>>,
    state: &mut State,
    out: &mut Partial<'_>,
) {
    debug_assert!(tile.count == Q && tile.value_dim <= HEAD_DIM_MAX && out.values.len() == Q * tile.value_dim);
    let (head, end) = (tile.head(c), tile.seen_end(c));
    if end == 0 {
        return;
    }
    // SAFETY: the head has 64 keys of K and 64 values of K'.
    unsafe {
        scores::<F, Q>(&tile.queries, tile.head_dim, &head, next.as_ref(), end, state);
        weigh::<F, Q>(tile, c, head.value_scales, state, out);
        merge_values::<F, Q>(head.values, next.as_ref(), end, tile.value_dim, state, out.values);
    }
}

/// Scores of the chunk's keys up to `end`.
#[inline(always)]
unsafe fn scores<F: KvForm, const Q: usize>(
    queries: &F::Queries,
    dim: usize,
    head: &Head<'_, F>,
    next: Option<&Head<'_, F>>,
    end: usize,
    state: &mut State,
) {
    let blocks = end.div_ceil(KEY_BLOCK);
    // SAFETY: blocks are the page's. Prefetches read nothing.
    unsafe {
        for block in (0..blocks / 2 * 2).step_by(2) {
            if let Some(next) = next {
                let start = block * KEY_BLOCK * dim;
                ask_for(next.keys.as_ptr().add(start).cast(), 2 * KEY_BLOCK * dim * size_of::<F::Key>());
            }
            scores_of::<F, Q, 2>(queries, dim, head, block, state);
        }
        if blocks % 2 == 1 {
            scores_of::<F, Q, 1>(queries, dim, head, blocks - 1, state);
        }
    }
}

/// Scores of B blocks of keys. Two at a time for every load of a query: as many sums as hide a product's latency.
#[inline(always)]
unsafe fn scores_of<F: KvForm, const Q: usize, const B: usize>(
    queries: &F::Queries,
    dim: usize,
    head: &Head<'_, F>,
    block: usize,
    state: &mut State,
) {
    // SAFETY: block + B <= 4, so the loads stay in the page's keys; queries hold `dim` values each.
    unsafe {
        let keys = head.keys.as_ptr().add(block * KEY_BLOCK * dim);
        // Where there are no scales, nothing is read from behind their end.
        let scales = head.key_scales.as_ptr().wrapping_add(block * KEY_BLOCK);
        let acc = F::scores_512::<Q, B>(queries, dim, keys, scales);
        for i in 0..Q {
            for b in 0..B {
                _mm512_storeu_ps(state.scores[i].as_mut_ptr().add((block + b) * KEY_BLOCK), acc[i][b]);
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

/// Turns every query's scores of the keys that it sees into weights, all others into zeros, and prepares the merges. What is one
/// number a query is computed for all of them together, so that none waits for its own latency.
#[inline(always)]
unsafe fn weigh<F: KvForm, const Q: usize>(
    tile: &Tile<'_, F>,
    chunk: usize,
    scales: &[f32],
    state: &mut State,
    out: &mut Partial<'_>,
) {
    let masks: [[u16; 4]; Q] = array::from_fn(|i| masks(&tile.seen(i, chunk)));
    // SAFETY: AVX-512 F is there; loads and stores are of 64 scores, scales and words, and of 8 queries' values. Where there are
    // no scales, nothing is read from behind their end.
    unsafe {
        let none = _mm512_set1_ps(f32::NEG_INFINITY);
        let tree = |x: [__m512; 4], f: fn(__m512, __m512) -> __m512| f(f(x[0], x[1]), f(x[2], x[3]));
        let mut of_chunk = [none; TILE_QUERIES];
        for i in 0..Q {
            let from = state.scores[i].as_ptr();
            let scores = array::from_fn(|b| _mm512_mask_loadu_ps(none, masks[i][b], from.add(b * LANES)));
            of_chunk[i] = tree(scores, |x, y| _mm512_max_ps(x, y));
        }
        let own_largest = reduce::eight(of_chunk, |x, y| _mm512_max_ps(x, y));
        let mut largest = [0.0; TILE_QUERIES];
        _mm256_storeu_ps(largest.as_mut_ptr(), own_largest);

        let (mut totals, mut sums) = ([_mm512_setzero_ps(); TILE_QUERIES], [_mm512_setzero_ps(); TILE_QUERIES]);
        for i in 0..Q {
            let (scores, own) = (state.scores[i].as_mut_ptr(), _mm512_set1_ps(largest[i]));
            let (mut weights, mut scaled) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
            for b in 0..4 {
                let at = scores.add(b * LANES);
                weights[b] = exp_2_up_to_0(masks[i][b], _mm512_sub_ps(_mm512_loadu_ps(at), own));
                scaled[b] = F::scaled_512(weights[b], masks[i][b], scales.as_ptr().wrapping_add(b * LANES));
                _mm512_storeu_ps(at, scaled[b]);
            }
            totals[i] = tree(weights, |x, y| _mm512_add_ps(x, y));
            sums[i] = tree(scaled, |x, y| _mm512_add_ps(x, y));
        }
        let total = reduce::eight(totals, |x, y| _mm512_add_ps(x, y));
        let (inverse, factor) = F::of_sums_256(reduce::eight(sums, |x, y| _mm512_add_ps(x, y)));
        let mut inverses = [0.0; TILE_QUERIES];
        _mm256_storeu_ps(inverses.as_mut_ptr(), inverse);
        for i in 0..Q {
            let scaled = array::from_fn(|b| _mm512_loadu_ps(state.scores[i].as_ptr().add(b * LANES)));
            F::words_512(scaled, _mm512_set1_ps(inverses[i]), state.words[i].as_mut_ptr());
        }

        let before = _mm256_loadu_ps(out.largest.as_ptr());
        let new_largest = _mm256_max_ps(before, own_largest);
        let both = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(before), own_largest);
        let from = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(new_largest), new_largest);
        let both = exp_2(_mm512_sub_ps(both, from));
        // A query that sees nothing of this chunk keeps what it has; what is no number is not nothing.
        let some = _mm256_cmp_ps_mask::<_CMP_NEQ_UQ>(own_largest, _mm256_set1_ps(f32::NEG_INFINITY));
        let old = _mm256_mask_mov_ps(_mm256_set1_ps(1.0), some, _mm512_castps512_ps256(both));
        let new = _mm256_maskz_mov_ps(some, _mm512_extractf32x8_ps::<1>(both));
        let total = _mm256_fmadd_ps(_mm256_loadu_ps(out.total.as_ptr()), old, _mm256_mul_ps(total, new));
        _mm256_storeu_ps(state.old.as_mut_ptr(), old);
        _mm256_storeu_ps(state.new.as_mut_ptr(), new);
        _mm256_storeu_ps(state.factor.as_mut_ptr(), _mm256_mul_ps(factor, new));
        _mm256_storeu_ps(out.total.as_mut_ptr(), total);
        _mm256_storeu_ps(out.largest.as_mut_ptr(), new_largest);
    }
}

/// out = out * old + (weights by values) * new, for the queries that see the chunk.
#[inline(always)]
unsafe fn merge_values<F: KvForm, const Q: usize>(
    values: &[F::Value],
    next: Option<&Head<'_, F>>,
    end: usize,
    dim: usize,
    state: &State,
    out: &mut [f32],
) {
    // SAFETY: `dim` is a multiple of 16, and so d + 16 V <= dim. Prefetches read nothing.
    unsafe {
        for d in (0..dim / (2 * LANES) * (2 * LANES)).step_by(2 * LANES) {
            if let Some(next) = next {
                let part = 2 * LANES * PAGE_TOKENS * size_of::<F::Value>();
                ask_for(next.values.as_ptr().add(d * PAGE_TOKENS).cast(), part);
            }
            merge_columns::<F, Q, 2>(values, end, (d, dim), state, out);
        }
        if !dim.is_multiple_of(2 * LANES) {
            merge_columns::<F, Q, 1>(values, end, (dim - LANES, dim), state, out);
        }
    }
}

/// As `merge_values`, of V vectors of the `dim` components from `d`. Two at a time for the reason that scores are.
#[inline(always)]
unsafe fn merge_columns<F: KvForm, const Q: usize, const V: usize>(
    values: &[F::Value],
    end: usize,
    (d, dim): (usize, usize),
    state: &State,
    out: &mut [f32],
) {
    // SAFETY: step < 64 / S and d + 16 V <= dim, so loads stay in the page's values; `out` has `dim` values for each query.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); V]; Q];
        for step in 0..end.div_ceil(F::SIDE) {
            let mut found = [_mm512_setzero_si512(); V];
            for v in 0..V {
                found[v] = _mm512_loadu_si512(values.as_ptr().add((step * dim + d + v * LANES) * F::SIDE).cast());
            }
            for i in 0..Q {
                let word = _mm512_set1_epi32(state.words[i].as_ptr().add(step).cast::<i32>().read());
                for v in 0..V {
                    acc[i][v] = F::step_512(acc[i][v], found[v], word);
                }
            }
        }
        for i in 0..Q {
            if state.new[i] != 0.0 {
                for v in 0..V {
                    let out = out.as_mut_ptr().add(i * dim + d + v * LANES);
                    let old = _mm512_mul_ps(_mm512_loadu_ps(out), _mm512_set1_ps(state.old[i]));
                    let sum = F::numbers_512(acc[i][v]);
                    _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, _mm512_set1_ps(state.factor[i]), old));
                }
            }
        }
    }
}
