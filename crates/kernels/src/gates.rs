//! Gates: factors between 0 and 1, and decays, that a token computes for itself.
//!
//! All work on rows of one token each and give a token the same bits whatever its neighbours.

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
};

impl Compute {
    /// `x *= sigmoid(gate)`, both (T, N) with N = `width`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn sigmoid_mul(&self, x: &mut [f32], gate: &[f32], width: usize) {
        assert_eq!(x.len(), gate.len(), "sigmoid_mul");
        self.each_row(x, width, |isa, row, x| sigmoid_mul_row(isa, &gate[row * width..][..width], x));
    }

    /// `x += sigmoid(gate) * y`; x and y: (T, D) with D = `width`, gate: (T), one factor for a token.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add_gated(&self, x: &mut [f32], y: &[f32], gate: &[f32], width: usize) {
        assert!(x.len() == y.len() && x.len() == gate.len() * width, "add_gated of {} gates", gate.len());
        self.each_row(x, width, |isa, row, x| {
            let factor = 1.0 / (1.0 + lanes::exp(-gate[row]));
            add_scaled_row(isa, factor, &y[row * width..][..width], x);
        });
    }
}

for_each_isa! {
    pub(crate) fn sigmoid_mul_row(gate: &[f32], x: &mut [f32]) {
        for (x, gate) in x.iter_mut().zip(gate) {
            *x /= 1.0 + lanes::exp(-gate);
        }
    }
}

for_each_isa! {
    /// `x += factor * y`
    pub(crate) fn add_scaled_row(factor: f32, y: &[f32], x: &mut [f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
    }
}
