//! The residual of sequences where the first adapted layer begins. Below it all weights are frozen, so it depends on a sequence's
//! tokens alone: what comes again in later steps and validations is not computed again, as far as memory is given for it.
//!
//! It is always rounded as kept values are, remembered or not, so that results do not depend on what came before.

use std::collections::HashMap;

use qwenkit_kernels::{Compute, Kept, KeptType};
use qwenkit_tensor::TokenId;

use super::{
    Learnt, Lesson, forward,
    tape::{LayerTape, Room, SequenceState, sized},
};
use crate::{error::Error, load::Model};

/// What is remembered.
#[derive(Default)]
pub(super) struct Begun {
    pub(super) limit_bytes: usize,
    pub(super) held_bytes: usize,
    /// The layer before which it is.
    layer: usize,
    of: HashMap<Box<[TokenId]>, Kept>,
    /// The residual of sequences that are not remembered yet, (T, D).
    pub(super) x: Vec<f32>,
}

impl Begun {
    /// x: (T, D) = the residual of a lesson before layer `lowest`, below which nothing is adapted.
    pub(super) fn fill(
        &mut self,
        model: &Model,
        (compute, learnt, form): (&Compute, Learnt<'_>, KeptType),
        lesson: &Lesson<'_>,
        lowest: usize,
        (state, room): (&mut SequenceState, &mut Room),
        x: &mut [f32],
    ) -> Result<(), Error> {
        let width = model.plan().width;
        let look_up = |tokens: &[TokenId], x: &mut [f32]| {
            let ids: Vec<usize> = tokens.iter().map(|token| token.index()).collect();
            compute.look_up(&model.embedding, &ids, x);
        };
        if lowest == 0 {
            look_up(lesson.tokens, x);
            return Ok(());
        }
        if self.layer != lowest {
            self.of.clear();
            (self.layer, self.held_bytes) = (lowest, 0);
        }
        let (mut tokens, mut seqs, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for seq in lesson.seqs {
            let own = &lesson.tokens[seq.clone()];
            match self.of.get(own) {
                Some(kept) => compute.recall(kept, &mut x[seq.start * width..seq.end * width]),
                None => {
                    seqs.push(tokens.len()..tokens.len() + own.len());
                    tokens.extend_from_slice(own);
                    places.push(seq.clone());
                }
            }
        }
        if seqs.is_empty() {
            return Ok(());
        }
        let new = sized(&mut self.x, tokens.len() * width);
        look_up(&tokens, new);
        state.prepare(&seqs);
        let (cos, sin) = model.angles(&seqs);
        let mut way = model.way((compute, learnt, form), &seqs, (&cos, &sin), false);
        let mut tape = LayerTape::default();
        for (i, layer) in model.layers[..lowest].iter().enumerate() {
            way.layer = i;
            forward(layer, &way, state, &mut tape, room, (new, None))?;
        }
        for (seq, place) in seqs.iter().zip(places) {
            let mut kept = Kept::default();
            compute.keep(&mut kept, form, &new[seq.start * width..seq.end * width]);
            compute.recall(&kept, &mut x[place.start * width..place.end * width]);
            let own = &tokens[seq.clone()];
            let bytes = kept.held_bytes() + size_of_val(own);
            if self.held_bytes + bytes <= self.limit_bytes && !self.of.contains_key(own) {
                self.held_bytes += bytes;
                self.of.insert(own.into(), kept);
            }
        }
        Ok(())
    }
}
