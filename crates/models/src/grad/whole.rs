//! Gradients towards a model's own numbers, where all of them are trained: what a block adds beside its way back. Matrices have
//! dW = dy^T x, in the order of a checkpoint; adapters have none then.

use qwenkit_kernels::{BackProduct, Join, Mat, MatmulScratch, Product};
use qwenkit_tensor::TokenId;

use super::tape::Way;
use crate::{adapter::Module, load::Model, whole::Own};

/// Logits of a head that is trained that are held at once: 128 MiB of them.
const LOGITS: usize = 32 << 20;

/// Rows that go at once through a head of so many logits that is trained.
pub(super) fn head_rows(vocab: usize) -> usize {
    (LOGITS / vocab.max(1)).clamp(1, super::tape::HEAD_ROWS)
}

impl Way<'_> {
    /// Whether the numbers of a module are learnt, in an adapter or themselves.
    pub(super) fn learns(&self, module: Module) -> bool {
        self.whole.is_some() || self.adapter.lora(self.layer, module).is_some()
    }

    /// Adds the gradient of a module's matrix, from x: (T, inputs) and dy: (T, outputs).
    pub(super) fn matrix_backward(&self, module: Module, x: &[f32], dy: &[f32], grads: &mut [f32]) {
        let own = self.whole.zip(Own::of_module(module));
        let Some(inner) = own.and_then(|(whole, own)| whole.inner(self.layer, own)) else { return };
        let tokens = x.len() / inner.cols;
        let (x, dy) = (Mat::new(x, tokens, inner.cols), Mat::new(dy, tokens, dy.len() / tokens));
        self.compute.product(dy.t(), x, Join::ADD, &mut grads[inner.range.clone()]);
    }

    /// Adds the gradient of a bias, from dy: (T, N).
    pub(super) fn bias_backward(&self, own: Own, dy: &[f32], grads: &mut [f32]) {
        if let Some(inner) = self.whole.and_then(|whole| whole.inner(self.layer, own)) {
            self.compute.bias_backward(dy, &mut grads[inner.range.clone()]);
        }
    }

    /// Adds the gradient of a norm's weights, from what it normed and the gradient towards its result.
    pub(super) fn norm_backward(&self, own: Own, x: &[f32], dy: &[f32], grads: &mut [f32]) {
        if let Some(inner) = self.whole.and_then(|whole| whole.inner(self.layer, own)) {
            self.compute.rms_norm_weight_backward(x, self.eps, dy, &mut grads[inner.range.clone()]);
        }
    }

    /// The same of the norm before the head.
    pub(super) fn last_norm_backward(&self, x: &[f32], dy: &[f32], grads: &mut [f32]) {
        if let Some(whole) = self.whole {
            self.compute.rms_norm_weight_backward(x, self.eps, dy, &mut grads[whole.norm()]);
        }
    }

    /// Adds the gradient of the tokens' embeddings, from dx: (T, D), the gradient towards them.
    pub(super) fn embedding_backward(&self, tokens: &[TokenId], dx: &[f32], grads: &mut [f32]) {
        let Some(whole) = self.whole else { return };
        let (table, width) = (&mut grads[whole.embedding()], dx.len() / tokens.len());
        for (token, dx) in tokens.iter().zip(dx.chunks_exact(width)) {
            let row = &mut table[token.index() * width..][..width];
            row.iter_mut().zip(dx).for_each(|(row, dx)| *row += dx);
        }
    }

    /// Losses of x: (rows, D) behind the last norm, their gradient towards x, which is written, and the head's own, which is added.
    pub(super) fn head_backward(
        &self,
        model: &Model,
        scratch: &mut MatmulScratch,
        (x, targets, scale): (&[f32], &[u32], f32),
        (losses, dx): (&mut [f32], &mut [f32]),
        grads: &mut [f32],
    ) {
        let Some(whole) = self.whole else { return };
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        let (rows, vocab, compute) = (targets.len(), head.rows(), self.compute);
        let mut logits = vec![0.0; rows * vocab];
        compute.matmul(scratch, x, &mut [Product { weight: head, out: &mut logits }]);
        compute.cross_entropy(&mut logits, targets, scale, losses);
        compute.matmul_backward(&[BackProduct { weight: head, dy: &logits }], Join::OVER, dx);
        let (logits, x) = (Mat::new(&logits, rows, vocab), Mat::new(x, rows, head.cols()));
        compute.product(logits.t(), x, Join::ADD, &mut grads[whole.head()]);
    }
}
