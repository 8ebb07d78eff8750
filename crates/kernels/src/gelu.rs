//! GELU in the three forms that vision towers use: x times how likely a normal variable is below x, or something near it.
//!
//! Works on rows of one token each and gives a token the same bits whatever its neighbours. Source: Hendrycks and Gimpel
//! 2016, with both of the approximations given there.

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
};

/// Which form of GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// By the error function: `x / 2 (1 + erf(x / sqrt(2)))`.
    Exact,
    /// By a hyperbolic tangent: `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    Tanh,
    /// By a sigmoid: `x sigmoid(1.702 x)`.
    Sigmoid,
}

impl Compute {
    /// `x = gelu(x)`, (T, N) with N = `width`.
    pub fn gelu(&self, form: Gelu, x: &mut [f32], width: usize) {
        self.each_row(x, width, |isa, _, x| match form {
            Gelu::Exact => exact_row(isa, x),
            Gelu::Tanh => tanh_row(isa, x),
            Gelu::Sigmoid => sigmoid_row(isa, x),
        });
    }
}

for_each_isa! {
    pub(crate) fn exact_row(x: &mut [f32]) {
        for x in x {
            *x *= 0.5 * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

for_each_isa! {
    pub(crate) fn tanh_row(x: &mut [f32]) {
        // 1/2 (1 + tanh y) is the sigmoid of 2 y.
        const SQRT_8_OVER_PI: f32 = 1.595_769;
        for x in x {
            let y = SQRT_8_OVER_PI * (*x + 0.044_715 * *x * *x * *x);
            *x /= 1.0 + lanes::exp(-y);
        }
    }
}

for_each_isa! {
    pub(crate) fn sigmoid_row(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + lanes::exp(-1.702 * *x);
        }
    }
}

/// The error function to within 2e-7. Source: Abramowitz and Stegun 1964, formula 7.1.26.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let size = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * size);
    let mut p = 1.061_405_4;
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p * t + c;
    }
    (1.0 - p * t * lanes::exp(-size * size)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// The error function as a sum: erf(x) = 2 / sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (1 3 5 ... (2n+1)).
    fn exact_erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, 0.0);
        for n in 1..300 {
            sum += term;
            term *= 2.0 * x * x / f64::from(2 * n + 1);
        }
        (sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI).clamp(-1.0, 1.0)
    }

    fn exact(form: Gelu, x: f64) -> f64 {
        match form {
            Gelu::Exact => 0.5 * x * (1.0 + exact_erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Gelu::Tanh => {
                let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + y.tanh())
            }
            Gelu::Sigmoid => x / (1.0 + (-1.702 * x).exp()),
        }
    }

    #[test]
    fn every_form_equals_its_formula() {
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            for form in [Gelu::Exact, Gelu::Tanh, Gelu::Sigmoid] {
                for (rows, width) in [(0, 3), (1, 1), (5, 33), (40, 50)] {
                    let before: Vec<f32> = (0..rows * width).map(|i| i as f32 * 0.009 - 9.0).collect();
                    let mut x = before.clone();
                    compute.gelu(form, &mut x, width);
                    for (found, x) in x.iter().zip(before) {
                        let exact = exact(form, f64::from(x));
                        let error = (f64::from(*found) - exact).abs();
                        assert!(error < 1e-6 * (1.0 + exact.abs()), "{isa} {form:?} of {x}: {found} and {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn far_values_are_kept_or_dropped() {
        let compute = Compute::new(1, Isa::Portable);
        for form in [Gelu::Exact, Gelu::Tanh, Gelu::Sigmoid] {
            let mut x = [-1e4, 0.0, 1e4];
            compute.gelu(form, &mut x, 3);
            assert!(x[0].abs() < 1e-3 && x[1] == 0.0 && x[2] == 1e4, "{form:?}: {x:?}");
        }
    }
}
