//! Learning: the forward pass over whole sequences that keeps what its backward needs, and the backward, towards an adapter's
//! numbers. A block's two ways stand side by side in one file.
//!
//! Base weights are frozen and stay as they are in their file. A step's gradients have the same bits on any number of threads.
//! Optimisers, data and schedules are not here.

mod attention;
mod delta_net;
mod dense;
mod head;
mod lora;
mod memory;
mod moe;
mod tape;

use std::ops::Range;

use qwenkit_kernels::Compute;
use qwenkit_tensor::TokenId;

pub use memory::LessonSize;
pub use tape::Tape;

use crate::{
    adapter::Adapter,
    blocks::{FfnBlock, Join, Layer, MixerBlock},
    error::Error,
    forward::DENSE,
    load::Model,
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
    },
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
        self.check_learning()?;
        let width = self.plan().width;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in lesson.seqs.iter().flat_map(|seq| 0..seq.len() as u32) {
            self.rope.angles([position; 3], &mut cos, &mut sin);
        }
        let covered = cos.len() == lesson.tokens.len() * self.rope.pairs();
        assert!(covered && lesson.seqs.iter().all(|seq| !seq.is_empty()), "the sequences cover the lesson");
        let (form, sparing) = (tape.form, tape.sparing);
        let Tape { layers, inputs, state, room, x, dx, scores, .. } = tape;
        state.prepare(lesson);
        let x = sized(x, lesson.tokens.len() * width);
        let ids: Vec<usize> = lesson.tokens.iter().map(|token| token.index()).collect();
        compute.look_up(&self.embedding, &ids, x);
        let mut way = Way {
            compute,
            adapter,
            layer: 0,
            eps: self.plan().rms_norm_eps,
            form,
            seqs: lesson.seqs,
            cos: &cos,
            sin: &sin,
            pairs: self.rope.pairs(),
        };
        for (i, layer) in self.layers.iter().enumerate() {
            way.layer = i;
            if sparing {
                compute.keep(&mut inputs[i], form, x);
            }
            let tape = &mut layers[if sparing { 0 } else { i }];
            forward(layer, &way, state, tape, room, x)?;
        }
        let norm = weights(&self.norm);
        let Some(grads) = grads else {
            head::losses(self, &way, norm, &lesson.aim, (room, x), (losses, scores), None);
            return Ok(());
        };
        let dx = sized(dx, x.len());
        head::losses(self, &way, norm, &lesson.aim, (room, x), (losses, scores), Some((&mut *grads, &mut *dx)));
        // Below the first adapted layer there is nothing to learn.
        let lowest = adapter.loras().first().map_or(self.layers.len(), |lora| lora.layer);
        for (i, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            way.layer = i;
            let tape = &mut layers[if sparing { 0 } else { i }];
            if sparing {
                compute.recall(&inputs[i], x);
                forward(layer, &way, state, tape, room, x)?;
            }
            backward(layer, &way, (state, tape), room, dx, (grads, i > lowest))?;
        }
        Ok(())
    }
}

/// The weights of a norm in front of a block; models with several streams have been refused.
fn weights(join: &Join) -> &[f32] {
    match join {
        Join::Norm(weights) => weights,
        Join::Streams(_) => unreachable!("several streams are refused before"),
    }
}

/// One layer; x: (T, D) becomes its result.
fn forward(
    layer: &Layer,
    way: &Way<'_>,
    state: &mut SequenceState,
    tape: &mut LayerTape,
    room: &mut Room,
    x: &mut [f32],
) -> Result<(), Error> {
    let (compute, before_mixer, before_ffn) = (way.compute, weights(&layer.before_mixer), weights(&layer.before_ffn));
    let width = before_mixer.len();
    let (mut normed, mut out) = (std::mem::take(&mut room.normed), std::mem::take(&mut room.out));
    let (of_normed, of_out) = (sized(&mut normed, x.len()), sized(&mut out, x.len()));
    compute.keep(&mut tape.x, way.form, x);
    compute.rms_norm(x, before_mixer, way.eps, of_normed);
    match &layer.mixer {
        MixerBlock::Attention(block) => {
            attention::forward(block, way, state, tape, (room, of_normed, of_out))?;
        }
        MixerBlock::DeltaNet(block) => delta_net::forward(block, way, state, tape, (room, of_normed, of_out))?,
    }
    compute.add(x, of_out, width);
    compute.keep(&mut tape.middle, way.form, x);
    compute.rms_norm(x, before_ffn, way.eps, of_normed);
    match &layer.ffn {
        FfnBlock::Dense(block) => dense::forward(block, DENSE, way, tape, (room, of_normed, of_out)),
        FfnBlock::Moe(block) => moe::forward(block, way, tape, (room, of_normed, of_out)),
    }
    compute.add(x, of_out, width);
    (room.normed, room.out) = (normed, out);
    Ok(())
}

/// Backward of one layer: dx: (T, D), the gradient towards its result, becomes that towards its input, if `goes_on`.
fn backward(
    layer: &Layer,
    way: &Way<'_>,
    (state, tape): (&mut SequenceState, &mut LayerTape),
    room: &mut Room,
    dx: &mut [f32],
    (grads, goes_on): (&mut [f32], bool),
) -> Result<(), Error> {
    let (compute, before_mixer, before_ffn) = (way.compute, weights(&layer.before_mixer), weights(&layer.before_ffn));
    let mut buffers = [&mut room.out, &mut room.normed, &mut room.d_normed].map(std::mem::take);
    let [x, normed, d_normed] = buffers.each_mut().map(|buffer| sized(buffer, dx.len()));
    compute.recall(&tape.middle, x);
    compute.rms_norm(x, before_ffn, way.eps, normed);
    match &layer.ffn {
        FfnBlock::Dense(block) => dense::backward(block, DENSE, way, tape, room, (normed, dx), grads, d_normed),
        FfnBlock::Moe(block) => moe::backward(block, way, tape, room, (normed, dx), grads, d_normed),
    }
    compute.rms_norm_backward(x, before_ffn, way.eps, d_normed, dx);
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
        compute.rms_norm_backward(x, before_mixer, way.eps, d_normed, dx);
    }
    [room.out, room.normed, room.d_normed] = buffers;
    Ok(())
}
