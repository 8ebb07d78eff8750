//! Softmax attention over cached keys and values, with the switches of all generations: biases, norms, a gate.

use qwenkit_kernels::{IndexCache, IndexKeys, Product, Weight};

use super::{BlockBuffers, Context, Room, sized};
use crate::{
    adapter::Module,
    plan::{AttentionPlan, IndexerPlan},
    state::LayerState,
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
    pub(crate) indexer: Option<Indexer>,
}

/// What chooses the positions that a token sees.
pub(crate) struct Indexer {
    pub(crate) plan: IndexerPlan,
    /// (heads K, D)
    pub(crate) q_proj: Weight,
    /// (K, D)
    pub(crate) k_proj: Weight,
    /// (K)
    pub(crate) q_norm: Vec<f32>,
    /// (K)
    pub(crate) k_norm: Vec<f32>,
}

impl Attention {
    pub(crate) fn weight_bytes(&self) -> usize {
        let weights = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        let indexer = self.indexer.iter().flat_map(|i| [&i.q_proj, &i.k_proj]);
        weights.into_iter().chain(&self.gate_proj).chain(indexer).map(Weight::size_bytes).sum()
    }

    /// out: (rows, D) = attention of the wanted rows of x: (T, D), all of whose keys and values join the state.
    ///
    /// # Panics
    /// If the state was made for another layer.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        (state, room): (&mut LayerState, Room<'_>),
        buffers: &mut BlockBuffers,
        x: &[f32],
        out: &mut [f32],
    ) {
        let (plan, width) = (&self.plan, self.q_proj.cols());
        let tokens = x.len() / width;
        let (rows, seqs, q_cos, q_sin) = match cx.wanted {
            Some(w) => (w.rows.len(), w.seqs.as_slice(), w.cos.as_slice(), w.sin.as_slice()),
            None => (tokens, cx.seqs, cx.cos, cx.sin),
        };
        let cache = state.kv.as_mut().expect("an attention layer's state has keys and values");
        if let Some(indexer) = &self.indexer {
            indexer.select(cx, state.index.as_mut().expect("an indexed layer's state has index keys"), buffers, x);
        }
        let q = sized(&mut buffers.a, rows * self.q_proj.rows());
        let k = sized(&mut buffers.b, tokens * self.k_proj.rows());
        let v = sized(&mut buffers.c, tokens * self.v_proj.rows());
        let gate = sized(&mut buffers.e, self.gate_proj.as_ref().map_or(0, |_| q.len()));
        let mut of_queries = vec![Product { weight: &self.q_proj, out: &mut *q }];
        of_queries.extend(self.gate_proj.as_ref().map(|weight| Product { weight, out: &mut *gate }));
        let of_keys = [Product { weight: &self.k_proj, out: &mut *k }, Product { weight: &self.v_proj, out: &mut *v }];
        let own = match cx.wanted {
            Some(wanted) => {
                cx.compute.matmul(&mut buffers.matmul, x, &mut { of_keys });
                let own = sized(&mut buffers.d, rows * width);
                wanted.copy(x, own);
                cx.compute.matmul(&mut buffers.matmul, own, &mut of_queries);
                own
            }
            None => {
                of_queries.extend(of_keys);
                cx.compute.matmul(&mut buffers.matmul, x, &mut of_queries);
                x
            }
        };
        let low = &mut buffers.low;
        cx.adapt(Module::QProj, low, own, &mut [&mut *q, &mut *gate]);
        cx.adapt_all(Module::KProj, low, x, &mut [&mut *k]);
        cx.adapt_all(Module::VProj, low, x, &mut [&mut *v]);
        for (x, bias) in [(&mut *q, &self.q_bias), (&mut *k, &self.k_bias), (&mut *v, &self.v_bias)] {
            if let Some(bias) = bias {
                cx.compute.add_bias(x, bias);
            }
        }
        let angles = [(q_cos, q_sin), (cx.cos, cx.sin)];
        for ((x, norm), (cos, sin)) in [(&mut *q, &self.q_norm), (&mut *k, &self.k_norm)].into_iter().zip(angles) {
            if let Some(norm) = norm {
                cx.compute.rms_norm_in_place(x, norm, cx.eps);
            }
            cx.compute.rope(x, plan.head_dim, cos, sin, cx.pairs);
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
        match &self.indexer {
            None => cx.compute.attention(cache, seqs, plan.window, scale, (q, heads)),
            Some(_) => {
                cx.compute.attention_selected(cache, seqs, (&buffers.selection, room), scale, (q, heads));
            }
        }
        if self.gate_proj.is_some() {
            cx.compute.sigmoid_mul(heads, gate, self.q_proj.rows());
        }
        visit(cx.tap, Site::Heads, cx.layer, heads);
        cx.compute.matmul(&mut buffers.matmul, heads, &mut [Product { weight: &self.o_proj, out: &mut *out }]);
        cx.adapt(Module::OProj, &mut buffers.low, heads, &mut [out]);
    }
}

impl Indexer {
    /// Chooses what each token of x: (T, D) sees; its index key joins the cache.
    fn select(&self, cx: &Context<'_, '_, '_>, cache: &mut IndexCache, buffers: &mut BlockBuffers, x: &[f32]) {
        let IndexerPlan { head_dim, blocks, block_tokens, .. } = self.plan;
        let tokens = x.len() / self.q_proj.cols();
        let q = sized(&mut buffers.a, tokens * self.q_proj.rows());
        let keys = sized(&mut buffers.b, tokens * head_dim);
        let mut products =
            [Product { weight: &self.q_proj, out: &mut *q }, Product { weight: &self.k_proj, out: &mut *keys }];
        cx.compute.matmul(&mut buffers.matmul, x, &mut products);
        cx.compute.rms_norm_in_place(q, &self.q_norm, cx.eps);
        cx.compute.rope(q, head_dim, cx.cos, cx.sin, cx.pairs);
        for seq in cx.seqs {
            let (mut cos, mut sin) = (Vec::new(), Vec::new());
            for block in IndexCache::completed(seq.first, seq.rows.len(), block_tokens) {
                cx.rope.angles([(block * block_tokens) as u32; 3], &mut cos, &mut sin);
            }
            let keys = &keys[seq.rows.start * head_dim..seq.rows.end * head_dim];
            let (norm, eps) = (&self.k_norm, cx.eps);
            let new = IndexKeys { pages: seq.pages, first: seq.first, keys, norm, eps, cos: &cos, sin: &sin };
            cache.write(cx.compute, &new);
        }
        cx.compute.select(cache, cx.seqs, q, blocks, &mut buffers.selection);
    }
}
