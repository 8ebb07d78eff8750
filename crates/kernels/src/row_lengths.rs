//! Lengths of the rows of a frozen weight with an adapter in it, what DoRA divides by. Source: Liu et al. 2024.
//!
//! Rows are made from their packed form sixteen at a time and never all held. A length has the same bits on any number of
//! threads.

use crate::{
    lanes::{self, for_each_isa},
    layout::GROUP_ROWS,
    matmul::Compute,
    product::{Join, LowRank, Mat, Out, multiply},
    shared_out::SharedOut,
    weight::Weight,
};

impl Compute {
    /// `out`: (N) = the lengths of the rows of `weight`: (N, K) plus `added`: (N, R) by (R, K).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn row_lengths(&self, weight: &Weight, added: &LowRank<'_>, out: &mut [f32]) {
        let (rows, cols) = (weight.rows(), weight.cols());
        assert_eq!(out.len(), rows, "lengths of ({rows}, {cols})");
        added.check(rows, cols);
        // Every sixteen rows read all of it.
        let right = added.right.plain();
        let right = Mat::new(&right, added.right.rows(), cols);
        let shared = SharedOut::new(out);
        self.pool().run_split(rows, GROUP_ROWS, |own| {
            let (mut sums, mut row) = (vec![0.0; GROUP_ROWS * cols], vec![0.0; cols]);
            for first in own.clone().step_by(GROUP_ROWS) {
                let count = GROUP_ROWS.min(own.end - first);
                let left = added.left.part(first..first + count);
                let into = Join { alpha: added.alpha, add: false };
                let to = SharedOut::new(&mut sums);
                multiply(self.isa(), left, &right, 0..count, 0..cols, into, &Out { to: &to, at: 0, step: cols });
                // SAFETY: each row is in one thread's range.
                let lengths = unsafe { shared.slice(first, count) };
                for (i, (length, added)) in lengths.iter_mut().zip(sums.chunks_exact(cols.max(1))).enumerate() {
                    weight.row(first + i, &mut row);
                    *length = length_of_sum(self.isa(), &mut row, added);
                }
            }
        });
    }
}

for_each_isa! {
    /// The length of x + y; x becomes that sum.
    pub(crate) fn length_of_sum(x: &mut [f32], y: &[f32]) -> f32 {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        lanes::dot(x, x).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::DType;

    use super::*;
    use crate::{Isa, dequantize_row, quantize_row};

    #[test]
    fn lengths_are_those_of_the_rows_summed_in_f64() {
        let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
        for (dtype, rows, cols, rank) in [(DType::F32, 37, 70, 3), (DType::Q4_K, 33, 512, 5), (DType::BF16, 1, 9, 1)] {
            let row_bytes = dtype.row_bytes(cols).unwrap();
            let mut bytes = vec![0; rows * row_bytes];
            for (values, bytes) in wave(rows * cols, 0.61).chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
                quantize_row(dtype, values, None, bytes);
            }
            let (a, b) = (wave(cols * rank, 0.37), wave(rank * rows, 0.83));
            let added = LowRank { left: Mat::new(&b, rank, rows).t(), right: Mat::new(&a, cols, rank).t(), alpha: 0.5 };
            for isa in Isa::available() {
                let find = |threads: usize| {
                    let compute = Compute::new(threads, isa);
                    let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap();
                    let mut lengths = vec![0.0; rows];
                    compute.row_lengths(&weight, &added, &mut lengths);
                    lengths
                };
                let found = find(1);
                assert_eq!(found, find(3), "{isa} {dtype}");
                for (n, found) in found.iter().enumerate() {
                    let mut row = vec![0.0; cols];
                    dequantize_row(dtype, &bytes[n * row_bytes..][..row_bytes], &mut row);
                    let square = |k: usize| {
                        let low: f64 = (0..rank).map(|r| f64::from(a[k * rank + r]) * f64::from(b[r * rows + n])).sum();
                        (f64::from(row[k]) + 0.5 * low).powi(2)
                    };
                    let exact = (0..cols).map(square).sum::<f64>().sqrt();
                    assert!((f64::from(*found) - exact).abs() < 1e-5 * exact, "{isa} {dtype} row {n}");
                }
            }
        }
    }
}
