//! Backward of causal attention over whole sequences: scores are computed again block by block, never kept.
//!
//! Each query head of a sequence is a job of its own; what the heads of one kv head give its keys and values is added in
//! ascending order of heads, so that results do not depend on threads. Source: Dao et al. 2022.

use std::ops::Range;

use crate::{
    Isa,
    attention::HEAD_DIM_MAX,
    lanes,
    lanes::for_each_isa,
    matmul::Compute,
    product::{Join, Mat, Out, multiply},
    shared_out::SharedOut,
};

/// Queries whose scores are held at once: (64, T) f32 are 128 KiB for 512 tokens.
const BLOCK_QUERIES: usize = 64;

/// The shape of an attention layer, and what it sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// H
    pub heads: usize,
    /// G
    pub kv_heads: usize,
    /// K
    pub head_dim: usize,
    /// How many positions a token sees, itself included.
    pub window: Option<usize>,
    /// What scores are multiplied with.
    pub scale: f32,
}

/// Queries (T, H, K), keys and values (T, G, K) of an attention layer as its softmax saw them.
#[derive(Clone, Copy)]
pub struct AttentionInput<'a> {
    /// (T, H, K)
    pub q: &'a [f32],
    /// (T, G, K)
    pub k: &'a [f32],
    /// (T, G, K)
    pub v: &'a [f32],
}

impl Compute {
    /// Gradients of attention of whole sequences, whose rows `seqs` cover the batch one after the other, from `d_out`: (T, H, K) towards q, k
    /// and v: `grads`, of the shapes of the input, overwritten.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn attention_backward(
        &self,
        shape: AttentionShape,
        seqs: &[Range<usize>],
        input: AttentionInput<'_>,
        d_out: &[f32],
        grads: [&mut [f32]; 3],
    ) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let tokens = shape.check(seqs, input, d_out, &grads);
        let [dq, dk, dv] = grads;
        // What each query head gives the keys and values: (H, T, K) each.
        let mut parts = vec![0.0; 2 * heads * tokens * head_dim];
        let (dk_parts, dv_parts) = parts.split_at_mut(heads * tokens * head_dim);
        {
            let (dq, dk, dv) = (SharedOut::new(dq), SharedOut::new(dk_parts), SharedOut::new(dv_parts));
            let (jobs, threads) = (seqs.len() * heads, self.pool.threads());
            self.pool.run(|i| {
                let mut room = Room::default();
                for job in (i..jobs).step_by(threads) {
                    let (seq, head) = (seqs[job / heads].clone(), job % heads);
                    Head { isa: self.isa, shape, input, d_out, tokens, seq, head }.run(&mut room, &dq, &dk, &dv);
                }
            });
        }
        let group = heads / kv_heads;
        for (to, parts) in [(dk, &*dk_parts), (dv, &*dv_parts)] {
            self.each_row(to, head_dim, |_, row, to| {
                let (t, kv_head) = (row / kv_heads, row % kv_heads);
                to.fill(0.0);
                for head in kv_head * group..(kv_head + 1) * group {
                    let part = &parts[(head * tokens + t) * head_dim..][..head_dim];
                    to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
                }
            });
        }
    }
}

impl AttentionShape {
    /// The number of tokens.
    ///
    /// # Panics
    /// If shapes do not fit, or sequences do not stand one after the other.
    pub(crate) fn check(
        &self,
        seqs: &[Range<usize>],
        input: AttentionInput<'_>,
        d_out: &[f32],
        grads: &[&mut [f32]; 3],
    ) -> usize {
        let AttentionShape { heads, kv_heads, head_dim, .. } = *self;
        let tokens = seqs.last().map_or(0, |s| s.end);
        let (wide, narrow) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
        let fits = [input.q.len(), d_out.len(), grads[0].len()] == [wide; 3]
            && [input.k.len(), input.v.len(), grads[1].len(), grads[2].len()] == [narrow; 4];
        assert!(fits && head_dim <= HEAD_DIM_MAX && heads.is_multiple_of(kv_heads), "attention_backward of {self:?}");
        // Rows of no sequence, or of two, would be left as they are or written twice.
        let mut end = 0;
        for seq in seqs {
            assert!(seq.start == end && seq.end >= end, "sequences one after the other from 0, found {seqs:?}");
            end = seq.end;
        }
        tokens
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Room {
    /// Keys and values transposed, (K, tokens of the sequence)
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Shares of a block's queries, (queries, keys), and their gradients
    shares: Vec<f32>,
    d_shares: Vec<f32>,
}

/// One query head of one sequence.
struct Head<'a> {
    isa: Isa,
    shape: AttentionShape,
    input: AttentionInput<'a>,
    d_out: &'a [f32],
    tokens: usize,
    seq: Range<usize>,
    head: usize,
}

impl Head<'_> {
    fn run(&self, room: &mut Room, dq: &SharedOut<'_, f32>, dk: &SharedOut<'_, f32>, dv: &SharedOut<'_, f32>) {
        let AttentionShape { heads, kv_heads, head_dim, window, scale } = self.shape;
        let (len, kv_head) = (self.seq.len(), self.head / (heads / kv_heads));
        let (q_step, kv_step) = (heads * head_dim, kv_heads * head_dim);
        let kv_at = self.seq.start * kv_step + kv_head * head_dim;
        transpose(&self.input.k[kv_at.min(self.input.k.len())..], len, head_dim, kv_step, &mut room.keys);
        transpose(&self.input.v[kv_at.min(self.input.v.len())..], len, head_dim, kv_step, &mut room.values);
        for first in (0..len).step_by(BLOCK_QUERIES) {
            let end = (first + BLOCK_QUERIES).min(len);
            let start = window.map_or(0, |w| (first + 1).saturating_sub(w));
            let (queries, keys) = (end - first, end - start);
            let q_at = (self.seq.start + first) * q_step + self.head * head_dim;
            let q = Mat::strided(&self.input.q[q_at..], queries, head_dim, q_step);
            let d_out = Mat::strided(&self.d_out[q_at..], queries, head_dim, q_step);
            room.shares.resize(queries * keys, 0.0);
            room.d_shares.resize(queries * keys, 0.0);
            let plain = Join::OVER;
            let scaled = Join { alpha: scale, add: false };
            self.into(q, Mat::strided(&room.keys[start..], head_dim, keys, len), scaled, &mut room.shares);
            self.into(d_out, Mat::strided(&room.values[start..], head_dim, keys, len), plain, &mut room.d_shares);
            for i in 0..queries {
                let last = first + i + 1;
                let from = window.map_or(0, |w| last.saturating_sub(w));
                let shares = &mut room.shares[i * keys..][..keys];
                let d_shares = &mut room.d_shares[i * keys..][..keys];
                softmax_back_row(self.isa, from - start, last - start, scale, shares, d_shares);
            }
            let (shares, d_scores) = (Mat::new(&room.shares, queries, keys), Mat::new(&room.d_shares, queries, keys));
            let k = Mat::strided(&self.input.k[kv_at + start * kv_step..], keys, head_dim, kv_step);
            let at = |to, at, step| Out { to, at, step };
            let part = (self.head * self.tokens + self.seq.start + start) * head_dim;
            multiply(self.isa, d_scores, &k, 0..queries, 0..head_dim, Join::OVER, &at(dq, q_at, q_step));
            multiply(self.isa, d_scores.t(), &q, 0..keys, 0..head_dim, Join::ADD, &at(dk, part, head_dim));
            multiply(self.isa, shares.t(), &d_out, 0..keys, 0..head_dim, Join::ADD, &at(dv, part, head_dim));
        }
    }

    fn into(&self, a: Mat<'_>, b: Mat<'_>, into: Join, out: &mut [f32]) {
        let (rows, cols) = (a.rows(), b.cols());
        let out = SharedOut::new(out);
        multiply(self.isa, a, &b, 0..rows, 0..cols, into, &Out { to: &out, at: 0, step: cols });
    }
}

/// `out`: (dim, len) = rows of x that are `step` apart, turned.
fn transpose(x: &[f32], len: usize, dim: usize, step: usize, out: &mut Vec<f32>) {
    out.resize(dim * len, 0.0);
    for t in 0..len {
        for (d, x) in x[t * step..][..dim].iter().enumerate() {
            out[d * len + t] = *x;
        }
    }
}

for_each_isa! {
    /// Scores become shares of the keys `from..to`, zero elsewhere; gradients towards shares become those towards q k.
    pub(crate) fn softmax_back_row(from: usize, to: usize, scale: f32, shares: &mut [f32], d_shares: &mut [f32]) {
        shares[..from].fill(0.0);
        shares[to..].fill(0.0);
        d_shares[..from].fill(0.0);
        d_shares[to..].fill(0.0);
        let (shares, d_shares) = (&mut shares[from..to], &mut d_shares[from..to]);
        let mut largest = [f32::NEG_INFINITY; lanes::LANES];
        let (whole, rest) = shares.as_chunks::<{ lanes::LANES }>();
        for x in whole {
            largest.iter_mut().zip(x).for_each(|(m, &x)| *m = f32::max(*m, x));
        }
        let largest = rest.iter().copied().fold(lanes::max(largest), f32::max);
        shares.iter_mut().for_each(|x| *x = lanes::exp(*x - largest));
        let inverse = 1.0 / lanes::sum_by(shares, |x| x);
        shares.iter_mut().for_each(|x| *x *= inverse);
        let mean = lanes::dot(shares, d_shares);
        for (p, d) in shares.iter().zip(d_shares) {
            *d = scale * p * (*d - mean);
        }
    }
}
