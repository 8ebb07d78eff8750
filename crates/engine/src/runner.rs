//! What the scheduler drives: something that computes a batch. The real one is a model with its state; tests plan
//! logits by hand.

use std::sync::Arc;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Buffers, Guesses, Model, ModelState, Outputs};
use qwenkit_tensor::TokenId;
use sha2::{Digest as _, Sha256};

use crate::{
    disk,
    error::Error,
    eyes::Eyes,
    sampler::argmax,
    vision::{VisionInfo, Visual},
};

/// Computes batches.
pub(crate) trait Runner {
    /// V
    fn vocab(&self) -> usize;
    /// Slots for a state that cannot be taken back to any earlier position; `None` where layers have no such state.
    fn slots(&self) -> Option<Slots>;
    /// How many tokens behind the one at `position` can be taken back after they were computed with it: the sequence's next
    /// part then begins before the end of the last one.
    fn can_take_back(&self, position: usize) -> usize;
    /// Computes `batch`; `logits` becomes (rows that want them, V), of which those that a part's `best` leaves out may be -infinity.
    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>);
    /// Bytes of the output head that the last batch read.
    fn head_bytes(&self) -> usize;
    /// The last batch's hidden states, (parts that want one, D).
    fn hidden(&self) -> &[f32];
    /// The last batch's states, (T, D), of a runner with a block that guesses; empty where it has none.
    fn states(&self) -> &[f32];
    /// Leads positions through the block. Returns the best of the first `real_tokens` for each guess that is wanted, and
    /// the states that the block has made for these: (guesses, D).
    fn guess(&mut self, guesses: &Guesses<'_>, real_tokens: usize) -> (Vec<TokenId>, Vec<f32>);
    /// What visuals it takes; none where absent.
    fn vision(&self) -> Option<VisionInfo>;
    /// The vectors of a visual, (tokens, 1 + S, D); `None` as long as they are not computed. Each call computes a piece, so
    /// that others can go on between.
    fn look(&mut self, visual: &Visual) -> Result<Option<Arc<Vec<f32>>>, Error>;
    /// Copies a page over another.
    fn copy_page(&mut self, from: u32, to: u32);
    /// Copies a slot over another.
    fn copy_slot(&mut self, from: usize, to: usize);
    /// The bytes of a page, to be kept.
    fn page(&self, page: u32) -> Vec<u8>;
    /// Puts kept bytes into a page; `false` if they are no page's.
    fn put_page(&mut self, page: u32, bytes: &[u8]) -> bool;
    /// The bytes of a slot, to be kept.
    fn slot(&self, slot: usize) -> Vec<u8>;
    /// Puts kept bytes into a slot; `false` if they are no slot's.
    fn put_slot(&mut self, slot: usize, bytes: &[u8]) -> bool;
}

/// How many slots there are. The first are those of running sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    /// For sequences that run at the same time.
    pub(crate) sequences: usize,
    /// For states kept to go on from.
    pub(crate) checkpoints: usize,
}

impl Slots {
    /// Both kinds.
    pub(crate) fn total(self) -> usize {
        self.sequences + self.checkpoints
    }
}

/// A model in memory with the state of its sequences.
pub(crate) struct ModelRunner {
    pub(crate) model: Model,
    pub(crate) compute: Compute,
    pub(crate) state: ModelState,
    /// Slots that the state was made with.
    pub(crate) slots: Option<Slots>,
    pub(crate) buffers: Buffers,
    /// Of the block that guesses: (guesses, V)
    pub(crate) guess_logits: Vec<f32>,
    pub(crate) eyes: Option<Eyes>,
}

impl Runner for ModelRunner {
    fn vocab(&self) -> usize {
        self.model.plan().vocab
    }

    fn slots(&self) -> Option<Slots> {
        self.slots
    }

    fn can_take_back(&self, position: usize) -> usize {
        ModelState::can_take_back(self.model.plan(), position)
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) {
        self.model.forward(&self.compute, &mut self.state, batch, &mut self.buffers, None, logits);
    }

    fn head_bytes(&self) -> usize {
        self.buffers.head_bytes()
    }

    fn hidden(&self) -> &[f32] {
        self.buffers.hidden()
    }

    fn states(&self) -> &[f32] {
        self.buffers.states()
    }

    fn guess(&mut self, guesses: &Guesses<'_>, real_tokens: usize) -> (Vec<TokenId>, Vec<f32>) {
        let ModelRunner { model, compute, state, buffers, guess_logits, .. } = self;
        model.guess(compute, state, guesses, buffers, guess_logits);
        let rows = guess_logits.chunks_exact(model.plan().vocab);
        (rows.map(|row| argmax(&row[..real_tokens])).collect(), buffers.hidden().to_vec())
    }

    fn vision(&self) -> Option<VisionInfo> {
        self.eyes.as_ref().map(|eyes| eyes.info().clone())
    }

    fn look(&mut self, visual: &Visual) -> Result<Option<Arc<Vec<f32>>>, Error> {
        match &mut self.eyes {
            Some(eyes) => eyes.look(&self.compute, visual),
            None => Ok(None),
        }
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        self.state.copy_page(from, to);
    }

    fn copy_slot(&mut self, from: usize, to: usize) {
        self.state.copy_slot(from, to);
    }

    fn page(&self, page: u32) -> Vec<u8> {
        self.state.page(page)
    }

    fn put_page(&mut self, page: u32, bytes: &[u8]) -> bool {
        self.state.put_page(page, bytes)
    }

    fn slot(&self, slot: usize) -> Vec<u8> {
        self.slots.map_or(Vec::new(), |_| self.state.slot(slot))
    }

    fn put_slot(&mut self, slot: usize, bytes: &[u8]) -> bool {
        self.state.put_slot(slot, bytes)
    }
}

impl ModelRunner {
    /// Stands for all that keys and values depend on: the program, the machine's arithmetic, the model's files - and what is
    /// computed for a page of text, should a file have been changed and its size and time not. Before anything runs.
    pub(crate) fn identity(&mut self, files: &ModelFiles) -> [u8; 32] {
        let ids: Vec<TokenId> = (0..PAGE_TOKENS).map(|i| TokenId((i * 7919 % self.vocab()) as u32)).collect();
        let part = BatchSeq {
            rows: 0..PAGE_TOKENS,
            first: 0,
            pages: &[0],
            slot: 0,
            outputs: Outputs::None,
            seen: None,
            adapter: None,
            best: None,
        };
        self.forward(&Batch { tokens: &ids, seqs: &[part] }, &mut Vec::new());
        let mut hasher = Sha256::new();
        let program = (env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, self.compute.isa(), self.model.kv_type());
        // Builds of one version differ in what they compute.
        let build = std::env::current_exe().map(|path| disk::stamps(&path)).unwrap_or_default();
        hasher.update(format!("{program:?}{build:?}{}{:?}", files.size_bytes(), disk::stamps(files.path())));
        hasher.update(self.page(0));
        hasher.update(self.slot(0));
        hasher.finalize().into()
    }
}
