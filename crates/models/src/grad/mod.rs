//! Learning: the forward pass over whole sequences that keeps what its backward needs, and the backward, towards an adapter's
//! numbers - base weights are frozen then and stay as they are in their file - or towards all of a dense model's own (`whole`). A
//! block's two ways stand side by side in one file.
//!
//! A step's gradients have the same bits on any number of threads. Optimisers, data and schedules are not here.

mod attention;
mod begun;
mod delta_net;
mod dense;
mod head;
mod lora;
mod memory;
mod moe;
mod tape;
mod whole;

use std::ops::Range;

use qwenkit_kernels::{Compute, KeptType};
use qwenkit_tensor::TokenId;

pub use memory::LessonSize;
pub use tape::Tape;

use crate::{
    adapter::Adapter,
    blocks::{FfnBlock, Join, Layer, MixerBlock},
    error::Error,
    forward::DENSE,
    load::Model,
    whole::{Own, Whole},
};
use tape::{LayerTape, Room, SequenceState, Way, sized};

/// Whole sequences to learn from.
pub struct Lesson<'a> {
    /// (T)
    pub tokens: &'a [TokenId],
    /// Each sequence's rows; they cover the tokens in order, and none is empty.
    pub seqs: &'a [Range<usize>],
    /// What is learnt from them.
    pub aim: Aim<'a>,
}

/// What is learnt.
pub enum Aim<'a> {
    /// The token after each of some rows.
    NextTokens {
        /// Ascending.
        rows: &'a [usize],
        /// What comes after each.
        targets: &'a [u32],
        /// What each row's loss counts in the gradient.
        scales: &'a [f32],
    },
    /// The label of each sequence, from its last row.
    Labels {
        /// (seqs)
        labels: &'a [u32],
        /// (seqs)
        scales: &'a [f32],
        /// What of a label's share is learnt as all labels', equally. Losses are those without. Source: Szegedy et al. 2016.
        smoothing: f32,
    },
}

/// What is learnt: the numbers of an adapter, or of the model; then the adapter is an empty one.
#[derive(Clone, Copy)]
struct Learnt<'a> {
    adapter: &'a Adapter,
    whole: Option<&'a Whole>,
}

impl Model {
    /// Refuses a model whose blocks have no backward yet.
    ///
    /// # Errors
    /// When there is such a block.
    pub fn check_learning(&self) -> Result<(), Error> {
        let wrong = |layer: usize, found: &'static str| Err(Error::NoBackward { layer, found });
        if self.plan().stream_count() > 1 {
            return wrong(0, "several residual streams");
        }
        for (i, layer) in self.layers.iter().enumerate() {
            match &layer.mixer {
                MixerBlock::Attention(a) if a.indexer.is_some() => return wrong(i, "attention to chosen positions"),
                MixerBlock::Attention(_) | MixerBlock::DeltaNet(_) => {}
            }
            if layer.ngrams.is_some() {
                return wrong(i, "a table of runs of tokens");
            }
        }
        Ok(())
    }

    /// Computes a lesson under an adapter of this model. `losses` become those of the lesson's rows or sequences; with `grads`,
    /// which lie as the adapter's values, the gradient of their sum, each times its scale, is added there.
    ///
    /// # Errors
    /// When the model has a block without a backward, or memory is short.
    ///
    /// # Panics
    /// If the lesson's rows, ids or labels do not fit the model.
    pub fn learn(
        &self,
        compute: &Compute,
        adapter: &Adapter,
        lesson: &Lesson<'_>,
        tape: &mut Tape,
        losses: &mut Vec<f32>,
        grads: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.learn_as(compute, Learnt { adapter, whole: None }, lesson, tape, losses, grads)
    }

    /// As `learn` without an adapter: the gradient is that towards the model's own numbers, which lie as `whole` says. Tokens alone
    /// can be learnt so.
    ///
    /// # Errors
    /// As `learn`.
    ///
    /// # Panics
    /// As `learn`, and if labels are to be learnt.
    pub fn learn_whole(
        &self,
        compute: &Compute,
        whole: &Whole,
        lesson: &Lesson<'_>,
        tape: &mut Tape,
        losses: &mut Vec<f32>,
        grads: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let learnt = Learnt { adapter: &whole.adapter, whole: Some(whole) };
        self.learn_as(compute, learnt, lesson, tape, losses, grads)
    }

    fn learn_as(
        &self,
        compute: &Compute,
        learnt: Learnt<'_>,
        lesson: &Lesson<'_>,
        tape: &mut Tape,
        losses: &mut Vec<f32>,
        grads: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.check_learning()?;
        self.measure(compute, learnt.adapter);
        let (width, count) = (self.plan().width, self.layers.len());
        let tokens: usize = lesson.seqs.iter().map(Range::len).sum();
        let covered = tokens == lesson.tokens.len() && lesson.seqs.last().map_or(0, |seq| seq.end) == tokens;
        assert!(covered && lesson.seqs.iter().all(|seq| !seq.is_empty()), "the sequences cover the lesson");
        // Below the first adapted layer there is nothing to learn.
        let lowest = if learnt.whole.is_some() { 0 } else { learnt.adapter.lowest_layer().unwrap_or(count) };
        let (form, sparing) = (tape.form, tape.sparing);
        let Tape { layers, inputs, state, room, begun, x, dx, scores, .. } = tape;
        let x = sized(x, tokens * width);
        begun.fill(self, (compute, learnt, form), lesson, lowest, (state, room), x)?;
        state.prepare(lesson.seqs);
        let (cos, sin) = self.angles(lesson.seqs);
        let mut way = self.way((compute, learnt, form), lesson.seqs, (&cos, &sin), grads.is_some());
        // The last layer's feed-forward block and what follows look at the rows that something is learnt from.
        let wanted: Vec<usize> = match &lesson.aim {
            Aim::NextTokens { rows, .. } => rows.to_vec(),
            Aim::Labels { .. } => lesson.seqs.iter().map(|seq| seq.end - 1).collect(),
        };
        let rows_of = |layer: usize| (layer + 1 == count).then_some(&wanted[..]);
        for (i, layer) in self.layers.iter().enumerate().skip(lowest) {
            way.layer = i;
            if sparing {
                way.keep(&mut inputs[i], x);
            }
            let tape = &mut layers[if sparing { 0 } else { i }];
            forward(layer, &way, state, tape, room, (x, rows_of(i)))?;
        }
        if lowest == count {
            gather(x, &wanted, width);
        }
        let (norm, of_wanted) = (weights(&self.norm), wanted.len() * width);
        let Some(grads) = grads else {
            head::losses(self, &way, norm, &lesson.aim, (room, &x[..of_wanted]), (losses, scores), None);
            return Ok(());
        };
        let dx = sized(dx, x.len());
        let back = (&mut *grads, &mut dx[..of_wanted]);
        head::losses(self, &way, norm, &lesson.aim, (room, &x[..of_wanted]), (losses, scores), Some(back));
        for (i, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            way.layer = i;
            let tape = &mut layers[if sparing { 0 } else { i }];
            if sparing {
                compute.recall(&inputs[i], x);
                forward(layer, &way, state, tape, room, (x, rows_of(i)))?;
            }
            backward(
                layer,
                &way,
                (state, tape),
                room,
                (dx, rows_of(i)),
                (grads, i > lowest || learnt.whole.is_some()),
            )?;
        }
        way.embedding_backward(lesson.tokens, dx, grads);
        Ok(())
    }

    /// Angles of the positions of whole sequences, (T, R) each.
    fn angles(&self, seqs: &[Range<usize>]) -> (Vec<f32>, Vec<f32>) {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in seqs.iter().flat_map(|seq| 0..seq.len() as u32) {
            self.rope.angles([position; 3], &mut cos, &mut sin);
        }
        (cos, sin)
    }

    fn way<'a>(
        &self,
        (compute, Learnt { adapter, whole }, form): (&'a Compute, Learnt<'a>, KeptType),
        seqs: &'a [Range<usize>],
        (cos, sin): (&'a [f32], &'a [f32]),
        keeps: bool,
    ) -> Way<'a> {
        let (eps, pairs) = (self.plan().rms_norm_eps, self.rope.pairs());
        Way { compute, adapter, whole, layer: 0, eps, form, keeps, seqs, cos, sin, pairs }
    }
}

/// x: (T, D) begins with these of its rows, which ascend.
fn gather<'a>(x: &'a mut [f32], rows: &[usize], width: usize) -> &'a mut [f32] {
    for (to, from) in rows.iter().enumerate() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
    &mut x[..rows.len() * width]
}

/// The way back of `gather`: the other rows become zero.
fn scatter(x: &mut [f32], rows: &[usize], width: usize) {
    let mut end = x.len() / width;
    for (from, to) in rows.iter().enumerate().rev() {
        x[(to + 1) * width..end * width].fill(0.0);
        x.copy_within(from * width..(from + 1) * width, to * width);
        end = *to;
    }
    x[..end * width].fill(0.0);
}

/// The weights of a norm in front of a block; models with several streams have been refused.
fn weights(join: &Join) -> &[f32] {
    match join {
        Join::Norm(weights) => weights,
        Join::Streams(_) => unreachable!("several streams are refused before"),
    }
}

/// One layer; x: (T, D) becomes its result, or begins with that of `rows`.
fn forward(
    layer: &Layer,
    way: &Way<'_>,
    state: &mut SequenceState,
    tape: &mut LayerTape,
    room: &mut Room,
    (x, rows): (&mut [f32], Option<&[usize]>),
) -> Result<(), Error> {
    let (compute, before_mixer, before_ffn) = (way.compute, weights(&layer.before_mixer), weights(&layer.before_ffn));
    let width = before_mixer.len();
    let (mut normed, mut out) = (std::mem::take(&mut room.normed), std::mem::take(&mut room.out));
    let (of_normed, of_out) = (sized(&mut normed, x.len()), sized(&mut out, x.len()));
    way.keep(&mut tape.x, x);
    compute.rms_norm(x, before_mixer, way.eps, of_normed);
    match &layer.mixer {
        MixerBlock::Attention(block) => {
            attention::forward(block, way, state, tape, (room, of_normed, of_out))?;
        }
        MixerBlock::DeltaNet(block) => delta_net::forward(block, way, state, tape, (room, of_normed, of_out))?,
    }
    compute.add(x, of_out, width);
    let x = match rows {
        Some(rows) => gather(x, rows, width),
        None => x,
    };
    let (of_normed, of_out) = (&mut of_normed[..x.len()], &mut of_out[..x.len()]);
    way.keep(&mut tape.middle, x);
    compute.rms_norm(x, before_ffn, way.eps, of_normed);
    match &layer.ffn {
        FfnBlock::Dense(block) => dense::forward(block, DENSE, way, &mut tape.ffn, (room, of_normed, of_out)),
        FfnBlock::Moe(block) => moe::forward(block, way, tape, (room, of_normed, of_out)),
    }
    compute.add(x, of_out, width);
    (room.normed, room.out) = (normed, out);
    Ok(())
}

/// Backward of one layer: dx: (T, D), the gradient towards its result - or in its first rows that towards the result of `rows` -
/// becomes that towards its input, if `goes_on`.
fn backward(
    layer: &Layer,
    way: &Way<'_>,
    (state, tape): (&mut SequenceState, &mut LayerTape),
    room: &mut Room,
    (dx, rows): (&mut [f32], Option<&[usize]>),
    (grads, goes_on): (&mut [f32], bool),
) -> Result<(), Error> {
    let (compute, before_mixer, before_ffn) = (way.compute, weights(&layer.before_mixer), weights(&layer.before_ffn));
    let width = before_mixer.len();
    let mut buffers = [&mut room.out, &mut room.normed, &mut room.d_normed].map(std::mem::take);
    let [x, normed, d_normed] = buffers.each_mut().map(|buffer| sized(buffer, dx.len()));
    {
        let len = rows.map_or(dx.len(), |rows| rows.len() * width);
        let (x, normed, d_normed) = (&mut x[..len], &mut normed[..len], &mut d_normed[..len]);
        let dx = &mut dx[..len];
        compute.recall(&tape.middle, x);
        compute.rms_norm(x, before_ffn, way.eps, normed);
        match &layer.ffn {
            FfnBlock::Dense(block) => {
                dense::backward(block, DENSE, way, &tape.ffn, room, (normed, dx), grads, d_normed)
            }
            FfnBlock::Moe(block) => moe::backward(block, way, tape, room, (normed, dx), grads, d_normed),
        }
        way.norm_backward(Own::PostNorm, x, d_normed, grads);
        compute.rms_norm_backward(x, before_ffn, way.eps, d_normed, dx);
    }
    if let Some(rows) = rows {
        scatter(dx, rows, width);
    }
    compute.recall(&tape.x, x);
    compute.rms_norm(x, before_mixer, way.eps, normed);
    let wanted = goes_on.then_some(&mut *d_normed);
    match &layer.mixer {
        MixerBlock::Attention(block) => attention::backward(block, way, tape, room, (normed, dx), grads, wanted),
        MixerBlock::DeltaNet(block) => {
            delta_net::backward(block, way, (state, tape), room, (normed, dx), grads, wanted)?;
        }
    }
    if goes_on {
        way.norm_backward(Own::InputNorm, x, d_normed, grads);
        compute.rms_norm_backward(x, before_mixer, way.eps, d_normed, dx);
    }
    [room.out, room.normed, room.d_normed] = buffers;
    Ok(())
}
