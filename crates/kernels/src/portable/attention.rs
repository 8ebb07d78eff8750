//! One tile of attention in plain Rust; inlined into AVX2's as well, whose registers the compiler fills from it.

use std::ops::Range;

use crate::{
    attention::{HEAD_DIM_MAX, Partial, Tile},
    kv::{KEY_BLOCK, KvForm, PAGE_TOKENS},
    lanes::{self, LANES},
};

/// The tile's results over `chunks`.
#[inline(always)]
pub(crate) fn span<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    let (dim, value_dim) = (tile.head_dim, tile.value_dim);
    for i in 0..tile.ranges.len() {
        let query = &tile.queries[i * dim..][..dim];
        let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0);
        let out_values = &mut out.values[i * value_dim..][..value_dim];
        out_values.fill(0.0);
        for c in chunks.clone() {
            let seen = tile.seen(i, c);
            if seen.is_empty() {
                continue;
            }
            let (keys, values) = tile.head(c);
            let mut weights = scores::<F>(query, keys);
            weights[..seen.start].fill(f32::NEG_INFINITY);
            weights[seen.end..].fill(f32::NEG_INFINITY);
            let (chunk_largest, chunk_total) = exponentials::<F>(&mut weights);
            let mut sum = [0.0; HEAD_DIM_MAX];
            weighted_values::<F>(&weights[..seen.end.next_multiple_of(F::SIDE)], values, &mut sum[..value_dim]);
            let new_largest = f32::max(largest, chunk_largest);
            let (old, new) = (lanes::exp_2(largest - new_largest), lanes::exp_2(chunk_largest - new_largest));
            for (out, sum) in out_values.iter_mut().zip(&sum) {
                *out = *out * old + sum * new;
            }
            total = total * old + chunk_total * new;
            largest = new_largest;
        }
        (out.largest[i], out.total[i]) = (largest, total);
    }
}

/// query: (K), keys: [4][K][16] to scores of 64 keys.
#[inline(always)]
fn scores<F: KvForm>(query: &[f32], keys: &[F::Key]) -> [f32; PAGE_TOKENS] {
    let mut scores = [0.0; PAGE_TOKENS];
    for (block, scores) in keys.chunks_exact(query.len() * KEY_BLOCK).zip(scores.as_chunks_mut::<LANES>().0) {
        for (key, q) in block.as_chunks::<LANES>().0.iter().zip(query) {
            let key = F::keys(key);
            scores.iter_mut().zip(key).for_each(|(s, k)| *s += k * q);
        }
    }
    scores
}

/// Turns scores into weights 2^(score - largest), and returns the largest score and the sum of the weights.
#[inline(always)]
fn exponentials<F: KvForm>(scores: &mut [f32; PAGE_TOKENS]) -> (f32, f32) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in scores.as_chunks::<LANES>().0 {
        largest.iter_mut().zip(block).for_each(|(m, s)| *m = f32::max(*m, *s));
    }
    let largest = lanes::max(largest);
    for s in scores.iter_mut() {
        // A masked key weighs exactly nothing; 2^-126, the smallest value of `exp_2`, would let it speak.
        *s = if *s == f32::NEG_INFINITY { 0.0 } else { F::weight(lanes::exp_2(*s - largest)) };
    }
    (largest, lanes::sum_by(&scores[..], |x| x))
}

/// sum: (K') += weights: (keys) by values: (keys / S, K', S).
#[inline(always)]
fn weighted_values<F: KvForm>(weights: &[f32], values: &[F::Value], sum: &mut [f32]) {
    let step = sum.len() * F::SIDE;
    for (w, values) in weights.chunks_exact(F::SIDE).zip(values.chunks_exact(step)) {
        for (sum, values) in sum.as_chunks_mut::<LANES>().0.iter_mut().zip(values.chunks_exact(LANES * F::SIDE)) {
            F::add_values(sum, w, values);
        }
    }
}
