//! The forward pass of a batch: tokens of one or many sequences in, logits or hidden states of the rows that want them out.
//!
//! A token's logits have the same bits whatever else rides in the batch and however its prompt was cut.

use std::ops::Range;

use qwenkit_kernels::{AttentionSeq, Best, Compute, Product, RecurrentSeq};
use qwenkit_tensor::TokenId;

use crate::{
    adapter::{Adapted, Adapter, Module},
    blocks::{BlockBuffers, Context, FfnBlock, Layer, MixerBlock, Room},
    load::Model,
    state::{LayerState, ModelState},
    tap::{Site, Tap, visit},
    wanted::Wanted,
};

/// What adapters call a dense block's matrices.
pub(crate) const DENSE: [Module; 3] = [Module::GateProj, Module::UpProj, Module::DownProj];

/// Tokens to compute.
pub struct Batch<'a> {
    /// (T)
    pub tokens: &'a [TokenId],
    /// The sequences they belong to; their rows cover the batch in order.
    pub seqs: &'a [BatchSeq<'a>],
}

/// One sequence's part of a batch.
pub struct BatchSeq<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first row in the sequence.
    pub first: usize,
    /// The sequence's pages, enough for every position up to the last row's.
    pub pages: &'a [u32],
    /// Where recurrent layers keep their summary of the sequence; a model without such layers does not look at it. A
    /// sequence keeps its slot from its first token to its last, its parts are computed in order and without gaps - one may
    /// begin before the end of the last, by what `ModelState::can_take_back` allows - and its part at position 0 clears the
    /// slot. No two sequences of a batch have the same.
    pub slot: usize,
    /// What is wanted of which rows.
    pub outputs: Outputs,
    /// Where the sequence has images; absent where it is text alone.
    pub seen: Option<&'a Seen<'a>>,
    /// What is added to the model's matrices for this sequence; the same from its first token to its last.
    pub adapter: Option<&'a Adapter>,
    /// Which logits are wanted of each row that wants logits; all where absent. Those that are not wanted are what they are or
    /// -infinity.
    pub best: Option<Best<'a>>,
}

/// What a sequence's part has of images.
pub struct Seen<'a> {
    /// Rotary positions of the part's rows in time, height and width: behind an image they are no longer the place in the
    /// sequence.
    pub positions: &'a [[u32; 3]],
    /// Rows that are no tokens but vectors of images.
    pub rows: &'a [SeenRows<'a>],
}

/// Rows of a sequence's part that are vectors of one image.
pub struct SeenRows<'a> {
    /// Rows of the part, counted from its first.
    pub rows: Range<usize>,
    /// (rows, 1 + S, D): what takes the place of the tokens' embedding, and what is added behind each of the first S layers.
    pub values: &'a [f32],
}

/// What is wanted of a sequence's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// Nothing: the middle of a prompt.
    None,
    /// The last row's logits: to choose the next token.
    Last,
    /// Every row's logits: to score the tokens.
    All,
    /// The last row's hidden state behind the final norm: to embed the sequence. It passes no output head.
    Hidden,
}

/// Memory of one batch's inner values, kept for the next.
#[derive(Default)]
pub struct Buffers {
    /// (T, S D)
    pub(crate) x: Vec<f32>,
    /// (T, D) each
    pub(crate) normed: Vec<f32>,
    pub(crate) out: Vec<f32>,
    /// (T, R) each
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) block: BlockBuffers,
    /// (rows that want it, D)
    pub(crate) hidden: Vec<f32>,
    /// (T, D), or empty where they are not kept
    states: Vec<f32>,
    keeps_states: bool,
    head_bytes: usize,
}

impl Buffers {
    /// Buffers that keep the states of all rows behind the final norm, from which the next tokens' guesses are made.
    pub fn keeping_states() -> Buffers {
        Buffers { keeps_states: true, ..Buffers::default() }
    }

    /// Of the last batch, the bytes of the output head that were read.
    pub fn head_bytes(&self) -> usize {
        self.head_bytes
    }

    /// Of the last batch, all rows' states, where they are kept: (T, D).
    pub fn states(&self) -> &[f32] {
        &self.states
    }

    /// Of the last batch, the hidden states that were wanted: (parts with `Outputs::Hidden`, D), in the order of the batch.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}

impl Model {
    /// Computes a batch. `logits` becomes (rows that want them, V), in the order of the batch; hidden states that are
    /// wanted lie in `buffers` afterwards.
    ///
    /// # Panics
    /// If the batch's rows, pages, slots or token ids do not fit the model and the state; the engine checks them.
    pub fn forward(
        &self,
        compute: &Compute,
        state: &mut ModelState,
        batch: &Batch<'_>,
        buffers: &mut Buffers,
        mut tap: Option<&mut Tap<'_>>,
        logits: &mut Vec<f32>,
    ) {
        let (plan, tokens) = (self.plan(), batch.tokens.len());
        let (width, residual) = (plan.width, plan.stream_count() * plan.width);
        let Buffers { x, normed, out, cos, sin, block, hidden, states, keeps_states, head_bytes } = buffers;
        x.resize(tokens * residual, 0.0);
        for buffer in [&mut *normed, &mut *out] {
            buffer.resize(tokens * width, 0.0);
        }
        for (token, x) in batch.tokens.iter().zip(x.chunks_exact_mut(residual)) {
            let (first, others) = x.split_at_mut(width);
            self.embedding.row(token.index(), first);
            others.chunks_exact_mut(width).for_each(|other| other.copy_from_slice(first));
        }
        for_each_seen(batch, width, |row, values| {
            let streams = x[row * residual..][..residual].chunks_exact_mut(width);
            streams.for_each(|stream| stream.copy_from_slice(&values[..width]));
        });
        visit(&mut tap, Site::Embedding, 0, x);
        cos.clear();
        sin.clear();
        let mut seqs = Vec::with_capacity(batch.seqs.len());
        let mut recurrent = Vec::with_capacity(batch.seqs.len());
        for seq in batch.seqs {
            for i in 0..seq.rows.len() {
                let position = seq.seen.map_or([(seq.first + i) as u32; 3], |seen| seen.positions[i]);
                self.rope.angles(position, cos, sin);
            }
            seqs.push(AttentionSeq { rows: seq.rows.clone(), first: seq.first, pages: seq.pages });
            recurrent.push(RecurrentSeq { rows: seq.rows.clone(), first: seq.first, slot: seq.slot });
        }
        assert_eq!(cos.len(), tokens * self.rope.pairs(), "the sequences' rows cover the batch");
        let wanted = Wanted::new(batch.seqs, (&*cos, &*sin), self.rope.pairs());
        // A tap sees every row of every layer; images may reach into the last layer.
        let text_alone = batch.seqs.iter().all(|seq| seq.seen.is_none_or(|seen| seen.rows.is_empty()));
        let few = wanted.rows.len() < tokens && !*keeps_states;
        let skips = few && tap.is_none() && text_alone && self.last_layer_answers_few();
        let adapters: Vec<_> = batch.seqs.iter().map(|seq| seq.adapter).collect();
        adapters.iter().flatten().for_each(|adapter| self.measure(compute, adapter));
        let of_seqs = if adapters.iter().any(Option::is_some) { &adapters[..] } else { &[] };
        let ModelState { layers: of_layers, selected, .. } = state;
        let cx = &mut Context {
            compute,
            layer: 0,
            eps: plan.rms_norm_eps,
            tokens: batch.tokens,
            seqs: &seqs,
            recurrent: &recurrent,
            cos,
            sin,
            pairs: self.rope.pairs(),
            rope: &self.rope,
            wanted: None,
            adapted: Adapted { of_seqs },
            tap: &mut tap,
        };
        for (i, (layer, state)) in self.layers.iter().zip(of_layers).enumerate() {
            cx.layer = i;
            cx.wanted = Some(&wanted).filter(|_| skips && i + 1 == self.layers.len());
            layer.forward(cx, (state, selected.as_mut()), block, (&mut *x, &mut *normed, &mut *out));
            for_each_seen(batch, width, |row, values| {
                if let Some(values) = values.chunks_exact(width).nth(1 + i) {
                    x[row * residual..][..width].iter_mut().zip(values).for_each(|(x, value)| *x += value);
                }
            });
            visit(cx.tap, Site::Residual, i, x);
        }
        if *keeps_states {
            states.resize(tokens * width, 0.0);
            self.norm.read(cx, block, x, states);
        }
        // Only rows that want logits go through the output head, the largest matrix of a small model.
        if !skips {
            wanted.keep(x, residual);
        }
        let (mut for_logits, mut as_hidden) = (Vec::new(), Vec::new());
        let mut rows = 0..wanted.rows.len();
        for seq in batch.seqs {
            let to = if seq.outputs == Outputs::Hidden { &mut as_hidden } else { &mut for_logits };
            to.extend(rows.by_ref().take(seq.wanted_rows().len()));
        }
        for (rows, to) in [(for_logits, &mut *normed), (as_hidden, hidden)] {
            let of_rows: Vec<f32> = rows.iter().flat_map(|row| &x[row * residual..][..residual]).copied().collect();
            to.resize(rows.len() * width, 0.0);
            self.norm.read(cx, block, &of_rows, to);
        }
        visit(cx.tap, Site::HeadInput, 0, normed);
        logits.resize(normed.len() / width * plan.vocab, 0.0);
        let weight = self.head.as_ref().unwrap_or(&self.embedding);
        let best: Vec<Best<'_>> = batch.seqs.iter().flat_map(BatchSeq::best_of_rows).collect();
        *head_bytes = match normed.len() / width {
            0 => 0,
            // Where some row wants all its logits, the head is read for it.
            rows if best.len() == rows => compute.best(&mut block.matmul, normed, weight, &best, logits),
            _ => {
                compute.matmul(&mut block.matmul, normed, &mut [Product { weight, out: logits }]);
                weight.size_bytes()
            }
        };
    }
}

impl Layer {
    /// x: (T, S D) is led through the layer; `normed` and `out` are buffers. Where only some rows are wanted, x holds these
    /// afterwards.
    pub(crate) fn forward(
        &self,
        cx: &mut Context<'_, '_, '_>,
        (state, room): (&mut LayerState, Room<'_>),
        block: &mut BlockBuffers,
        (x, normed, out): (&mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>),
    ) {
        let i = cx.layer;
        let width = normed.len() / cx.tokens.len().max(1);
        if let Some(ngrams) = &self.ngrams {
            let state = state.ngrams.as_mut().expect("the layer's state has its last tokens");
            ngrams.forward(cx, state, block, x);
        }
        self.before_mixer.read(cx, block, x, normed);
        visit(cx.tap, Site::MixerInput, i, normed);
        out.resize(cx.wanted.map_or(normed.len(), |wanted| wanted.rows.len() * width), 0.0);
        match &self.mixer {
            MixerBlock::Attention(attention) => {
                attention.forward(cx, (state, room), block, normed, out);
            }
            MixerBlock::DeltaNet(delta) => {
                let state = state.recurrent.as_mut().expect("a recurrent layer's state has a summary");
                delta.forward(cx, state, block, normed, out);
            }
        }
        if let Some(wanted) = cx.wanted {
            // From here on there are only the rows that somebody wants.
            wanted.keep(x, width);
            normed.truncate(x.len());
        }
        self.before_mixer.write(cx, block, x, out);
        visit(cx.tap, Site::ResidualMiddle, i, x);
        self.before_ffn.read(cx, block, x, normed);
        visit(cx.tap, Site::FfnInput, i, normed);
        match &self.ffn {
            FfnBlock::Dense(ffn) => ffn.forward(cx, DENSE, block, normed, out),
            FfnBlock::Moe(moe) => moe.forward(cx, block, normed, out),
        }
        self.before_ffn.write(cx, block, x, out);
    }
}

impl Model {
    /// Whether the last layer can leave out what it computes for rows that nobody wants: one residual stream, and no choice
    /// of positions, which is made for all rows at once.
    fn last_layer_answers_few(&self) -> bool {
        let chooses = |layer: &Layer| matches!(&layer.mixer, MixerBlock::Attention(a) if a.indexer.is_some());
        self.plan().stream_count() == 1 && self.layers.last().is_some_and(|layer| !chooses(layer))
    }
}

/// Calls `f(row of the batch, (1 + S, D))` for each row that is a vector of an image.
fn for_each_seen(batch: &Batch<'_>, width: usize, mut f: impl FnMut(usize, &[f32])) {
    for seq in batch.seqs {
        for seen in seq.seen.iter().flat_map(|seen| seen.rows) {
            let values = seen.values.len() / seen.rows.len().max(1);
            assert!(values.is_multiple_of(width), "vectors of images are of the model's width");
            for (row, values) in seen.rows.clone().zip(seen.values.chunks_exact(values.max(1))) {
                f(seq.rows.start + row, values);
            }
        }
    }
}
