//! What the scheduler drives: something that computes a batch. The real one is a model with its state; tests plan
//! logits by hand.

use qwenkit_kernels::Compute;
use qwenkit_models::{Batch, Buffers, Model, ModelState};

/// Computes batches.
pub(crate) trait Runner {
    /// V
    fn vocab(&self) -> usize;
    /// Sequences that can run at the same time, where layers keep a state in slots that cannot be taken back to an
    /// earlier position; `None` where there is no such state.
    fn slots(&self) -> Option<usize> {
        None
    }
    /// Computes `batch`; `logits` becomes (rows that want them, V).
    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>);
    /// The last batch's hidden states, (parts that want one, D).
    fn hidden(&self) -> &[f32];
}

/// A model in memory with the state of its sequences.
pub(crate) struct ModelRunner {
    pub(crate) model: Model,
    pub(crate) compute: Compute,
    pub(crate) state: ModelState,
    /// Slots that the state was made with.
    pub(crate) slots: usize,
    pub(crate) buffers: Buffers,
}

impl Runner for ModelRunner {
    fn vocab(&self) -> usize {
        self.model.plan().vocab
    }

    fn slots(&self) -> Option<usize> {
        self.model.plan().has_recurrent_state().then_some(self.slots)
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) {
        self.model.forward(&self.compute, &mut self.state, batch, &mut self.buffers, None, logits);
    }

    fn hidden(&self) -> &[f32] {
        self.buffers.hidden()
    }
}
