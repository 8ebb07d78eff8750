//! The gated delta rule: attention of linear cost, whose memory of a sequence is one matrix S: (K, V) per head.
//!
//! For each token `S *= decay; S += k (beta (v - S^T k))^T; out = S^T q`, in f32 throughout: half precision drifts. Positions
//! are taken in chunks of eight that begin at multiples of eight. S stands still within a chunk; a token reads it as it was at
//! the chunk's beginning and adds what the tokens of the chunk before it wrote, which the slot keeps. The chunk's last token
//! joins the eight writes with S. So S is gone through twice for eight tokens and read once for one, and as chunks lie at fixed
//! positions, any cut of the prompt gives the same bits. Until a chunk's last token has come, a sequence can go back within the
//! chunk: what the tokens taken back have written is written over. Sources: Yang et al. 2024; the sums within a chunk are the WY form of
//! Bischof and Van Loan 1987.

mod chunk;

use std::ops::Range;

use chunk::Chunk;
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
            && input.write.len() == tokens * heads
            && input.fade.len() == tokens * heads
            && input.fade_bias.len() == heads
            && input.rate.len() == heads
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

/// What the tokens of a chunk mean to each other, for one head. Row i is token i's.
struct Between {
    /// In 0..=1: how much of a value is written.
    beta: [f32; CHUNK],
    /// How much of S is left.
    left: [f32; CHUNK],
    /// How much of what an earlier token wrote the key meets: what is left of it, times the product of the keys.
    held: [[f32; CHUNK]; CHUNK],
    /// The same for the query, which meets the token's own write too.
    read: [[f32; CHUNK]; CHUNK],
    /// Of each token's write, what is left behind the chunk's last token.
    kept: [f32; CHUNK],
}

impl Head<'_> {
    /// Takes the head through the sequence's new tokens. `memory` is what it remembers.
    fn run(&self, memory: &mut [Lanes], tiles: &mut [Tile]) {
        let (seq, blocks, dim) = (self.seq, self.shape.blocks(), self.shape.key_dim);
        let (state, rest) = memory.split_at_mut(blocks * dim);
        let (writes, decays) = rest.split_at_mut(blocks * CHUNK);
        if seq.first == 0 {
            state.fill([0.0; LANES]);
        }
        for place in 0..seq.first % CHUNK {
            spread(&self.keys[place * dim..][..dim], tiles, place);
        }
        let mut row = seq.rows.start;
        while row < seq.rows.end {
            let from = (seq.first + row - seq.rows.start) % CHUNK;
            let places = from..CHUNK.min(from + seq.rows.end - row);
            let between = self.between(row, places.clone(), &mut decays[0], tiles);
            Chunk { head: self, tiles, between: &between, row, places: places.clone() }.run(state, writes);
            row += places.len();
        }
    }

    /// Lays out the keys and queries of the tokens at `places`, the first of which is `row`, and what they mean to each other
    /// and to those before them in the chunk.
    fn between(&self, row: usize, places: Range<usize>, decays: &mut Lanes, tiles: &mut [Tile]) -> Between {
        let (shape, input, head) = (self.shape, self.input, self.head);
        let (dim, zero) = (shape.key_dim, [0.0; CHUNK]);
        let mut between =
            Between { beta: zero, left: zero, held: [zero; CHUNK], read: [zero; CHUNK], kept: [1.0; CHUNK] };
        for (row, place) in (row..).zip(places.clone()) {
            let token = &input.qkv[row * shape.channels()..][..shape.channels()];
            let q = shape.key_head(head) * dim;
            spread(&token[q + shape.key_heads * dim..][..dim], tiles, place);
            spread(&token[q..][..dim], tiles, CHUNK + place);
            let i = row * shape.value_heads + head;
            decays[place] = input.decay(i, head);
            between.beta[place] = input.beta(i);
        }
        // What is left of S, and of each write, behind the token that the loop has come to.
        let mut left = 1.0;
        let mut kept = [1.0; CHUNK];
        for i in 0..places.end {
            left *= decays[i];
            kept[..i].iter_mut().for_each(|kept| *kept *= decays[i]);
            if places.contains(&i) {
                between.left[i] = left;
                products(self.isa, dim, tiles, i, &mut between.held[i], &mut between.read[i]);
                for products in [&mut between.held[i], &mut between.read[i]] {
                    products.iter_mut().zip(&kept).for_each(|(product, kept)| *product *= kept);
                }
            }
        }
        between.kept = kept;
        between
    }
}

/// Lays a head's values out as row `place` of the tiles.
fn spread(x: &[f32], tiles: &mut [Tile], place: usize) {
    for (x, tile) in x.chunks(PART).zip(tiles) {
        tile[place][..x.len()].copy_from_slice(x);
    }
}

for_each_isa! {
    /// The products of token `i`'s key and query with the keys of the tokens before it and its own.
    pub(crate) fn products(dim: usize, tiles: &[Tile], i: usize, held: &mut [f32; CHUNK], read: &mut [f32; CHUNK]) {
        for j in 0..=i {
            (held[j], read[j]) = (0.0, 0.0);
            for (tile, first) in tiles.iter().zip((0..dim).step_by(PART)) {
                let len = PART.min(dim - first);
                held[j] += lanes::dot(&tile[j][..len], &tile[i][..len]);
                read[j] += lanes::dot(&tile[j][..len], &tile[CHUNK + i][..len]);
            }
        }
    }
}

impl DeltaInput<'_> {
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
mod tests {
    use super::*;
    use crate::Isa;

    /// Two value heads to a key head, and columns that fill no whole number of blocks.
    const SHAPE: DeltaShape =
        DeltaShape { key_heads: 2, value_heads: 4, key_dim: 6, value_dim: 20, order: HeadOrder::Grouped };

    /// Keys of more than one part of a tile, and enough columns for several blocks at once.
    const LARGE: DeltaShape =
        DeltaShape { key_heads: 2, value_heads: 4, key_dim: 140, value_dim: 90, order: HeadOrder::Grouped };

    /// Inputs of `tokens` tokens: (qkv, write, fade).
    fn inputs(shape: DeltaShape, tokens: usize, seed: f32) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f + seed).sin()).collect::<Vec<_>>();
        (wave(tokens * shape.channels(), 0.71), wave(tokens * 4, 1.9), wave(tokens * 4, 2.3))
    }

    const FADE_BIAS: [f32; 4] = [0.1, -0.4, 0.3, 25.0];
    const RATE: [f32; 4] = [-0.3, -1.0, -0.01, -0.02];

    /// Feeds tokens in pieces to slot 1 of a dirty state.
    fn fed(isa: Isa, shape: DeltaShape, tokens: usize, pieces: &[usize]) -> Vec<f32> {
        let compute = Compute::new(2, isa);
        let mut state = DeltaState::new(shape, 2).unwrap();
        state.data.as_mut_slice::<f32>().fill(f32::NAN);
        state.keys.as_mut_slice::<f32>().fill(f32::NAN);
        let (mut qkv, write, fade) = inputs(shape, tokens, 0.2);
        compute.unit_heads(shape, &mut qkv);
        let mut out = vec![0.0; tokens * shape.value_width()];
        let mut first = 0;
        for &piece in pieces {
            let at = |width: usize| first * width..(first + piece) * width;
            let input = DeltaInput {
                qkv: &qkv[at(shape.channels())],
                write: &write[at(4)],
                fade: &fade[at(4)],
                fade_bias: &FADE_BIAS,
                rate: &RATE,
            };
            let seq = RecurrentSeq { rows: 0..piece, first, slot: 1 };
            compute.delta_rule(&mut state, &[seq], &input, &mut out[at(shape.value_width())]);
            first += piece;
        }
        out
    }

    /// The same in f64, as the formula has it.
    fn exact(shape: DeltaShape, tokens: usize) -> Vec<f64> {
        let (qkv, write, fade) = inputs(shape, tokens, 0.2);
        let (dim, width) = (shape.key_dim, shape.value_dim);
        let unit = |x: &[f32]| {
            let length = (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() + 1e-6).sqrt();
            x.iter().map(|x| f64::from(*x) / length).collect::<Vec<f64>>()
        };
        let mut out = vec![0.0; tokens * shape.value_width()];
        for head in 0..shape.value_heads {
            let key_head = if shape.order == HeadOrder::Grouped { head / 2 } else { head % 2 };
            let mut memory = vec![0.0; dim * width];
            for t in 0..tokens {
                let row = &qkv[t * shape.channels()..][..shape.channels()];
                let q = unit(&row[key_head * dim..][..dim]);
                let k = unit(&row[(shape.key_heads + key_head) * dim..][..dim]);
                let v = &row[2 * shape.key_heads * dim + head * width..][..width];
                let softplus = (1.0 + f64::from(fade[t * 4 + head] + FADE_BIAS[head]).exp()).ln();
                let decay = (f64::from(RATE[head]) * softplus).exp();
                let beta = 1.0 / (1.0 + f64::from(-write[t * 4 + head]).exp());
                memory.iter_mut().for_each(|s| *s *= decay);
                for c in 0..width {
                    let held: f64 = (0..dim).map(|i| k[i] * memory[i * width + c]).sum();
                    let written = beta * (f64::from(v[c]) - held);
                    (0..dim).for_each(|i| memory[i * width + c] += k[i] * written);
                    let read: f64 = (0..dim).map(|i| q[i] * memory[i * width + c]).sum();
                    out[t * shape.value_width() + head * width + c] = read / (dim as f64).sqrt();
                }
            }
        }
        out
    }

    #[test]
    fn equals_the_formula_in_either_order_of_heads() {
        let tiled = DeltaShape { order: HeadOrder::Tiled, ..SHAPE };
        for shape in [SHAPE, tiled, LARGE] {
            let exact = exact(shape, 70);
            for (isa, pieces) in Isa::available().into_iter().flat_map(|isa| [(isa, vec![70]), (isa, vec![1; 70])]) {
                let found = fed(isa, shape, 70, &pieces);
                for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
                    assert!((f64::from(*found) - exact).abs() < 2e-5, "{isa} {shape:?} {i}: {found} and {exact}");
                }
            }
        }
    }

    #[test]
    fn any_cut_gives_the_same_bits() {
        let tokens = 2 * CHUNK + 3;
        for (isa, shape) in Isa::available().into_iter().flat_map(|isa| [(isa, SHAPE), (isa, LARGE)]) {
            let whole = fed(isa, shape, tokens, &[tokens]);
            for cut in 1..tokens {
                assert_eq!(fed(isa, shape, tokens, &[cut, tokens - cut]), whole, "{isa} cut at {cut}");
            }
            assert_eq!(fed(isa, shape, tokens, &vec![1; tokens]), whole, "{isa} token by token");
        }
    }

    #[test]
    fn tokens_taken_back_leave_no_trace() {
        let (tokens, isa) = (3 * CHUNK, Isa::detect().unwrap());
        let whole = fed(isa, SHAPE, tokens, &[tokens]);
        let compute = Compute::new(2, isa);
        let (mut qkv, write, fade) = inputs(SHAPE, tokens, 0.2);
        compute.unit_heads(SHAPE, &mut qkv);
        for first in 0..2 * CHUNK {
            let back = DeltaState::can_take_back(first);
            assert!(first / CHUNK == (first + back) / CHUNK || first % CHUNK == CHUNK - 1, "one chunk");
            let mut state = DeltaState::new(SHAPE, 1).unwrap();
            let mut feed = |from: usize, to: usize, wrong: usize| {
                let at = |width: usize| from * width..to * width;
                let mut qkv = qkv[at(SHAPE.channels())].to_vec();
                qkv[wrong.min(to - from) * SHAPE.channels()..].iter_mut().for_each(|x| *x = 0.5 - *x);
                let (write, fade) = (&write[at(4)], &fade[at(4)]);
                let input = DeltaInput { qkv: &qkv, write, fade, fade_bias: &FADE_BIAS, rate: &RATE };
                let mut out = vec![0.0; (to - from) * SHAPE.value_width()];
                compute.delta_rule(
                    &mut state,
                    &[RecurrentSeq { rows: 0..to - from, first: from, slot: 0 }],
                    &input,
                    &mut out,
                );
                out
            };
            feed(0, first, tokens);
            // The first of these stays, the others are taken back.
            feed(first, first + 1 + back, 1);
            let after = feed(first + 1, tokens, tokens);
            assert_eq!(after, whole[(first + 1) * SHAPE.value_width()..], "{back} taken back to {}", first + 1);
        }
    }

    #[test]
    fn a_copied_slot_goes_on_from_the_middle_of_a_chunk() {
        let compute = Compute::new(2, Isa::detect().unwrap());
        let (tokens, cut) = (12, 5);
        let whole = fed(compute.isa(), SHAPE, tokens, &[tokens]);
        let (mut qkv, write, fade) = inputs(SHAPE, tokens, 0.2);
        compute.unit_heads(SHAPE, &mut qkv);
        let mut state = DeltaState::new(SHAPE, 3).unwrap();
        let feed = |state: &mut DeltaState, slot, from: usize, to: usize| {
            let at = |width: usize| from * width..to * width;
            let (qkv, write, fade) = (&qkv[at(SHAPE.channels())], &write[at(4)], &fade[at(4)]);
            let input = DeltaInput { qkv, write, fade, fade_bias: &FADE_BIAS, rate: &RATE };
            let mut out = vec![0.0; (to - from) * SHAPE.value_width()];
            compute.delta_rule(state, &[RecurrentSeq { rows: 0..to - from, first: from, slot }], &input, &mut out);
            out
        };
        feed(&mut state, 0, 0, cut);
        state.copy_slot(0, 2);
        // What the first does afterwards does not reach the copy.
        feed(&mut state, 0, cut, cut + 1);
        assert_eq!(feed(&mut state, 2, cut, tokens), whole[cut * SHAPE.value_width()..]);
    }

    #[test]
    fn sequences_of_a_batch_do_not_meet() {
        let compute = Compute::new(3, Isa::detect().unwrap());
        let alone = fed(compute.isa(), SHAPE, 5, &[5]);
        let (mut qkv, mut write, mut fade) = inputs(SHAPE, 3, 9.0);
        let (other_qkv, other_write, other_fade) = inputs(SHAPE, 5, 0.2);
        qkv.extend(other_qkv);
        write.extend(other_write);
        fade.extend(other_fade);
        compute.unit_heads(SHAPE, &mut qkv);
        let mut state = DeltaState::new(SHAPE, 4).unwrap();
        let input = DeltaInput { qkv: &qkv, write: &write, fade: &fade, fade_bias: &FADE_BIAS, rate: &RATE };
        let seqs = [RecurrentSeq { rows: 0..3, first: 0, slot: 3 }, RecurrentSeq { rows: 3..8, first: 0, slot: 0 }];
        let mut out = vec![0.0; 8 * SHAPE.value_width()];
        compute.delta_rule(&mut state, &seqs, &input, &mut out);
        assert_eq!(out[3 * SHAPE.value_width()..], alone);
    }

    #[test]
    fn absurd_shapes_are_refused_and_not_wrapped_around() {
        let huge = 1 << 40;
        let shape = DeltaShape { key_heads: 1, value_heads: huge, key_dim: huge, value_dim: huge, ..SHAPE };
        assert!(DeltaState::new(shape, 1).is_err());
        assert!(DeltaState::new(SHAPE, usize::MAX).is_err());
    }
}
