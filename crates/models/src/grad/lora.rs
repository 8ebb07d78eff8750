//! Adapters both ways: what a module's LoRA adds, and its gradients. y += s (x A) B, so with h = x A:
//! dB = s h^T dy, dh = s dy B^T, dA = x^T dh, dx += dh A^T. What is added to a product is added while that is made.
//!
//! With magnitudes y = c u follows, u being the sum and c = m / n; the lengths n are constants. So dm is the sum over tokens of
//! dy u / n, which is that of dy y / m, and c dy takes the place of dy. A row whose magnitude is zero gives nothing and learns
//! nothing.

use qwenkit_kernels::{Join, Kept, LowRank, Mat};

use super::tape::{Way, sized};
use crate::adapter::Module;

/// A matrix for each module: x A, or the gradient towards it, (T, R); empty where nothing is adapted.
pub(super) type Lows = [Vec<f32>; Module::COUNT];

/// Buffers of the way back through magnitudes: outputs, gradients towards them, sums.
#[derive(Default)]
pub(super) struct MagnitudeRoom {
    pub(super) y: Vec<f32>,
    dy: Vec<f32>,
    pub(super) sums: Vec<f32>,
}

impl MagnitudeRoom {
    pub(super) fn held_bytes(&self) -> usize {
        4 * (self.y.capacity() + self.dy.capacity() + self.sums.capacity())
    }
}

/// Some outputs of a module.
#[derive(Clone, Copy)]
pub(super) struct Outputs {
    pub(super) module: Module,
    /// The first of them, and how many.
    pub(super) first: usize,
    pub(super) width: usize,
}

impl Outputs {
    pub(super) fn all(module: Module, width: usize) -> Outputs {
        Outputs { module, first: 0, width }
    }
}

impl Way<'_> {
    /// Keeps x A of some modules of one x: (T, inputs).
    pub(super) fn low(&self, modules: &[Module], x: &[f32], lows: &mut Lows) {
        for module in modules {
            if let Some(lora) = self.adapter.lora(self.layer, *module) {
                let (rows, low) = (x.len() / lora.inputs, &mut lows[*module as usize]);
                low.truncate(rows * lora.rank);
                sized(low, rows * lora.rank);
                let a = Mat::new(&self.adapter.values()[lora.a()], lora.inputs, lora.rank);
                self.compute.product(Mat::new(x, rows, lora.inputs), a, Join::OVER, low);
            }
        }
    }

    /// What is added to `width` outputs of a module from output `first` on.
    pub(super) fn added<'a>(
        &'a self,
        module: Module,
        (first, width): (usize, usize),
        lows: &'a Lows,
    ) -> Option<LowRank<'a>> {
        let lora = self.adapter.lora(self.layer, module)?;
        let low = &lows[module as usize];
        let b = &self.adapter.values()[lora.b()][first..];
        Some(LowRank {
            left: Mat::new(low, low.len() / lora.rank, lora.rank),
            right: Mat::strided(b, lora.rank, width, lora.outputs),
            alpha: lora.scale,
        })
    }

    /// Whether a module has magnitudes.
    pub(super) fn has_magnitudes(&self, module: Module) -> bool {
        self.adapter.lora(self.layer, module).is_some_and(|lora| lora.magnitudes().is_some())
    }

    /// Brings y: (T, width) to its magnitudes, if the module has such.
    pub(super) fn scale(&self, of: Outputs, y: &mut [f32]) {
        if let Some(factors) = self.adapter.lora(self.layer, of.module).and_then(|lora| self.adapter.factors(lora)) {
            self.compute.scale_columns(y, &factors[of.first..of.first + of.width]);
        }
    }

    /// The way back of `scale`, y being what it gave: adds the magnitudes' gradients to `grads`; dy becomes the gradient towards
    /// what it was given. Both (T, width).
    pub(super) fn scale_backward(
        &self,
        of: Outputs,
        y: &[f32],
        dy: &mut [f32],
        sums: &mut Vec<f32>,
        grads: &mut [f32],
    ) {
        let magnitudes = self.adapter.lora(self.layer, of.module).and_then(|lora| lora.magnitudes());
        let Some(magnitudes) = magnitudes else { return };
        let own = magnitudes.start + of.first..magnitudes.start + of.first + of.width;
        let sums = sized(sums, of.width);
        self.compute.column_dots(y, dy, sums);
        for ((grad, sum), m) in grads[own.clone()].iter_mut().zip(sums).zip(&self.adapter.values()[own]) {
            if *m != 0.0 {
                *grad += *sum / m;
            }
        }
        self.scale(of, dy);
    }

    /// The same where y was kept.
    pub(super) fn scale_backward_kept(
        &self,
        of: Outputs,
        kept: &Kept,
        dy: &mut [f32],
        room: &mut MagnitudeRoom,
        grads: &mut [f32],
    ) {
        if self.has_magnitudes(of.module) {
            let y = sized(&mut room.y, dy.len());
            self.compute.recall(kept, y);
            self.scale_backward(of, y, dy, &mut room.sums, grads);
        }
    }

    /// The same where others need dy as it is: the result is dy itself or stands in `room`.
    pub(super) fn scale_backward_apart<'a>(
        &self,
        of: Outputs,
        kept: &Kept,
        dy: &'a [f32],
        room: &'a mut MagnitudeRoom,
        grads: &mut [f32],
    ) -> &'a [f32] {
        if !self.has_magnitudes(of.module) {
            return dy;
        }
        let (y, own) = (sized(&mut room.y, dy.len()), sized(&mut room.dy, dy.len()));
        self.compute.recall(kept, y);
        own.copy_from_slice(dy);
        self.scale_backward(of, y, own, &mut room.sums, grads);
        own
    }

    /// From the gradients towards a module's outputs, which are `dys` side by side: adds the adapter's, or the matrix's own, to
    /// `grads`, which lie as its values, and keeps that towards x A in `d_lows`. x and `lows` are as in the forward pass.
    pub(super) fn low_backward(
        &self,
        module: Module,
        (x, lows): (&[f32], &Lows),
        dys: &[&[f32]],
        (d_lows, part): (&mut Lows, &mut Vec<f32>),
        grads: &mut [f32],
    ) {
        if let [dy] = dys {
            self.matrix_backward(module, x, dy, grads);
        }
        let Some(lora) = self.adapter.lora(self.layer, module) else { return };
        let (compute, rows, rank) = (self.compute, x.len() / lora.inputs, lora.rank);
        let b = &self.adapter.values()[lora.b()];
        let (low, d_low) = (Mat::new(&lows[module as usize], rows, rank), &mut d_lows[module as usize]);
        d_low.truncate(rows * rank);
        sized(d_low, rows * rank);
        let mut first = 0;
        for dy in dys.iter().filter(|dy| !dy.is_empty()) {
            let width = dy.len() / rows;
            let dy = Mat::new(dy, rows, width);
            let own = Mat::strided(&b[first..], rank, width, lora.outputs);
            compute.product(dy, own.t(), Join { alpha: lora.scale, add: first > 0 }, d_low);
            let into = Join { alpha: lora.scale, add: true };
            let of_b = &mut grads[lora.b()];
            if width == lora.outputs {
                compute.product(low.t(), dy, into, of_b);
            } else {
                let part = sized(part, rank * width);
                compute.product(low.t(), dy, Join { add: false, ..into }, part);
                for (r, part) in part.chunks_exact(width).enumerate() {
                    let to = &mut of_b[r * lora.outputs + first..][..width];
                    to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
                }
            }
            first += width;
        }
        let d_low = Mat::new(d_low, rows, rank);
        compute.product(Mat::new(x, rows, lora.inputs).t(), d_low, Join::ADD, &mut grads[lora.a()]);
    }

    /// What some modules add to the gradient towards their common x.
    pub(super) fn through<'a>(&'a self, modules: &[Module], d_lows: &'a Lows) -> Vec<LowRank<'a>> {
        let of = |module: &Module| {
            let (lora, d_low) = (self.adapter.lora(self.layer, *module)?, &d_lows[*module as usize]);
            let a = Mat::new(&self.adapter.values()[lora.a()], lora.inputs, lora.rank);
            Some(LowRank { left: Mat::new(d_low, d_low.len() / lora.rank, lora.rank), right: a.t(), alpha: 1.0 })
        };
        modules.iter().filter_map(of).collect()
    }
}
