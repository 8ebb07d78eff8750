//! Gated DeltaNet: a short convolution, the delta rule over a state of fixed size, a gated norm.
//!
//! Prompts and single tokens take the same way through the state and get the same bits. Source: Yang et al. 2024; order of operations as in transformers' Qwen3-Next and Qwen3.5.

use qwenkit_kernels::{DeltaGates, DeltaLayer, Product, Weight};

use super::{BlockBuffers, Context, sized};
use crate::{
    adapter::Module,
    plan::DeltaNetPlan,
    state::RecurrentState,
    tap::{Site, visit},
};

/// Gated DeltaNet's weights. C: channels of q, k and v together; H: value heads; V: their size.
pub(crate) struct DeltaNet {
    pub(crate) plan: DeltaNetPlan,
    /// (C, D)
    pub(crate) in_qkv: Weight,
    /// (H V, D)
    pub(crate) in_z: Weight,
    /// (H, D)
    pub(crate) in_b: Weight,
    /// (H, D)
    pub(crate) in_a: Weight,
    /// (conv width, C), oldest token first
    pub(crate) conv: Vec<f32>,
    /// (H)
    pub(crate) fade_bias: Vec<f32>,
    /// `-exp(A_log)`, (H)
    pub(crate) rate: Vec<f32>,
    /// (V)
    pub(crate) norm: Vec<f32>,
    /// (D, H V)
    pub(crate) out_proj: Weight,
}

impl DeltaNet {
    pub(crate) fn weight_bytes(&self) -> usize {
        let weights = [&self.in_qkv, &self.in_z, &self.in_b, &self.in_a, &self.out_proj];
        weights.into_iter().map(Weight::size_bytes).sum::<usize>() + self.conv.len() * size_of::<f32>()
    }

    /// The gates of tokens with these numbers: (T, H) each.
    pub(crate) fn gates<'a>(&'a self, write: &'a [f32], fade: &'a [f32]) -> DeltaGates<'a> {
        DeltaGates { write, fade, fade_bias: &self.fade_bias, rate: &self.rate }
    }

    /// out: (rows, D) = DeltaNet of the wanted rows of x: (T, D), all of whose tokens join the state.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        state: &mut RecurrentState,
        buffers: &mut BlockBuffers,
        x: &[f32],
        out: &mut [f32],
    ) {
        let (shape, compute) = (self.plan.shape, cx.compute);
        let (width, values) = (self.in_qkv.cols(), shape.value_width());
        let tokens = x.len() / width;
        let rows = cx.wanted.map_or(tokens, |wanted| wanted.rows.len());
        let heads = shape.value_heads;
        let raw = sized(&mut buffers.a, tokens * shape.channels());
        let z = sized(&mut buffers.b, rows * values);
        let (b, a) = sized(&mut buffers.c, 2 * tokens * heads).split_at_mut(tokens * heads);
        let of_qkv = Product { weight: &self.in_qkv, out: &mut *raw };
        let of_b = Product { weight: &self.in_b, out: &mut *b };
        let of_a = Product { weight: &self.in_a, out: &mut *a };
        let of_gate = Product { weight: &self.in_z, out: &mut *z };
        let own = match cx.wanted {
            Some(wanted) => {
                compute.matmul(&mut buffers.matmul, x, &mut [of_qkv, of_b, of_a]);
                let own = sized(&mut buffers.d, rows * width);
                wanted.copy(x, own);
                compute.matmul(&mut buffers.matmul, own, &mut [of_gate]);
                own
            }
            None => {
                compute.matmul(&mut buffers.matmul, x, &mut [of_qkv, of_b, of_a, of_gate]);
                x
            }
        };
        let low = &mut buffers.low;
        cx.adapt(Module::InProjZ, low, own, &mut [&mut *z]);
        cx.adapt_all(Module::InProjQkv, low, x, &mut [&mut *raw]);
        cx.adapt_all(Module::InProjB, low, x, &mut [&mut *b]);
        cx.adapt_all(Module::InProjA, low, x, &mut [&mut *a]);
        let layer = DeltaLayer {
            x: raw,
            conv: &self.conv,
            gates: self.gates(b, a),
            norm: &self.norm,
            eps: cx.eps,
            gate: self.plan.gate,
            wanted: cx.wanted.map(|wanted| &wanted.rows[..]),
        };
        compute.delta_layer(&mut state.conv, &mut state.delta, cx.recurrent, &layer, z);
        let gated = z;
        visit(cx.tap, Site::Heads, cx.layer, gated);
        compute.matmul(&mut buffers.matmul, gated, &mut [Product { weight: &self.out_proj, out: &mut *out }]);
        cx.adapt(Module::OutProj, &mut buffers.low, gated, &mut [out]);
    }
}
