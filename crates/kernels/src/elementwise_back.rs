//! Backward of the ops between matrix products (`elementwise`, `gates`): norms, rotations, gated activations.
//!
//! All work on rows of one token each. Gradients towards inputs only: norm weights and biases are frozen.

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
};

impl Compute {
    /// Backward of `rms_norm`: adds to `dx` the gradient towards x, from dy. x, dy, dx: rows of weight's length.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let width = weight.len();
        assert!(x.len() == dx.len() && dy.len() == dx.len(), "rms_norm_backward");
        self.each_row(dx, width, |isa, row, dx| {
            norm_back_row(isa, &x[row * width..][..width], weight, eps, &dy[row * width..][..width], dx);
        });
    }

    /// Backward of `scale_columns` towards the logarithms of its factors: `out`: (N) = the sum over rows of y dy, both (T, N),
    /// y being what it gave.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn column_dots(&self, y: &[f32], dy: &[f32], out: &mut [f32]) {
        let width = out.len();
        assert!(y.len() == dy.len() && y.len().is_multiple_of(width.max(1)), "column_dots");
        let shared = crate::shared_out::SharedOut::new(out);
        self.pool().run_split(width, lanes::LANES, |own| {
            // SAFETY: each column is in one thread's range.
            let out = unsafe { shared.slice(own.start, own.len()) };
            out.fill(0.0);
            for (y, dy) in y.chunks_exact(width).zip(dy.chunks_exact(width)) {
                add_products_row(self.isa(), &y[own.clone()], &dy[own.clone()], out);
            }
        });
    }

    /// Backward of `silu_mul`, whose gate and up are given as they were before it: `gate` becomes the gradient towards gate,
    /// `up` that towards up. All (T, F) with F = `width`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn silu_mul_backward(&self, gate: &mut [f32], up: &mut [f32], dh: &[f32], width: usize) {
        assert!(gate.len() == up.len() && dh.len() == gate.len(), "silu_mul_backward");
        let shared = crate::shared_out::SharedOut::new(up);
        self.each_row(gate, width, |isa, row, gate| {
            // SAFETY: each row is handed out once.
            let up = unsafe { shared.slice(row * width, width) };
            silu_mul_back_row(isa, gate, up, &dh[row * width..][..width]);
        });
    }

    /// Backward of `sigmoid_mul`: x as it was before; `dy` becomes the gradient towards x, `gate` that towards the gate.
    /// All (T, N) with N = `width`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn sigmoid_mul_backward(&self, x: &[f32], gate: &mut [f32], dy: &mut [f32], width: usize) {
        assert!(x.len() == gate.len() && dy.len() == gate.len(), "sigmoid_mul_backward");
        let shared = crate::shared_out::SharedOut::new(gate);
        self.each_row(dy, width, |isa, row, dy| {
            // SAFETY: each row is handed out once.
            let gate = unsafe { shared.slice(row * width, width) };
            sigmoid_mul_back_row(isa, &x[row * width..][..width], gate, dy);
        });
    }

    /// Backward of `rope`, in place: the same rotation the other way.
    pub fn rope_backward(&self, dx: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], rotated: usize) {
        let back: Vec<f32> = sin.iter().map(|s| -s).collect();
        self.rope(dx, head_dim, cos, &back, rotated);
    }
}

for_each_isa! {
    /// y = s w x with s = (mean(x^2) + eps)^-1/2, so dx = s w dy - x s^3 / D * sum(w dy x).
    pub(crate) fn norm_back_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let mean = lanes::sum_by(x, |x| x * x) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        let along = lanes::dot_3(x, weight, dy) * scale * scale * scale / x.len() as f32;
        for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
            *dx += scale * w * dy - x * along;
        }
    }
}

for_each_isa! {
    pub(crate) fn add_products_row(x: &[f32], y: &[f32], out: &mut [f32]) {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out += x * y;
        }
    }
}

for_each_isa! {
    pub(crate) fn silu_mul_back_row(gate: &mut [f32], up: &mut [f32], dh: &[f32]) {
        for ((gate, up), dh) in gate.iter_mut().zip(up).zip(dh) {
            let x = *gate;
            let sigmoid = 1.0 / (1.0 + lanes::exp(-x));
            *gate = dh * *up * sigmoid * (1.0 + x * (1.0 - sigmoid));
            *up = dh * x * sigmoid;
        }
    }
}

for_each_isa! {
    pub(crate) fn sigmoid_mul_back_row(x: &[f32], gate: &mut [f32], dy: &mut [f32]) {
        for ((x, gate), dy) in x.iter().zip(gate).zip(dy) {
            let sigmoid = 1.0 / (1.0 + lanes::exp(-*gate));
            *gate = *dy * x * sigmoid * (1.0 - sigmoid);
            *dy *= sigmoid;
        }
    }
}
