//! What layers keep of sequences between tokens, for a whole engine: one `LayerState` per layer.
//!
//! Pages have the same number in every layer, so a sequence is one list of pages; likewise slots, of which a sequence has
//! one. Who owns which page and slot is the engine's business.

use qwenkit_kernels::{ConvState, DeltaState, KvCache, KvType};
use qwenkit_tensor::AllocError;

use crate::plan::{Plan, StateNeed};

/// One layer's memory of all sequences.
pub enum LayerState {
    /// Keys and values in pages.
    Paged(KvCache),
    /// Summaries in slots.
    Recurrent(RecurrentState),
}

/// A recurrent layer's memory of all sequences.
pub struct RecurrentState {
    /// The last inputs of the convolution.
    pub(crate) conv: ConvState,
    /// The delta rule's matrices, f32 always.
    pub(crate) delta: DeltaState,
}

/// The memory of all layers.
pub struct ModelState {
    pub(crate) layers: Vec<LayerState>,
}

impl ModelState {
    /// Room for `pages` pages of `PAGE_TOKENS` positions in every attention layer and `slots` sequences in every
    /// recurrent one. Memory is used as pages and slots are written.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(plan: &Plan, kv_type: KvType, pages: usize, slots: usize) -> Result<ModelState, AllocError> {
        let layer = |need| match need {
            StateNeed::Paged { kv_heads, head_dim } => {
                KvCache::new(kv_type, kv_heads, head_dim, pages).map(LayerState::Paged)
            }
            StateNeed::Recurrent(d) => Ok(LayerState::Recurrent(RecurrentState {
                conv: ConvState::new(d.conv_width, d.shape.channels(), slots)?,
                delta: DeltaState::new(d.shape, slots)?,
            })),
        };
        let layers = plan.layers.iter().map(|l| layer(l.state())).collect::<Result<_, _>>()?;
        Ok(ModelState { layers })
    }

    /// Copies a page of every layer over another: a sequence that begins like an earlier one and goes on otherwise within
    /// a page needs its own.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            if let LayerState::Paged(cache) = layer {
                cache.copy_page(from, to);
            }
        }
    }

    /// Copies a slot of every layer over another: a recurrent state cannot be taken back, so an earlier one is kept.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        for layer in &mut self.layers {
            if let LayerState::Recurrent(state) = layer {
                state.conv.copy_slot(from, to);
                state.delta.copy_slot(from, to);
            }
        }
    }

    /// Bytes that one page of every layer takes together.
    pub fn page_bytes(plan: &Plan, kv_type: KvType) -> usize {
        let layer = |need| match need {
            StateNeed::Paged { kv_heads, head_dim } => KvCache::page_bytes(kv_type, kv_heads, head_dim),
            StateNeed::Recurrent(_) => 0,
        };
        plan.layers.iter().map(|l| layer(l.state())).sum()
    }

    /// Bytes that one slot of every layer takes together; 0 for models without recurrent layers.
    pub fn slot_bytes(plan: &Plan) -> usize {
        let layer = |need| match need {
            StateNeed::Paged { .. } => 0,
            StateNeed::Recurrent(d) => {
                ConvState::slot_bytes(d.conv_width, d.shape.channels()) + DeltaState::slot_bytes(d.shape)
            }
        };
        plan.layers.iter().map(|l| layer(l.state())).sum()
    }
}
