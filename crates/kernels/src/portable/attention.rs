//! Tiles of attention in plain Rust.

use std::ops::Range;

use crate::{
    attention::{HEAD_DIM_MAX, Partial, Tile},
    kv::{KEY_BLOCK, PAGE_TOKENS},
    kv_form::KvForm,
    lanes::{self, LANES},
};

/// The tiles' results over `chunks`.
#[inline(always)]
pub(crate) fn span<F: KvForm>(tiles: &[Tile<'_, F>], chunks: Range<usize>, outs: &mut [Partial<'_>]) {
    tiles.iter().zip(outs).for_each(|(tile, out)| tile_span(tile, chunks.clone(), out));
}

#[inline(always)]
fn tile_span<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    let (dim, value_dim) = (tile.head_dim, tile.value_dim);
    for i in 0..tile.count {
        let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0);
        let out_values = &mut out.values[i * value_dim..][..value_dim];
        out_values.fill(0.0);
        for c in chunks.clone() {
            let seen = tile.seen(i, c);
            if seen.is_empty() {
                continue;
            }
            let head = tile.head(c);
            let mut scores = [0.0; PAGE_TOKENS];
            for (b, scores) in scores.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let scales = head.key_scales.get(b * KEY_BLOCK..).unwrap_or_default();
                *scores = F::scores(&tile.queries, i, &head.keys[b * KEY_BLOCK * dim..][..KEY_BLOCK * dim], scales);
            }
            scores[..seen.start].fill(f32::NEG_INFINITY);
            scores[seen.end..].fill(f32::NEG_INFINITY);
            let chunk_largest = exponentials(&mut scores);
            let mut words = [bytemuck::Zeroable::zeroed(); PAGE_TOKENS];
            let weights = F::weights(&scores, head.value_scales, &mut words);
            let mut sum = [F::Sum::default(); HEAD_DIM_MAX];
            weighted_values::<F>(&words[..seen.end.next_multiple_of(F::SIDE)], head.values, &mut sum[..value_dim]);
            let new_largest = f32::max(largest, chunk_largest);
            let (old, new) = (lanes::exp_2(largest - new_largest), lanes::exp_2(chunk_largest - new_largest));
            for (out, sum) in out_values.iter_mut().zip(&sum) {
                *out = *out * old + F::number(*sum) * (new * weights.factor);
            }
            total = total * old + weights.total * new;
            largest = new_largest;
        }
        (out.largest[i], out.total[i]) = (largest, total);
    }
}

/// Turns scores into 2^(score - largest), and returns the largest score.
#[inline(always)]
fn exponentials(scores: &mut [f32; PAGE_TOKENS]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in scores.as_chunks::<LANES>().0 {
        largest.iter_mut().zip(block).for_each(|(m, s)| *m = f32::max(*m, *s));
    }
    let largest = lanes::max(largest);
    for s in scores.iter_mut() {
        // A masked key weighs exactly nothing; 2^-126, the smallest value of `exp_2`, would let it speak.
        *s = if *s == f32::NEG_INFINITY { 0.0 } else { lanes::exp_2(*s - largest) };
    }
    largest
}

/// sum: (K') += weights: (keys) by values: (keys / S, K', S).
#[inline(always)]
fn weighted_values<F: KvForm>(weights: &[F::Weight], values: &[F::Value], sum: &mut [F::Sum]) {
    let step = sum.len() * F::SIDE;
    for (w, values) in weights.chunks_exact(F::SIDE).zip(values.chunks_exact(step)) {
        for (sum, values) in sum.as_chunks_mut::<LANES>().0.iter_mut().zip(values.chunks_exact(LANES * F::SIDE)) {
            F::add_values(sum, w, values);
        }
    }
}
