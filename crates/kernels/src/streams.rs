//! Several residual streams beside each other, as hyper-connections have them: norm, mix to one, write back to all.
//!
//! `S` is the number of streams; a token's streams lie one after the other, (T, S, D). All ops work on rows of one token
//! and give a token the same bits whatever its neighbours. Source: Zhu et al. 2024 (hyper-connections) with the gates of
//! transformers' Qwen4-exp.

use crate::{
    elementwise::norm_row,
    gates::add_scaled_row,
    lanes::{self, for_each_isa},
    matmul::Compute,
};

/// Below this the root of a gate is taken of it instead.
const GATE_MIN: f32 = 1e-6;

impl Compute {
    /// Norms every stream of x: (T, S, D) by itself, each with weights of its own: (S, D).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn rms_norm_streams(&self, x: &[f32], weight: &[f32], width: usize, eps: f32, out: &mut [f32]) {
        assert!(x.len() == out.len() && weight.len().is_multiple_of(width), "norm of streams of {width}");
        self.each_row(out, weight.len(), |isa, row, out| {
            let x = &x[row * weight.len()..][..weight.len()];
            for ((x, weight), out) in
                x.chunks_exact(width).zip(weight.chunks_exact(width)).zip(out.chunks_exact_mut(width))
            {
                norm_row(isa, x, weight, eps, out);
            }
        });
    }

    /// `x = silu(x / divisor)`, in rows of `width`.
    pub fn silu_divided(&self, x: &mut [f32], divisor: f32, width: usize) {
        self.each_row(x, width, |isa, _, x| silu_divided_row(isa, divisor, x));
    }

    /// `out = mean over streams of sigmoid(mix) * x`; mix, x: (T, S, D), out: (T, D) with D = `width`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn mix_streams(&self, mix: &[f32], x: &[f32], width: usize, out: &mut [f32]) {
        let streams = x.len().checked_div(out.len()).unwrap_or(0);
        assert!(x.len() == mix.len() && x.len() == streams * out.len(), "mix of streams of {width}");
        let all = streams * width;
        self.each_row(out, width, |isa, row, out| {
            mix_row(isa, &mix[row * all..][..all], &x[row * all..][..all], out);
        });
    }

    /// `x[stream] += 2 sigmoid(gate[stream] / S) * y`; x: (T, S, D), y: (T, D) with D = `width`, gate: (T, S).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add_to_streams(&self, x: &mut [f32], y: &[f32], gate: &[f32], width: usize) {
        let streams = x.len().checked_div(y.len()).unwrap_or(0);
        assert!(x.len() == streams * y.len() && x.len() == gate.len() * width, "writing to streams of {width}");
        self.each_row(x, streams * width, |isa, row, x| {
            let (y, gate) = (&y[row * width..][..width], &gate[row * streams..][..streams]);
            for (x, gate) in x.chunks_exact_mut(width).zip(gate) {
                add_scaled_row(isa, 2.0 / (1.0 + lanes::exp(-gate / streams as f32)), y, x);
            }
        });
    }

    /// `out[stream] = sigmoid(root(key . query / sqrt(D))) * value` with `root(g) = sign(g) sqrt(max(|g|, 1e-6))`; key, query,
    /// out: (T, S, D), value: (T, D) with D = `width`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn gate_streams(&self, key: &[f32], query: &[f32], value: &[f32], width: usize, out: &mut [f32]) {
        let streams = out.len().checked_div(value.len()).unwrap_or(0);
        let fits = key.len() == out.len() && query.len() == out.len() && out.len() == streams * value.len();
        assert!(fits, "gates of streams of {width}");
        let all = streams * width;
        self.each_row(out, all, |isa, row, out| {
            let of = |x: &[f32], s: usize| row * all + s * width..(row * all + (s + 1) * width).min(x.len());
            for (s, out) in out.chunks_exact_mut(width).enumerate() {
                let value = &value[row * width..][..width];
                gate_row(isa, &key[of(key, s)], &query[of(query, s)], value, out);
            }
        });
    }
}

for_each_isa! {
    pub(crate) fn silu_divided_row(divisor: f32, x: &mut [f32]) {
        for x in x {
            let scaled = *x / divisor;
            *x = scaled / (1.0 + lanes::exp(-scaled));
        }
    }
}

for_each_isa! {
    pub(crate) fn mix_row(mix: &[f32], x: &[f32], out: &mut [f32]) {
        let width = out.len();
        let streams = x.len() / width;
        out.fill(0.0);
        for (mix, x) in mix.chunks_exact(width).zip(x.chunks_exact(width)) {
            for ((out, mix), x) in out.iter_mut().zip(mix).zip(x) {
                *out += x / (1.0 + lanes::exp(-mix));
            }
        }
        out.iter_mut().for_each(|out| *out /= streams as f32);
    }
}

for_each_isa! {
    pub(crate) fn gate_row(key: &[f32], query: &[f32], value: &[f32], out: &mut [f32]) {
        let gate = lanes::dot(key, query) / (key.len() as f32).sqrt();
        let root = gate.abs().max(GATE_MIN).sqrt();
        // A gate of 0 is half open; `signum` has no zero.
        let root = if gate == 0.0 { 0.0 } else { root.copysign(gate) };
        let factor = 1.0 / (1.0 + lanes::exp(-root));
        out.iter_mut().zip(value).for_each(|(out, value)| *out = factor * value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 3.0).collect()
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    fn assert_near(found: &[f32], exact: impl Fn(usize) -> f64, what: &str) {
        for (i, found) in found.iter().enumerate() {
            let exact = exact(i);
            assert!((f64::from(*found) - exact).abs() < 2e-5, "{what} {i}: {found} and {exact}");
        }
    }

    #[test]
    fn streams_equal_the_formulas_for_ugly_shapes() {
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            for (tokens, streams, width) in [(0, 2, 5), (1, 2, 7), (3, 3, 16), (5, 4, 33), (9, 2, 64)] {
                let all = tokens * streams * width;
                let (x, m, y) = (wave(all, 0.7), wave(all, 1.3), wave(tokens * width, 0.9));
                let (gate, weight) = (wave(tokens * streams, 2.1), wave(streams * width, 0.4));
                let at = |x: &[f32], i: usize| f64::from(x[i]);
                let (token, stream) = (|i: usize| i / (streams * width), |i: usize| i / width % streams);

                let mut mixed = vec![0.0; tokens * width];
                compute.mix_streams(&m, &x, width, &mut mixed);
                let mean = |i: usize| {
                    let of = |s: usize| (i / width * streams + s) * width + i % width;
                    (0..streams).map(|s| sigmoid(at(&m, of(s))) * at(&x, of(s))).sum::<f64>() / streams as f64
                };
                assert_near(&mixed, mean, &format!("{isa} mix"));

                let mut added = x.clone();
                compute.add_to_streams(&mut added, &y, &gate, width);
                let sum = |i: usize| {
                    let factor = 2.0 * sigmoid(at(&gate, token(i) * streams + stream(i)) / streams as f64);
                    at(&x, i) + factor * at(&y, token(i) * width + i % width)
                };
                assert_near(&added, sum, &format!("{isa} add"));

                let mut normed = vec![0.0; all];
                compute.rms_norm_streams(&x, &weight, width, 1e-6, &mut normed);
                let norm = |i: usize| {
                    let own = &x[i / width * width..][..width];
                    let square = own.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    at(&x, i) / (square + 1e-6).sqrt() * at(&weight, i % (streams * width))
                };
                assert_near(&normed, norm, &format!("{isa} norm"));

                let mut gated = vec![0.0; all];
                compute.gate_streams(&m, &x, &y, width, &mut gated);
                let gates = |i: usize| {
                    let own = i / width * width;
                    let dot: f64 = (own..own + width).map(|j| at(&m, j) * at(&x, j)).sum();
                    let gate = dot / (width as f64).sqrt();
                    sigmoid(gate.signum() * gate.abs().max(1e-6).sqrt()) * at(&y, token(i) * width + i % width)
                };
                assert_near(&gated, gates, &format!("{isa} gate"));

                let mut divided = x.clone();
                compute.silu_divided(&mut divided, 4.0, width);
                assert_near(&divided, |i| at(&x, i) / 4.0 * sigmoid(at(&x, i) / 4.0), &format!("{isa} silu"));
            }
        }
    }

    #[test]
    fn a_gate_of_zero_is_half_open() {
        let compute = Compute::new(1, Isa::Portable);
        let mut out = [0.0; 2];
        compute.gate_streams(&[0.0, 0.0], &[1.0, 2.0], &[4.0, -2.0], 2, &mut out);
        assert_eq!(out, [2.0, -1.0]);
    }
}
