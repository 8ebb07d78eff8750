//! What layers keep of sequences between tokens, for a whole engine: one `LayerState` per layer.
//!
//! Pages have the same number in every layer, so a sequence is one list of pages. Who owns which page is the engine's
//! business.

use qwenkit_kernels::{KvCache, KvType};
use qwenkit_tensor::AllocError;

use crate::plan::{Plan, StateNeed};

/// One layer's memory of all sequences.
pub enum LayerState {
    /// Keys and values in pages.
    Paged(KvCache),
}

/// The memory of all layers.
pub struct ModelState {
    pub(crate) layers: Vec<LayerState>,
}

impl ModelState {
    /// Room for `pages` pages of `PAGE_TOKENS` positions in every layer. Memory is used as pages are written.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(plan: &Plan, kv_type: KvType, pages: usize) -> Result<ModelState, AllocError> {
        let layer = |need| match need {
            StateNeed::Paged { kv_heads, head_dim } => {
                KvCache::new(kv_type, kv_heads, head_dim, pages).map(LayerState::Paged)
            }
        };
        let layers = plan.layers.iter().map(|l| layer(l.state())).collect::<Result<_, _>>()?;
        Ok(ModelState { layers })
    }

    /// Bytes that one page of every layer takes together.
    pub fn page_bytes(plan: &Plan, kv_type: KvType) -> usize {
        let layer = |need| match need {
            StateNeed::Paged { kv_heads, head_dim } => KvCache::page_bytes(kv_type, kv_heads, head_dim),
        };
        plan.layers.iter().map(|l| layer(l.state())).sum()
    }
}
