//! Layer norm, as vision towers have it. Works on rows of one token each and gives a token the same bits whatever its
//! neighbours. Source: Ba et al. 2016.

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
};

impl Compute {
    /// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row. x, out: (T, D); weight, bias: (D).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        assert!(x.len() == out.len() && bias.len() == width, "layer_norm of {} values by {width}", x.len());
        self.each_row(out, width, |isa, row, out| {
            layer_norm_row(isa, &x[row * width..][..width], weight, bias, eps, out);
        });
    }
}

for_each_isa! {
    pub(crate) fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let count = x.len() as f32;
        let mean = lanes::sum_by(x, |x| x) / count;
        // Squares of differences rather than a difference of squares, which cancels where the mean is large.
        let variance = lanes::sum_by(x, |x| (x - mean) * (x - mean)) / count;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * scale * w + b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn equals_the_formula_for_ugly_shapes() {
        let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin() * 3.0 + 20.0).collect::<Vec<f32>>();
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            for (rows, width) in [(0, 5), (1, 1), (3, 16), (5, 33), (9, 72)] {
                let (x, weight, bias) = (wave(rows * width, 0.7), wave(width, 1.1), wave(width, 2.3));
                let mut out = vec![0.0; x.len()];
                compute.layer_norm(&x, &weight, &bias, 1e-6, &mut out);
                for (row, (x, out)) in x.chunks_exact(width).zip(out.chunks_exact(width)).enumerate() {
                    let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                    let mean = wide.iter().sum::<f64>() / width as f64;
                    let variance = wide.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let scaled = (wide[i] - mean) / (variance + 1e-6).sqrt() * f64::from(weight[i]);
                        let exact = scaled + f64::from(bias[i]);
                        let error = (f64::from(out[i]) - exact).abs();
                        assert!(error < 2e-4, "{isa} row {row} of {width}, value {i}: {} and {exact}", out[i]);
                    }
                }
            }
        }
    }
}
