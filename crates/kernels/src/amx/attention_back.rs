//! Backward of one query head's attention on AMX: as on AVX-512 with pairs of bf16, on tiles.
//!
//! For scores, queries and keys are sums of two bf16 numbers each, of whose four products the smallest is left out: 2^-16 of the
//! size. All else is rounded to one.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Amx` stands for.

use std::{
    arch::x86_64::{_mm512_mul_ps, _mm512_set1_ps},
    ops::Range,
};

use super::{
    lay::{self, Source},
    tile::{self, ROW_BYTES, ROWS, Room, Tiles},
};
use crate::{
    Isa,
    attention_back::softmax_back_row,
    avx512::attention_back::{Head, KEYS},
    shared_out::SharedOut,
};

/// Queries whose shares are held for keys' gradients, which are read and written once for each so many.
const BLOCK: usize = 64;
/// Queries whose scores are held: two tiles.
const STEP: usize = 2 * ROWS;
/// Steps of a block.
const STEPS: usize = BLOCK / STEP;

/// Buffers of one thread, in tiles of bf16 unless said otherwise. d is K / 32 and e K / 16.
#[derive(Default)]
pub(crate) struct HeadRoom {
    /// Right sides along K, (keys / 16, d): keys rounded, what that leaves of them, values
    keys: Vec<Room<u32>>,
    keys_left: Vec<Room<u32>>,
    values: Vec<Room<u32>>,
    /// A right side over keys, (keys / 32, e)
    keys_over: Vec<Room<u32>>,
    /// Left sides along K of a step, (2, d): scaled queries rounded, what that leaves, what comes from above
    queries: Vec<Room<u32>>,
    queries_left: Vec<Room<u32>>,
    above: Vec<Room<u32>>,
    /// Left sides over a block's queries, (e, `STEPS`)
    queries_over: Vec<Room<u32>>,
    above_over: Vec<Room<u32>>,
    /// f32 of a step, (32, row)
    scores: Vec<Room<f32>>,
    d_shares: Vec<Room<f32>>,
    /// Right sides over a block's queries, (keys / 16, `STEPS`)
    shares: Vec<Room<u32>>,
    d_scores: Vec<Room<u32>>,
    /// Left side along keys of a step, (2, keys / 32)
    d_scores_along: Vec<Room<u32>>,
}

/// From one row of f32 to the next: not a power of two, whose lines would all want the same place in the cache.
fn row_step(keys: usize) -> usize {
    keys + ROWS
}

/// Gradients of the head, as `avx512::attention_back::run` gives them.
///
/// # Safety
/// The machine has what `Isa::Amx` stands for, and K is a multiple of 32; nobody else has these rows of `dq`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")]
pub(crate) unsafe fn run(
    head: &Head<'_>,
    room: &mut HeadRoom,
    dq: &SharedOut<'_, f32>,
    dq_at: usize,
    [dk, dv]: [&mut [Room<f32>]; 2],
) {
    let Head { len, dim, window, scale, .. } = *head;
    let keys = head.begin([&mut *dk, &mut *dv]);
    // SAFETY: rows of the head exist by the assertions; buffers have the sizes that `HeadRoom` states.
    unsafe {
        room.prepare(head, keys);
        let _tiles = Tiles::new([(ROWS, ROW_BYTES); 8]);
        for first in (0..len).step_by(BLOCK) {
            let end = (first + BLOCK).min(len);
            // Keys that any query of the block sees, to whole steps.
            let start = window.map_or(0, |w| (first + 1).saturating_sub(w)) / KEYS * KEYS;
            let seen = end.next_multiple_of(KEYS) - start;
            room.block(head, first, end);
            for step in 0..STEPS {
                let queries = (first + step * STEP).min(end)..(first + (step + 1) * STEP).min(end);
                if queries.is_empty() {
                    // No queries: they count nothing.
                    for tiles in [&mut room.shares, &mut room.d_scores] {
                        tiles[..seen / ROWS * STEPS].iter_mut().skip(step).step_by(STEPS).for_each(clear);
                    }
                    continue;
                }
                room.step(head, queries.clone());
                let width = queries.end.next_multiple_of(KEYS) - start;
                room.scores(dim, start, width, keys);
                let (scores, d_shares) = (floats(&mut room.scores), floats(&mut room.d_shares));
                for i in 0..STEP {
                    let own = i * row_step(keys)..i * row_step(keys) + seen;
                    let (scores, d_shares) = (&mut scores[own.clone()], &mut d_shares[own]);
                    if i >= queries.len() {
                        scores.fill(0.0);
                        d_shares.fill(0.0);
                        continue;
                    }
                    let to = queries.start + i + 1;
                    let from = window.map_or(0, |w| to.saturating_sub(w));
                    softmax_back_row(Isa::Avx512, from - start, to - start, scale, scores, d_shares);
                }
                room.round(step, seen, keys);
                room.d_queries(head, queries, start, width, keys, dq, dq_at);
            }
            d_keys(&room.d_scores, &room.queries_over, dim, start, seen, dk);
            d_keys(&room.shares, &room.above_over, dim, start, seen, dv);
        }
    }
}

fn clear(tile: &mut Room<u32>) {
    tile.0 = [[0; ROWS]; ROWS];
}

/// All values.
fn floats(rooms: &mut [Room<f32>]) -> &mut [f32] {
    // SAFETY: a room is sixteen by sixteen values and nothing else.
    unsafe { std::slice::from_raw_parts_mut(rooms.as_mut_ptr().cast(), rooms.len() * ROWS * ROWS) }
}

fn grow<T: Copy + Default>(rooms: &mut Vec<Room<T>>, len: usize) {
    rooms.resize(rooms.len().max(len), Room([[T::default(); ROWS]; ROWS]));
}

/// Up to `rows` of the rows of x from `at`, which are those before `end`; `from` values on.
fn rows_of(x: &[f32], step: usize, at: usize, end: usize, rows: usize, from: usize) -> Source {
    let rows = rows.min(end.saturating_sub(at));
    Source { first: x.as_ptr().wrapping_add(at * step + from), step, rows, width: lay::DEPTH }
}

impl HeadRoom {
    /// Keys and values in the forms that products want, zero behind the sequence's end.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn prepare(&mut self, head: &Head<'_>, keys: usize) {
        let (dim, row_floats) = (head.dim, STEP * row_step(keys));
        let (d, e) = (dim / lay::DEPTH, dim / ROWS);
        for (tiles, len) in [
            (&mut self.keys, keys / ROWS * d),
            (&mut self.keys_left, keys / ROWS * d),
            (&mut self.values, keys / ROWS * d),
            (&mut self.keys_over, keys / lay::DEPTH * e),
            (&mut self.queries, 2 * d),
            (&mut self.queries_left, 2 * d),
            (&mut self.above, 2 * d),
            (&mut self.queries_over, e * STEPS),
            (&mut self.above_over, e * STEPS),
            (&mut self.shares, keys / ROWS * STEPS),
            (&mut self.d_scores, keys / ROWS * STEPS),
            (&mut self.d_scores_along, 2 * keys / lay::DEPTH),
        ] {
            grow(tiles, len);
        }
        grow(&mut self.scores, row_floats.div_ceil(ROWS * ROWS));
        grow(&mut self.d_shares, row_floats.div_ceil(ROWS * ROWS));
        // SAFETY: rows below `len` exist.
        unsafe {
            for t in (0..keys).step_by(ROWS) {
                for i in 0..d {
                    let at = t / ROWS * d + i;
                    let of = |x: &[f32]| rows_of(x, head.kv_step, t, head.len, ROWS, i * lay::DEPTH);
                    lay::along::<true>(of(head.k), |x| x, &mut self.keys[at]);
                    lay::along::<true>(of(head.k), |x| lay::left_over(x), &mut self.keys_left[at]);
                    lay::along::<true>(of(head.v), |x| x, &mut self.values[at]);
                }
            }
            for t in (0..keys).step_by(lay::DEPTH) {
                for i in 0..e {
                    let of = rows_of(head.k, head.kv_step, t, head.len, lay::DEPTH, i * ROWS);
                    lay::across::<false>(of, &mut self.keys_over[t / lay::DEPTH * e + i]);
                }
            }
        }
    }

    /// What is over a block's queries, zero behind `end`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn block(&mut self, head: &Head<'_>, first: usize, end: usize) {
        for (x, tiles) in [(head.q, &mut self.queries_over), (head.d_out, &mut self.above_over)] {
            for (i, tiles) in tiles[..head.dim / ROWS * STEPS].chunks_exact_mut(STEPS).enumerate() {
                for (step, tile) in tiles.iter_mut().enumerate() {
                    let of = rows_of(x, head.q_step, first + step * STEP, end, STEP, i * ROWS);
                    // SAFETY: rows below `end` exist.
                    unsafe { lay::across::<true>(of, tile) };
                }
            }
        }
    }

    /// What is along K of a step's queries, zero behind the last.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn step(&mut self, head: &Head<'_>, queries: Range<usize>) {
        let d = head.dim / lay::DEPTH;
        // SAFETY: rows of `queries` exist.
        unsafe {
            let scale = _mm512_set1_ps(head.scale);
            for (half, i) in (0..2).flat_map(|half| (0..d).map(move |i| (half, i))) {
                let of = |x: &[f32]| {
                    let at = queries.start + half * ROWS;
                    rows_of(x, head.q_step, at, queries.end, ROWS, i * lay::DEPTH)
                };
                let at = half * d + i;
                lay::along::<false>(of(head.q), |x| _mm512_mul_ps(x, scale), &mut self.queries[at]);
                let left = |x| lay::left_over(_mm512_mul_ps(x, scale));
                lay::along::<false>(of(head.q), left, &mut self.queries_left[at]);
                lay::along::<false>(of(head.d_out), |x| x, &mut self.above[at]);
            }
        }
    }

    /// Scores of a step's queries with `width` keys from `start`, and what comes from above times the values.
    unsafe fn scores(&mut self, dim: usize, start: usize, width: usize, keys: usize) {
        let (d, step) = (dim / lay::DEPTH, row_step(keys));
        // SAFETY: the caller's promise; tiles are set, and buffers as long as `prepare` has made them.
        unsafe {
            for key in (0..width).step_by(KEYS) {
                let at = (start + key) / ROWS * d;
                let rights = |tiles: &[Room<u32>]| [tiles[at..].as_ptr(), tiles[at + d..].as_ptr()];
                let lefts = |tiles: &[Room<u32>]| [tiles.as_ptr(), tiles[d..].as_ptr()];
                clear_sums();
                add(lefts(&self.queries), rights(&self.keys), d, 1, 1);
                add(lefts(&self.queries), rights(&self.keys_left), d, 1, 1);
                add(lefts(&self.queries_left), rights(&self.keys), d, 1, 1);
                store_sums(self.scores.as_mut_ptr().cast::<f32>().add(key), step);
                clear_sums();
                add(lefts(&self.above), rights(&self.values), d, 1, 1);
                store_sums(self.d_shares.as_mut_ptr().cast::<f32>().add(key), step);
            }
        }
    }

    /// Rounds a step's shares and gradients of scores.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn round(&mut self, step: usize, seen: usize, keys: usize) {
        let of = |x: &[Room<f32>], row: usize, key: usize, rows: usize| Source {
            first: x.as_ptr().cast::<f32>().wrapping_add(row * row_step(keys) + key),
            step: row_step(keys),
            rows,
            width: lay::DEPTH,
        };
        // SAFETY: `seen` is at most `keys` and a multiple of 32.
        unsafe {
            for key in (0..seen).step_by(ROWS) {
                let at = key / ROWS * STEPS + step;
                lay::across::<false>(of(&self.scores, 0, key, STEP), &mut self.shares[at]);
                lay::across::<false>(of(&self.d_shares, 0, key, STEP), &mut self.d_scores[at]);
            }
            for (half, key) in (0..2).flat_map(|half| (0..seen).step_by(lay::DEPTH).map(move |key| (half, key))) {
                let at = (half * keys + key) / lay::DEPTH;
                let of = of(&self.d_shares, half * ROWS, key, ROWS);
                lay::along::<false>(of, |x| x, &mut self.d_scores_along[at]);
            }
        }
    }

    /// Gradients of scores times keys: gradients towards a step's queries.
    #[expect(clippy::too_many_arguments, reason = "an inner loop's places")]
    unsafe fn d_queries(
        &self,
        head: &Head<'_>,
        queries: Range<usize>,
        start: usize,
        width: usize,
        keys: usize,
        dq: &SharedOut<'_, f32>,
        dq_at: usize,
    ) {
        let e = head.dim / ROWS;
        let mut sums = [const { Room([[0f32; ROWS]; ROWS]) }; 4];
        // SAFETY: the caller's promise; tiles are set; rows of `queries` are written by this thread alone.
        unsafe {
            for i in (0..e).step_by(2) {
                let rights = &self.keys_over[start / lay::DEPTH * e + i..];
                let lefts = [self.d_scores_along.as_ptr(), self.d_scores_along[keys / lay::DEPTH..].as_ptr()];
                clear_sums();
                add(lefts, [rights.as_ptr(), rights[1..].as_ptr()], width / lay::DEPTH, 1, e);
                store_sums(sums.as_mut_ptr().cast(), 2 * ROWS);
                for (r, row) in floats(&mut sums).chunks_exact(2 * ROWS).enumerate().take(queries.len()) {
                    let at = dq_at + (queries.start + r) * head.q_step + i * ROWS;
                    dq.slice(at, 2 * ROWS).copy_from_slice(row);
                }
            }
        }
    }
}

/// Adds to `out`: (keys / 16, e), sixteen of K by sixteen keys each, for the keys from `start`, the sum over the block's queries of
/// `over`: (e, `STEPS`) times `weights`: (keys / 16, `STEPS`).
unsafe fn d_keys(
    weights: &[Room<u32>],
    over: &[Room<u32>],
    dim: usize,
    start: usize,
    seen: usize,
    out: &mut [Room<f32>],
) {
    let e = dim / ROWS;
    for key in (0..seen / ROWS).step_by(2) {
        for i in (0..e).step_by(2) {
            let at = (start / ROWS + key) * e + i;
            let lefts = [over[i * STEPS..].as_ptr(), over[(i + 1) * STEPS..].as_ptr()];
            let rights = [weights[key * STEPS..].as_ptr(), weights[(key + 1) * STEPS..].as_ptr()];
            let mut sum = |left: usize, right: usize| (&raw mut out[at + right * e + left]).cast::<u8>();
            let sums = [sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1)];
            // SAFETY: the caller's promise; tiles are set, and each side has its steps.
            unsafe {
                tile::load::<0>(sums[0], ROW_BYTES);
                tile::load::<1>(sums[1], ROW_BYTES);
                tile::load::<2>(sums[2], ROW_BYTES);
                tile::load::<3>(sums[3], ROW_BYTES);
                add(lefts, rights, STEPS, 1, 1);
                tile::store::<0>(sums[0], ROW_BYTES);
                tile::store::<1>(sums[1], ROW_BYTES);
                tile::store::<2>(sums[2], ROW_BYTES);
                tile::store::<3>(sums[3], ROW_BYTES);
            }
        }
    }
}

#[inline(always)]
unsafe fn clear_sums() {
    // SAFETY: the caller's promise.
    unsafe {
        tile::zero::<0>();
        tile::zero::<1>();
        tile::zero::<2>();
        tile::zero::<3>();
    }
}

/// Adds two left sides by two right sides over `run` tiles of each, `left_step` and `right_step` tiles apart: sum 2 l + r is of
/// left l and right r.
#[inline(always)]
unsafe fn add(
    lefts: [*const Room<u32>; 2],
    rights: [*const Room<u32>; 2],
    run: usize,
    left_step: usize,
    right_step: usize,
) {
    // SAFETY: the caller's promise that these tiles exist.
    unsafe {
        for s in 0..run {
            tile::load::<4>(lefts[0].add(s * left_step).cast(), ROW_BYTES);
            tile::load::<6>(rights[0].add(s * right_step).cast(), ROW_BYTES);
            tile::add_bf16::<0, 4, 6>();
            tile::load::<7>(rights[1].add(s * right_step).cast(), ROW_BYTES);
            tile::add_bf16::<1, 4, 7>();
            tile::load::<5>(lefts[1].add(s * left_step).cast(), ROW_BYTES);
            tile::add_bf16::<2, 5, 6>();
            tile::add_bf16::<3, 5, 7>();
        }
    }
}

/// Writes the sums as 32 rows of 32 values, `step` values apart.
#[inline(always)]
unsafe fn store_sums(to: *mut f32, step: usize) {
    let at = |row: usize, col: usize| to.wrapping_add(row * step + col).cast::<u8>();
    // SAFETY: the caller's promise that it may write there.
    unsafe {
        tile::store::<0>(at(0, 0), 4 * step);
        tile::store::<1>(at(0, ROWS), 4 * step);
        tile::store::<2>(at(ROWS, 0), 4 * step);
        tile::store::<3>(at(ROWS, ROWS), 4 * step);
    }
}
