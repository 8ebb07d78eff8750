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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 9.0).collect()
    }

    fn sigmoid(x: f32) -> f64 {
        1.0 / (1.0 + f64::from(-x).exp())
    }

    #[test]
    fn gates_equal_the_formula_for_ugly_shapes() {
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            for (rows, width) in [(0, 7), (1, 1), (3, 16), (5, 33), (9, 64)] {
                let (x, gate, one) = (wave(rows * width, 0.7), wave(rows * width, 1.3), wave(rows, 2.1));
                let (mut gated, mut added) = (x.clone(), x.clone());
                compute.sigmoid_mul(&mut gated, &gate, width);
                compute.add_gated(&mut added, &gate, &one, width);
                for i in 0..rows * width {
                    let exact = f64::from(x[i]) * sigmoid(gate[i]);
                    assert!((f64::from(gated[i]) - exact).abs() < 1e-5, "{isa} sigmoid_mul {i}");
                    let exact = f64::from(x[i]) + f64::from(gate[i]) * sigmoid(one[i / width]);
                    assert!((f64::from(added[i]) - exact).abs() < 1e-5, "{isa} add_gated {i}");
                }
            }
        }
    }

    #[test]
    fn far_gates_are_shut_or_open() {
        let compute = Compute::new(1, Isa::Portable);
        let mut x = [2.0, 2.0, 2.0];
        compute.sigmoid_mul(&mut x, &[-1e30, 0.0, 1e30], 3);
        assert_eq!(x[1..], [1.0, 2.0]);
        assert!(x[0] < 1e-37);
    }
}
