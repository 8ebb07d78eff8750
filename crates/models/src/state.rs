//! What layers keep of sequences between tokens, for a whole engine: one `LayerState` per layer.
//!
//! Pages have the same number in every layer, so a sequence is one list of pages; likewise slots, of which a sequence has
//! one. Who owns which page and slot is the engine's business.

mod bytes;

use qwenkit_kernels::{ConvState, DeltaState, IndexCache, KvCache, KvType, PAGE_TOKENS, SelectedKv, TAKEN_BACK};
use qwenkit_tensor::{AllocError, TokenId};

use crate::plan::{IndexerPlan, Plan, StateNeed};

/// One layer's memory of all sequences: a part for each `StateNeed` of the layer.
#[derive(Default)]
pub struct LayerState {
    /// Keys and values in pages.
    pub(crate) kv: Option<KvCache>,
    /// Index keys in pages.
    pub(crate) index: Option<IndexCache>,
    /// Summaries in slots.
    pub(crate) recurrent: Option<RecurrentState>,
    /// Last tokens in slots.
    pub(crate) ngrams: Option<NgramState>,
}

/// A recurrent layer's memory of all sequences.
pub struct RecurrentState {
    /// The last inputs of the convolution.
    pub(crate) conv: ConvState,
    /// The delta rule's matrices, f32 always.
    pub(crate) delta: DeltaState,
}

/// What a layer with a table of runs of tokens keeps of all sequences.
pub struct NgramState {
    /// (slots, tokens held): that of position p is number p modulo the tokens held
    pub(crate) tokens: Vec<TokenId>,
    /// The last inputs of the convolution.
    pub(crate) conv: ConvState,
}

/// The memory of all layers.
pub struct ModelState {
    pub(crate) layers: Vec<LayerState>,
    /// Where the keys and values that queries choose are laid side by side; only for the time of one layer's attention.
    pub(crate) selected: Option<SelectedKv>,
    /// Of the block that guesses, in the same pages. A position's keys and values are made of its token and of the state of
    /// the position before.
    pub(crate) mtp: Option<LayerState>,
}

impl ModelState {
    /// Room for `pages` pages of `PAGE_TOKENS` positions in every attention layer and `slots` sequences in every
    /// recurrent one. Memory is used as pages and slots are written.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(plan: &Plan, kv_type: KvType, pages: usize, slots: usize) -> Result<ModelState, AllocError> {
        let layers = plan.layers.iter().map(|l| LayerState::new(&l.state(), kv_type, pages, slots));
        let layers = layers.collect::<Result<_, _>>()?;
        let mtp = plan.mtp.as_ref().map(|layer| LayerState::new(&layer.state(), kv_type, pages, slots)).transpose()?;
        Ok(ModelState { layers, selected: selected(plan, kv_type, pages)?, mtp })
    }

    /// Copies a page of every layer over another: a sequence that begins like an earlier one and goes on otherwise within
    /// a page needs its own.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        for layer in self.layers.iter_mut().chain(&mut self.mtp) {
            layer.kv.iter_mut().for_each(|cache| cache.copy_page(from, to));
            layer.index.iter_mut().for_each(|cache| cache.copy_page(from, to));
        }
    }

    /// Copies a slot of every layer over another: a recurrent state cannot be taken back by more than a few tokens, so an
    /// earlier one is kept.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        for layer in &mut self.layers {
            if let Some(state) = &mut layer.recurrent {
                state.conv.copy_slot(from, to);
                state.delta.copy_slot(from, to);
            }
            layer.ngrams.iter_mut().for_each(|state| state.copy_slot(from, to));
        }
    }

    /// How many tokens behind the one at `position` a sequence can take back after they were computed with it: its next part
    /// then begins before the end of the last one. Keys and values are written over; states in slots allow a few tokens.
    pub fn can_take_back(plan: &Plan, position: usize) -> usize {
        if plan.has_recurrent_state() { DeltaState::can_take_back(position) } else { usize::MAX }
    }

    /// Bytes that one page of every layer takes together.
    pub fn page_bytes(plan: &Plan, kv_type: KvType) -> usize {
        let bytes = |need| match need {
            StateNeed::Paged { kv_heads, head_dim } => KvCache::page_bytes(kv_type, kv_heads, head_dim),
            StateNeed::Index(indexer) => IndexCache::page_bytes(indexer.head_dim),
            StateNeed::Recurrent(_) | StateNeed::Ngrams { .. } => 0,
        };
        plan.layers.iter().chain(&plan.mtp).flat_map(|l| l.state()).map(bytes).sum()
    }

    /// Bytes that one slot of every layer takes together; 0 for models without recurrent layers.
    pub fn slot_bytes(plan: &Plan) -> usize {
        let bytes = |need| match need {
            StateNeed::Paged { .. } | StateNeed::Index(_) => 0,
            StateNeed::Recurrent(d) => ConvState::slot_bytes(d.conv()) + DeltaState::slot_bytes(d.shape),
            StateNeed::Ngrams { tokens, conv } => {
                ConvState::slot_bytes(conv) + NgramState::held(tokens) * size_of::<TokenId>()
            }
        };
        plan.layers.iter().flat_map(|l| l.state()).map(bytes).sum()
    }
}

impl LayerState {
    fn new(needs: &[StateNeed], kv_type: KvType, pages: usize, slots: usize) -> Result<LayerState, AllocError> {
        let mut state = LayerState::default();
        for need in needs {
            match *need {
                StateNeed::Paged { kv_heads, head_dim } => {
                    state.kv = Some(KvCache::new(kv_type, kv_heads, head_dim, pages)?);
                }
                StateNeed::Index(IndexerPlan { head_dim, block_tokens, .. }) => {
                    state.index = Some(IndexCache::new(head_dim, block_tokens, pages)?);
                }
                StateNeed::Recurrent(d) => {
                    let (conv, delta) = (ConvState::new(d.conv(), slots)?, DeltaState::new(d.shape, slots)?);
                    state.recurrent = Some(RecurrentState { conv, delta });
                }
                StateNeed::Ngrams { tokens, conv } => {
                    let tokens = vec![TokenId(0); NgramState::held(tokens) * slots];
                    let conv = ConvState::new(conv, slots)?;
                    state.ngrams = Some(NgramState { tokens, conv });
                }
            }
        }
        Ok(state)
    }
}

impl NgramState {
    /// Tokens held of a sequence where the next one needs `kept`.
    pub(crate) fn held(kept: usize) -> usize {
        kept + TAKEN_BACK
    }

    fn copy_slot(&mut self, from: usize, to: usize) {
        self.conv.copy_slot(from, to);
        // Slots beyond these have been refused by the convolution.
        let held = self.tokens.len() / self.conv.slots().max(1);
        self.tokens.copy_within(from * held..(from + 1) * held, to * held);
    }
}

/// Room for what queries choose, if any layer chooses and sequences can be long enough for it.
fn selected(plan: &Plan, kv_type: KvType, pages: usize) -> Result<Option<SelectedKv>, AllocError> {
    let chosen = |needs: Vec<StateNeed>| match needs[..] {
        [StateNeed::Paged { kv_heads, head_dim }, StateNeed::Index(indexer), ..] => {
            let positions = indexer.blocks.saturating_add(1).saturating_mul(indexer.block_tokens);
            (positions < pages.saturating_mul(PAGE_TOKENS)).then_some((kv_heads, head_dim, positions))
        }
        _ => None,
    };
    let Some((kv_heads, head_dim, positions)) = plan.layers.iter().find_map(|l| chosen(l.state())) else {
        return Ok(None);
    };
    SelectedKv::new(kv_type, kv_heads, head_dim, positions).map(Some)
}
