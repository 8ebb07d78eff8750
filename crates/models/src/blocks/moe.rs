//! A mixture of experts: a router, gated units of which each token visits a few, and one that all visit.
//!
//! Each expert that any token of the batch goes to is read once, for all its tokens; the others are not touched. The
//! router computes in f32 whatever the file's type: rounding it sends tokens to other experts.

use qwenkit_kernels::{GroupedProduct, Product, Weight};

use super::{BlockBuffers, Context, DenseFfn, sized};
use crate::{
    adapter::Module,
    plan::MoePlan,
    tap::{Site, visit},
};

/// What adapters call the shared expert's matrices.
pub(crate) const SHARED: [Module; 3] = [Module::SharedGateProj, Module::SharedUpProj, Module::SharedDownProj];

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
        let shared_gate = sized(&mut buffers.shared_gate, self.shared.as_ref().map_or(0, |_| tokens));
        let mut products = vec![Product { weight: &self.router, out: &mut *logits }];
        products.extend(self.shared.as_ref().map(|s| Product { weight: &s.router, out: &mut *shared_gate }));
        compute.matmul(&mut buffers.matmul, x, &mut products);
        visit(cx.tap, Site::Router, cx.layer, logits);
        buffers.routing.choose(compute.isa(), self.plan.router, logits);
        self.experts(cx, buffers, x, out);
        if let Some(shared) = &self.shared {
            // The shared expert's forward uses the first two buffers.
            let mut result = std::mem::take(&mut buffers.d);
            shared.ffn.forward(cx, SHARED, buffers, x, sized(&mut result, x.len()));
            compute.add_gated(out, &result[..x.len()], &buffers.shared_gate[..tokens], width);
            buffers.d = result;
        }
    }

    /// out: (T, D) = the weighted sum of the chosen experts: one fork for all products of a kind.
    fn experts(&self, cx: &Context<'_, '_, '_>, buffers: &mut BlockBuffers, x: &[f32], out: &mut [f32]) {
        let (width, compute) = (self.router.cols(), cx.compute);
        let BlockBuffers { routing, matmul, a, b, d, .. } = buffers;
        let routes = routing.routes();
        let (gate, up) = (sized(a, routes.len() * self.plan.width), sized(b, routes.len() * self.plan.width));
        let results = sized(d, routes.len() * width);
        // A single token is every expert's only row, wherever it lies.
        let is_single = x.len() == width;
        let own = if is_single {
            x
        } else {
            compute.gather_rows(routes, x, width, results);
            &*results
        };
        let mut products = Vec::with_capacity(2 * routes.len());
        let (mut gates, mut ups) = (&mut *gate, &mut *up);
        let mut first = 0;
        for routes in routing.by_expert() {
            let expert = &self.experts[routes[0].expert];
            let rows = if is_single { 0..1 } else { first..first + routes.len() };
            for (weight, outs) in [(&expert.gate, &mut gates), (&expert.up, &mut ups)] {
                let (out, others) = std::mem::take(outs).split_at_mut(routes.len() * self.plan.width);
                *outs = others;
                products.push(GroupedProduct { weight, rows: rows.clone(), out });
            }
            first += routes.len();
        }
        compute.matmul_grouped(matmul, own, &mut products);
        compute.silu_mul(gate, up, self.plan.width);
        let mut products = Vec::with_capacity(routes.len());
        let mut outs = &mut *results;
        let mut first = 0;
        for routes in routing.by_expert() {
            let (out, others) = outs.split_at_mut(routes.len() * width);
            outs = others;
            let weight = &self.experts[routes[0].expert].down;
            products.push(GroupedProduct { weight, rows: first..first + routes.len(), out });
            first += routes.len();
        }
        compute.matmul_grouped(matmul, gate, &mut products);
        compute.add_routes(routing, results, width, out);
    }
}
