//! Scoring: the logits of every position of a text, and greedy continuation, straight from a model without a loop.
//!
//! Perplexity, KL divergence, conformance and equivalence proofs are all made of these.

use qwenkit_kernels::{Compute, PAGE_TOKENS};
use qwenkit_models::{Adapter, Batch, BatchSeq, Buffers, Model, ModelState, Outputs, Seen};
use qwenkit_tensor::TokenId;

use crate::{error::Error, vision::View};

/// Tokens of one batch; as a batch's logits are held at once, fewer than the scheduler takes.
const CHUNK_TOKENS: usize = 128;

/// One sequence with its state, fed piece by piece.
pub struct Scorer<'a> {
    model: &'a Model,
    compute: &'a Compute,
    state: ModelState,
    pages: Vec<u32>,
    buffers: Buffers,
    logits: Vec<f32>,
    position: usize,
    view: Option<&'a View>,
    adapter: Option<&'a Adapter>,
}

impl<'a> Scorer<'a> {
    /// A sequence that can grow to `tokens` tokens.
    ///
    /// # Errors
    /// When the model has no output head, or memory is short.
    pub fn new(model: &'a Model, compute: &'a Compute, tokens: usize) -> Result<Scorer<'a>, Error> {
        if model.plan().headless {
            return Err(Error::Headless { origin: "the model".to_owned() });
        }
        let pages = tokens.div_ceil(PAGE_TOKENS).max(1);
        Ok(Scorer {
            model,
            compute,
            state: ModelState::new(model.plan(), model.kv_type(), pages, 1)?,
            pages: (0..pages as u32).collect(),
            buffers: Buffers::default(),
            logits: Vec::new(),
            position: 0,
            view: None,
            adapter: None,
        })
    }

    /// The same with images in it.
    pub fn seeing(self, view: Option<&'a View>) -> Scorer<'a> {
        Scorer { view, ..self }
    }

    /// The sequence is computed under this adapter of the model.
    pub fn under(self, adapter: Option<&'a Adapter>) -> Scorer<'a> {
        Scorer { adapter, ..self }
    }

    /// Computes `ids` after what was fed before, and returns the logits of those rows that `outputs` wants: (rows, V).
    ///
    /// # Errors
    /// When an id is not in the vocabulary.
    pub fn feed(&mut self, ids: &[TokenId], outputs: Outputs) -> Result<&[f32], Error> {
        let vocab = self.model.plan().vocab;
        if let Some(&found) = ids.iter().find(|id| id.index() >= vocab) {
            return Err(Error::TokenUnknown { found, vocab });
        }
        let (first, rows) = (self.position, 0..ids.len());
        let range = first..first + ids.len();
        let seen = self.view.map(|view| (view.positions(range.clone()), view.rows(range)));
        let seen = seen.as_ref().map(|(positions, rows)| Seen { positions, rows });
        let (pages, adapter) = (&self.pages, self.adapter);
        let seq = BatchSeq { rows, first, pages, slot: 0, outputs, seen: seen.as_ref(), adapter, best: None };
        let batch = Batch { tokens: ids, seqs: &[seq] };
        self.model.forward(self.compute, &mut self.state, &batch, &mut self.buffers, None, &mut self.logits);
        self.position += ids.len();
        Ok(&self.logits)
    }
}

/// Calls `sink(row, logits: (V))` for every position of `ids`, in order.
///
/// # Errors
/// When `ids` is empty, an id is not in the vocabulary, or memory is short.
pub fn logits(
    model: &Model,
    compute: &Compute,
    ids: &[TokenId],
    sink: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), Error> {
    logits_seeing(model, compute, ids, None, sink)
}

/// As `logits`, under an adapter of the model.
///
/// # Errors
/// As `logits`.
pub fn logits_under(
    model: &Model,
    compute: &Compute,
    ids: &[TokenId],
    adapter: &Adapter,
    sink: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), Error> {
    feed_all(&|| Ok(Scorer::new(model, compute, ids.len())?.under(Some(adapter))), ids, sink)
}

/// As `logits`, with images in the text.
///
/// # Errors
/// As `logits`.
pub fn logits_seeing(
    model: &Model,
    compute: &Compute,
    ids: &[TokenId],
    view: Option<&View>,
    sink: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), Error> {
    feed_all(&|| Ok(Scorer::new(model, compute, ids.len())?.seeing(view)), ids, sink)
}

fn feed_all<'a>(
    scorer: &dyn Fn() -> Result<Scorer<'a>, Error>,
    ids: &[TokenId],
    sink: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), Error> {
    if ids.is_empty() {
        return Err(Error::PromptEmpty);
    }
    let mut scorer = scorer()?;
    let vocab = scorer.model.plan().vocab;
    let mut row = 0;
    for chunk in ids.chunks(CHUNK_TOKENS) {
        for logits in scorer.feed(chunk, Outputs::All)?.chunks_exact(vocab) {
            sink(row, logits);
            row += 1;
        }
    }
    Ok(())
}

/// The `tokens` most probable tokens after `prompt`, each from all before it, through the cache; nothing ends it early.
///
/// # Errors
/// As `logits`.
pub fn greedy(model: &Model, compute: &Compute, prompt: &[TokenId], tokens: usize) -> Result<Vec<TokenId>, Error> {
    greedy_seeing(model, compute, prompt, None, tokens)
}

/// As `greedy`, with images in the prompt.
///
/// # Errors
/// As `logits`.
pub fn greedy_seeing(
    model: &Model,
    compute: &Compute,
    prompt: &[TokenId],
    view: Option<&View>,
    tokens: usize,
) -> Result<Vec<TokenId>, Error> {
    if prompt.is_empty() {
        return Err(Error::PromptEmpty);
    }
    let mut scorer = Scorer::new(model, compute, prompt.len() + tokens)?.seeing(view);
    let mut ids = Vec::with_capacity(tokens);
    let mut input = prompt;
    let mut last;
    while ids.len() < tokens {
        let logits = scorer.feed(input, Outputs::Last)?;
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        last = [TokenId(best as u32)];
        ids.push(last[0]);
        input = &last;
    }
    Ok(ids)
}
