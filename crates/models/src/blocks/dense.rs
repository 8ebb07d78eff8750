//! The dense feed-forward block: a gated unit. Source: Shazeer 2020, SwiGLU.

use qwenkit_kernels::{GatedUnit, Product, Weight};

use super::{BlockBuffers, Context, sized};
use crate::{
    adapter::Module,
    tap::{Site, visit},
};

/// A dense feed-forward block's weights.
pub(crate) struct DenseFfn {
    /// (F, D)
    pub(crate) gate: Weight,
    /// (F, D)
    pub(crate) up: Weight,
    /// (D, F)
    pub(crate) down: Weight,
}

impl DenseFfn {
    pub(crate) fn weight_bytes(&self) -> usize {
        [&self.gate, &self.up, &self.down].into_iter().map(Weight::size_bytes).sum()
    }

    /// out: (T, D) = down(silu(gate(x)) * up(x)) of x: (T, D). `modules` are what adapters call gate, up and down.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        modules: [Module; 3],
        buffers: &mut BlockBuffers,
        x: &[f32],
        out: &mut [f32],
    ) {
        if cx.tap.is_none() && cx.adapted.of_seqs.is_empty() {
            // Nobody looks at the inner values or adds to them.
            let unit = GatedUnit { gate: &self.gate, up: &self.up, down: &self.down };
            return cx.compute.gated_unit(&mut buffers.matmul, x, unit, out);
        }
        let [of_gate, of_up, of_down] = modules;
        let (tokens, width) = (x.len() / self.gate.cols(), self.gate.rows());
        let gate = sized(&mut buffers.a, tokens * width);
        let up = sized(&mut buffers.b, tokens * width);
        let mut products =
            [Product { weight: &self.gate, out: &mut *gate }, Product { weight: &self.up, out: &mut *up }];
        cx.compute.matmul(&mut buffers.matmul, x, &mut products);
        cx.adapt(of_gate, &mut buffers.low, x, &mut [&mut *gate]);
        cx.adapt(of_up, &mut buffers.low, x, &mut [&mut *up]);
        cx.compute.silu_mul(gate, up, width);
        visit(cx.tap, Site::FfnHidden, cx.layer, gate);
        cx.compute.matmul(&mut buffers.matmul, gate, &mut [Product { weight: &self.down, out: &mut *out }]);
        cx.adapt(of_down, &mut buffers.low, gate, &mut [out]);
    }
}
