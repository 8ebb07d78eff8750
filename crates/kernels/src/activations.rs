//! The input of a matrix product in the form that a weight's kernel reads: f32, bf16, or 8-bit blocks.
//!
//! 8-bit form: each 32 values of a row share `scale = max|x| / 127`; a value is `round(x / scale)`. It is a function of
//! the row alone, so that a token's result does not depend on its neighbours in the batch. Rows lie in tiles of 8 - of 16 for
//! AMX - and the last ones in tiles of half as many, down to 1; a tile holds unit after unit of 32 values, and in each unit row
//! after row, so that a kernel that goes through a tile reads straight ahead.

use std::ops::Range;

use half::{bf16, slice::HalfFloatSliceExt};

use crate::{Isa, layout::UNIT, pool::Pool, shared_out::SharedOut, weight::Operand};

/// What a kernel needs beside the quants of one unit of one row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UnitFacts {
    pub(crate) scale: f32,
    /// Minus the sum of the quants: of all 32, of the first 16, of the last 16. Offsets of weights multiply these.
    pub(crate) minus_sum: [i32; 3],
    /// Scale times the sum of the quants, in the same order. Addends of weights multiply these.
    pub(crate) sum: [f32; 3],
    _to_32_bytes: u32,
}

/// Rows of a whole tile where vectors multiply: what the widest kernel takes at once.
pub(crate) const TILE_ROWS: usize = 8;

/// Rows of a whole tile on an instruction set.
const fn tile_rows(isa: Isa) -> usize {
    match isa {
        Isa::Amx => 2 * TILE_ROWS,
        _ => TILE_ROWS,
    }
}

/// The rows of one matrix product, (T, K), in every form that was asked for. Buffers are kept for the next product.
#[derive(Default)]
pub(crate) struct Activations {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows of whole tiles.
    pub(crate) widest: usize,
    /// Tiles of (K/32, rows of the tile, 32); valid for `Operand::Quantized`.
    pub(crate) quants: Vec<i8>,
    /// Tiles of (K/32, rows of the tile)
    pub(crate) facts: Vec<UnitFacts>,
    /// (T, K rounded up to even), zero-padded; valid for `Operand::Bf16` where pairs of them are multiplied.
    pub(crate) bf16: Vec<bf16>,
}

impl Activations {
    /// Prepares `x`: (T, K) in the forms `needed`.
    pub(crate) fn prepare(&mut self, isa: Isa, pool: &Pool, x: &[f32], cols: usize, needed: &[Operand]) {
        let all = 0..x.len() / cols;
        self.prepare_segments(isa, pool, x, cols, needed, &[all]);
    }

    /// As `prepare`, the rows of each segment lying in tiles of their own, as if they were alone. Segments are in order;
    /// what stands between them is left out of the 8-bit form.
    pub(crate) fn prepare_segments(
        &mut self,
        isa: Isa,
        pool: &Pool,
        x: &[f32],
        cols: usize,
        needed: &[Operand],
        segments: &[Range<usize>],
    ) {
        (self.rows, self.cols, self.widest) = (x.len() / cols, cols, tile_rows(isa));
        // A fork pays only for several rows.
        let parallel = self.rows >= 4;
        if needed.contains(&Operand::Quantized) {
            self.quantize(isa, pool, x, segments, parallel);
        }
        if needed.contains(&Operand::Bf16) && isa.pairs_bf16() {
            self.round_bf16(pool, x, parallel);
        }
    }

    /// Room for `rows` rows of `cols` values in the form of `operand`, which is filled piece by piece; `values` is for f32.
    pub(crate) fn open<'a>(
        &'a mut self,
        isa: Isa,
        (rows, cols): (usize, usize),
        operand: Operand,
        values: &'a mut Vec<f32>,
    ) -> Filling<'a> {
        (self.rows, self.cols, self.widest) = (rows, cols, tile_rows(isa));
        let form = match operand {
            Operand::Quantized => {
                grow(&mut self.quants, rows * cols);
                grow(&mut self.facts, rows * (cols / UNIT));
                Form::Quants(SharedOut::new(&mut self.quants), SharedOut::new(&mut self.facts))
            }
            Operand::Bf16 if isa.pairs_bf16() => {
                grow(&mut self.bf16, rows * cols.next_multiple_of(2));
                Form::Bf16(SharedOut::new(&mut self.bf16))
            }
            _ => {
                grow(values, rows * cols);
                Form::F32(SharedOut::new(values))
            }
        };
        Filling { isa, rows, cols, widest: self.widest, form }
    }

    /// Bytes of the buffers.
    pub(crate) fn held_bytes(&self) -> usize {
        let Activations { quants, facts, bf16, .. } = self;
        quants.capacity() + size_of::<UnitFacts>() * facts.capacity() + size_of::<bf16>() * bf16.capacity()
    }

    fn quantize(&mut self, isa: Isa, pool: &Pool, x: &[f32], segments: &[Range<usize>], parallel: bool) {
        let (rows, cols) = (self.rows, self.cols);
        let units = cols / UNIT;
        grow(&mut self.quants, rows * cols);
        grow(&mut self.facts, rows * units);
        let (quants, facts) = (SharedOut::new(&mut self.quants), SharedOut::new(&mut self.facts));
        let work = |range: Range<usize>| {
            for row in range {
                let Some(own) = segments.get(segments.partition_point(|s| s.end <= row)) else { continue };
                let Some(in_own) = row.checked_sub(own.start) else { continue };
                let (first, width) = tile_of(self.widest, in_own, own.len());
                let first = (own.start + first) * units + (in_own - first);
                let mut place = Place { quants: &quants, facts: &facts, first, width };
                quantize_row(isa, &x[row * cols..][..cols], &mut place);
            }
        };
        if parallel { pool.run_split(rows, 1, work) } else { work(0..rows) }
    }

    fn round_bf16(&mut self, pool: &Pool, x: &[f32], parallel: bool) {
        let (rows, cols, padded) = (self.rows, self.cols, self.cols.next_multiple_of(2));
        grow(&mut self.bf16, rows * padded);
        for_rows(pool, parallel, rows, (&mut self.bf16, padded), (&mut [(); 0], 0), |row, out, _| {
            out[..cols].convert_from_f32_slice(&x[row * cols..][..cols]);
            out[cols..].fill(bf16::ZERO);
        });
    }
}

/// Makes `buffer` at least so long. It is not cut: growing again would fill it with zeros, on one thread, at every op.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
}

/// Runs `f(row, part of a, part of b)` for every row, on all threads when that pays.
fn for_rows<A: Send, B: Send>(
    pool: &Pool,
    parallel: bool,
    rows: usize,
    (a, a_width): (&mut [A], usize),
    (b, b_width): (&mut [B], usize),
    f: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let (a, b) = (SharedOut::new(a), SharedOut::new(b));
    let work = |range: std::ops::Range<usize>| {
        for row in range {
            // SAFETY: each row is in exactly one range, so its parts are borrowed once.
            let (a, b) = unsafe { (a.slice(row * a_width, a_width), b.slice(row * b_width, b_width)) };
            f(row, a, b);
        }
    };
    if parallel { pool.run_split(rows, 1, work) } else { work(0..rows) }
}

/// The tile of row `row` of `rows`, where whole tiles have `widest` rows: its first row and its width.
pub(crate) fn tile_of(widest: usize, row: usize, rows: usize) -> (usize, usize) {
    let (mut first, mut width) = (row / widest * widest, widest);
    while first + width > rows || row >= first + width {
        match first + width > rows {
            true => width /= 2,
            false => first += width,
        }
    }
    (first, width)
}

/// Where a row's units go: the first, and every `width`-th after it.
pub(crate) struct Place<'a> {
    quants: &'a SharedOut<'a, i8>,
    facts: &'a SharedOut<'a, UnitFacts>,
    first: usize,
    width: usize,
}

impl Place<'_> {
    /// Quants and facts of unit `u`.
    #[inline(always)]
    pub(crate) fn unit(&mut self, u: usize) -> (&mut [i8; UNIT], &mut UnitFacts) {
        let at = self.first + u * self.width;
        // SAFETY: the units of a place belong to one row, which one thread quantises, unit after unit.
        unsafe { (&mut self.quants.slice(at * UNIT, UNIT).as_chunks_mut().0[0], &mut self.facts.slice(at, 1)[0]) }
    }
}

/// Rows that are filled piece by piece, by several threads.
pub(crate) struct Filling<'a> {
    isa: Isa,
    rows: usize,
    cols: usize,
    widest: usize,
    form: Form<'a>,
}

enum Form<'a> {
    Quants(SharedOut<'a, i8>, SharedOut<'a, UnitFacts>),
    Bf16(SharedOut<'a, bf16>),
    F32(SharedOut<'a, f32>),
}

impl Filling<'_> {
    /// Takes x: (rows, columns); columns begin and, but for the last, end with a unit.
    ///
    /// # Safety
    /// Nobody else gives these columns of these rows.
    pub(crate) unsafe fn put(&self, rows: Range<usize>, cols: Range<usize>, x: &[f32]) {
        for (row, x) in rows.zip(x.chunks_exact(cols.len())) {
            match &self.form {
                Form::Quants(quants, facts) => {
                    let (first, width) = tile_of(self.widest, row, self.rows);
                    let first = first * (self.cols / UNIT) + cols.start / UNIT * width + (row - first);
                    quantize_row(self.isa, x, &mut Place { quants, facts, first, width });
                }
                Form::Bf16(to) => {
                    let padded = self.cols.next_multiple_of(2);
                    let len = if cols.end == self.cols { padded - cols.start } else { cols.len() };
                    // SAFETY: the caller's promise.
                    let to = unsafe { to.slice(row * padded + cols.start, len) };
                    to[..x.len()].convert_from_f32_slice(x);
                    to[x.len()..].fill(bf16::ZERO);
                }
                // SAFETY: the caller's promise.
                Form::F32(to) => unsafe { to.slice(row * self.cols + cols.start, cols.len()) }.copy_from_slice(x),
            }
        }
    }
}

impl UnitFacts {
    /// The facts of quants with this scale whose first and last halves have these sums.
    #[inline(always)]
    pub(crate) fn new(scale: f32, [first, last]: [i32; 2]) -> UnitFacts {
        let sums = [first + last, first, last];
        UnitFacts { scale, minus_sum: sums.map(|s| -s), sum: sums.map(|s| scale * s as f32), _to_32_bytes: 0 }
    }
}

/// Quantises one row: x (K).
fn quantize_row(isa: Isa, x: &[f32], place: &mut Place<'_>) {
    let units = x.as_chunks::<UNIT>().0;
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::quantize::row(units, place) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::quantize::row(units, place) },
        _ => crate::portable::quantize::row(units, place),
    }
}

/// From the largest |x| of a unit: its scale, and what values are multiplied by.
#[inline(always)]
pub(crate) fn scale_of(largest: f32) -> (f32, f32) {
    (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_rows_once_and_narrow_at_the_end() {
        let tiles = |rows: usize| (0..rows).map(|row| tile_of(8, row, rows)).collect::<Vec<_>>();
        assert_eq!(tiles(1), [(0, 1)]);
        assert_eq!(tiles(3), [(0, 2), (0, 2), (2, 1)]);
        assert_eq!(tiles(15)[8..], [(8, 4), (8, 4), (8, 4), (8, 4), (12, 2), (12, 2), (14, 1)]);
        assert_eq!(tile_of(16, 31, 40), (16, 16));
        assert_eq!(tile_of(16, 39, 40), (32, 8));
        assert!(tiles(16).iter().enumerate().all(|(row, tile)| *tile == (row / 8 * 8, 8)));
    }

    #[test]
    fn rows_quantise_alone_and_within_half_a_step() {
        let pool = Pool::new(2);
        let (rows, cols) = (5, 96);
        let x: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) * (i / cols) as f32).collect();
        let mut all = Activations::default();
        all.prepare(Isa::Portable, &pool, &x, cols, &[Operand::Quantized]);
        for row in 0..rows {
            let mut one = Activations::default();
            one.prepare(Isa::Portable, &pool, &x[row * cols..][..cols], cols, &[Operand::Quantized]);
            let (first, width) = tile_of(8, row, rows);
            for u in 0..cols / UNIT {
                let at = (first * cols / UNIT + u * width + row - first) * UNIT;
                assert_eq!(one.quants[u * UNIT..][..UNIT], all.quants[at..][..UNIT], "row {row}, unit {u}");
            }
            let facts = &one.facts;
            for (i, v) in x[row * cols..][..cols].iter().enumerate() {
                let scale = facts[i / UNIT].scale;
                assert!((v - scale * f32::from(one.quants[i])).abs() <= 0.5001 * scale, "row {row} value {i}");
            }
        }
    }
}
