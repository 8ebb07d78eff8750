//! Products of plain f32 matrices with any strides: what adapters and gradients are made of, beside frozen weights.
//!
//! Contract: an element of the result is the sum over ascending k in blocks of 256, each block summed by fused
//! multiply-adds and then added, whatever the shape of the rest and the number of threads. Frozen weights are multiplied
//! by `matmul`, and on the way back by `matmul_back`, which for plain weights uses the same tiles.

use std::ops::Range;

use crate::{Isa, matmul::Compute, portable, shared_out::SharedOut};

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 8;
/// Columns of a tile: with eight rows sixteen 512-bit accumulators, which hide the latency of the multiply-add.
pub(crate) const TILE_COLS: usize = 32;
/// Steps of k between which a tile's sums are in registers: 32 columns of them are 32 KiB.
const BLOCK_K: usize = 256;
/// The rank up to which a product is skinny.
#[cfg(target_arch = "x86_64")]
const SKINNY_RANK: usize = 64;
/// Rows to which a product is added at once.
const ADDED_ROWS: usize = COPY_TILES * TILE_ROWS;
/// Row tiles from which on copying a column tile into one piece pays.
const COPY_TILES: usize = 8;

/// A matrix inside a slice: element (i, j) stands at `i * row_step + j * col_step`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_step: usize,
    col_step: usize,
}

impl<'a> Mat<'a> {
    /// (rows, cols), row after row.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        assert_eq!(data.len(), rows * cols, "a matrix of ({rows}, {cols})");
        Mat { data, rows, cols, row_step: cols, col_step: 1 }
    }

    /// The first `cols` columns of rows that are `row_step` apart.
    ///
    /// # Panics
    /// If `data` ends before the last element.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_step: usize) -> Mat<'a> {
        let reach = if rows * cols == 0 { 0 } else { (rows - 1) * row_step + cols };
        assert!(data.len() >= reach, "({rows}, {cols}) with rows {row_step} apart in {} values", data.len());
        Mat { data, rows, cols, row_step, col_step: 1 }
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same matrix transposed.
    pub fn t(self) -> Mat<'a> {
        Mat { rows: self.cols, cols: self.rows, row_step: self.col_step, col_step: self.row_step, ..self }
    }

    /// Some of its rows.
    pub(crate) fn part(self, rows: Range<usize>) -> Mat<'a> {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // Behind the last row there may be no element.
        let at = (rows.start * self.row_step).min(self.data.len());
        Mat { data: &self.data[at..], rows: rows.len(), ..self }
    }

    /// Its elements row after row.
    pub(crate) fn plain(&self) -> Vec<f32> {
        let row = |i: usize| (0..self.cols).map(move |j| self.data[i * self.row_step + j * self.col_step]);
        (0..self.rows).flat_map(row).collect()
    }
}

/// The right side of a product, (K, N), which gives its columns tile by tile.
pub(crate) trait Right: Sync {
    /// N
    fn cols(&self) -> usize;
    /// Where a whole tile of columns from `col` already lies row by row, from row `k`: the values and the step between rows.
    fn lies(&self, k: usize, col: usize) -> Option<(&[f32], usize)>;
    /// Copies rows `ks` of the columns from `col` into `out`: (K, `TILE_COLS`), zero beyond the last column.
    fn copy(&self, ks: Range<usize>, col: usize, out: &mut [f32]);
}

impl Right for Mat<'_> {
    fn cols(&self) -> usize {
        self.cols
    }

    fn lies(&self, k: usize, col: usize) -> Option<(&[f32], usize)> {
        let whole = self.col_step == 1 && col + TILE_COLS <= self.cols;
        whole.then(|| (&self.data[k * self.row_step + col..], self.row_step))
    }

    fn copy(&self, ks: Range<usize>, col: usize, out: &mut [f32]) {
        let count = TILE_COLS.min(self.cols - col);
        for (k, out) in ks.zip(out.as_chunks_mut::<TILE_COLS>().0) {
            let at = k * self.row_step + col * self.col_step;
            out[count..].fill(0.0);
            if self.col_step == 1 {
                out[..count].copy_from_slice(&self.data[at..][..count]);
            } else {
                let from = &self.data[at..];
                out[..count].iter_mut().enumerate().for_each(|(j, x)| *x = from[j * self.col_step]);
            }
        }
    }
}

/// What a tile's kernel gets: `a` begins at the tile's first row and the block's first k.
pub(crate) struct Tile<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) a_row: usize,
    pub(crate) a_k: usize,
    pub(crate) b: &'a [f32],
    pub(crate) b_k: usize,
    pub(crate) steps: usize,
}

/// Columns whose sums a skinny product holds at once, and rows: 16 KiB.
pub(crate) const SKINNY_COLS: usize = 256;
/// Rows of a skinny product.
pub(crate) const SKINNY_ROWS: usize = 16;

/// What the kernel of a skinny product gets: few rows, many columns; `a` and `b` begin at the first row, step and column.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Skinny<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) a_row: usize,
    pub(crate) a_k: usize,
    pub(crate) rows: usize,
    pub(crate) b: &'a [f32],
    pub(crate) b_k: usize,
    pub(crate) cols: usize,
    pub(crate) steps: usize,
}

/// A product that is added to another where it is made, as an adapter's is: alpha times left right.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// (T, R)
    pub left: Mat<'a>,
    /// (R, N)
    pub right: Mat<'a>,
    /// What it is multiplied with.
    pub alpha: f32,
}

impl LowRank<'_> {
    /// # Panics
    /// If it is not of `rows` by `cols`.
    pub(crate) fn check(&self, rows: usize, cols: usize) {
        let LowRank { left, right, .. } = self;
        assert!(
            left.rows == rows && left.cols == right.rows && right.cols == cols,
            "({}, {}) by ({}, {}) added to ({rows}, {cols})",
            left.rows,
            left.cols,
            right.rows,
            right.cols
        );
    }

    /// Adds the part in `cols` to all rows of `out`, on this thread. Rows are pages apart where they are long: some of them take
    /// all that is theirs before the next.
    pub(crate) fn add(&self, isa: Isa, cols: Range<usize>, out: &Out<'_, '_>) {
        let into = Join { alpha: self.alpha, add: true };
        for first in (0..self.left.rows).step_by(ADDED_ROWS) {
            let rows = first..(first + ADDED_ROWS).min(self.left.rows);
            multiply(isa, self.left, &self.right, rows, cols.clone(), into, out);
        }
    }
}

/// Sums of a tile.
pub(crate) type Sums = [[f32; TILE_COLS]; TILE_ROWS];

/// How a result joins what is there: `out = (add ? out : 0) + alpha * product`.
#[derive(Clone, Copy)]
pub struct Join {
    /// The factor.
    pub alpha: f32,
    /// Whether the result is added.
    pub add: bool,
}

impl Join {
    /// Overwrites.
    pub const OVER: Join = Join { alpha: 1.0, add: false };
    /// Adds.
    pub const ADD: Join = Join { alpha: 1.0, add: true };
}

/// Where a product goes: rows of `step` values.
pub(crate) struct Out<'a, 'b> {
    pub(crate) to: &'b SharedOut<'a, f32>,
    pub(crate) at: usize,
    pub(crate) step: usize,
}

impl Compute {
    /// `out`: (M, N) becomes or gains `alpha` times `a`: (M, K) by `b`: (K, N).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn product(&self, a: Mat<'_>, b: Mat<'_>, into: Join, out: &mut [f32]) {
        assert!(
            a.cols == b.rows && out.len() == a.rows * b.cols,
            "({}, {}) by ({}, {})",
            a.rows,
            a.cols,
            b.rows,
            b.cols
        );
        #[cfg(target_arch = "x86_64")]
        if self.isa >= Isa::Avx512 && a.rows * b.cols * a.cols >= 1 << 15 {
            // A gradient of an adapter sums over tokens: few rows of one side, many of the other, both with tokens as rows.
            if a.rows <= SKINNY_RANK && a.row_step == 1 && b.col_step == 1 && b.cols >= 2 * SKINNY_RANK {
                return self.skinny(a, b, into, out, false);
            }
            if b.cols <= SKINNY_RANK && a.row_step == 1 && b.col_step == 1 && a.rows >= 2 * SKINNY_RANK {
                return self.skinny(b.t(), a.t(), into, out, true);
            }
        }
        self.product_with(a, &b, into, out);
    }

    /// `a`: (R, K) by `b`: (K, N) for few rows, which reads `b` once, row after row; `out` is (R, N), or (N, R) if `turned`. The
    /// same sums as by tiles.
    #[cfg(target_arch = "x86_64")]
    fn skinny(&self, a: Mat<'_>, b: Mat<'_>, into: Join, out: &mut [f32], turned: bool) {
        let (rows, out_step) = (a.rows, if turned { a.rows } else { b.cols });
        let out = SharedOut::new(out);
        self.pool.run_split(b.cols, TILE_COLS, |own| {
            let mut sums = [[0.0; SKINNY_COLS]; SKINNY_ROWS];
            for col in own.clone().step_by(SKINNY_COLS) {
                let cols = SKINNY_COLS.min(own.end - col);
                for first in (0..a.cols).step_by(BLOCK_K) {
                    let steps = BLOCK_K.min(a.cols - first);
                    for row in (0..rows).step_by(SKINNY_ROWS) {
                        let count = SKINNY_ROWS.min(rows - row);
                        let part = Skinny {
                            a: &a.data[row * a.row_step + first * a.col_step..],
                            a_row: a.row_step,
                            a_k: a.col_step,
                            rows: count,
                            b: &b.data[first * b.row_step + col * b.col_step..],
                            b_k: b.row_step,
                            cols,
                            steps,
                        };
                        let a_end = (count - 1) * part.a_row + (steps - 1) * part.a_k;
                        assert!(a_end < part.a.len() && (steps - 1) * part.b_k + cols <= part.b.len(), "a skinny part");
                        // SAFETY: `Compute::new` has checked the instruction set, and the operands' ends are checked above.
                        unsafe { crate::avx512::product::skinny(&part, &mut sums) };
                        let add = into.add || first > 0;
                        let join = |to: &mut f32, x: f32| *to = if add { *to + into.alpha * x } else { into.alpha * x };
                        if turned {
                            for j in 0..cols {
                                // SAFETY: a column is in one thread's range.
                                let to = unsafe { out.slice((col + j) * out_step + row, count) };
                                to.iter_mut().zip(&sums).for_each(|(to, sums)| join(to, sums[j]));
                            }
                            continue;
                        }
                        for (i, sums) in sums[..count].iter().enumerate() {
                            // SAFETY: as above.
                            let to = unsafe { out.slice((row + i) * out_step + col, cols) };
                            to.iter_mut().zip(sums).for_each(|(to, x)| join(to, *x));
                        }
                    }
                }
            }
        });
    }

    pub(crate) fn product_with(&self, a: Mat<'_>, b: &impl Right, into: Join, out: &mut [f32]) {
        let (rows, cols) = (a.rows, b.cols());
        let out = SharedOut::new(out);
        let out = Out { to: &out, at: 0, step: cols };
        let threads = self.pool.threads();
        let small = rows * cols * a.cols < 1 << 15;
        if small || threads == 1 {
            multiply(self.isa, a, b, 0..rows, 0..cols, into, &out);
        } else if cols / TILE_COLS >= rows / TILE_ROWS || cols >= 8 * threads * TILE_COLS {
            self.pool.run_split(cols, TILE_COLS, |cols| multiply(self.isa, a, b, 0..rows, cols, into, &out));
        } else {
            self.pool.run_split(rows, TILE_ROWS, |rows| multiply(self.isa, a, b, rows, 0..cols, into, &out));
        }
    }
}

/// The part of a product in `rows` and `cols`, on this thread. Who calls it for different parts at the same time gives each
/// element to one of them.
pub(crate) fn multiply(
    isa: Isa,
    a: Mat<'_>,
    b: &impl Right,
    rows: Range<usize>,
    cols: Range<usize>,
    into: Join,
    out: &Out<'_, '_>,
) {
    let Join { alpha, add } = into;
    let mut copied = [0.0; BLOCK_K * TILE_COLS];
    let mut sums: Sums = [[0.0; TILE_COLS]; TILE_ROWS];
    for col in cols.clone().step_by(TILE_COLS) {
        let width = TILE_COLS.min(cols.end - col);
        // A product over nothing is zero.
        for first in (0..a.cols.max(1)).step_by(BLOCK_K) {
            let ks = first..(first + BLOCK_K).min(a.cols);
            let steps = ks.len();
            let lying = if rows.len() < COPY_TILES * TILE_ROWS { b.lies(first, col) } else { None };
            let (b, b_k) = lying.unwrap_or_else(|| {
                b.copy(ks.clone(), col, &mut copied[..steps * TILE_COLS]);
                (&copied[..], TILE_COLS)
            });
            for row in rows.clone().step_by(TILE_ROWS) {
                let count = TILE_ROWS.min(rows.end - row);
                let a_data = if steps == 0 { &[][..] } else { &a.data[row * a.row_step + first * a.col_step..] };
                let tile = Tile { a: a_data, a_row: a.row_step, a_k: a.col_step, b, b_k, steps };
                sum(isa, &tile, count, width, &mut sums);
                for (i, sums) in sums[..count].iter().enumerate() {
                    // SAFETY: the caller gives each element to one thread.
                    let to = unsafe { out.to.slice(out.at + (row + i) * out.step + col, width) };
                    if add || first > 0 {
                        to.iter_mut().zip(sums).for_each(|(to, x)| *to += alpha * x);
                    } else {
                        to.iter_mut().zip(sums).for_each(|(to, x)| *to = alpha * x);
                    }
                }
            }
        }
    }
}

/// A tile's sums over its steps; rows from `count` and columns from the next multiple of 16 after `width` are left as they are.
fn sum(isa: Isa, tile: &Tile<'_>, count: usize, width: usize, sums: &mut Sums) {
    if tile.steps > 0 {
        let a_end = (count - 1) * tile.a_row + (tile.steps - 1) * tile.a_k;
        let b_end = (tile.steps - 1) * tile.b_k + TILE_COLS;
        assert!(a_end < tile.a.len() && b_end <= tile.b.len(), "a tile of {} steps", tile.steps);
    }
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set, and the operands' ends are checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::product::sum(tile, count, width, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::product::sum(tile, count, width, sums) },
        _ => portable::product::sum(tile, count, sums),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin()).collect()
    }

    #[test]
    fn equals_the_sum_in_f64_for_ugly_shapes_and_every_transposition() {
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            for (m, k, n) in [(1, 1, 1), (7, 33, 5), (9, 300, 47), (70, 17, 64), (3, 0, 4), (8, 513, 33), (130, 64, 32)]
            {
                let (a, b) = (wave(m * k, 0.37), wave(k * n, 0.91));
                let (at, bt) = (turned(&a, m, k), turned(&b, k, n));
                let exact: Vec<f64> = (0..m * n)
                    .map(|i| (0..k).map(|p| f64::from(a[i / n * k + p]) * f64::from(b[p * n + i % n])).sum())
                    .collect();
                let (plain, flipped) = (Mat::new(&a, m, k), Mat::new(&at, k, m).t());
                for a in [plain, flipped] {
                    for b in [Mat::new(&b, k, n), Mat::new(&bt, n, k).t()] {
                        let mut out = vec![1.0; m * n];
                        compute.product(a, b, Join { alpha: 2.0, add: true }, &mut out);
                        for (i, (out, exact)) in out.iter().zip(&exact).enumerate() {
                            let expected = 1.0 + 2.0 * exact;
                            assert!((f64::from(*out) - expected).abs() < 1e-4, "{isa} ({m}, {k}, {n}) at {i}");
                        }
                    }
                }
            }
        }
    }

    /// Gradients of adapters, which have a kernel of their own, against the same sums by tiles.
    #[test]
    fn skinny_products_have_the_bits_of_tiles() {
        for isa in Isa::available() {
            let (t, n) = (300, 333);
            for rank in [1, 5, 16, 23, 64] {
                let (h, y) = (wave(t * rank, 0.37), wave(t * n, 0.91));
                let (h, y) = (Mat::new(&h, t, rank), Mat::new(&y, t, n));
                let (start, into) = (wave(rank * n, 0.77), Join { alpha: 0.5, add: true });
                let by_tiles = |a: Mat<'_>, b: Mat<'_>| {
                    let mut out = start.clone();
                    let (rows, cols) = (a.rows(), b.cols());
                    let shared = SharedOut::new(&mut out);
                    multiply(isa, a, &b, 0..rows, 0..cols, into, &Out { to: &shared, at: 0, step: cols });
                    out
                };
                for threads in [1, 3] {
                    let compute = Compute::new(threads, isa);
                    for (a, b) in [(h.t(), y), (y.t(), h)] {
                        let mut out = start.clone();
                        compute.product(a, b, into, &mut out);
                        assert!(out == by_tiles(a, b), "{isa}, rank {rank}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_on_any_number_of_threads() {
        for isa in Isa::available() {
            let (m, k, n) = (70, 300, 70);
            let (a, b) = (wave(m * k, 0.37), wave(k * n, 0.91));
            let product = |threads: usize, rows: Range<usize>| {
                let mut out = vec![0.0; rows.len() * n];
                let a = Mat::new(&a[rows.start * k..rows.end * k], rows.len(), k);
                Compute::new(threads, isa).product(a, Mat::new(&b, k, n), Join::OVER, &mut out);
                out
            };
            let whole = product(1, 0..m);
            assert_eq!(product(3, 0..m), whole, "{isa}");
            for row in [0, 8, 69] {
                assert_eq!(product(1, row..row + 1), whole[row * n..][..n], "{isa} row {row}");
            }
        }
    }

    fn turned(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| x[i % rows.max(1) * cols + i / rows.max(1)]).collect()
    }
}
