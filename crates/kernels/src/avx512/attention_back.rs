//! Backward of one query head's attention on AVX-512 with products of bf16 pairs.
//!
//! Scores are computed in f32, as rounded keys move them too far (docs/LOG.md, attention over long contexts); shares, their
//! gradients, queries, keys, values and what comes from above are rounded to bf16 where they are multiplied with each other, and
//! summed in f32.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for, and bf16 products.

use std::arch::x86_64::*;

use super::transpose::{self, Square};
use crate::{Isa, attention_back::softmax_back_row, shared_out::SharedOut};

/// Queries whose shares are held at once: sums of keys' gradients are read and written once for each so many.
const BLOCK: usize = 64;
/// Pairs of queries in a block.
const PAIRS: usize = BLOCK / 2;
/// Queries that share each load of keys.
const TILE: usize = 8;
/// Keys of a step, and what their number is rounded up to.
pub(crate) const KEYS: usize = 32;
/// Values in a vector.
const LANES: usize = 16;

/// One query head of one sequence. Slices begin at its first value.
pub(crate) struct Head<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) d_out: &'a [f32],
    pub(crate) q_step: usize,
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) kv_step: usize,
    pub(crate) len: usize,
    /// K, a multiple of 32
    pub(crate) dim: usize,
    pub(crate) window: Option<usize>,
    pub(crate) scale: f32,
}

impl Head<'_> {
    /// Keys to whole steps; what keys and values are given becomes zero.
    ///
    /// # Panics
    /// If slices end before the last token, or K is no multiple of 32.
    pub(crate) fn begin(&self, parts: [&mut [Square<f32>]; 2]) -> usize {
        let Head { len, dim, .. } = *self;
        let keys = len.next_multiple_of(KEYS);
        assert!(dim.is_multiple_of(2 * LANES));
        assert!(len == 0 || self.q.len().min(self.d_out.len()) >= (len - 1) * self.q_step + dim);
        assert!(len == 0 || self.k.len().min(self.v.len()) >= (len - 1) * self.kv_step + dim);
        for part in parts {
            assert!(part.len() == keys / LANES * (dim / LANES));
            part.fill(Square([[0.0; LANES]; LANES]));
        }
        keys
    }
}

/// Buffers of one thread. A pair is two bf16 values in a word, the lower half being the first.
#[derive(Default)]
pub(crate) struct Room {
    /// Values (K, keys), as f32's bits
    keys: Vec<u32>,
    /// Pairs of keys, (keys / 2, K)
    key_pairs: Vec<u32>,
    /// Pairs along K, (K / 2, keys)
    value_pairs: Vec<u32>,
    /// Pairs along K of a block's d_out, (64, K / 2)
    d_out_pairs: Vec<u32>,
    /// Pairs of queries, (K, 32), of the block's q and d_out
    q_turned: Vec<u32>,
    d_out_turned: Vec<u32>,
    /// Rows on their way to be turned
    rows: Vec<u32>,
    /// (8, keys)
    scores: Vec<f32>,
    d_shares: Vec<f32>,
    /// Pairs of queries, (32, keys), of shares and of scores' gradients
    shares: Vec<u32>,
    d_scores: Vec<u32>,
    /// Pairs of keys, (64, keys / 2)
    d_score_rows: Vec<u32>,
}

/// Whether this machine has the products, and heads of `dim` fit them.
pub(crate) fn fits(dim: usize) -> bool {
    is_x86_feature_detected!("avx512bf16") && dim.is_multiple_of(2 * LANES)
}

/// Gradients of the head: towards its queries into rows of `dq` from `dq_at`, `q_step` apart; towards keys and values turned into
/// `dk` and `dv`: (keys rounded up to 32 / 16, K / 16), sixteen of K by sixteen keys each, overwritten.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for, and `fits(dim)`; nobody else has these rows of `dq`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")]
pub(crate) unsafe fn run(
    head: &Head<'_>,
    room: &mut Room,
    dq: &SharedOut<'_, f32>,
    dq_at: usize,
    [dk, dv]: [&mut [Square<f32>]; 2],
) {
    let Head { len, dim, window, scale, .. } = *head;
    let keys = head.begin([&mut *dk, &mut *dv]);
    // SAFETY: rows of the head exist by the assertions; buffers have the sizes that `Room` states.
    unsafe {
        room.prepare(head, keys);
        for first in (0..len).step_by(BLOCK) {
            let end = (first + BLOCK).min(len);
            // Keys that any query of the block sees, to whole steps.
            let start = window.map_or(0, |w| (first + 1).saturating_sub(w)) / KEYS * KEYS;
            let seen = end.next_multiple_of(KEYS) - start;
            room.queries(head, first, end);
            for tile in (first..first + BLOCK).step_by(TILE) {
                let at = tile - first;
                if tile >= end {
                    // No queries: their pairs count nothing.
                    for pair in at / 2..(at + TILE) / 2 {
                        room.shares[pair * keys..][..seen].fill(0);
                        room.d_scores[pair * keys..][..seen].fill(0);
                    }
                    continue;
                }
                let last = (tile + TILE).min(end);
                let width = last.next_multiple_of(KEYS) - start;
                scores(head, room, tile..last, start, width, keys);
                d_shares(head, room, at, start, width, keys);
                for i in 0..TILE {
                    let (scores, d_shares) =
                        (&mut room.scores[i * keys..][..seen], &mut room.d_shares[i * keys..][..seen]);
                    if tile + i >= end {
                        scores.fill(0.0);
                        d_shares.fill(0.0);
                        continue;
                    }
                    let to = tile + i + 1;
                    let from = window.map_or(0, |w| to.saturating_sub(w));
                    softmax_back_row(Isa::Avx512, from - start, to - start, scale, scores, d_shares);
                }
                room.round(at, seen, keys);
            }
            d_queries(head, room, first..end, start, seen, keys, dq, dq_at);
            d_keys(&room.d_scores, &room.q_turned, dim, start, seen, keys, dk);
            d_keys(&room.shares, &room.d_out_turned, dim, start, seen, keys, dv);
        }
    }
}

/// Sixteen values rounded, one in each word's lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rounded(x: __m512) -> __m512i {
    // SAFETY: both are sixteen 16-bit values.
    unsafe { _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
}

/// Words of the values of two rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn paired(first: __m512, second: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_or_si512(rounded(first), _mm512_slli_epi32::<16>(rounded(second))) }
}

/// Words of the pairs along a row: 32 values from `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pairs_along(x: *const f32) -> __m512i {
    // SAFETY: the caller's promise that 32 values can be read; a vector of bf16 has the same size.
    unsafe {
        let (first, last) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(LANES)));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(last, first))
    }
}

/// acc plus products of pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: vectors of 32 bf16 values have the same size.
    unsafe {
        let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
        _mm512_dpbf16_ps(acc, a, b)
    }
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

impl Room {
    /// Keys and values in the forms that products want, zero behind the sequence's end.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn prepare(&mut self, head: &Head<'_>, keys: usize) {
        let dim = head.dim;
        for (buffer, len) in [
            (&mut self.keys, dim * keys),
            (&mut self.key_pairs, keys / 2 * dim),
            (&mut self.value_pairs, dim / 2 * keys),
            (&mut self.d_out_pairs, BLOCK * dim / 2),
            (&mut self.q_turned, dim * PAIRS),
            (&mut self.d_out_turned, dim * PAIRS),
            (&mut self.rows, (keys * dim).max(BLOCK * dim)),
            (&mut self.shares, PAIRS * keys),
            (&mut self.d_scores, PAIRS * keys),
            (&mut self.d_score_rows, BLOCK * keys / 2),
        ] {
            grow(buffer, len);
        }
        grow(&mut self.scores, TILE * keys);
        grow(&mut self.d_shares, TILE * keys);
        // SAFETY: rows below `len` exist; buffers are as long as asked for above.
        unsafe {
            let rows = self.rows.as_mut_ptr();
            for t in 0..keys {
                for d in (0..dim).step_by(LANES) {
                    let x = if t < head.len { load(head.k, t * head.kv_step + d) } else { _mm512_setzero_ps() };
                    _mm512_storeu_ps(rows.add(t * dim + d).cast(), x);
                }
            }
            transpose::matrix(&self.rows, [keys, dim], dim, &mut self.keys, keys);
            for pair in 0..keys / 2 {
                for d in (0..dim).step_by(LANES) {
                    let [a, b] = [0, 1].map(|i| _mm512_loadu_ps(rows.add((2 * pair + i) * dim + d).cast()));
                    _mm512_storeu_si512(self.key_pairs.as_mut_ptr().add(pair * dim + d).cast(), paired(a, b));
                }
            }
            for t in 0..keys {
                for d in (0..dim).step_by(2 * LANES) {
                    let at = t * head.kv_step + d;
                    let x = if t < head.len { pairs_along(head.v[at..].as_ptr()) } else { _mm512_setzero_si512() };
                    _mm512_storeu_si512(rows.add((t * dim + d) / 2).cast(), x);
                }
            }
            transpose::matrix(&self.rows, [keys, dim / 2], dim / 2, &mut self.value_pairs, keys);
        }
    }

    /// Queries of a block and what comes from above, zero behind `end`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn queries(&mut self, head: &Head<'_>, first: usize, end: usize) {
        let dim = head.dim;
        // SAFETY: rows below `end` exist; buffers are as long as `prepare` has made them.
        unsafe {
            let zero = _mm512_setzero_ps();
            for (x, turned) in [(head.q, &mut self.q_turned), (head.d_out, &mut self.d_out_turned)] {
                for pair in 0..PAIRS {
                    for d in (0..dim).step_by(LANES) {
                        let [a, b] = [0, 1].map(|i| {
                            let t = first + 2 * pair + i;
                            if t < end { load(x, t * head.q_step + d) } else { zero }
                        });
                        _mm512_storeu_si512(self.rows.as_mut_ptr().add(pair * dim + d).cast(), paired(a, b));
                    }
                }
                transpose::matrix(&self.rows, [PAIRS, dim], dim, turned, PAIRS);
            }
            for t in first..end {
                for d in (0..dim).step_by(2 * LANES) {
                    let pairs = pairs_along(head.d_out[t * head.q_step + d..].as_ptr());
                    let to = self.d_out_pairs.as_mut_ptr().add(((t - first) * dim + d) / 2);
                    _mm512_storeu_si512(to.cast(), pairs);
                }
            }
        }
    }

    /// Rounds a tile's shares and gradients of scores, in pairs of queries and in pairs of keys.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn round(&mut self, at: usize, seen: usize, keys: usize) {
        // SAFETY: `seen` is at most `keys` and a multiple of 32; the tile is inside the block.
        unsafe {
            for (from, to) in [(&self.scores, &mut self.shares), (&self.d_shares, &mut self.d_scores)] {
                for pair in 0..TILE / 2 {
                    for key in (0..seen).step_by(LANES) {
                        let [a, b] = [0, 1].map(|i| load(from, (2 * pair + i) * keys + key));
                        let to = to.as_mut_ptr().add((at / 2 + pair) * keys + key);
                        _mm512_storeu_si512(to.cast(), paired(a, b));
                    }
                }
            }
            for i in 0..TILE {
                for key in (0..seen).step_by(2 * LANES) {
                    let pairs = pairs_along(self.d_shares.as_ptr().add(i * keys + key));
                    let to = self.d_score_rows.as_mut_ptr().add(((at + i) * keys + key) / 2);
                    _mm512_storeu_si512(to.cast(), pairs);
                }
            }
        }
    }
}

/// Sixteen values from `at`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(x: &[f32], at: usize) -> __m512 {
    debug_assert!(at + LANES <= x.len());
    // SAFETY: the caller's promise that they exist.
    unsafe { _mm512_loadu_ps(x.as_ptr().add(at)) }
}

/// Scaled scores of the queries `tile` with `width` keys from `start`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn scores(
    head: &Head<'_>,
    room: &mut Room,
    tile: std::ops::Range<usize>,
    start: usize,
    width: usize,
    keys: usize,
) {
    // SAFETY: queries of the tile exist - the last stands in for what is behind it -, keys are whole steps.
    unsafe {
        let q: [*const f32; TILE] =
            std::array::from_fn(|i| head.q.as_ptr().add((tile.start + i).min(tile.end - 1) * head.q_step));
        for key in (0..width).step_by(KEYS) {
            let mut acc = [[_mm512_setzero_ps(); 2]; TILE];
            let mut k = room.keys.as_ptr().cast::<f32>().add(start + key);
            for d in 0..head.dim {
                let both = [_mm512_loadu_ps(k), _mm512_loadu_ps(k.add(LANES))];
                for (acc, q) in acc.iter_mut().zip(q) {
                    let x = _mm512_set1_ps(*q.add(d));
                    acc[0] = _mm512_fmadd_ps(x, both[0], acc[0]);
                    acc[1] = _mm512_fmadd_ps(x, both[1], acc[1]);
                }
                k = k.wrapping_add(keys);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let to = room.scores.as_mut_ptr().add(i * keys + key);
                for (half, acc) in acc.into_iter().enumerate() {
                    _mm512_storeu_ps(to.add(half * LANES), _mm512_mul_ps(acc, _mm512_set1_ps(head.scale)));
                }
            }
        }
    }
}

/// What comes from above times the values: gradients towards the shares of the tile at `at` of the block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn d_shares(head: &Head<'_>, room: &mut Room, at: usize, start: usize, width: usize, keys: usize) {
    // SAFETY: the block's pairs exist, keys are whole steps.
    unsafe {
        let step = head.dim / 2;
        let above = room.d_out_pairs.as_ptr().add(at * step);
        for key in (0..width).step_by(KEYS) {
            let mut acc = [[_mm512_setzero_ps(); 2]; TILE];
            let mut v = room.value_pairs.as_ptr().add(start + key);
            for d in 0..step {
                let both = [_mm512_loadu_si512(v.cast()), _mm512_loadu_si512(v.add(LANES).cast())];
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*above.add(i * step + d) as i32);
                    acc[0] = dot(acc[0], both[0], x);
                    acc[1] = dot(acc[1], both[1], x);
                }
                v = v.wrapping_add(keys);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let to = room.d_shares.as_mut_ptr().add(i * keys + key);
                _mm512_storeu_ps(to, acc[0]);
                _mm512_storeu_ps(to.add(LANES), acc[1]);
            }
        }
    }
}

/// Gradients of scores times keys: gradients towards the block's queries.
#[inline]
#[expect(clippy::too_many_arguments, reason = "an inner loop's places")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn d_queries(
    head: &Head<'_>,
    room: &Room,
    block: std::ops::Range<usize>,
    start: usize,
    seen: usize,
    keys: usize,
    dq: &SharedOut<'_, f32>,
    dq_at: usize,
) {
    /// Queries and vectors of columns of a tile: with sixteen sums eight loads stand against sixteen products.
    const ROWS: usize = 4;
    const COLS: usize = 4;
    let dim = head.dim;
    // SAFETY: rows of the block exist in the buffers whether or not the sequence has them; only those that it has are written.
    unsafe {
        for row in (0..block.len()).step_by(ROWS) {
            for first in (0..dim).step_by(COLS * LANES) {
                let cols = COLS.min((dim - first) / LANES);
                let mut acc = [[_mm512_setzero_ps(); COLS]; ROWS];
                let rows = room.d_score_rows.as_ptr().add(row * keys / 2);
                let k = room.key_pairs.as_ptr().add(start / 2 * dim + first);
                for pair in 0..seen / 2 {
                    let k = k.add(pair * dim);
                    // The last tile of an odd number of columns reads its own again.
                    let k: [__m512i; COLS] =
                        std::array::from_fn(|c| _mm512_loadu_si512(k.add(c.min(cols - 1) * LANES).cast()));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(*rows.add(i * keys / 2 + pair) as i32);
                        for (acc, k) in acc.iter_mut().zip(k) {
                            *acc = dot(*acc, k, x);
                        }
                    }
                }
                for (i, acc) in acc.into_iter().enumerate().take(block.len() - row) {
                    let at = dq_at + (block.start + row + i) * head.q_step + first;
                    let out = dq.slice(at, cols * LANES);
                    for (out, acc) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(acc) {
                        _mm512_storeu_ps(out.as_mut_ptr(), acc);
                    }
                }
            }
        }
    }
}

/// Adds to `out`, as `run` has it, for the keys from `start`, the sum over the block's pairs of queries of `turned`: (K, 32) times
/// `weights`: (32, keys).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn d_keys(
    weights: &[u32],
    turned: &[u32],
    dim: usize,
    start: usize,
    seen: usize,
    keys: usize,
    out: &mut [Square<f32>],
) {
    // SAFETY: `dim` is a multiple of 16, `seen` of 32, and the matrices are of these shapes.
    unsafe {
        for key in (0..seen).step_by(LANES) {
            for d in (0..dim).step_by(LANES) {
                let Square(to) = &mut out[(start + key) / LANES * (dim / LANES) + d / LANES];
                let mut acc: [__m512; LANES] = std::array::from_fn(|i| _mm512_load_ps(to[i].as_ptr()));
                let x = turned.as_ptr().add(d * PAIRS);
                for pair in 0..PAIRS {
                    let w = _mm512_loadu_si512(weights.as_ptr().add(pair * keys + key).cast());
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = dot(*acc, w, _mm512_set1_epi32(*x.add(i * PAIRS + pair) as i32));
                    }
                }
                for (acc, to) in acc.into_iter().zip(to) {
                    _mm512_store_ps(to.as_mut_ptr(), acc);
                }
            }
        }
    }
}

/// `to`: (16 tokens, `step` apart, K) = the sum of heads' gradients, as `run` gives them, for the tokens from `first`.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for; `to` has `tokens` rows.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn sum_turned<'a>(
    parts: impl Iterator<Item = &'a [Square<f32>]> + Clone,
    dim: usize,
    first: usize,
    mut row: impl FnMut(usize) -> Option<&'a mut [f32]>,
) {
    let mut rows: [Option<&mut [f32]>; LANES] = std::array::from_fn(&mut row);
    for d in (0..dim).step_by(LANES) {
        // SAFETY: rows are K long.
        unsafe {
            let sums: [__m512i; LANES] = std::array::from_fn(|i| {
                let mut sum = _mm512_setzero_ps();
                for part in parts.clone() {
                    let Square(part) = &part[first / LANES * (dim / LANES) + d / LANES];
                    sum = _mm512_add_ps(sum, _mm512_load_ps(part[i].as_ptr()));
                }
                _mm512_castps_si512(sum)
            });
            for (x, row) in transpose::square(sums).into_iter().zip(&mut rows) {
                if let Some(row) = row {
                    _mm512_storeu_ps(row[d..d + LANES].as_mut_ptr(), _mm512_castsi512_ps(x));
                }
            }
        }
    }
}
