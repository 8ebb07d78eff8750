//! One tile of attention in plain Rust; inlined into AVX2's as well, whose registers the compiler fills from it.

use crate::{
    attention::{HEAD_DIM_MAX, Tile},
    kv::{KEY_BLOCK, KvElement, PAGE_TOKENS},
    lanes::{self, LANES},
};

/// Results of the tile's queries: out (queries, K').
#[inline(always)]
pub(crate) fn tile<E: KvElement>(tile: &Tile<'_, E>, out: &mut [f32]) {
    let (dim, value_dim) = (tile.head_dim, tile.value_dim);
    for (i, out) in out.chunks_exact_mut(value_dim).enumerate() {
        let query = &tile.queries[i * dim..][..dim];
        out.fill(0.0);
        let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0);
        for c in tile.chunks() {
            let seen = tile.seen(i, c);
            if seen.is_empty() {
                continue;
            }
            let (keys, values) = tile.head(c);
            let mut weights = scores(query, keys);
            weights[..seen.start].fill(f32::NEG_INFINITY);
            weights[seen.end..].fill(f32::NEG_INFINITY);
            let (chunk_largest, chunk_total) = exponentials(&mut weights);
            let mut sum = [0.0; HEAD_DIM_MAX];
            weighted_values(&weights[..seen.end], values, &mut sum[..value_dim]);
            let new_largest = f32::max(largest, chunk_largest);
            let (old, new) = (lanes::exp(largest - new_largest), lanes::exp(chunk_largest - new_largest));
            for (out, sum) in out.iter_mut().zip(&sum) {
                *out = *out * old + sum * new;
            }
            total = total * old + chunk_total * new;
            largest = new_largest;
        }
        let scale = 1.0 / total;
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// query: (K), keys: [4][K][16] to scores of 64 keys.
#[inline(always)]
fn scores<E: KvElement>(query: &[f32], keys: &[E]) -> [f32; PAGE_TOKENS] {
    let mut scores = [0.0; PAGE_TOKENS];
    for (block, scores) in keys.chunks_exact(query.len() * KEY_BLOCK).zip(scores.as_chunks_mut::<LANES>().0) {
        for (key, q) in block.as_chunks::<LANES>().0.iter().zip(query) {
            let key = E::lanes(key);
            scores.iter_mut().zip(key).for_each(|(s, k)| *s += k * q);
        }
    }
    scores
}

/// Turns scores into e^(score - largest), and returns the largest and the sum.
#[inline(always)]
fn exponentials(scores: &mut [f32; PAGE_TOKENS]) -> (f32, f32) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in scores.as_chunks::<LANES>().0 {
        largest.iter_mut().zip(block).for_each(|(m, s)| *m = f32::max(*m, *s));
    }
    let largest = lanes::max(largest);
    for s in scores.iter_mut() {
        // A masked key weighs exactly nothing; e^-87, the smallest value of `exp`, would let it speak.
        *s = if *s == f32::NEG_INFINITY { 0.0 } else { lanes::exp(*s - largest) };
    }
    (largest, lanes::sum_by(&scores[..], |x| x))
}

/// sum: (K') += weights: (keys) by values: (keys, K').
#[inline(always)]
fn weighted_values<E: KvElement>(weights: &[f32], values: &[E], sum: &mut [f32]) {
    for (w, value) in weights.iter().zip(values.chunks_exact(sum.len())) {
        for (sum, value) in sum.as_chunks_mut::<LANES>().0.iter_mut().zip(value.as_chunks::<LANES>().0) {
            let value = E::lanes(value);
            sum.iter_mut().zip(value).for_each(|(s, v)| *s += w * v);
        }
    }
}
