//! Softmax attention over cached keys and values, with the switches of all generations: biases, norms, a gate.

use qwenkit_kernels::{KvCache, Product, Weight};

use super::{BlockBuffers, Context, sized};
use crate::{
    plan::AttentionPlan,
    tap::{Site, visit},
};

/// Softmax attention's weights.
pub(crate) struct Attention {
    pub(crate) plan: AttentionPlan,
    /// (H K, D)
    pub(crate) q_proj: Weight,
    /// The output gate, (H K, D)
    pub(crate) gate_proj: Option<Weight>,
    /// (G K, D)
    pub(crate) k_proj: Weight,
    /// (G K, D)
    pub(crate) v_proj: Weight,
    /// (D, H K)
    pub(crate) o_proj: Weight,
    pub(crate) q_bias: Option<Vec<f32>>,
    pub(crate) k_bias: Option<Vec<f32>>,
    pub(crate) v_bias: Option<Vec<f32>>,
    /// (K)
    pub(crate) q_norm: Option<Vec<f32>>,
    /// (K)
    pub(crate) k_norm: Option<Vec<f32>>,
}

impl Attention {
    pub(crate) fn weight_bytes(&self) -> usize {
        let weights = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        weights.into_iter().chain(&self.gate_proj).map(Weight::size_bytes).sum()
    }

    /// out: (T, D) = attention of x: (T, D), whose keys and values join the cache.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        cache: &mut KvCache,
        buffers: &mut BlockBuffers,
        x: &[f32],
        out: &mut [f32],
    ) {
        let (plan, tokens) = (&self.plan, x.len() / self.q_proj.cols());
        let q = sized(&mut buffers.a, tokens * self.q_proj.rows());
        let k = sized(&mut buffers.b, tokens * self.k_proj.rows());
        let v = sized(&mut buffers.c, tokens * self.v_proj.rows());
        let gate = sized(&mut buffers.e, self.gate_proj.as_ref().map_or(0, |_| q.len()));
        let mut products = vec![
            Product { weight: &self.q_proj, out: &mut *q },
            Product { weight: &self.k_proj, out: &mut *k },
            Product { weight: &self.v_proj, out: &mut *v },
        ];
        products.extend(self.gate_proj.as_ref().map(|weight| Product { weight, out: &mut *gate }));
        cx.compute.matmul(&mut buffers.matmul, x, &mut products);
        for (x, bias) in [(&mut *q, &self.q_bias), (&mut *k, &self.k_bias), (&mut *v, &self.v_bias)] {
            if let Some(bias) = bias {
                cx.compute.add_bias(x, bias);
            }
        }
        for (x, norm) in [(&mut *q, &self.q_norm), (&mut *k, &self.k_norm)] {
            if let Some(norm) = norm {
                cx.compute.rms_norm_in_place(x, norm, cx.eps);
            }
            cx.compute.rope(x, plan.head_dim, cx.cos, cx.sin, cx.pairs);
        }
        visit(cx.tap, Site::Query, cx.layer, q);
        visit(cx.tap, Site::Key, cx.layer, k);
        visit(cx.tap, Site::Value, cx.layer, v);
        let kv_width = plan.kv_heads * plan.head_dim;
        for seq in cx.seqs {
            let rows = seq.rows.start * kv_width..seq.rows.end * kv_width;
            cache.write(cx.compute, seq.pages, seq.first, &k[rows.clone()], &v[rows]);
        }
        let heads = sized(&mut buffers.d, q.len());
        let scale = 1.0 / (plan.head_dim as f32).sqrt();
        cx.compute.attention(cache, cx.seqs, plan.window, scale, (q, heads));
        if self.gate_proj.is_some() {
            cx.compute.sigmoid_mul(heads, gate, self.q_proj.rows());
        }
        visit(cx.tap, Site::Heads, cx.layer, heads);
        cx.compute.matmul(&mut buffers.matmul, heads, &mut [Product { weight: &self.o_proj, out }]);
    }
}
