//! What the scheduler drives: something that computes a batch. The real one is a model with its state; tests plan
//! logits by hand.

use qwenkit_kernels::Compute;
use qwenkit_models::{Batch, Buffers, Model, ModelState};

/// Computes batches.
pub(crate) trait Runner {
    /// V
    fn vocab(&self) -> usize;
    /// Computes `batch`; `logits` becomes (rows that want them, V).
    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>);
}

/// A model in memory with the state of its sequences.
pub(crate) struct ModelRunner {
    pub(crate) model: Model,
    pub(crate) compute: Compute,
    pub(crate) state: ModelState,
    pub(crate) buffers: Buffers,
}

impl Runner for ModelRunner {
    fn vocab(&self) -> usize {
        self.model.plan().vocab
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) {
        self.model.forward(&self.compute, &mut self.state, batch, &mut self.buffers, None, logits);
    }
}
