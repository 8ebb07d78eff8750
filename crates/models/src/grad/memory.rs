//! How much memory a lesson takes: reckoned before the first one, from above, and counted afterwards.
//!
//! The reckoning goes through the same buffers as the blocks do: what a layer keeps, the room that layers share, what ops take
//! beside these. Not here: the weights, the adapter, the optimiser.

use qwenkit_kernels::{ConvState, DeltaState, HeadLoss, KvCache, PAGE_TOKENS};
use qwenkit_tensor::TokenId;

use super::tape::{FFN_ROWS, HEAD_ROWS, LETTERS, LayerTape, SequenceState, Tape, kept_type};
use super::whole::head_rows;
use crate::{
    adapter::{Adapter, Module},
    load::Model,
    plan::{Ffn, Mixer, Plan},
    whole::Whole,
};

/// How much is computed at once.
#[derive(Clone, Copy, Debug)]
pub struct LessonSize {
    /// T
    pub tokens: usize,
    /// Sequences.
    pub seqs: usize,
    /// Rows that go through the output head.
    pub wanted: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// Values of one token.
struct Inner {
    /// What a layer keeps of its mixer and of its feed-forward block.
    mixer: usize,
    ffn: usize,
    /// In each buffer of the room; of a dense block's for its rows at once.
    room: [usize; LETTERS],
    tiled: [usize; LETTERS],
    /// What ops take for the time of one call, in bytes, and what of that each thread has of its own.
    ops: usize,
    ops_each: usize,
    /// The widest input of a product, and outputs of products whose gradients are added, for all rows and for a dense block's.
    widest: usize,
    outputs: usize,
    widest_tiled: usize,
    outputs_tiled: usize,
}

/// Bytes of a gradient's value rounded to bf16, or to 8 bits with its share of scales.
const ROUNDED: usize = 2;
/// Bytes that products take for each thread.
const PRODUCTS_EACH: usize = 1280 << 10;
/// What gradients of outputs are padded to, for each of the products.
const PADDED: usize = 4 * 128;
/// What is held of each token besides: ids, places, angles' positions.
const TOKEN_BYTES: usize = 64;

impl Tape {
    /// Bytes that lessons of this size take beside weights and adapter, no fewer than they will be.
    pub fn bytes(model: &Model, adapter: &Adapter, sparing: bool, size: LessonSize) -> usize {
        let lowest = adapter.lowest_layer().unwrap_or(model.plan().layers.len());
        bytes(model, adapter, lowest, sparing, size)
    }

    /// The same where the model's own numbers are learnt.
    pub fn whole_bytes(model: &Model, whole: &Whole, sparing: bool, size: LessonSize) -> usize {
        let vocab = model.plan().vocab;
        bytes(model, &whole.adapter, 0, sparing, size) + 4 * vocab * head_rows(vocab).min(size.wanted)
    }

    /// Bytes that it takes to remember all sequences of so many tokens in all; none where the first layer is adapted.
    pub fn remembered_bytes(model: &Model, adapter: &Adapter, tokens: usize) -> usize {
        match adapter.lowest_layer() {
            Some(0) => 0,
            _ => tokens * (model.plan().width * kept_type(model).bytes() + size_of::<TokenId>()),
        }
    }

    /// Bytes of the buffers that the tape holds now. What ops take for one call is not among them.
    pub fn held_bytes(&self) -> usize {
        let floats = |x: &Vec<f32>| 4 * x.capacity();
        let kept: usize = self.layers.iter().map(LayerTape::held_bytes).sum();
        let inputs: usize = self.inputs.iter().map(|kept| kept.held_bytes()).sum();
        let room = &self.room;
        let letters: usize = room.letters().into_iter().map(floats).sum();
        let others =
            [&room.normed, &room.d_normed, &room.out, &room.part, &self.x, &self.begun.x, &self.dx, &self.scores];
        kept + inputs
            + letters
            + room.d_lows.iter().chain(others).map(floats).sum::<usize>()
            + room.magnitudes.held_bytes()
            + room.matmul.held_bytes()
            + self.state.held_bytes()
            + self.begun.held_bytes
    }
}

/// As `Tape::bytes`, nothing being learnt below layer `lowest`.
fn bytes(model: &Model, adapter: &Adapter, lowest: usize, sparing: bool, size: LessonSize) -> usize {
    let (plan, form) = (model.plan(), kept_type(model).bytes());
    let LessonSize { tokens, seqs, wanted, threads } = size;
    let layers: Vec<Inner> = plan.layers.iter().map(|layer| inner(plan, &layer.mixer, &layer.ffn)).collect();
    let most = |f: &dyn Fn(&Inner) -> usize| layers.iter().map(f).max().unwrap_or(0);
    let ranks = |layer: usize| Module::ALL.map(|m| adapter.lora(layer, m).map_or(0, |lora| lora.rank));
    let all_ranks: Vec<_> = (0..layers.len()).map(ranks).collect();
    let widest_ranks: usize =
        (0..Module::COUNT).map(|m| all_ranks.iter().map(|ranks| ranks[m]).max().unwrap_or(0)).sum();
    // With magnitudes a layer keeps its two residuals and what its two blocks gave.
    let residuals = if adapter.has_magnitudes() { 4 * plan.width } else { 2 * plan.width };
    let (kept, lows) = match sparing {
        true => {
            let one = most(&|l| l.mixer) + most(&|l| l.ffn) + residuals;
            (one + (layers.len() - lowest) * plan.width, widest_ranks)
        }
        false => (layers[lowest..].iter().map(|l| l.mixer + l.ffn + residuals).sum(), all_ranks.iter().flatten().sum()),
    };
    let tile = tokens.min(FFN_ROWS);
    let room: usize = (0..LETTERS).map(|i| (tokens * most(&|l| l.room[i])).max(tile * most(&|l| l.tiled[i]))).sum();
    // Residual, the same of a lesson's beginning, and its gradient, the two norms' results, a block's result; ranks on the way
    // back; angles.
    let plain = 6 * plan.width + lows + widest_ranks + plan.rope.dims;
    let inputs = (tokens * most(&|l| l.widest)).max(tile * most(&|l| l.widest_tiled));
    let outputs = (tokens * most(&|l| l.outputs)).max(tile * most(&|l| l.outputs_tiled));
    // A module's outputs, a gradient that others need too, sums.
    let magnitudes = match adapter.has_magnitudes() {
        true => outputs + tokens * plan.width + most(&|l| l.outputs.max(l.outputs_tiled)),
        false => 0,
    };
    let rounded = 4 * inputs + ROUNDED * outputs + threads * PRODUCTS_EACH;
    let ops = most(&|l| l.ops) + threads * most(&|l| l.ops_each);
    let pages = tokens / PAGE_TOKENS + seqs;
    let state = |mixer: &Mixer| match mixer {
        Mixer::Attention(a) => pages * KvCache::page_bytes(model.kv_type(), a.kv_heads, a.head_dim),
        Mixer::DeltaNet(d) => {
            // Each thread computes the memories of sixteen tokens again.
            let memory = 4 * d.shape.key_dim * d.shape.value_dim;
            seqs * (ConvState::slot_bytes(d.conv()) + DeltaState::slot_bytes(d.shape)) + threads * 20 * memory
        }
    };
    let kinds = [true, false].map(|paged| {
        let of_kind = |mixer: &&Mixer| matches!(mixer, Mixer::Attention(_)) == paged;
        plan.layers.iter().map(|layer| &layer.mixer).filter(of_kind).map(state).max().unwrap_or(0)
    });
    let at_head = 16 * plan.width * wanted.max(seqs).min(HEAD_ROWS);
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    let of_head = if wanted > 0 { HeadLoss::bytes(head, wanted.min(HEAD_ROWS), threads) } else { 0 };
    // One module's gradient in two parts, and scores of labels.
    let of_labels = adapter.score().map_or(0, |score| 8 * seqs * score.labels);
    let part = 4 * adapter.loras().iter().map(|lora| lora.rank * lora.outputs).max().unwrap_or(0);
    tokens * (kept * form + 4 * plain + ops + TOKEN_BYTES)
        + 4 * (room + magnitudes)
        + rounded
        + kinds.iter().sum::<usize>()
        + at_head
        + of_head
        + of_labels
        + part
}

impl SequenceState {
    fn held_bytes(&self) -> usize {
        let paged = self.kv.as_ref().map_or(0, |((kv_heads, head_dim, pages), _)| {
            pages * KvCache::page_bytes(self.kv_type, *kv_heads, *head_dim)
        });
        let slots = self.recurrent.as_ref().map_or(0, |(plan, slots, ..)| {
            slots * (ConvState::slot_bytes(plan.conv()) + DeltaState::slot_bytes(plan.shape))
        });
        paged + slots
    }
}

/// What the blocks of a layer hold of one token; the letters are those that the blocks' files say.
fn inner(plan: &Plan, mixer: &Mixer, ffn: &Ffn) -> Inner {
    let width = plan.width;
    let mut found = match mixer {
        Mixer::Attention(a) => {
            let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            let gate = if a.output_gate { q } else { 0 };
            let normed = if a.qk_norm { q } else { 0 };
            Inner {
                mixer: 2 * q + 2 * kv + gate,
                ffn: 0,
                room: [q, kv.max(gate), q.max(kv), gate.max(2 * kv), q, kv, kv, normed, 0, 0, 0],
                tiled: [0; LETTERS],
                widest_tiled: 0,
                outputs_tiled: 0,
                // What each query head gives keys and values; a thread's keys, values and scores of one head.
                ops: 8 * q,
                ops_each: 16 * a.head_dim + 1024,
                widest: q.max(width),
                outputs: q + gate + 2 * kv,
            }
        }
        Mixer::DeltaNet(d) => {
            let (channels, values, heads) = (d.shape.channels(), d.shape.value_width(), d.shape.value_heads);
            let (memory, largest) = (d.shape.key_dim * d.shape.value_dim, channels.max(values));
            Inner {
                // Computed again.
                mixer: 0,
                ffn: 0,
                room: [
                    channels,
                    values,
                    2 * heads,
                    channels,
                    channels,
                    largest,
                    values,
                    largest,
                    values,
                    channels,
                    2 * heads,
                ],
                tiled: [0; LETTERS],
                widest_tiled: 0,
                outputs_tiled: 0,
                ops: 8 * heads * d.shape.key_dim,
                ops_each: memory / 4,
                widest: values.max(width),
                outputs: channels + values + 2 * heads,
            }
        }
    };
    let mut room = [0; LETTERS];
    match ffn {
        Ffn::Dense { width: inner } => {
            found.ffn = 2 * inner;
            found.tiled[..4].fill(*inner);
            found.widest_tiled = *inner;
            found.outputs_tiled = 2 * inner + PADDED;
        }
        Ffn::Moe(moe) => {
            let (each, inner, shared) = (moe.router.experts_per_token, moe.width, moe.shared_width.unwrap_or(0));
            let routed = each * inner;
            found.ffn = if shared > 0 { width + 2 * shared } else { 0 };
            room = [
                routed.max(shared),
                routed.max(shared),
                moe.router.experts.max(shared),
                (each * width).max(shared),
                routed,
                each * width,
                width,
                0,
                width,
                width,
                1,
            ];
            // The routing.
            found.ops = found.ops.max(each * 128 + 16 * moe.router.experts);
            found.widest = found.widest.max(each * width.max(inner)).max(shared);
            found.outputs = found.outputs.max(each * 2 * inner).max(2 * shared).max(moe.router.experts);
        }
    }
    found.outputs = found.outputs.max(width) + PADDED;
    found.room.iter_mut().zip(room).for_each(|(most, own)| *most = own.max(*most));
    found
}
