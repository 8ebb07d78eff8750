//! What the forward pass of training keeps for the way back, and the memory that both ways share.
//!
//! Either every layer keeps what its backward needs, or only its input, and the rest is computed again when its turn comes;
//! which of the two is the caller's choice, by the memory that there is.

use std::ops::Range;

use qwenkit_kernels::{
    AttentionSeq, Compute, ConvState, DeltaState, Kept, KeptType, KvCache, KvType, MatmulScratch, PAGE_TOKENS,
    RecurrentSeq, Routing,
};
use qwenkit_tensor::{AllocError, DType};

use super::{
    begun::Begun,
    lora::{Lows, MagnitudeRoom},
};
use crate::{
    adapter::Adapter,
    load::Model,
    plan::{AttentionPlan, DeltaNetPlan},
    whole::Whole,
};

/// Rows that go through the output head at once, whose logits are never all there.
pub(super) const HEAD_ROWS: usize = 512;

/// Buffers of the room that have letters.
pub(super) const LETTERS: usize = 11;

/// What is kept of the forward pass, and buffers; one for each model that learns.
pub struct Tape {
    pub(super) form: KeptType,
    pub(super) sparing: bool,
    /// One for each layer, or a single one where layers are computed again.
    pub(super) layers: Vec<LayerTape>,
    /// Where layers are computed again, the input of each.
    pub(super) inputs: Vec<Kept>,
    pub(super) state: SequenceState,
    pub(super) room: Room,
    pub(super) begun: Begun,
    /// The residual (T, D), and its gradient.
    pub(super) x: Vec<f32>,
    pub(super) dx: Vec<f32>,
    /// Scores of the sequences, (seqs, labels), where labels are learnt.
    pub(super) scores: Vec<f32>,
}

/// What one layer keeps.
#[derive(Default)]
pub(super) struct LayerTape {
    /// The residual before the layer, (T, D).
    pub(super) x: Kept,
    /// The residual after the mixer, (T, D).
    pub(super) middle: Kept,
    /// Queries and keys before norm and rotation, values, gate, heads before the gate; of modules with magnitudes before the bias.
    pub(super) q: Kept,
    pub(super) k: Kept,
    pub(super) v: Kept,
    pub(super) gate: Kept,
    pub(super) heads: Kept,
    /// With magnitudes, what the mixer gave, (T, D).
    pub(super) mixed: Kept,
    /// Of the feed-forward block, `FFN_ROWS` rows each.
    pub(super) ffn: Vec<FfnTape>,
    /// Of a mixture, what its shared expert gave before its factor, (T, D).
    pub(super) shared: Kept,
    /// A x of each adapted module, (T, R).
    pub(super) lows: Lows,
}

/// What a dense feed-forward block keeps of some rows.
#[derive(Default)]
pub(super) struct FfnTape {
    /// Before the activation.
    pub(super) gate: Kept,
    pub(super) up: Kept,
    /// With magnitudes, the block's result, (T, D).
    pub(super) down: Kept,
    /// As the layer's.
    pub(super) lows: Lows,
}

/// Rows that go through a dense feed-forward block together, both ways: inner values of many more fall out of every cache.
pub(super) const FFN_ROWS: usize = 512;

/// What layers keep of sequences for the time of one layer.
pub(super) struct SequenceState {
    pub(super) kv_type: KvType,
    pub(super) kv: Option<(AttentionPlanKey, KvCache)>,
    pub(super) recurrent: Option<(DeltaNetPlan, usize, ConvState, DeltaState)>,
    /// (seqs): pages of each
    pages: Vec<Vec<u32>>,
}

type AttentionPlanKey = (usize, usize, usize);

/// Buffers of one block's inner values and gradients. What a buffer holds is said where it is used.
#[derive(Default)]
pub(super) struct Room {
    pub(super) matmul: MatmulScratch,
    pub(super) routing: Routing,
    pub(super) normed: Vec<f32>,
    pub(super) d_normed: Vec<f32>,
    pub(super) out: Vec<f32>,
    pub(super) a: Vec<f32>,
    pub(super) b: Vec<f32>,
    pub(super) c: Vec<f32>,
    pub(super) d: Vec<f32>,
    pub(super) e: Vec<f32>,
    pub(super) f: Vec<f32>,
    pub(super) g: Vec<f32>,
    pub(super) h: Vec<f32>,
    pub(super) i: Vec<f32>,
    pub(super) j: Vec<f32>,
    pub(super) k: Vec<f32>,
    /// Gradients towards x A of the layer's modules.
    pub(super) d_lows: Lows,
    pub(super) part: Vec<f32>,
    pub(super) magnitudes: MagnitudeRoom,
}

/// `buffer` with exactly `len` elements, whose values are whatever they are.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        // What is made for the longest of lessons is no longer than that.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Room {
    /// The buffers that have letters.
    pub(super) fn letters(&self) -> [&Vec<f32>; LETTERS] {
        let Room { a, b, c, d, e, f, g, h, i, j, k, .. } = self;
        [a, b, c, d, e, f, g, h, i, j, k]
    }
}

impl LayerTape {
    /// Bytes that are held.
    pub(super) fn held_bytes(&self) -> usize {
        let LayerTape { x, middle, q, k, v, gate, heads, mixed, ffn, shared, lows } = self;
        let of_ffn = ffn.iter().flat_map(|f| [&f.gate, &f.up, &f.down]);
        let kept = [x, middle, q, k, v, gate, heads, mixed, shared].into_iter().chain(of_ffn);
        let lows = lows.iter().chain(ffn.iter().flat_map(|f| &f.lows));
        kept.map(Kept::held_bytes).sum::<usize>() + lows.map(|low| 4 * low.capacity()).sum::<usize>()
    }
}

/// What every block of a batch needs, both ways.
pub(super) struct Way<'a> {
    pub(super) compute: &'a Compute,
    pub(super) adapter: &'a Adapter,
    /// Where the model's own numbers lie, if they are learnt.
    pub(super) whole: Option<&'a Whole>,
    pub(super) layer: usize,
    pub(super) eps: f32,
    pub(super) form: KeptType,
    /// Whether there is a way back, for which values are kept.
    pub(super) keeps: bool,
    pub(super) seqs: &'a [Range<usize>],
    /// Angles of the rows' positions, (T, R)
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    /// R
    pub(super) pairs: usize,
}

impl Way<'_> {
    /// Keeps x for the way back.
    pub(super) fn keep(&self, kept: &mut Kept, x: &[f32]) {
        if self.keeps {
            self.compute.keep(kept, self.form, x);
        }
    }
}

impl Tape {
    /// A tape for a model. `sparing`: layers keep only their input and are computed again on the way back.
    pub fn new(model: &Model, sparing: bool) -> Tape {
        let layers = model.plan().layers.len();
        Tape {
            form: kept_type(model),
            sparing,
            layers: (0..if sparing { 1 } else { layers }).map(|_| LayerTape::default()).collect(),
            inputs: (0..if sparing { layers } else { 0 }).map(|_| Kept::default()).collect(),
            state: SequenceState::new(model.kv_type()),
            room: Room::default(),
            begun: Begun::default(),
            x: Vec::new(),
            dx: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// Lets sequences that come again keep up to so many bytes of what layers below the first adapted one make of them.
    pub fn remember(&mut self, limit_bytes: usize) {
        self.begun.limit_bytes = limit_bytes;
    }

    /// Scores of the last lesson's sequences, (seqs, labels), before any softmax.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }
}

/// Models whose activations stay in f32 keep f32.
pub(super) fn kept_type(model: &Model) -> KeptType {
    match model.embedding.dtype() {
        DType::F32 | DType::F16 => KeptType::F32,
        _ => KeptType::Bf16,
    }
}

impl SequenceState {
    fn new(kv_type: KvType) -> SequenceState {
        SequenceState { kv_type, kv: None, recurrent: None, pages: Vec::new() }
    }

    /// Pages for the sequences of a lesson.
    pub(super) fn prepare(&mut self, seqs: &[Range<usize>]) {
        self.pages.clear();
        let mut next = 0;
        for seq in seqs {
            let count = seq.len().div_ceil(PAGE_TOKENS) as u32;
            self.pages.push((next..next + count).collect());
            next += count;
        }
    }

    /// The cache of an attention layer, and the sequences as it takes them.
    pub(super) fn attention(
        &mut self,
        plan: &AttentionPlan,
        seqs: &[Range<usize>],
    ) -> Result<(&mut KvCache, Vec<AttentionSeq<'_>>), AllocError> {
        let pages: usize = self.pages.iter().map(Vec::len).sum();
        let key = (plan.kv_heads, plan.head_dim, pages);
        let fits = |(kv_heads, head_dim, room): &AttentionPlanKey| {
            (*kv_heads, *head_dim) == (plan.kv_heads, plan.head_dim) && *room >= pages
        };
        if !self.kv.as_ref().is_some_and(|(made, _)| fits(made)) {
            self.kv = Some((key, KvCache::new(self.kv_type, plan.kv_heads, plan.head_dim, pages)?));
        }
        let seq = |(rows, pages): (&Range<usize>, _)| AttentionSeq { rows: rows.clone(), first: 0, pages };
        let seqs = seqs.iter().zip(self.pages.iter().map(Vec::as_slice)).map(seq).collect();
        match &mut self.kv {
            Some((_, cache)) => Ok((cache, seqs)),
            None => unreachable!("made above"),
        }
    }

    /// The states of a recurrent layer, and the sequences as it takes them.
    pub(super) fn recurrent(
        &mut self,
        plan: &DeltaNetPlan,
        seqs: &[Range<usize>],
    ) -> Result<(&mut ConvState, &mut DeltaState, Vec<RecurrentSeq>), AllocError> {
        let fits = |made: &DeltaNetPlan, slots: usize| made == plan && slots >= seqs.len();
        if !self.recurrent.as_ref().is_some_and(|(made, slots, ..)| fits(made, *slots)) {
            let (conv, delta) = (ConvState::new(plan.conv(), seqs.len())?, DeltaState::new(plan.shape, seqs.len())?);
            self.recurrent = Some((*plan, seqs.len(), conv, delta));
        }
        let seq = |(slot, rows): (usize, &Range<usize>)| RecurrentSeq { rows: rows.clone(), first: 0, slot };
        let seqs = seqs.iter().enumerate().map(seq).collect();
        match &mut self.recurrent {
            Some((_, _, conv, delta)) => Ok((conv, delta, seqs)),
            None => unreachable!("made above"),
        }
    }
}
