//! The block that guesses the token after the next (multi-token prediction): one more layer, over the model's own state and the
//! token that followed it.
//!
//! Source: DeepSeek-AI 2024, in the form of Qwen3-Next: `fc` over the normed embedding of the token, then the normed state.

use qwenkit_kernels::{Product, Weight};

use super::{BlockBuffers, Context, Layer, sized};

/// The weights of the block. Embedding and output head are the model's own.
pub(crate) struct Mtp {
    /// (D)
    pub(crate) embedding_norm: Vec<f32>,
    /// (D)
    pub(crate) hidden_norm: Vec<f32>,
    /// (D, 2 D)
    pub(crate) fc: Weight,
    /// Softmax attention with keys and values of its own, and a feed-forward block.
    pub(crate) layer: Layer,
    /// (D)
    pub(crate) norm: Vec<f32>,
}

impl Mtp {
    pub(crate) fn weight_bytes(&self) -> usize {
        self.fc.size_bytes() + self.layer.weight_bytes()
    }

    /// x: (T, D) = what the layer begins with, of the tokens' embeddings in x: (T, D) and the states before them: (T, D).
    pub(crate) fn join(&self, cx: &Context<'_, '_, '_>, buffers: &mut BlockBuffers, states: &[f32], x: &mut [f32]) {
        let width = self.fc.rows();
        let normed = sized(&mut buffers.a, x.len());
        let pairs = sized(&mut buffers.b, 2 * x.len());
        for (half, (from, weight)) in [(&*x, &self.embedding_norm), (states, &self.hidden_norm)].into_iter().enumerate()
        {
            cx.compute.rms_norm(from, weight, cx.eps, normed);
            for (pair, row) in pairs.chunks_exact_mut(2 * width).zip(normed.chunks_exact(width)) {
                pair[half * width..][..width].copy_from_slice(row);
            }
        }
        cx.compute.matmul(&mut buffers.matmul, pairs, &mut [Product { weight: &self.fc, out: x }]);
    }
}
