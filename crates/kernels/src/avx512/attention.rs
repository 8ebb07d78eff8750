//! One tile of attention on AVX-512: up to 8 queries share each vector of keys and of values.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::arch::x86_64::*;

use crate::{
    attention::{HEAD_DIM_MAX, TILE_QUERIES, Tile},
    kv::{KEY_BLOCK, KvElement, PAGE_TOKENS},
    lanes::LANES,
};

/// The tile's running results.
struct State {
    largest: [f32; TILE_QUERIES],
    total: [f32; TILE_QUERIES],
    /// Scores, then weights, of one chunk: (queries, 64)
    weights: [[f32; PAGE_TOKENS]; TILE_QUERIES],
    /// What the chunk's merge multiplies: the running result, and the chunk's.
    old: [f32; TILE_QUERIES],
    new: [f32; TILE_QUERIES],
}

/// Results of the tile's queries: out (queries, K').
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,avx2")]
pub(crate) unsafe fn tile<E: KvElement>(tile: &Tile<'_, E>, out: &mut [f32]) {
    // SAFETY: the caller's promise; Q is at least the number of queries.
    unsafe {
        match tile.ranges.len() {
            1 => queries::<E, 1>(tile, out),
            2 => queries::<E, 2>(tile, out),
            3..=4 => queries::<E, 4>(tile, out),
            5..=6 => queries::<E, 6>(tile, out),
            _ => queries::<E, 8>(tile, out),
        }
    }
}

/// The tile in `Q` slots; slots past the last query repeat the first one's scores and are not stored.
#[inline(always)]
unsafe fn queries<E: KvElement, const Q: usize>(tile: &Tile<'_, E>, out: &mut [f32]) {
    let (dim, count) = (tile.value_dim, tile.ranges.len());
    let slots: [usize; Q] = std::array::from_fn(|i| if i < count { i } else { 0 });
    let mut state = State {
        largest: [f32::NEG_INFINITY; TILE_QUERIES],
        total: [0.0; TILE_QUERIES],
        weights: [[0.0; PAGE_TOKENS]; TILE_QUERIES],
        old: [0.0; TILE_QUERIES],
        new: [0.0; TILE_QUERIES],
    };
    debug_assert!(count <= Q && dim <= HEAD_DIM_MAX && out.len() == count * dim);
    out.fill(0.0);
    for c in tile.chunks() {
        let (keys, values) = tile.head(c);
        let end = (0..count).map(|i| tile.seen(i, c).end).max().unwrap_or(0);
        // SAFETY: `keys` and `values` are a page's, of 64 keys of K and 64 values of K'.
        unsafe {
            scores::<E, Q>(tile, &slots, keys, end, &mut state);
            for i in 0..count {
                weigh(tile.seen(i, c), i, &mut state);
            }
            merge_values::<E, Q>(values, end, dim, count, &slots, &state, out);
        }
    }
    for (out, total) in out.chunks_exact_mut(dim).zip(state.total) {
        let scale = 1.0 / total;
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// Scores of the chunk's keys up to `end`.
#[inline(always)]
unsafe fn scores<E: KvElement, const Q: usize>(
    tile: &Tile<'_, E>,
    slots: &[usize; Q],
    keys: &[E],
    end: usize,
    state: &mut State,
) {
    let dim = tile.head_dim;
    for block in 0..end.div_ceil(KEY_BLOCK) {
        // SAFETY: block < 4, so the loads stay in the page's keys; queries hold `dim` values for each slot.
        unsafe {
            let keys = keys.as_ptr().add(block * KEY_BLOCK * dim);
            let queries: [*const f32; Q] = std::array::from_fn(|i| tile.queries.as_ptr().add(slots[i] * dim));
            let mut acc = [_mm512_setzero_ps(); Q];
            for d in 0..dim {
                let key = E::load_512(keys.add(d * KEY_BLOCK));
                for i in 0..Q {
                    acc[i] = _mm512_fmadd_ps(key, _mm512_set1_ps(*queries[i].add(d)), acc[i]);
                }
            }
            for i in 0..Q {
                _mm512_storeu_ps(state.weights[i].as_mut_ptr().add(block * KEY_BLOCK), acc[i]);
            }
        }
    }
}

/// Turns query `i`'s scores of the keys `seen` into weights, all others into zeros, and prepares its merge.
#[inline(always)]
unsafe fn weigh(seen: std::ops::Range<usize>, i: usize, state: &mut State) {
    if seen.is_empty() {
        state.weights[i] = [0.0; PAGE_TOKENS];
        (state.old[i], state.new[i]) = (1.0, 0.0);
        return;
    }
    let weights = &mut state.weights[i];
    // SAFETY: AVX-512 F is there; loads and stores are of the 64 weights.
    unsafe {
        let masks: [u16; 4] = std::array::from_fn(|b| {
            let bits = |n: usize| ((1u32 << n.saturating_sub(b * LANES).min(LANES)) - 1) as u16;
            bits(seen.end) & !bits(seen.start)
        });
        let none = _mm512_set1_ps(f32::NEG_INFINITY);
        let scores: [__m512; 4] =
            std::array::from_fn(|b| _mm512_mask_loadu_ps(none, masks[b], weights.as_ptr().add(b * LANES)));
        let pairs = (_mm512_max_ps(scores[0], scores[1]), _mm512_max_ps(scores[2], scores[3]));
        let largest = _mm512_reduce_max_ps(_mm512_max_ps(pairs.0, pairs.1));
        let mut total = _mm512_setzero_ps();
        for b in 0..4 {
            let e = _mm512_maskz_mov_ps(masks[b], exp(_mm512_sub_ps(scores[b], _mm512_set1_ps(largest))));
            _mm512_storeu_ps(weights.as_mut_ptr().add(b * LANES), e);
            total = _mm512_add_ps(total, e);
        }
        let mut lanes = [0.0; LANES];
        _mm512_storeu_ps(lanes.as_mut_ptr(), total);
        let total = crate::lanes::sum(lanes);
        let new_largest = f32::max(state.largest[i], largest);
        state.old[i] = crate::lanes::exp(state.largest[i] - new_largest);
        state.new[i] = crate::lanes::exp(largest - new_largest);
        state.total[i] = state.total[i] * state.old[i] + total * state.new[i];
        state.largest[i] = new_largest;
    }
}

/// out = out * old + (weights by values) * new, for the queries that see the chunk.
#[inline(always)]
unsafe fn merge_values<E: KvElement, const Q: usize>(
    values: &[E],
    end: usize,
    dim: usize,
    count: usize,
    slots: &[usize; Q],
    state: &State,
    out: &mut [f32],
) {
    for d in (0..dim).step_by(LANES) {
        // SAFETY: key < 64 and d + 16 <= dim, so loads stay in the page's values; `out` has `dim` values for each query.
        unsafe {
            let mut acc = [_mm512_setzero_ps(); Q];
            for key in 0..end {
                let value = E::load_512(values.as_ptr().add(key * dim + d));
                for i in 0..Q {
                    let weight = _mm512_set1_ps(*state.weights[slots[i]].as_ptr().add(key));
                    acc[i] = _mm512_fmadd_ps(value, weight, acc[i]);
                }
            }
            for i in 0..Q {
                if i < count && state.new[i] != 0.0 {
                    let out = out.as_mut_ptr().add(i * dim + d);
                    let old = _mm512_mul_ps(_mm512_loadu_ps(out), _mm512_set1_ps(state.old[i]));
                    _mm512_storeu_ps(out, _mm512_fmadd_ps(acc[i], _mm512_set1_ps(state.new[i]), old));
                }
            }
        }
    }
}

/// `lanes::exp` for sixteen values.
#[inline(always)]
unsafe fn exp(x: __m512) -> __m512 {
    // SAFETY: the caller has AVX-512 F.
    unsafe {
        let x = _mm512_max_ps(x, _mm512_set1_ps(-87.0));
        let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r);
        let mut p = _mm512_set1_ps(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
        }
        _mm512_scalef_ps(p, n)
    }
}
