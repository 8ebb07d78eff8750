//! A mixture of experts: a router, gated units of which each token visits a few, and one that all visit.
//!
//! Each expert that any token of the batch goes to is read once, for all its tokens; the others are not touched. The
//! router computes in f32 whatever the file's type: rounding it sends tokens to other experts.

use qwenkit_kernels::{Product, Weight};

use super::{BlockBuffers, Context, DenseFfn, sized};
use crate::{
    plan::MoePlan,
    tap::{Site, visit},
};

/// A mixture's weights.
pub(crate) struct Moe {
    pub(crate) plan: MoePlan,
    /// (E, D), f32
    pub(crate) router: Weight,
    /// E of them
    pub(crate) experts: Vec<DenseFfn>,
    pub(crate) shared: Option<SharedExpert>,
}

/// The expert that every token visits.
pub(crate) struct SharedExpert {
    /// (1, D), f32
    pub(crate) router: Weight,
    pub(crate) ffn: DenseFfn,
}

impl Moe {
    pub(crate) fn weight_bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, |s| s.router.size_bytes() + s.ffn.weight_bytes());
        self.router.size_bytes() + self.expert_bytes() + shared
    }

    /// Bytes of experts that a token does not visit.
    pub(crate) fn idle_bytes(&self) -> usize {
        let (all, visited) = (self.experts.len(), self.plan.router.experts_per_token);
        self.expert_bytes() / all.max(1) * (all - visited.min(all))
    }

    fn expert_bytes(&self) -> usize {
        self.experts.iter().map(DenseFfn::weight_bytes).sum()
    }

    /// out: (T, D) = the weighted sum of the experts of x: (T, D), then the shared one's.
    pub(crate) fn forward(&self, cx: &mut Context<'_, '_, '_>, buffers: &mut BlockBuffers, x: &[f32], out: &mut [f32]) {
        let (width, compute) = (self.router.cols(), cx.compute);
        let tokens = x.len() / width;
        let logits = sized(&mut buffers.c, tokens * self.router.rows());
        compute.matmul(&mut buffers.matmul, x, &mut [Product { weight: &self.router, out: &mut *logits }]);
        visit(cx.tap, Site::Router, cx.layer, logits);
        buffers.routing.choose(compute.isa(), self.plan.router, logits);
        out.fill(0.0);
        for routes in buffers.routing.by_expert() {
            let Some(expert) = routes.first().and_then(|r| self.experts.get(r.expert)) else { continue };
            let own = sized(&mut buffers.d, routes.len() * width);
            compute.gather_rows(routes, x, width, own);
            let gate = sized(&mut buffers.a, routes.len() * self.plan.width);
            let up = sized(&mut buffers.b, routes.len() * self.plan.width);
            let mut products =
                [Product { weight: &expert.gate, out: &mut *gate }, Product { weight: &expert.up, out: &mut *up }];
            compute.matmul(&mut buffers.matmul, own, &mut products);
            compute.silu_mul(gate, up, self.plan.width);
            compute.matmul(&mut buffers.matmul, gate, &mut [Product { weight: &expert.down, out: &mut *own }]);
            compute.add_weighted_rows(routes, own, width, out);
        }
        if let Some(shared) = &self.shared {
            // The shared expert's forward uses the first two buffers.
            let mut result = std::mem::take(&mut buffers.d);
            shared.ffn.forward(cx, buffers, x, sized(&mut result, x.len()));
            let gate = sized(&mut buffers.c, tokens);
            compute.matmul(&mut buffers.matmul, x, &mut [Product { weight: &shared.router, out: &mut *gate }]);
            compute.add_gated(out, &result[..x.len()], gate, width);
            buffers.d = result;
        }
    }
}
