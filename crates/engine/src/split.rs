//! Whether a text's logits hang on how it was computed: cut in two at every position, and by a sequence that forks off there.
//!
//! A fork is what the scheduler makes of a prompt that begins like an earlier one: it shares the full pages, has a copy of the page that
//! is begun and of the recurrent state, and goes on beside the sequence that it came from. Contract: everything is compared bit by bit.

use std::ops::Range;

use qwenkit_kernels::{Compute, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Buffers, Model, ModelState, Outputs, Seen};
use qwenkit_tensor::TokenId;

use crate::{error::Error, vision::View};

/// A text of more tokens is split at so many positions, evenly.
const POSITIONS_MAX: usize = 256;

/// Which way of computing gave other bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The prompt in two pieces.
    Cut,
    /// A second sequence, from a copy of the first one's state.
    Fork,
}

/// What splitting a text has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits {
    /// Positions at which it was cut, and at which a sequence forked off.
    pub positions: usize,
    /// The first that changed a bit: (tokens before the split, the way, the row of logits).
    pub fault: Option<(usize, Way, usize)>,
}

/// Computes `ids` as a whole, then in two pieces with a fork at every position between, and compares all rows of logits.
///
/// # Errors
/// When an id is not in the vocabulary, the model has no output head, or memory is short.
pub fn splits(model: &Model, compute: &Compute, ids: &[TokenId], view: Option<&View>) -> Result<Splits, Error> {
    let vocab = model.plan().vocab;
    if let Some(&found) = ids.iter().find(|id| id.index() >= vocab) {
        return Err(Error::TokenUnknown { found, vocab });
    }
    if model.plan().headless {
        return Err(Error::Headless { origin: "the model".to_owned() });
    }
    let pages = ids.len().div_ceil(PAGE_TOKENS).max(1) as u32;
    let mut run = Run {
        model,
        compute,
        ids,
        view,
        state: ModelState::new(model.plan(), model.kv_type(), 2 * pages as usize, 2)?,
        buffers: Buffers::default(),
    };
    let own: Vec<u32> = (0..pages).collect();
    let whole = run.feed(&[(0..ids.len(), &own, 0)]);
    let step = ids.len().div_ceil(POSITIONS_MAX).max(1);
    let mut found = Splits { positions: 0, fault: None };
    for at in (1..ids.len()).step_by(step) {
        found.positions += 1;
        let before = run.feed(&[(0..at, &own, 0)]);
        let forked: Vec<u32> =
            (0..pages).map(|i| if (i as usize) < at / PAGE_TOKENS { i } else { pages + i }).collect();
        if !at.is_multiple_of(PAGE_TOKENS) {
            run.state.copy_page(own[at / PAGE_TOKENS], forked[at / PAGE_TOKENS]);
        }
        run.state.copy_slot(0, 1);
        let rest = run.feed(&[(at..ids.len(), &own, 0), (at..ids.len(), &forked, 1)]);
        let (cut, fork) = rest.split_at(rest.len() / 2);
        let parts = [(Way::Cut, 0, &before[..]), (Way::Cut, at, cut), (Way::Fork, at, fork)];
        for (way, first, logits) in parts {
            let expected = &whole[first * vocab..first * vocab + logits.len()];
            let differs = logits.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
            if let Some(value) = differs {
                found.fault = Some((at, way, first + value / vocab));
                return Ok(found);
            }
        }
    }
    Ok(found)
}

struct Run<'a> {
    model: &'a Model,
    compute: &'a Compute,
    ids: &'a [TokenId],
    view: Option<&'a View>,
    state: ModelState,
    buffers: Buffers,
}

impl Run<'_> {
    /// Logits (T, V) of one batch: of each part its tokens, its pages and its slot.
    fn feed(&mut self, parts: &[(Range<usize>, &[u32], usize)]) -> Vec<f32> {
        let looked: Vec<_> = parts
            .iter()
            .map(|(range, ..)| self.view.map(|view| (view.positions(range.clone()), view.rows(range.clone()))))
            .collect();
        let seen: Vec<Option<Seen<'_>>> =
            looked.iter().map(|looked| looked.as_ref().map(|(positions, rows)| Seen { positions, rows })).collect();
        let (mut tokens, mut seqs, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for ((range, pages, slot), seen) in parts.iter().zip(&seen) {
            let rows = tokens.len()..tokens.len() + range.len();
            tokens.extend_from_slice(&self.ids[range.clone()]);
            let (first, seen) = (range.start, seen.as_ref());
            let (slot, outputs) = (*slot, Outputs::All);
            seqs.push(BatchSeq { rows, first, pages, slot, outputs, seen, adapter: None, best: None });
        }
        let batch = Batch { tokens: &tokens, seqs: &seqs };
        self.model.forward(self.compute, &mut self.state, &batch, &mut self.buffers, None, &mut logits);
        logits
    }
}
