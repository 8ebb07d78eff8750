//! The blocks that layers are made of, and what each computes for a batch of tokens.

use qwenkit_kernels::{AttentionSeq, Compute, MatmulScratch, Product, Weight};

use crate::{
    plan::AttentionPlan,
    state::LayerState,
    tap::{Site, Tap, visit},
};

/// One decoder layer.
pub(crate) struct Layer {
    /// (D)
    pub(crate) input_norm: Vec<f32>,
    pub(crate) mixer: MixerBlock,
    /// (D)
    pub(crate) post_norm: Vec<f32>,
    pub(crate) ffn: FfnBlock,
}

pub(crate) enum MixerBlock {
    Attention(Attention),
}

pub(crate) enum FfnBlock {
    Dense(DenseFfn),
}

/// Softmax attention's weights.
pub(crate) struct Attention {
    pub(crate) plan: AttentionPlan,
    /// (H K, D)
    pub(crate) q_proj: Weight,
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

/// A dense feed-forward block's weights.
pub(crate) struct DenseFfn {
    /// (F, D)
    pub(crate) gate: Weight,
    /// (F, D)
    pub(crate) up: Weight,
    /// (D, F)
    pub(crate) down: Weight,
}

/// What every block of a batch needs.
pub(crate) struct Context<'a, 'b, 'c> {
    pub(crate) compute: &'a Compute,
    pub(crate) layer: usize,
    pub(crate) eps: f32,
    pub(crate) seqs: &'a [AttentionSeq<'a>],
    /// Angles of the batch's positions, (T, R)
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// R
    pub(crate) pairs: usize,
    pub(crate) tap: &'a mut Option<&'b mut Tap<'c>>,
}

/// Buffers of one block's inner values; kept from batch to batch.
#[derive(Default)]
pub(crate) struct BlockBuffers {
    pub(crate) matmul: MatmulScratch,
    /// (T, H K) or (T, F)
    a: Vec<f32>,
    /// (T, G K) or (T, F)
    b: Vec<f32>,
    /// (T, G K)
    c: Vec<f32>,
    /// (T, H K)
    d: Vec<f32>,
}

/// `buffer` with exactly `len` elements, whose values are whatever they are.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl Layer {
    pub(crate) fn weight_bytes(&self) -> usize {
        let MixerBlock::Attention(a) = &self.mixer;
        let FfnBlock::Dense(f) = &self.ffn;
        let weights = [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &f.gate, &f.up, &f.down];
        weights.into_iter().map(Weight::size_bytes).sum()
    }
}

impl Attention {
    /// out: (T, D) = attention of x: (T, D), whose keys and values join the state.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        state: &mut LayerState,
        buffers: &mut BlockBuffers,
        x: &[f32],
        out: &mut [f32],
    ) {
        let (plan, tokens) = (&self.plan, x.len() / self.q_proj.cols());
        let q = sized(&mut buffers.a, tokens * self.q_proj.rows());
        let k = sized(&mut buffers.b, tokens * self.k_proj.rows());
        let v = sized(&mut buffers.c, tokens * self.v_proj.rows());
        cx.compute.matmul(
            &mut buffers.matmul,
            x,
            &mut [
                Product { weight: &self.q_proj, out: &mut *q },
                Product { weight: &self.k_proj, out: &mut *k },
                Product { weight: &self.v_proj, out: &mut *v },
            ],
        );
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
        let LayerState::Paged(cache) = state;
        let kv_width = plan.kv_heads * plan.head_dim;
        for seq in cx.seqs {
            let rows = seq.rows.start * kv_width..seq.rows.end * kv_width;
            cache.write(cx.compute, seq.pages, seq.first, &k[rows.clone()], &v[rows]);
        }
        let heads = sized(&mut buffers.d, q.len());
        let scale = 1.0 / (plan.head_dim as f32).sqrt();
        cx.compute.attention(cache, cx.seqs, plan.window, scale, (q, heads));
        visit(cx.tap, Site::Heads, cx.layer, heads);
        cx.compute.matmul(&mut buffers.matmul, heads, &mut [Product { weight: &self.o_proj, out }]);
    }
}

impl DenseFfn {
    /// out: (T, D) = down(silu(gate(x)) * up(x)) of x: (T, D).
    pub(crate) fn forward(&self, cx: &mut Context<'_, '_, '_>, buffers: &mut BlockBuffers, x: &[f32], out: &mut [f32]) {
        let (tokens, width) = (x.len() / self.gate.cols(), self.gate.rows());
        let gate = sized(&mut buffers.a, tokens * width);
        let up = sized(&mut buffers.b, tokens * width);
        let mut products =
            [Product { weight: &self.gate, out: &mut *gate }, Product { weight: &self.up, out: &mut *up }];
        cx.compute.matmul(&mut buffers.matmul, x, &mut products);
        cx.compute.silu_mul(gate, up, width);
        visit(cx.tap, Site::FfnHidden, cx.layer, gate);
        cx.compute.matmul(&mut buffers.matmul, gate, &mut [Product { weight: &self.down, out }]);
    }
}
