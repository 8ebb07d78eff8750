//! Pages and slots as bytes, to be kept outside the process and put back: layer after layer, all of one machine's own order.
//!
//! Contract: bytes put back give what was computed bit by bit, as long as model, instruction set and program are the same;
//! whoever keeps them sees to that. The block that guesses may not have seen a page's last positions yet: what lies there is
//! what lay there before, which costs guesses and no answer.

use qwenkit_tensor::TokenId;

use super::{LayerState, ModelState, NgramState};

impl ModelState {
    /// The bytes of a page, in every layer that has pages.
    pub fn page(&self, page: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for layer in self.layers.iter().chain(&self.mtp) {
            layer.kv.iter().for_each(|cache| bytes.extend_from_slice(cache.page(page)));
            layer.index.iter().for_each(|cache| bytes.extend_from_slice(cache.page(page)));
        }
        bytes
    }

    /// Puts a page's bytes back, into any page. Returns whether they are as many as a page has; if not, what is there is worth nothing.
    #[must_use]
    pub fn put_page(&mut self, page: u32, mut bytes: &[u8]) -> bool {
        let layers = self.layers.iter_mut().chain(&mut self.mtp);
        let mut parts = layers.flat_map(|LayerState { kv, index, .. }| {
            kv.iter_mut().map(|cache| cache.page_mut(page)).chain(index.iter_mut().map(|cache| cache.page_mut(page)))
        });
        parts.all(|part| put(part, &mut bytes)) && bytes.is_empty()
    }

    /// The bytes of a slot, in every layer that has slots.
    pub fn slot(&self, slot: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for layer in &self.layers {
            if let Some(state) = &layer.recurrent {
                bytes.extend_from_slice(state.conv.slot_as_bytes(slot));
                state.delta.slot_as_bytes(slot).iter().for_each(|part| bytes.extend_from_slice(part));
            }
            if let Some(state) = &layer.ngrams {
                bytes.extend_from_slice(state.conv.slot_as_bytes(slot));
                bytes.extend(state.held_of(slot).iter().flat_map(|id| id.0.to_le_bytes()));
            }
        }
        bytes
    }

    /// Puts a slot's bytes back, into any slot. Returns whether they are as many as a slot has; if not, what is there is worth nothing.
    #[must_use]
    pub fn put_slot(&mut self, slot: usize, mut bytes: &[u8]) -> bool {
        let mut fits = true;
        for layer in &mut self.layers {
            if let Some(state) = &mut layer.recurrent {
                let [memory, keys] = state.delta.slot_as_bytes_mut(slot);
                fits &=
                    [state.conv.slot_as_bytes_mut(slot), memory, keys].into_iter().all(|part| put(part, &mut bytes));
            }
            if let Some(state) = &mut layer.ngrams {
                fits &= put(state.conv.slot_as_bytes_mut(slot), &mut bytes) && state.put_held(slot, &mut bytes);
            }
        }
        fits && bytes.is_empty()
    }
}

impl NgramState {
    /// The last tokens of a slot.
    fn held_of(&self, slot: usize) -> &[TokenId] {
        let held = self.tokens.len() / self.conv.slots().max(1);
        &self.tokens[slot * held..][..held]
    }

    fn put_held(&mut self, slot: usize, bytes: &mut &[u8]) -> bool {
        let held = self.tokens.len() / self.conv.slots().max(1);
        self.tokens[slot * held..][..held].iter_mut().all(|id| {
            let mut number = [0; 4];
            let found = put(&mut number, bytes);
            *id = TokenId(u32::from_le_bytes(number));
            found
        })
    }
}

/// Takes as many bytes as `to` has from the front; `false` if there are not as many.
fn put(to: &mut [u8], bytes: &mut &[u8]) -> bool {
    let Some((part, rest)) = bytes.split_at_checked(to.len()) else { return false };
    to.copy_from_slice(part);
    *bytes = rest;
    true
}
