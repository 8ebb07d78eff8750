//! The input of a matrix product in the form that a weight's kernel reads: f32, bf16, or 8-bit blocks.
//!
//! 8-bit form: each 32 values of a row share `scale = max|x| / 127`; a value is `round(x / scale)`. It is a function of
//! the row alone, so that a token's result does not depend on its neighbours in the batch.

use half::{bf16, slice::HalfFloatSliceExt};

use crate::{Isa, lanes::for_each_isa, layout::UNIT, pool::Pool, shared_out::SharedOut, weight::Operand};

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

/// The rows of one matrix product, (T, K), in every form that was asked for. Buffers are kept for the next product.
#[derive(Default)]
pub(crate) struct Activations {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// (T, K) as i8; valid for `Operand::Quantized`.
    pub(crate) quants: Vec<i8>,
    /// (T, K/32)
    pub(crate) facts: Vec<UnitFacts>,
    /// (T, K rounded up to even), zero-padded; valid for `Operand::Bf16`.
    pub(crate) bf16: Vec<bf16>,
}

impl Activations {
    /// Prepares `x`: (T, K) in the forms `needed`.
    pub(crate) fn prepare(&mut self, isa: Isa, pool: &Pool, x: &[f32], cols: usize, needed: &[Operand]) {
        self.cols = cols;
        self.rows = x.len() / cols;
        // A fork pays only for several rows.
        let parallel = self.rows >= 4;
        if needed.contains(&Operand::Quantized) {
            self.quantize(isa, pool, x, parallel);
        }
        if needed.contains(&Operand::Bf16) {
            self.round_bf16(pool, x, parallel);
        }
    }

    fn quantize(&mut self, isa: Isa, pool: &Pool, x: &[f32], parallel: bool) {
        let (rows, cols) = (self.rows, self.cols);
        let units = cols / UNIT;
        self.quants.resize(rows * cols, 0);
        self.facts.resize(rows * units, UnitFacts::default());
        for_rows(pool, parallel, rows, (&mut self.quants, cols), (&mut self.facts, units), |row, quants, facts| {
            quantize_row(isa, &x[row * cols..][..cols], quants, facts);
        });
    }

    fn round_bf16(&mut self, pool: &Pool, x: &[f32], parallel: bool) {
        let (rows, cols, padded) = (self.rows, self.cols, self.cols.next_multiple_of(2));
        self.bf16.resize(rows * padded, bf16::ZERO);
        for_rows(pool, parallel, rows, (&mut self.bf16, padded), (&mut [(); 0], 0), |row, out, _| {
            out[..cols].convert_from_f32_slice(&x[row * cols..][..cols]);
            out[cols..].fill(bf16::ZERO);
        });
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

for_each_isa! {
    /// Quantises one row: x (K) into quants (K) and facts (K/32).
    pub(crate) fn quantize_row(x: &[f32], quants: &mut [i8], facts: &mut [UnitFacts]) {
        let units = x.as_chunks::<UNIT>().0.iter().zip(quants.as_chunks_mut::<UNIT>().0);
        for ((x, quants), facts) in units.zip(facts) {
            let largest = largest_magnitude(x);
            let scale = largest / 127.0;
            let inverse = if scale > 0.0 { 127.0 / largest } else { 0.0 };
            let mut sums = [0; 2];
            for (half, sum) in sums.iter_mut().enumerate() {
                for i in half * UNIT / 2..(half + 1) * UNIT / 2 {
                    // A NaN becomes 0 here; its row's norm has already spread it if it came from the model.
                    let q = (x[i] * inverse).round_ties_even() as i32;
                    quants[i] = q as i8;
                    *sum += q;
                }
            }
            let sums = [sums[0] + sums[1], sums[0], sums[1]];
            *facts = UnitFacts {
                scale,
                minus_sum: sums.map(|s| -s),
                sum: sums.map(|s| scale * s as f32),
                _to_32_bytes: 0,
            };
        }
    }
}

/// The largest |x|, lane by lane and then as a tree, which every instruction set does in few steps.
#[inline(always)]
fn largest_magnitude(x: &[f32; UNIT]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes: [f32; UNIT / 2] = std::array::from_fn(|i| larger(x[i].abs(), x[i + UNIT / 2].abs()));
    let mut width = UNIT / 4;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(one.quants, all.quants[row * cols..][..cols]);
            for (i, v) in x[row * cols..][..cols].iter().enumerate() {
                let scale = one.facts[i / UNIT].scale;
                assert!((v - scale * f32::from(one.quants[i])).abs() <= 0.5001 * scale, "row {row} value {i}");
            }
        }
    }
}
