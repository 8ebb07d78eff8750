//! Runs models without an engine: one state, given pages, any cut of the input.

use std::path::Path;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Best, Compute, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Buffers, Model, ModelState, Outputs};
use qwenkit_tensor::TokenId;

/// Part of a sequence: its tokens, the position of the first, the sequence's pages.
pub(crate) type Part<'a> = (&'a [TokenId], usize, &'a [u32]);

/// A model with state for some pages.
pub(crate) struct Run<'a> {
    model: &'a Model,
    compute: &'a Compute,
    state: ModelState,
    buffers: Buffers,
}

pub(crate) fn load(path: &Path, compute: &Compute) -> Model {
    let files = ModelFiles::open(path).unwrap();
    Model::load(&files, compute, &mut |_| {}).unwrap()
}

impl<'a> Run<'a> {
    pub(crate) fn new(model: &'a Model, compute: &'a Compute, pages: usize) -> Run<'a> {
        let state = ModelState::new(model.plan(), model.kv_type(), pages, 1).unwrap();
        Run { model, compute, state, buffers: Buffers::default() }
    }

    /// Computes one batch of `parts`; logits (rows wanted, V) in their order.
    pub(crate) fn feed(&mut self, parts: &[Part<'_>], outputs: Outputs) -> Vec<f32> {
        self.feed_for_best(parts, outputs, &vec![None; parts.len()])
    }

    /// The same, where of some parts only the best logits are wanted.
    pub(crate) fn feed_for_best(
        &mut self,
        parts: &[Part<'_>],
        outputs: Outputs,
        best: &[Option<Best<'_>>],
    ) -> Vec<f32> {
        let (mut tokens, mut seqs, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for (&(ids, first, pages), &best) in parts.iter().zip(best) {
            let rows = tokens.len()..tokens.len() + ids.len();
            tokens.extend_from_slice(ids);
            seqs.push(BatchSeq { rows, first, pages, slot: 0, outputs, seen: None, adapter: None, best });
        }
        let batch = Batch { tokens: &tokens, seqs: &seqs };
        self.model.forward(self.compute, &mut self.state, &batch, &mut self.buffers, None, &mut logits);
        logits
    }

    /// Of the last batch, the bytes of the output head that were read.
    pub(crate) fn head_bytes(&self) -> usize {
        self.buffers.head_bytes()
    }
}

/// Logits (T, V) of `ids`, fed in pieces that end at `cuts` and at the end, on pages in order.
pub(crate) fn logits(model: &Model, compute: &Compute, ids: &[TokenId], cuts: &[usize]) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE_TOKENS) as u32).collect();
    let mut run = Run::new(model, compute, pages.len());
    let (mut all, mut start) = (Vec::new(), 0);
    for &end in cuts.iter().chain([&ids.len()]).filter(|end| **end > 0) {
        all.extend(run.feed(&[(&ids[start..end], start, &pages)], Outputs::All));
        start = end;
    }
    all
}

/// The `count` most probable tokens after `prompt`, each computed from the cache of all before it, with their logits.
pub(crate) fn greedy(model: &Model, compute: &Compute, prompt: &[TokenId], count: usize) -> Vec<(TokenId, Vec<f32>)> {
    let pages: Vec<u32> = (0..(prompt.len() + count).div_ceil(PAGE_TOKENS) as u32).collect();
    let mut run = Run::new(model, compute, pages.len());
    let mut found = Vec::new();
    let (mut input, mut position) = (prompt.to_vec(), 0);
    while found.len() < count {
        let logits = run.feed(&[(&input, position, &pages)], Outputs::Last);
        position += input.len();
        let id = largest(&logits);
        input = vec![id];
        found.push((id, logits));
    }
    found
}

/// The largest logit's index, of equals the first.
pub(crate) fn largest(logits: &[f32]) -> TokenId {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    TokenId(best as u32)
}

/// Refuses two lists that differ in a bit, naming the first place.
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let differs = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = differs {
        panic!("{what}: value {i} is {:e}, expected {:e}", found[i], expected[i]);
    }
}
