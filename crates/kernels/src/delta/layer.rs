//! All that a layer of the gated delta rule does between its products, as one op: convolution, heads of length 1, the rule,
//! the norm of its results and their gate.
//!
//! A thread takes a key head, with the value heads that use it, through a sequence's tokens, eight at a time: so what is made of
//! them on the way stays in the first-level cache, and what keys and queries mean to each other is computed once for all value
//! heads. Every number has the bits that the ops one by one give it.

use std::ops::Range;

use super::{
    Between, CHUNK, Chunk, DeltaGates, DeltaShape, DeltaState, Memory, PART, Products, Tile, chunk_places, spread,
    unit_row,
};
use crate::{
    Isa,
    conv::{ConvState, RecurrentSeq, check_seqs, conv_row},
    elementwise::{norm_row_in_place, silu_mul, silu_row},
    gates::sigmoid_mul_row,
    lanes::Lanes,
    matmul::Compute,
    shared_out::SharedOut,
};

/// What becomes of a layer's results behind their norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaGate {
    /// `silu(z) * result`
    Silu,
    /// `result * sigmoid(z)`
    Sigmoid,
}

/// What a layer computes with.
pub struct DeltaLayer<'a> {
    /// Heads of q, then k, then v of each token, before the convolution: (T, C)
    pub x: &'a [f32],
    /// The convolution's weights: (width, C), oldest token first.
    pub conv: &'a [f32],
    /// What is written, and how fast it fades.
    pub gates: DeltaGates<'a>,
    /// The norm's factors for each head's results: (V)
    pub norm: &'a [f32],
    /// Added to the mean of their squares.
    pub eps: f32,
    /// What becomes of them.
    pub gate: DeltaGate,
    /// Rows whose results are wanted, ascending; all where absent.
    pub wanted: Option<&'a [usize]>,
}

impl Compute {
    /// Runs the layer over the new tokens of all sequences; z: (wanted rows, value heads, V) is what the results' gates are made
    /// of, and becomes the results.
    ///
    /// # Panics
    /// If shapes do not fit, the sequences do not cover the rows in order, or two share a slot.
    pub fn delta_layer(
        &self,
        conv: &mut ConvState,
        state: &mut DeltaState,
        seqs: &[RecurrentSeq],
        layer: &DeltaLayer<'_>,
        z: &mut [f32],
    ) {
        let shape = state.shape;
        let tokens = layer.x.len() / shape.channels();
        check_seqs(seqs, state.slots.min(conv.slots()), tokens);
        let rows = layer.wanted.map_or(tokens, <[usize]>::len);
        let fits = layer.x.len() == tokens * shape.channels()
            && conv.shape().channels == shape.channels()
            && layer.conv.len() == conv.shape().width * shape.channels()
            && layer.gates.fit(tokens, shape.value_heads)
            && layer.norm.len() == shape.value_dim
            && z.len() == rows * shape.value_width();
        assert!(fits, "delta layer of {shape:?} over {tokens} tokens, {rows} of them wanted");
        conv.begin(seqs);
        let memory = SharedOut::new(state.data.as_mut_slice::<Lanes>());
        let keys = SharedOut::new(state.keys.as_mut_slice::<f32>());
        let z = SharedOut::new(z);
        let (jobs, threads, kept) = (seqs.len() * shape.key_heads, self.pool.threads(), &*conv);
        self.pool.run(|i| {
            let mut room = Room::new(shape);
            for job in (i..jobs).step_by(threads) {
                let (seq, key_head) = (&seqs[job / shape.key_heads], job % shape.key_heads);
                // SAFETY: each key head of a slot, and each value head with it, is in exactly one job, as no two sequences have the
                // same slot.
                unsafe {
                    let len = CHUNK * shape.key_dim;
                    let keys = keys.slice((seq.slot * shape.key_heads + key_head) * len, len);
                    let memory = |head| {
                        memory.slice((seq.slot * shape.value_heads + head) * shape.head_lanes(), shape.head_lanes())
                    };
                    let heads = (0..shape.value_heads).filter(|&head| shape.key_head(head) == key_head);
                    let memories = heads.map(|head| (head, Memory::of(memory(head), shape, seq))).collect();
                    KeyHead { isa: self.isa, shape, layer, conv: kept, seq, key_head, z: &z }
                        .run(keys, memories, &mut room);
                }
            }
        });
        for seq in seqs {
            conv.keep(seq, layer.x);
        }
    }
}

/// One key head of one sequence.
struct KeyHead<'a> {
    isa: Isa,
    shape: DeltaShape,
    layer: &'a DeltaLayer<'a>,
    conv: &'a ConvState,
    seq: &'a RecurrentSeq,
    key_head: usize,
    /// (wanted rows, value heads, V)
    z: &'a SharedOut<'a, f32>,
}

/// What a thread needs for a chunk.
struct Room {
    tiles: Vec<Tile>,
    /// A head of k or q: (K)
    head: Vec<f32>,
    /// Values of a head, then its results: (8, V) each
    v: Vec<f32>,
    out: Vec<f32>,
}

impl Room {
    fn new(shape: DeltaShape) -> Room {
        Room {
            tiles: vec![[[0.0; PART]; 2 * CHUNK]; shape.key_dim.div_ceil(PART)],
            head: vec![0.0; shape.key_dim],
            v: vec![0.0; CHUNK * shape.value_dim],
            out: vec![0.0; CHUNK * shape.value_dim],
        }
    }
}

impl KeyHead<'_> {
    /// Takes the head through the sequence's new tokens. `keys`: (8, K) of the chunk under way.
    fn run(&self, keys: &mut [f32], mut memories: Vec<(usize, Memory<'_>)>, room: &mut Room) {
        let KeyHead { isa, shape, layer, seq, .. } = *self;
        let DeltaShape { key_heads, key_dim: dim, value_dim, .. } = shape;
        let Room { tiles, head: unit, v, out } = room;
        for place in 0..seq.first % CHUNK {
            spread(&keys[place * dim..][..dim], tiles, place);
        }
        let scale = 1.0 / (dim as f32).sqrt();
        let mut row = seq.rows.start;
        while row < seq.rows.end {
            let places = chunk_places(seq, row);
            for (row, place) in (row..).zip(places.clone()) {
                self.unit_head(row, self.key_head, scale, unit, tiles, CHUNK + place);
                let key = &mut keys[place * dim..][..dim];
                self.unit_head(row, key_heads + self.key_head, 1.0, key, tiles, place);
            }
            let products = Products::of(isa, dim, tiles, places.clone());
            for (head, Memory { state, writes, decays }) in &mut memories {
                for (row, v) in (row..).zip(v.chunks_exact_mut(value_dim)).take(places.len()) {
                    self.channels(row, 2 * key_heads * dim + *head * value_dim, v);
                }
                let of_head = (&layer.gates, row, shape.value_heads, *head);
                let between = Between::of(&products, of_head, places.clone(), decays);
                let to = SharedOut::new(&mut *out);
                let (v, out_at) = ((&v[..], value_dim), (&to, 0, value_dim));
                Chunk { shape, isa, tiles, between: &between, places: places.clone(), v, out: out_at }
                    .run(state, writes);
                self.finish(*head, row..row + places.len(), out);
            }
            row += places.len();
        }
    }

    /// Head `head` of row `row`, of those of q and k, brought to a length, in `unit` and as row `place` of the tiles.
    fn unit_head(&self, row: usize, head: usize, scale: f32, unit: &mut [f32], tiles: &mut [Tile], place: usize) {
        let dim = self.shape.key_dim;
        self.channels(row, head * dim, unit);
        unit_row(self.isa, dim, scale, unit);
        spread(unit, tiles, place);
    }

    /// Channels of row `row` from `first` on, behind the convolution.
    fn channels(&self, row: usize, first: usize, out: &mut [f32]) {
        let own = first..first + out.len();
        let shape = self.conv.shape();
        let mut inputs = self.conv.inputs(self.seq, self.layer.x, row);
        let mut weights = [&[][..]; crate::conv::CONV_WIDTH_MAX];
        for (j, weight) in self.layer.conv.chunks_exact(shape.channels).enumerate() {
            (inputs[j], weights[j]) = (&inputs[j][own.clone()], &weight[own.clone()]);
        }
        conv_row(self.isa, &inputs[..shape.width], &weights[..shape.width], out);
        silu_row(self.isa, out);
    }

    /// Norm and gate of a head's results for the wanted of these rows.
    fn finish(&self, head: usize, rows: Range<usize>, out: &mut [f32]) {
        let KeyHead { isa, shape, layer, .. } = *self;
        let wanted = |row: usize| match layer.wanted {
            Some(wanted) => wanted.binary_search(&row).ok(),
            None => Some(row),
        };
        for (row, result) in rows.zip(out.chunks_exact_mut(shape.value_dim)) {
            let Some(to) = wanted(row) else { continue };
            norm_row_in_place(isa, layer.norm, layer.eps, result);
            // SAFETY: each head of a row is in exactly one job.
            let z = unsafe { self.z.slice(to * shape.value_width() + head * shape.value_dim, shape.value_dim) };
            match layer.gate {
                DeltaGate::Silu => silu_mul(isa, result, z),
                DeltaGate::Sigmoid => {
                    sigmoid_mul_row(isa, z, result);
                    z.copy_from_slice(result);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
