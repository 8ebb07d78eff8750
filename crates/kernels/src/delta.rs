//! The gated delta rule: attention of linear cost, whose memory of a sequence is one matrix S: (K, V) per head.
//!
//! For each token `S *= decay; S += k (beta (v - S^T k))^T; out = S^T q`, in f32 throughout: half precision drifts. A
//! column of S depends on no other, so a thread carries sixteen of them through some tokens while they lie in its
//! first-level cache. Tokens come strictly one after the other, so any cut of the prompt gives the same bits; the chunked
//! form, which suits machines with matrix units, rounds differently at each cut and is not here. Beside the Q4_K products
//! of a 4B model's layer the rule takes 8 % of the time for 512 tokens and 3 % for one (AVX-512, one thread).
//! Source: Yang et al. 2024.

use std::ops::Range;

use qwenkit_tensor::{AllocError, HugeBuf};

use crate::{
    conv::{RecurrentSeq, check_seqs},
    lanes::{self, LANES, Lanes, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Added to the sum of squares when a head of q or k is brought to length 1.
const UNIT_EPS: f32 = 1e-6;

/// Tokens that one block of columns goes through before the next block does: q and k of these and the block's memory, 8
/// KiB each for heads of 128, fit the first-level cache together.
const TILE_TOKENS: usize = 16;

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
    /// (slots, value heads, blocks of 16 columns, K, 16)
    data: HugeBuf,
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

    fn key_head(&self, value_head: usize) -> usize {
        match self.order {
            HeadOrder::Grouped => value_head / (self.value_heads / self.key_heads),
            HeadOrder::Tiled => value_head % self.key_heads,
        }
    }

    /// Blocks of sixteen columns that a head's memory has.
    fn blocks(&self) -> usize {
        self.value_dim.div_ceil(LANES)
    }
}

impl DeltaState {
    /// Room for `slots` sequences. Memory is used as slots are.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(shape: DeltaShape, slots: usize) -> Result<DeltaState, AllocError> {
        let too_large = AllocError { wanted_bytes: usize::MAX };
        let bytes = DeltaState::slot_bytes(shape).checked_mul(slots).ok_or(too_large)?;
        Ok(DeltaState { shape, slots, data: HugeBuf::zeroed(bytes)? })
    }

    /// Bytes of one slot.
    pub fn slot_bytes(shape: DeltaShape) -> usize {
        let lanes = shape.value_heads.saturating_mul(shape.blocks()).saturating_mul(shape.key_dim);
        lanes.saturating_mul(size_of::<Lanes>())
    }

    /// Copies what a slot remembers over another's.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        let bytes = DeltaState::slot_bytes(self.shape);
        self.data.as_mut_slice::<u8>().copy_within(from * bytes..(from + 1) * bytes, to * bytes);
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
        let gates: Vec<Gates> = (0..tokens * heads).map(|i| input.gates(i, i % heads)).collect();
        let (blocks, len) = (shape.blocks(), shape.key_dim);
        let memory = SharedOut::new(state.data.as_mut_slice::<Lanes>());
        let out = SharedOut::new(out);
        let jobs = seqs.len() * heads;
        let threads = self.pool.threads();
        self.pool.run(|i| {
            for job in (i..jobs).step_by(threads) {
                let (seq, head) = (&seqs[job / heads], job % heads);
                // SAFETY: each head of a slot is in exactly one job, as no two sequences have the same slot.
                let memory = unsafe { memory.slice((seq.slot * heads + head) * blocks * len, blocks * len) };
                if seq.first == 0 {
                    memory.fill([0.0; LANES]);
                }
                for first in seq.rows.clone().step_by(TILE_TOKENS) {
                    let rows = first..(first + TILE_TOKENS).min(seq.rows.end);
                    for (block, memory) in memory.chunks_exact_mut(len).enumerate() {
                        let rows = rows.clone();
                        let steps = Steps { shape, qkv: input.qkv, gates: &gates, rows, head, block, out: &out };
                        delta_block(self.isa, &steps, memory);
                    }
                }
            }
        });
    }
}

/// One token's factors for one head.
#[derive(Clone, Copy)]
struct Gates {
    /// In 0..=1
    decay: f32,
    /// In 0..=1
    beta: f32,
}

impl DeltaInput<'_> {
    fn gates(&self, i: usize, head: usize) -> Gates {
        let x = self.fade[i] + self.fade_bias[head];
        // Beyond 20 the logarithm equals x in f32, and the exponential would overflow further on.
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        Gates { decay: (self.rate[head] * softplus).exp(), beta: 1.0 / (1.0 + (-self.write[i]).exp()) }
    }
}

/// Some new tokens of one sequence for sixteen columns of one head's memory.
pub(crate) struct Steps<'a> {
    shape: DeltaShape,
    qkv: &'a [f32],
    /// (T, value heads)
    gates: &'a [Gates],
    rows: Range<usize>,
    head: usize,
    block: usize,
    /// (T, value heads, V)
    out: &'a SharedOut<'a, f32>,
}

for_each_isa! {
    pub(crate) fn unit_row(dim: usize, scale: f32, x: &mut [f32]) {
        for head in x.chunks_exact_mut(dim) {
            let factor = scale / (lanes::sum_by(head, |x| x * x) + UNIT_EPS).sqrt();
            head.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

for_each_isa! {
    pub(crate) fn delta_block(steps: &Steps<'_>, memory: &mut [Lanes]) {
        let Steps { shape, head, block, .. } = steps;
        let (dim, channels) = (shape.key_dim, shape.channels());
        let q_at = shape.key_head(*head) * dim;
        let k_at = q_at + shape.key_heads * dim;
        let column = head * shape.value_dim + block * LANES;
        let v_at = 2 * shape.key_heads * dim + column;
        let columns = LANES.min(shape.value_dim - block * LANES);
        for t in steps.rows.clone() {
            let row = &steps.qkv[t * channels..][..channels];
            let (q, k) = (&row[q_at..][..dim], &row[k_at..][..dim]);
            let mut v = [0.0; LANES];
            v[..columns].copy_from_slice(&row[v_at..][..columns]);
            let gates = steps.gates[t * shape.value_heads + head];
            let out = step(memory, q, k, v, gates);
            // SAFETY: each token's columns of a head are in exactly one job.
            let to = unsafe { steps.out.slice(t * shape.value_width() + column, columns) };
            to.copy_from_slice(&out[..columns]);
        }
    }
}

/// Sums that run side by side, so that additions do not wait for each other. Their number is part of the result's bits.
const SUMS: usize = 4;

/// One token: what the memory holds for k, the correction, the write, what q reads.
#[inline(always)]
fn step(memory: &mut [Lanes], q: &[f32], k: &[f32], v: Lanes, gates: Gates) -> Lanes {
    let ((k_whole, k_rest), (q_whole, q_rest)) = (k.as_chunks::<SUMS>(), q.as_chunks::<SUMS>());
    let mut sums = [[0.0; LANES]; SUMS];
    let (whole, rest) = memory.as_chunks::<SUMS>();
    for (s, k) in whole.iter().zip(k_whole) {
        for i in 0..SUMS {
            add(&mut sums[i], &s[i], k[i]);
        }
    }
    for ((sum, s), k) in sums.iter_mut().zip(rest).zip(k_rest) {
        add(sum, s, *k);
    }
    let held = fold(sums);
    let write: Lanes = std::array::from_fn(|l| gates.beta * (v[l] - gates.decay * held[l]));
    let mut sums = [[0.0; LANES]; SUMS];
    let (whole, rest) = memory.as_chunks_mut::<SUMS>();
    for ((s, k), q) in whole.iter_mut().zip(k_whole).zip(q_whole) {
        for i in 0..SUMS {
            update(&mut s[i], gates.decay, k[i], &write);
            add(&mut sums[i], &s[i], q[i]);
        }
    }
    for (((sum, s), k), q) in sums.iter_mut().zip(rest).zip(k_rest).zip(q_rest) {
        update(s, gates.decay, *k, &write);
        add(sum, s, *q);
    }
    fold(sums)
}

/// `sum += s * x`
#[inline(always)]
fn add(sum: &mut Lanes, s: &Lanes, x: f32) {
    for (sum, s) in sum.iter_mut().zip(s) {
        *sum = x.mul_add(*s, *sum);
    }
}

/// `s = decay * s + k * write`
#[inline(always)]
fn update(s: &mut Lanes, decay: f32, k: f32, write: &Lanes) {
    for (s, write) in s.iter_mut().zip(write) {
        *s = k.mul_add(*write, decay * *s);
    }
}

#[inline(always)]
fn fold([a, b, c, d]: [Lanes; SUMS]) -> Lanes {
    std::array::from_fn(|l| (a[l] + b[l]) + (c[l] + d[l]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// Two value heads to a key head, and columns that fill no whole number of blocks.
    const SHAPE: DeltaShape =
        DeltaShape { key_heads: 2, value_heads: 4, key_dim: 6, value_dim: 20, order: HeadOrder::Grouped };

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
        for order in [HeadOrder::Grouped, HeadOrder::Tiled] {
            let shape = DeltaShape { order, ..SHAPE };
            let exact = exact(shape, 70);
            for isa in Isa::available() {
                let found = fed(isa, shape, 70, &[70]);
                for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
                    assert!((f64::from(*found) - exact).abs() < 2e-5, "{isa} {order:?} {i}: {found} and {exact}");
                }
            }
        }
    }

    #[test]
    fn any_cut_gives_the_same_bits() {
        for isa in Isa::available() {
            let whole = fed(isa, SHAPE, 7, &[7]);
            for cut in 1..7 {
                assert_eq!(fed(isa, SHAPE, 7, &[cut, 7 - cut]), whole, "{isa} cut at {cut}");
            }
            assert_eq!(fed(isa, SHAPE, 7, &[1; 7]), whole, "{isa} token by token");
        }
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
