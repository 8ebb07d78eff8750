//! The gated delta rule: attention of linear cost, whose memory of a sequence is one matrix S: (K, V) per head.
//!
//! For each token `S *= decay; S += k (beta (v - S^T k))^T; out = S^T q`, in f32 throughout: half precision drifts. Positions
//! are taken in chunks of eight that begin at multiples of eight. S stands still within a chunk; a token reads it as it was at
//! the chunk's beginning and adds what the tokens of the chunk before it wrote, which the slot keeps. The chunk's last token
//! joins the eight writes with S. So S is gone through twice for eight tokens and read once for one, and as chunks lie at fixed
//! positions, any cut of the prompt gives the same bits. Until a chunk's last token has come, a sequence can go back within the
//! chunk: what the tokens taken back have written is written over. Sources: Yang et al. 2024; the sums within a chunk are the WY form of
//! Bischof and Van Loan 1987.

mod between;
mod chunk;
mod layer;

use std::ops::Range;

use between::{Between, Products};
use chunk::Chunk;
pub use layer::{DeltaGate, DeltaLayer};
use qwenkit_tensor::{AllocError, HugeBuf};

use crate::{
    Isa,
    conv::{RecurrentSeq, check_seqs},
    lanes::{self, LANES, Lanes, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Added to the sum of squares when a head of q or k is brought to length 1.
pub(crate) const UNIT_EPS: f32 = 1e-6;

/// Tokens of a chunk; part of the result's bits. Eight tokens' k and q make sixteen sums, which hide the latency of the
/// multiply-add and leave half of the 512-bit registers.
const CHUNK: usize = 8;

/// The most tokens that can be taken back at once, of any state in slots.
pub const TAKEN_BACK: usize = CHUNK - 1;

/// Values of a head of k or q that lie together in `Tile`: those of published models. A number known to the compiler, so that
/// all sixteen rows of a tile are reached from one register.
const PART: usize = 128;

/// Some of the dimensions of a chunk's keys, then of its queries.
type Tile = [[f32; PART]; 2 * CHUNK];

/// The shape of a delta rule layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of q and k, `linear_num_key_heads`.
    pub key_heads: usize,
    /// Heads of v and of the result, `linear_num_value_heads`; a multiple of the key heads.
    pub value_heads: usize,
    /// Size of a head of q and k, `linear_key_head_dim`.
    pub key_dim: usize,
    /// Size of a head of v, `linear_value_head_dim`.
    pub value_dim: usize,
    /// Which key head a value head uses.
    pub order: HeadOrder,
}

/// Which key head a value head uses, where there are several value heads to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadOrder {
    /// Value heads of one key head stand together: j uses j / r.
    Grouped,
    /// Key heads take turns: j uses j % key heads.
    Tiled,
}

/// The memory of every slot of one layer.
pub struct DeltaState {
    shape: DeltaShape,
    slots: usize,
    /// (slots, value heads, what a head remembers): S as (blocks of 16 columns, K, 16), what the tokens of the chunk under
    /// way wrote as (blocks, 8, 16), and their decays as (16), of which 8 are used.
    data: HugeBuf,
    /// Keys of the tokens of the chunk under way: (slots, key heads, 8, K)
    keys: HugeBuf,
}

/// What a delta rule layer computes with.
pub struct DeltaInput<'a> {
    /// Heads of q, then k, then v of each token: (T, C). Heads of q and k have length 1, those of q are scaled.
    pub qkv: &'a [f32],
    /// What is written, and how fast it fades.
    pub gates: DeltaGates<'a>,
}

/// How much each token writes, and how fast the memory fades.
#[derive(Clone, Copy)]
pub struct DeltaGates<'a> {
    /// How much of a value is written, before its sigmoid: (T, value heads)
    pub write: &'a [f32],
    /// How fast the memory fades, before bias, softplus and `rate`: (T, value heads)
    pub fade: &'a [f32],
    /// Added to `fade`: (value heads)
    pub fade_bias: &'a [f32],
    /// Multiplied with the softplus; negative: (value heads)
    pub rate: &'a [f32],
}

impl DeltaShape {
    /// C: values of q, k and v together.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Values of all value heads together.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    pub(crate) fn key_head(&self, value_head: usize) -> usize {
        match self.order {
            HeadOrder::Grouped => value_head / (self.value_heads / self.key_heads),
            HeadOrder::Tiled => value_head % self.key_heads,
        }
    }

    /// Blocks of sixteen columns that a head's memory has.
    fn blocks(&self) -> usize {
        self.value_dim.div_ceil(LANES)
    }

    /// Lanes of what a value head remembers; as many as can be counted where they are more.
    fn head_lanes(&self) -> usize {
        self.blocks().saturating_mul(self.key_dim.saturating_add(CHUNK)).saturating_add(1)
    }

    /// Values of a slot's keys.
    fn key_values(&self) -> usize {
        self.key_heads.saturating_mul(self.key_dim).saturating_mul(CHUNK)
    }
}

impl DeltaState {
    /// Room for `slots` sequences. Memory is used as slots are.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(shape: DeltaShape, slots: usize) -> Result<DeltaState, AllocError> {
        let room = |values: usize| match values.checked_mul(size_of::<f32>()).and_then(|bytes| bytes.checked_mul(slots))
        {
            Some(bytes) => HugeBuf::zeroed(bytes),
            None => Err(AllocError { wanted_bytes: usize::MAX }),
        };
        let heads = shape.value_heads.saturating_mul(shape.head_lanes());
        let (data, keys) = (room(heads.saturating_mul(LANES))?, room(shape.key_values())?);
        Ok(DeltaState { shape, slots, data, keys })
    }

    /// Bytes of one slot.
    pub fn slot_bytes(shape: DeltaShape) -> usize {
        let heads = shape.value_heads.saturating_mul(shape.head_lanes()).saturating_mul(size_of::<Lanes>());
        heads.saturating_add(shape.key_values().saturating_mul(size_of::<f32>()))
    }

    /// How many tokens behind the one at `position` can be taken back after they were computed with it: those of the chunk
    /// that stands open behind it, whose last one would close it.
    pub fn can_take_back(position: usize) -> usize {
        CHUNK - 1 - (position + 1) % CHUNK
    }

    /// Copies what a slot remembers over another's.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        let heads = self.shape.value_heads * self.shape.head_lanes();
        self.data.as_mut_slice::<Lanes>().copy_within(from * heads..(from + 1) * heads, to * heads);
        let keys = self.shape.key_values();
        self.keys.as_mut_slice::<f32>().copy_within(from * keys..(from + 1) * keys, to * keys);
    }

    /// The bytes of what a slot remembers, in two parts, to be kept elsewhere.
    pub fn slot_as_bytes(&self, slot: usize) -> [&[u8]; 2] {
        let [memory, keys] = self.slot_ranges(slot);
        [&self.data.as_slice::<u8>()[memory], &self.keys.as_slice::<u8>()[keys]]
    }

    /// The same, to be put back.
    pub fn slot_as_bytes_mut(&mut self, slot: usize) -> [&mut [u8]; 2] {
        let [memory, keys] = self.slot_ranges(slot);
        [&mut self.data.as_mut_slice::<u8>()[memory], &mut self.keys.as_mut_slice::<u8>()[keys]]
    }

    /// Where a slot's bytes lie in both buffers.
    fn slot_ranges(&self, slot: usize) -> [Range<usize>; 2] {
        let memory = self.shape.value_heads * self.shape.head_lanes() * size_of::<Lanes>();
        let keys = self.shape.key_values() * size_of::<f32>();
        [slot * memory..(slot + 1) * memory, slot * keys..(slot + 1) * keys]
    }

    /// Keeps the keys of `seq`'s last chunk where the chunk is not through.
    fn keep_keys(&mut self, seq: &RecurrentSeq, qkv: &[f32]) {
        let DeltaShape { key_heads, key_dim, .. } = self.shape;
        let open = (seq.first + seq.rows.len()) % CHUNK;
        let new = open.min(seq.rows.len());
        let slot =
            &mut self.keys.as_mut_slice::<f32>()[seq.slot * self.shape.key_values()..][..self.shape.key_values()];
        for (place, row) in (open - new..open).zip(seq.rows.end - new..seq.rows.end) {
            let keys = &qkv[row * self.shape.channels() + key_heads * key_dim..][..key_heads * key_dim];
            for (slot, key) in slot.chunks_exact_mut(CHUNK * key_dim).zip(keys.chunks_exact(key_dim)) {
                slot[place * key_dim..][..key_dim].copy_from_slice(key);
            }
        }
    }
}

impl Compute {
    /// Brings every head of q and k in x: (T, C) to length 1, and those of q to `1 / sqrt(K)`.
    ///
    /// # Panics
    /// If `x` is not of whole rows.
    pub fn unit_heads(&self, shape: DeltaShape, x: &mut [f32]) {
        let width = shape.key_heads * shape.key_dim;
        let scale = 1.0 / (shape.key_dim as f32).sqrt();
        self.each_row(x, shape.channels(), |isa, _, x| {
            let (q, rest) = x.split_at_mut(width);
            unit_row(isa, shape.key_dim, scale, q);
            unit_row(isa, shape.key_dim, 1.0, &mut rest[..width]);
        });
    }

    /// Runs the rule over the new tokens of all sequences; out: (T, value heads, V).
    ///
    /// # Panics
    /// If shapes do not fit, the sequences do not cover the rows in order, or two share a slot.
    pub fn delta_rule(&self, state: &mut DeltaState, seqs: &[RecurrentSeq], input: &DeltaInput<'_>, out: &mut [f32]) {
        let shape = state.shape;
        let (channels, heads) = (shape.channels(), shape.value_heads);
        let tokens = input.qkv.len() / channels;
        check_seqs(seqs, state.slots, tokens);
        let fits = input.qkv.len() == tokens * channels
            && input.gates.fit(tokens, heads)
            && out.len() == tokens * shape.value_width();
        assert!(fits, "delta rule of {heads} heads over {tokens} tokens");
        let memory = SharedOut::new(state.data.as_mut_slice::<Lanes>());
        let keys = state.keys.as_slice::<f32>();
        let out = SharedOut::new(out);
        let jobs = seqs.len() * heads;
        let threads = self.pool.threads();
        self.pool.run(|i| {
            let mut tiles = vec![[[0.0; PART]; 2 * CHUNK]; shape.key_dim.div_ceil(PART)];
            for job in (i..jobs).step_by(threads) {
                let (seq, head) = (&seqs[job / heads], job % heads);
                // SAFETY: each head of a slot is in exactly one job, as no two sequences have the same slot.
                let memory =
                    unsafe { memory.slice((seq.slot * heads + head) * shape.head_lanes(), shape.head_lanes()) };
                let keys = &keys[(seq.slot * shape.key_heads + shape.key_head(head)) * CHUNK * shape.key_dim..];
                Head { shape, isa: self.isa, input, seq, head, keys, out: &out }.run(memory, &mut tiles);
            }
        });
        for seq in seqs {
            state.keep_keys(seq, input.qkv);
        }
    }
}

/// One value head of one sequence.
struct Head<'a> {
    shape: DeltaShape,
    isa: Isa,
    input: &'a DeltaInput<'a>,
    seq: &'a RecurrentSeq,
    head: usize,
    /// Of the chunk that the sequence's first row belongs to: (8, K)
    keys: &'a [f32],
    /// (T, value heads, V)
    out: &'a SharedOut<'a, f32>,
}

/// What one value head remembers of a sequence.
struct Memory<'a> {
    /// S as (blocks of 16 columns, K, 16)
    state: &'a mut [Lanes],
    /// What the tokens of the chunk under way wrote, (blocks, 8, 16)
    writes: &'a mut [Lanes],
    /// Their decays.
    decays: &'a mut Lanes,
}

impl<'a> Memory<'a> {
    /// The parts of `memory`, which has what a head remembers; empty where a sequence begins.
    fn of(memory: &'a mut [Lanes], shape: DeltaShape, seq: &RecurrentSeq) -> Memory<'a> {
        let (state, rest) = memory.split_at_mut(shape.blocks() * shape.key_dim);
        let (writes, decays) = rest.split_at_mut(shape.blocks() * CHUNK);
        if seq.first == 0 {
            state.fill([0.0; LANES]);
        }
        Memory { state, writes, decays: &mut decays[0] }
    }
}

impl Head<'_> {
    /// Takes the head through the sequence's new tokens. `memory` is what it remembers.
    fn run(&self, memory: &mut [Lanes], tiles: &mut [Tile]) {
        let Head { shape, isa, input, seq, head, keys, out } = *self;
        let (dim, channels) = (shape.key_dim, shape.channels());
        let Memory { state, writes, decays } = Memory::of(memory, shape, seq);
        for place in 0..seq.first % CHUNK {
            spread(&keys[place * dim..][..dim], tiles, place);
        }
        let mut row = seq.rows.start;
        while row < seq.rows.end {
            let places = chunk_places(seq, row);
            for (row, place) in (row..).zip(places.clone()) {
                let token = &input.qkv[row * channels..][..channels];
                let q = shape.key_head(head) * dim;
                spread(&token[q + shape.key_heads * dim..][..dim], tiles, place);
                spread(&token[q..][..dim], tiles, CHUNK + place);
            }
            let products = Products::of(isa, dim, tiles, places.clone());
            let of_head = (&input.gates, row, shape.value_heads, head);
            let between = Between::of(&products, of_head, places.clone(), decays);
            let column = head * shape.value_dim;
            let v = &input.qkv[row * channels + 2 * shape.key_heads * dim + column..];
            let out = (out, row * shape.value_width() + column, shape.value_width());
            let places_done = places.len();
            Chunk { shape, isa, tiles, between: &between, places, v: (v, channels), out }.run(state, writes);
            row += places_done;
        }
    }
}

/// The places in their chunk of the tokens that a sequence has in it, from row `row` of the batch on.
fn chunk_places(seq: &RecurrentSeq, row: usize) -> Range<usize> {
    let from = (seq.first + row - seq.rows.start) % CHUNK;
    from..CHUNK.min(from + seq.rows.end - row)
}

/// Lays a head's values out as row `place` of the tiles.
fn spread(x: &[f32], tiles: &mut [Tile], place: usize) {
    for (x, tile) in x.chunks(PART).zip(tiles) {
        tile[place][..x.len()].copy_from_slice(x);
    }
}

impl DeltaGates<'_> {
    fn fit(&self, tokens: usize, heads: usize) -> bool {
        let (of_tokens, of_heads) = ([self.write, self.fade], [self.fade_bias, self.rate]);
        of_tokens.iter().all(|x| x.len() == tokens * heads) && of_heads.iter().all(|x| x.len() == heads)
    }

    /// What is left of the memory after one token, in 0..=1.
    pub(crate) fn decay(&self, i: usize, head: usize) -> f32 {
        let x = self.fade[i] + self.fade_bias[head];
        // Beyond 20 the logarithm equals x in f32, and the exponential would overflow further on.
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        (self.rate[head] * softplus).exp()
    }

    /// How much of a value is written, in 0..=1.
    pub(crate) fn beta(&self, i: usize) -> f32 {
        1.0 / (1.0 + lanes::exp(-self.write[i]))
    }
}

for_each_isa! {
    pub(crate) fn unit_row(dim: usize, scale: f32, x: &mut [f32]) {
        for head in x.chunks_exact_mut(dim) {
            let factor = scale / (lanes::sum_by(head, |x| x * x) + UNIT_EPS).sqrt();
            head.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

#[cfg(test)]
mod tests;
