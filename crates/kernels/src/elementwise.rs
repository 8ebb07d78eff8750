//! The ops between matrix products: norms, biases, rotary positions, gated activations, residuals.
//!
//! All work on rows of one token each and give a token the same bits whatever its neighbours. With several tokens the
//! rows are divided among the threads.

use crate::{
    Isa,
    lanes::{self, for_each_isa},
    matmul::Compute,
};

impl Compute {
    /// Root-mean-square norm of each row: `out = x / sqrt(mean(x^2) + eps) * weight`. x, out: (T, D); weight: (D).
    /// For a per-head norm let rows be (T, H) and D the head size. Source: Zhang and Sennrich 2019.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        assert_eq!(x.len(), out.len(), "rms_norm's output");
        self.each_row(out, width, |isa, row, out| {
            norm_row(isa, &x[row * width..][..width], weight, eps, out);
        });
    }

    /// As `rms_norm`, in place.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let width = weight.len();
        self.each_row(x, width, |isa, _, x| norm_row_in_place(isa, weight, eps, x));
    }

    /// Adds `bias`: (N) to each row of x: (T, N).
    pub fn add_bias(&self, x: &mut [f32], bias: &[f32]) {
        self.each_row(x, bias.len(), |isa, _, x| add_row(isa, bias, x));
    }

    /// Multiplies each row of x: (T, N) with `factors`: (N).
    pub fn scale_columns(&self, x: &mut [f32], factors: &[f32]) {
        self.each_row(x, factors.len(), |isa, _, x| mul_row(isa, factors, x));
    }

    /// Adds `y` to `x`, both (T, D).
    pub fn add(&self, x: &mut [f32], y: &[f32], width: usize) {
        assert_eq!(x.len(), y.len(), "residual");
        self.each_row(x, width, |isa, row, x| add_row(isa, &y[row * width..][..width], x));
    }

    /// `gate = silu(gate) * up`, both (T, F). Source: Shazeer 2020, SwiGLU.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32], width: usize) {
        assert_eq!(gate.len(), up.len(), "silu_mul");
        self.each_row(gate, width, |isa, row, gate| silu_mul(isa, &up[row * width..][..width], gate));
    }

    /// Rotates each head of x: (T, H, K) by its token's angles, halves against halves (the NeoX pairing). `cos` and `sin`
    /// are (T, R) for the first 2 R values of a head; the others stay. Source: Su et al. 2021.
    pub fn rope(&self, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], rotated: usize) {
        let tokens = cos.len() / rotated;
        let width = x.len() / tokens.max(1);
        assert!(2 * rotated <= head_dim && sin.len() == cos.len(), "rope of {head_dim} by {rotated} angles");
        self.each_row(x, width, |isa, row, x| {
            let (cos, sin) = (&cos[row * rotated..][..rotated], &sin[row * rotated..][..rotated]);
            rope_row(isa, head_dim, cos, sin, x);
        });
    }
}

for_each_isa! {
    pub(crate) fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = norm_scale(x, eps);
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * w;
        }
    }
}

for_each_isa! {
    pub(crate) fn norm_row_in_place(weight: &[f32], eps: f32, x: &mut [f32]) {
        let scale = norm_scale(x, eps);
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
}

#[inline(always)]
fn norm_scale(x: &[f32], eps: f32) -> f32 {
    let mean = lanes::sum_by(x, |x| x * x) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

for_each_isa! {
    pub(crate) fn add_row(y: &[f32], x: &mut [f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

for_each_isa! {
    pub(crate) fn mul_row(y: &[f32], x: &mut [f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x *= y);
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + lanes::exp(-x))
}

/// `gate = silu(gate) * up`.
pub(crate) fn silu_mul(isa: Isa, up: &[f32], gate: &mut [f32]) {
    match isa {
        // SAFETY: an `Isa` reaches the ops only through `Compute::new`, which has checked that it is present.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::elementwise::silu_mul_row(up, gate) },
        _ => silu_mul_row(isa, up, gate),
    }
}

/// `x = silu(x)`, one row.
pub(crate) fn silu_row(isa: Isa, x: &mut [f32]) {
    match isa {
        // SAFETY: an `Isa` reaches the ops only through `Compute::new`, which has checked that it is present.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::elementwise::silu_row(x) },
        _ => plain_silu_row(isa, x),
    }
}

for_each_isa! {
    pub(crate) fn plain_silu_row(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = silu(*x));
    }
}

for_each_isa! {
    pub(crate) fn silu_mul_row(up: &[f32], gate: &mut [f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = silu(*gate) * up;
        }
    }
}

for_each_isa! {
    pub(crate) fn rope_row(head_dim: usize, cos: &[f32], sin: &[f32], x: &mut [f32]) {
        let rotated = cos.len();
        for head in x.chunks_exact_mut(head_dim) {
            let (first, rest) = head.split_at_mut(rotated);
            for (((a, b), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
