//! Products on bf16 tiles, for training: forward y = x W^T of quantised weights, and backward dx^T = W^T dy^T of these and of
//! BF16.
//!
//! A block of W, 32 rows by 32 columns - two groups by a unit -, is made into two tiles of bf16 and meets all tokens; either way it lies as tiles want it
//! without being turned: forward as the right side, rows side by side, backward as the left one, a column of two
//! groups being a tile's row. On the way back gradients are turned, once, so that tokens lie side by side. Sums stay in the
//! tiles for some blocks, and in memory between these.
//!
//! An element is the sum over ascending k (of dy: rows of W), each 32 summed by themselves, even and odd ones apart, whatever
//! the other tokens. These bits are not those of 8-bit products, and nearer to the exact ones.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Amx` stands for.

use std::{arch::x86_64::*, ops::Range};

use qwenkit_tensor::DType;

use super::{
    lay::{self, DEPTH, Source},
    tile::{self, ROW_BYTES, ROWS, Room, Tiles},
};
use crate::{
    Isa,
    avx512::{transpose, turned},
    layout::{GROUP_ROWS, UNIT},
    matmul::{Compute, Product},
    matmul_back::BackProduct,
    pool::{Pool, part},
    product::{Join, LowRank, Out},
    shared_out::SharedOut,
    weight::{Operand, Weight},
};

/// Blocks over which sums stay in tiles: what is made of them is 16 KiB, and of 32 tokens as much, in a first-level cache of 48.
const RUN: usize = 8;
/// Blocks side by side whose sums are held at once, and tiles of tokens: 1 MiB of a second-level cache of 2.
const STRIP: usize = 16;
const PANEL_TILES: usize = 32;

/// Buffers of these products.
#[derive(Default)]
pub(crate) struct TileRoom {
    tokens: Vec<Room<u32>>,
    /// One for each thread
    strips: Vec<StripRoom>,
}

/// Buffers of one thread.
#[derive(Default)]
struct StripRoom {
    /// (`RUN`, 2): tiles of W
    blocks: Vec<Room<u32>>,
    /// (blocks side by side, pairs of tiles of tokens, 2 of tokens, 2 of W)
    sums: Vec<Room<f32>>,
}

impl TileRoom {
    /// Room for so many tiles of tokens, and a strip for each thread.
    fn grow(&mut self, tiles: usize, threads: usize) {
        self.tokens.resize(self.tokens.len().max(tiles), Room([[0; ROWS]; ROWS]));
        self.strips.resize_with(threads, StripRoom::default);
    }
}

/// What a product takes of W: `across` blocks for its results, `along` for each sum.
trait Side: Sync {
    /// Whether W is the left side, and tokens lie side by side.
    const IS_BACK: bool;

    /// Makes the tiles of a block.
    fn make(&self, across: usize, along: usize, to: &mut [Room<u32>; 2]);
}

/// W^T of one weight.
struct Forward<'a>(&'a Weight);

impl Side for Forward<'_> {
    const IS_BACK: bool = false;

    fn make(&self, across: usize, along: usize, to: &mut [Room<u32>; 2]) {
        let weight = self.0;
        for (g, to) in (2 * across..weight.groups()).zip(to) {
            // SAFETY: only a machine with AMX comes here.
            with_group(weight, g, along, |dtype, group, u| unsafe { spread_rows(dtype, group, u, to) });
        }
    }
}

/// W of several products whose gradients are added: a weight and its first group for each block along.
struct Backward<'a>(Vec<(&'a Weight, usize)>);

impl Side for Backward<'_> {
    const IS_BACK: bool = true;

    fn make(&self, across: usize, along: usize, to: &mut [Room<u32>; 2]) {
        let (weight, first) = self.0[along];
        for part in 0..2 {
            if first + part == weight.groups() {
                return to.iter_mut().flat_map(|room| &mut room.0).for_each(|row| row[ROWS / 2..].fill(0));
            }
            // SAFETY: only a machine with AMX comes here.
            with_group(weight, first + part, across, |dtype, group, u| unsafe {
                spread_columns(dtype, group, u, part, to)
            });
        }
    }
}

/// Calls `f` with a group's bytes and the unit's number in them.
fn with_group(weight: &Weight, g: usize, unit: usize, f: impl FnOnce(DType, &[u8], usize)) {
    match weight.in_planes() {
        true => f(weight.dtype(), &weight.unit_group(Isa::Amx, g, unit), 0),
        false => f(weight.dtype(), weight.group(g), unit),
    }
}

/// Whether backward products of a weight go this way.
pub(crate) fn takes_back(weight: &Weight) -> bool {
    match weight.operand() {
        Operand::Quantized => true,
        Operand::Bf16 => weight.cols().is_multiple_of(UNIT),
        Operand::F32 => false,
    }
}

impl Compute {
    /// `out` of each product: (T, N) = x W^T, and what is added to it; all weights are quantised.
    ///
    /// # Safety
    /// The machine has what `Isa::Amx` stands for.
    pub(crate) unsafe fn tiles_forward(
        &self,
        room: &mut TileRoom,
        x: &[f32],
        products: &mut [Product<'_>],
        added: &[Option<LowRank<'_>>],
    ) {
        let width = products[0].weight.cols();
        let (tokens, along) = (x.len() / width, width / UNIT);
        room.grow(tokens.div_ceil(ROWS) * along, self.pool.threads());
        let TileRoom { tokens: of_x, strips } = room;
        // SAFETY: the caller's promise.
        unsafe { lay_all::<false>(&self.pool, &[(x, width)], tokens, along, of_x) };
        let jobs: Vec<_> = products
            .iter_mut()
            .enumerate()
            .map(|(i, p)| (p.weight, SharedOut::new(&mut *p.out), added.get(i).copied().flatten()))
            .collect();
        let across: usize = jobs.iter().map(|(weight, ..)| weight.groups().div_ceil(2)).sum();
        let strips = SharedOut::new(strips);
        self.pool.run(|i| {
            // SAFETY: each thread has one of its own.
            let strip = unsafe { &mut strips.slice(i, 1)[0] };
            let own = part(across, 1, i, self.pool.threads());
            let mut start = 0;
            for (weight, out, added) in &jobs {
                let end = start + weight.groups().div_ceil(2);
                let mine = own.start.clamp(start, end) - start..own.end.clamp(start, end) - start;
                let task = Task {
                    side: Forward(weight),
                    along,
                    x: of_x,
                    tokens,
                    into: Join::OVER,
                    out: Out { to: out, at: 0, step: weight.rows() },
                    first: 0,
                    cols: weight.rows(),
                };
                // SAFETY: the caller's promise.
                unsafe { task.run(self.isa, strip, mine, added.as_slice()) };
                start = end;
            }
        });
    }

    /// `dx`: (T, K) = the sum of dy W over products that `takes_back`, and of all that is added to it.
    ///
    /// # Safety
    /// The machine has what `Isa::Amx` stands for.
    pub(crate) unsafe fn tiles_backward(
        &self,
        room: &mut TileRoom,
        products: &[&BackProduct<'_>],
        added: &[LowRank<'_>],
        into: Join,
        dx: &mut [f32],
    ) {
        let width = products[0].weight.cols();
        let tokens = dx.len() / width;
        let mut side = Vec::new();
        for p in products {
            side.extend((0..p.weight.groups()).step_by(2).map(|g| (p.weight, g)));
        }
        let along = side.len();
        room.grow(tokens.div_ceil(ROWS) * along, self.pool.threads());
        let TileRoom { tokens: of_dy, strips } = room;
        let dys: Vec<_> = products.iter().map(|p| (p.dy, p.weight.rows())).collect();
        // SAFETY: the caller's promise.
        unsafe { lay_all::<true>(&self.pool, &dys, tokens, along, of_dy) };
        let (strips, out) = (SharedOut::new(strips), SharedOut::new(dx));
        let out = Out { to: &out, at: 0, step: width };
        let task = Task { side: Backward(side), along, x: of_dy, tokens, into, out, first: 0, cols: width };
        self.pool.run(|i| {
            // SAFETY: each thread has one of its own; the caller's promise.
            unsafe {
                let strip = &mut strips.slice(i, 1)[0];
                task.run(self.isa, strip, part(width / UNIT, 1, i, self.pool.threads()), added);
            }
        });
    }
}

/// The rows of one product of a quantised weight, whose results are computed piece by piece.
pub(crate) struct TilePieces<'a> {
    weight: &'a Weight,
    tokens: usize,
    x: &'a [Room<u32>],
    strips: SharedOut<'a, StripRoom>,
}

impl<'a> TilePieces<'a> {
    /// Of x: (T, K).
    ///
    /// # Safety
    /// The machine has what `Isa::Amx` stands for.
    pub(crate) unsafe fn new(pool: &Pool, room: &'a mut TileRoom, weight: &'a Weight, x: &[f32]) -> TilePieces<'a> {
        let (width, along) = (weight.cols(), weight.cols() / UNIT);
        let tokens = x.len() / width;
        room.grow(tokens.div_ceil(ROWS) * along, pool.threads());
        let TileRoom { tokens: of_x, strips } = room;
        // SAFETY: the caller's promise.
        unsafe { lay_all::<false>(pool, &[(x, width)], tokens, along, of_x) };
        TilePieces { weight, tokens, x: of_x, strips: SharedOut::new(strips) }
    }

    /// Results of `groups`, which begin with an even one, for all tokens, on thread `i`: rows of `step` values.
    ///
    /// # Safety
    /// This is thread `i` of the pool.
    pub(crate) unsafe fn piece(&self, i: usize, groups: Range<usize>, out: &SharedOut<'_, f32>, step: usize) {
        let cols = (groups.end * GROUP_ROWS).min(self.weight.rows()) - groups.start * GROUP_ROWS;
        let across = groups.start / 2..groups.end.div_ceil(2);
        let task = Task {
            side: Forward(self.weight),
            along: self.weight.cols() / UNIT,
            x: self.x,
            tokens: self.tokens,
            into: Join::OVER,
            out: Out { to: out, at: 0, step },
            first: across.start,
            cols,
        };
        // SAFETY: each thread has one of its own; there is a `TilePieces` only where there are tiles.
        unsafe { task.run(Isa::Amx, &mut self.strips.slice(i, 1)[0], across, &[]) }
    }
}

/// Rows of several matrices, (T, N) each, side by side, as bf16 tiles: (tiles of tokens, `along`), each matrix padded to whole
/// tiles with zeros. With `TURNED` tokens lie side by side in pairs of values.
unsafe fn lay_all<const TURNED: bool>(
    pool: &Pool,
    matrices: &[(&[f32], usize)],
    tokens: usize,
    along: usize,
    to: &mut [Room<u32>],
) {
    let to = SharedOut::new(to);
    pool.run_split(tokens.div_ceil(ROWS), 1, |tiles| {
        for tile in tiles {
            // SAFETY: each tile of tokens is in one range.
            let mut to = unsafe { to.slice(tile * along, along) }.iter_mut();
            for &(values, n) in matrices {
                let rows = &values[tile * ROWS * n..((tile + 1) * ROWS).min(tokens) * n];
                for (first, to) in (0..n).step_by(DEPTH).zip(&mut to) {
                    // SAFETY: the caller's promise.
                    unsafe { lay_tile::<TURNED>(rows, n, first, to) };
                }
            }
        }
    });
}

/// Values `first..first + 32` of up to sixteen rows of n.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn lay_tile<const TURNED: bool>(rows: &[f32], n: usize, first: usize, to: &mut Room<u32>) {
    let from = Source { first: rows[first..].as_ptr(), step: n, rows: rows.len() / n, width: n - first };
    // SAFETY: the caller's promise; the rows have these values.
    unsafe { lay::along::<TURNED>(from, |x| x, to) }
}

/// What all threads read.
struct Task<'a, 'b, S> {
    side: S,
    /// Blocks of W for each sum
    along: usize,
    /// (tiles of tokens, `along`)
    x: &'a [Room<u32>],
    tokens: usize,
    into: Join,
    /// Where results go: they begin with block `first` across, and there are `cols`.
    out: Out<'a, 'b>,
    first: usize,
    cols: usize,
}

impl<S: Side> Task<'_, '_, S> {
    /// Computes the results of blocks `across` for all tokens, and adds what is `added`.
    unsafe fn run(&self, isa: Isa, room: &mut StripRoom, across: Range<usize>, added: &[LowRank<'_>]) {
        if across.is_empty() {
            return;
        }
        let tiles = self.tokens.div_ceil(ROWS);
        room.blocks.resize(2 * RUN, Room([[0; ROWS]; ROWS]));
        // SAFETY: the caller's promise.
        let shapes = unsafe { Tiles::new([(ROWS, ROW_BYTES); 8]) };
        for first in across.clone().step_by(STRIP) {
            let strip = first..(first + STRIP).min(across.end);
            for first in (0..tiles).step_by(PANEL_TILES) {
                let tiles = first..(first + PANEL_TILES).min(tiles);
                // SAFETY: the caller's promise, and tiles are set.
                unsafe {
                    self.add_up(room, strip.clone(), tiles.clone());
                    self.write(room, strip.clone(), tiles);
                }
            }
        }
        drop(shapes);
        let cols = across.start * DEPTH..(across.end * DEPTH).min(self.cols);
        for added in added {
            added.add(isa, cols.clone(), &self.out);
        }
    }

    /// Fills the room's sums: `strip` by `tiles`.
    unsafe fn add_up(&self, room: &mut StripRoom, strip: Range<usize>, tiles: Range<usize>) {
        let pairs = tiles.len().div_ceil(2);
        let sums = strip.len() * pairs * 4;
        room.sums.resize(room.sums.len().max(sums), Room([[0.0; ROWS]; ROWS]));
        for first in (0..self.along).step_by(RUN) {
            let run = first..(first + RUN).min(self.along);
            for (across, sums) in strip.clone().zip(room.sums.chunks_exact_mut(4 * pairs)) {
                for (along, to) in run.clone().zip(room.blocks.as_chunks_mut::<2>().0) {
                    self.side.make(across, along, to);
                }
                for (tile, sums) in tiles.clone().step_by(2).zip(sums.as_chunks_mut::<4>().0) {
                    let x = |tile: usize| self.x[tile * self.along..][run.clone()].as_ptr();
                    let blocks = room.blocks.as_ptr();
                    // SAFETY: the caller's promise; there are so many blocks, and tiles of tokens.
                    unsafe {
                        match tile + 1 < tiles.end {
                            true => add::<S, 2>(blocks, [x(tile), x(tile + 1)], run.len(), sums, first > 0),
                            false => add::<S, 1>(blocks, [x(tile)], run.len(), sums, first > 0),
                        }
                    }
                }
            }
        }
    }

    /// Hands the room's sums out.
    #[target_feature(enable = "avx512f")]
    unsafe fn write(&self, room: &StripRoom, strip: Range<usize>, tiles: Range<usize>) {
        let pairs = tiles.len().div_ceil(2);
        let alpha = _mm512_set1_ps(self.into.alpha);
        // Tokens' rows are pages apart: sixteen of them take all that is theirs before the next.
        for (i, tile) in tiles.enumerate() {
            let tokens = tile * ROWS..((tile + 1) * ROWS).min(self.tokens);
            for (across, sums) in strip.clone().zip(room.sums.chunks_exact(4 * pairs)) {
                for (half, Room(sums)) in sums[2 * i..][..2].iter().enumerate() {
                    let col = (across - self.first) * DEPTH + half * GROUP_ROWS;
                    let width = GROUP_ROWS.min(self.cols.saturating_sub(col));
                    if width == 0 {
                        continue;
                    }
                    let mask = (u32::MAX >> (32 - width)) as u16;
                    // SAFETY: loads are of whole rows; the mask keeps to the columns there are, which are one thread's.
                    unsafe {
                        let mut rows = std::array::from_fn(|r| _mm512_load_si512(sums[r].as_ptr().cast()));
                        if S::IS_BACK {
                            rows = transpose::square(rows);
                        }
                        for (t, x) in tokens.clone().zip(rows) {
                            let out = self.out.to.slice(self.out.at + t * self.out.step + col, width).as_mut_ptr();
                            let mut x = _mm512_mul_ps(_mm512_castsi512_ps(x), alpha);
                            if self.into.add {
                                x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), x);
                            }
                            _mm512_mask_storeu_ps(out, mask, x);
                        }
                    }
                }
            }
        }
    }
}

/// Two tiles of W by `T` tiles of tokens over a run of blocks: their sums begin, or go on.
///
/// # Safety
/// `Tiles` are set to whole tiles; there are twice so many tiles at `blocks`, and as many at each of `x`.
#[inline(always)]
unsafe fn add<S: Side, const T: usize>(
    blocks: *const Room<u32>,
    x: [*const Room<u32>; T],
    run: usize,
    sums: &mut [Room<f32>; 4],
    goes_on: bool,
) {
    let sums = sums.as_mut_ptr();
    let sum = |i: usize| sums.wrapping_add(i).cast::<u8>();
    // Sums, W's tile, the tokens' tile.
    macro_rules! multiply {
        ($sum:literal, $w:literal, $x:literal) => {
            if S::IS_BACK { tile::add_bf16::<$sum, $w, $x>() } else { tile::add_bf16::<$sum, $x, $w>() }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        if goes_on {
            tile::load::<0>(sum(0), ROW_BYTES);
            tile::load::<1>(sum(1), ROW_BYTES);
            if T > 1 {
                tile::load::<2>(sum(2), ROW_BYTES);
                tile::load::<3>(sum(3), ROW_BYTES);
            }
        } else {
            tile::zero::<0>();
            tile::zero::<1>();
            tile::zero::<2>();
            tile::zero::<3>();
        }
        for s in 0..run {
            tile::load::<4>(blocks.add(2 * s).cast(), ROW_BYTES);
            tile::load::<6>(x[0].add(s).cast(), ROW_BYTES);
            multiply!(0, 4, 6);
            tile::load::<5>(blocks.add(2 * s + 1).cast(), ROW_BYTES);
            multiply!(1, 5, 6);
            if T > 1 {
                tile::load::<7>(x[T - 1].add(s).cast(), ROW_BYTES);
                multiply!(2, 4, 7);
                multiply!(3, 5, 7);
            }
        }
        tile::store::<0>(sum(0), ROW_BYTES);
        tile::store::<1>(sum(1), ROW_BYTES);
        if T > 1 {
            tile::store::<2>(sum(2), ROW_BYTES);
            tile::store::<3>(sum(3), ROW_BYTES);
        }
    }
}

macro_rules! by_type {
    ($dtype:expr, $f:ident($($arg:expr),*)) => {
        by_type!($dtype, $f($($arg),*), Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS)
    };
    ($dtype:expr, $f:ident $args:tt, $($name:ident)*) => {
        match $dtype {
            $(DType::$name => by_type!(call $f, $name, $args),)*
            other => unreachable!("{other} is not quantised"),
        }
    };
    (call $f:ident, $name:ident, ($($arg:expr),*)) => { $f::<{ DType::$name as usize }>($($arg),*) };
}

/// Unit `u` of a group as a right side: pairs of k-values of sixteen rows.
unsafe fn spread_rows(dtype: DType, group: &[u8], u: usize, to: &mut Room<u32>) {
    // SAFETY: the caller's promise, and that the group has this unit.
    unsafe { by_type!(dtype, spread_rows_of(group, u, to)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,avx2")]
unsafe fn spread_rows_of<const D: usize>(group: &[u8], u: usize, to: &mut Room<u32>) {
    // SAFETY: the caller's promise; a row of a room is a vector.
    unsafe {
        let mut even = _mm512_setzero_ps();
        turned::columns::<D>(group, u, |column, x| {
            if column % 2 == 0 {
                even = x;
                return;
            }
            _mm512_store_si512(to.0[column / 2].as_mut_ptr().cast(), lay::side_by_side(even, x));
        });
    }
}

/// Unit `u` of a group as two left sides: columns, of which the group is the first or the last half.
unsafe fn spread_columns(dtype: DType, group: &[u8], u: usize, part: usize, to: &mut [Room<u32>; 2]) {
    // SAFETY: the caller's promise, and that the group has this unit.
    unsafe {
        match dtype {
            DType::BF16 => part_columns(&group[u * UNIT * GROUP_ROWS * 2..], part, to),
            _ => by_type!(dtype, spread_columns_of(group, u, part, to)),
        }
    }
}

/// Of a BF16 weight, whose pairs of columns lie side by side.
#[target_feature(enable = "avx512f")]
unsafe fn part_columns(pairs: &[u8], part: usize, to: &mut [Room<u32>; 2]) {
    for (i, pair) in pairs.as_chunks::<ROW_BYTES>().0[..UNIT / 2].iter().enumerate() {
        // SAFETY: half a row of a room is a vector of 256 bits, a pair of columns one of 512.
        unsafe {
            let pair = _mm512_loadu_si512(pair.as_ptr().cast());
            for (column, x) in [(2 * i, pair), (2 * i + 1, _mm512_srli_epi32::<16>(pair))] {
                let half = to[column / ROWS].0[column % ROWS].as_mut_ptr().cast::<__m256i>().add(part);
                _mm256_store_si256(half, _mm512_cvtepi32_epi16(x));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,avx2")]
unsafe fn spread_columns_of<const D: usize>(group: &[u8], u: usize, part: usize, to: &mut [Room<u32>; 2]) {
    // SAFETY: the caller's promise; half a row of a room is a vector of 256 bits.
    unsafe {
        turned::columns::<D>(group, u, |column, x| {
            let half = to[column / ROWS].0[column % ROWS].as_mut_ptr().cast::<__m256i>().add(part);
            _mm256_store_si256(half, std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
        });
    }
}
