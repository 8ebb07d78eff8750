//! Guesses of the token after the next, by the block that a model has for it (multi-token prediction).
//!
//! The block stands behind the last layer: of a token and of the state of the position before it, it makes a state of its own, from
//! which the model's head guesses the token that follows; from that state and that token it can guess on. It has keys and values
//! of its own, in the same pages as the model's. Contract: a guess is nobody's answer, so the block may miss positions or
//! have them wrong; then it guesses worse. Source: DeepSeek-AI 2024, as vLLM runs it for Qwen3-Next.

use std::ops::Range;

use qwenkit_kernels::{AttentionSeq, Compute, Product};
use qwenkit_tensor::TokenId;

use crate::{
    adapter::Adapted,
    blocks::Context,
    forward::{BatchSeq, Buffers, Outputs},
    load::Model,
    state::ModelState,
    wanted::Wanted,
};

/// Positions to lead through the block.
pub struct Guesses<'a> {
    /// (T)
    pub tokens: &'a [TokenId],
    /// Of each token the state of the position before it, behind the final norm: (T, D).
    pub states: &'a [f32],
    /// The sequences they belong to; their rows cover the batch in order.
    pub seqs: &'a [GuessSeq<'a>],
}

/// One sequence's part of the positions.
pub struct GuessSeq<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first token in the sequence.
    pub first: usize,
    /// The sequence's pages, enough for every position.
    pub pages: &'a [u32],
    /// Whether a guess is wanted of what follows the last token.
    pub wanted: bool,
}

impl Model {
    /// Leads positions through the block. `logits` becomes (wanted guesses, V) and `buffers.hidden()` the states that the
    /// block has made, (wanted guesses, D), both in the order of the batch.
    ///
    /// # Panics
    /// If the model was loaded without the block, or rows, pages or token ids do not fit.
    pub fn guess(
        &self,
        compute: &Compute,
        state: &mut ModelState,
        guesses: &Guesses<'_>,
        buffers: &mut Buffers,
        logits: &mut Vec<f32>,
    ) {
        let Guesses { tokens, states, seqs } = *guesses;
        let (plan, width) = (self.plan(), self.plan().width);
        let (Some(mtp), Some(of_layer)) = (&self.mtp, &mut state.mtp) else {
            panic!("a model of `Model::load_guessing`, and its state");
        };
        assert_eq!(states.len(), tokens.len() * width, "a state for each token");
        let Buffers { x, normed, out, cos, sin, block, hidden, .. } = buffers;
        for buffer in [&mut *x, &mut *normed, &mut *out] {
            buffer.resize(tokens.len() * width, 0.0);
        }
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            self.embedding.row(token.index(), x);
        }
        cos.clear();
        sin.clear();
        let (mut of_attention, mut parts) = (Vec::with_capacity(seqs.len()), Vec::with_capacity(seqs.len()));
        for GuessSeq { rows, first, pages, wanted } in seqs {
            (0..rows.len()).for_each(|i| self.rope.angles([(first + i) as u32; 3], cos, sin));
            of_attention.push(AttentionSeq { rows: rows.clone(), first: *first, pages });
            let outputs = if *wanted { Outputs::Last } else { Outputs::None };
            let (rows, first) = (rows.clone(), *first);
            parts.push(BatchSeq { rows, first, pages, slot: 0, outputs, seen: None, adapter: None, best: None });
        }
        assert_eq!(cos.len(), tokens.len() * self.rope.pairs(), "the sequences' rows cover the batch");
        let wanted = Wanted::new(&parts, (&*cos, &*sin), self.rope.pairs());
        let mut tap = None;
        let cx = &mut Context {
            compute,
            layer: plan.layers.len(),
            eps: plan.rms_norm_eps,
            tokens,
            seqs: &of_attention,
            recurrent: &[],
            cos,
            sin,
            pairs: self.rope.pairs(),
            rope: &self.rope,
            wanted: Some(&wanted),
            adapted: Adapted { of_seqs: &[] },
            tap: &mut tap,
        };
        mtp.join(cx, block, states, x);
        mtp.layer.forward(cx, (of_layer, None), block, (&mut *x, &mut *normed, &mut *out));
        hidden.resize(x.len(), 0.0);
        compute.rms_norm(x, &mtp.norm, plan.rms_norm_eps, hidden);
        logits.resize(x.len() / width * plan.vocab, 0.0);
        let weight = self.head.as_ref().unwrap_or(&self.embedding);
        compute.matmul(&mut block.matmul, hidden, &mut [Product { weight, out: logits }]);
    }
}
