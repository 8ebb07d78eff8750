//! Adapters both ways: what a module's LoRA adds, and its gradients. y += s (x A) B, so with h = x A:
//! dB = s h^T dy, dh = s dy B^T, dA = x^T dh, dx += dh A^T.

use qwenkit_kernels::{Join, Mat};

use super::tape::{Way, sized};
use crate::adapter::Module;

impl Way<'_> {
    /// Adds to `outs`, side by side (T, outputs of `module`), what the adapter adds for x. `lows` keeps x A.
    pub(super) fn adapt(
        &self,
        module: Module,
        x: &[f32],
        lows: &mut [Vec<f32>; Module::COUNT],
        outs: &mut [&mut [f32]],
    ) {
        if let Some(lora) = self.adapter.lora(self.layer, module) {
            let low = &mut lows[module as usize];
            low.resize(x.len() / lora.inputs * lora.rank, 0.0);
            self.adapter.add(self.compute, lora, x, low, outs);
        }
    }

    /// Backward of `adapt`, whose x and kept `lows` are given: adds to `grads`, which lie as the adapter's values, and to `dx`,
    /// the gradient towards x, if there is one. `dys` are those towards the outs.
    pub(super) fn adapt_backward(
        &self,
        module: Module,
        (x, lows): (&[f32], &[Vec<f32>; Module::COUNT]),
        dys: &[&[f32]],
        (d_low, part): (&mut Vec<f32>, &mut Vec<f32>),
        grads: &mut [f32],
        dx: Option<&mut [f32]>,
    ) {
        let Some(lora) = self.adapter.lora(self.layer, module) else { return };
        let (compute, rows, rank) = (self.compute, x.len() / lora.inputs, lora.rank);
        let (a, b) = (&self.adapter.values()[lora.a()], &self.adapter.values()[lora.b()]);
        let low = Mat::new(&lows[module as usize], rows, rank);
        let d_low = sized(d_low, rows * rank);
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
        if let Some(dx) = dx {
            compute.product(d_low, Mat::new(a, lora.inputs, rank).t(), Join::ADD, dx);
        }
    }
}
