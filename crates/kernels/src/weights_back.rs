//! Backward towards a model's own numbers, where these are trained: weights of norms, and biases. The gradient of a matrix is a plain
//! product of `product`: dW = dy^T x.
//!
//! A sum over rows ascends and is made in f64 for each column by one thread, so that results do not depend on threads.

use std::ops::Range;

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

impl Compute {
    /// Adds to `dw`: (D) the gradient towards the weights of `rms_norm`, from x and dy: rows of D.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn rms_norm_weight_backward(&self, x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
        let width = dw.len();
        assert!(x.len() == dy.len() && x.len().is_multiple_of(width), "rms_norm_weight_backward");
        let mut scales = vec![0.0; x.len() / width];
        self.each_row(&mut scales, 1, |isa, row, scale| {
            scale[0] = norm_scale(isa, &x[row * width..][..width], eps);
        });
        self.add_columns(scales.len(), dw, |row, cols, sums| {
            let own = row * width + cols.start..row * width + cols.end;
            for ((sum, x), dy) in sums.iter_mut().zip(&x[own.clone()]).zip(&dy[own]) {
                *sum += f64::from(scales[row] * x * dy);
            }
        });
    }

    /// Adds to `db`: (N) the gradient towards a bias, the sum of dy's rows.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn bias_backward(&self, dy: &[f32], db: &mut [f32]) {
        let width = db.len();
        assert!(dy.len().is_multiple_of(width), "bias_backward");
        self.add_columns(dy.len() / width, db, |row, cols, sums| {
            let own = &dy[row * width + cols.start..row * width + cols.end];
            sums.iter_mut().zip(own).for_each(|(sum, dy)| *sum += f64::from(*dy));
        });
    }

    /// Adds to `to` what `add` gives its columns, row after row.
    fn add_columns(&self, rows: usize, to: &mut [f32], add: impl Fn(usize, Range<usize>, &mut [f64]) + Sync) {
        let width = to.len();
        let to = SharedOut::new(to);
        self.pool.run_split(width, lanes::LANES, |cols| {
            let mut sums = vec![0.0; cols.len()];
            (0..rows).for_each(|row| add(row, cols.clone(), &mut sums));
            // SAFETY: columns are one thread's.
            let to = unsafe { to.slice(cols.start, cols.len()) };
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum as f32);
        });
    }
}

for_each_isa! {
    /// What `rms_norm` multiplies a row with, beside its weights.
    pub(crate) fn norm_scale(x: &[f32], eps: f32) -> f32 {
        1.0 / (lanes::sum_by(x, |x| x * x) / x.len() as f32 + eps).sqrt()
    }
}
