//! Backward of the gated delta rule over whole sequences, and of what stands before it: unit heads and gates.
//!
//! The memory of every token would take more room than anything else in training, so that of every sixteenth is kept and the
//! others are computed again, sixteen at a time, on the way back. A head of a sequence is a job of its own; what the value
//! heads of one key head give its q and k is added in ascending order.

use std::ops::Range;

use crate::{
    delta::{DeltaInput, DeltaShape, UNIT_EPS},
    lanes::{self, dot, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Tokens from one kept memory to the next.
const STRIDE: usize = 16;

/// Gradients towards the inputs of the rule, overwritten.
pub struct DeltaGrads<'a> {
    /// (T, C)
    pub qkv: &'a mut [f32],
    /// (T, value heads)
    pub write: &'a mut [f32],
    /// (T, value heads)
    pub fade: &'a mut [f32],
}

impl Compute {
    /// Backward of `unit_heads`: x: (T, C) as it was before; of `d`, which holds gradients towards q, k and v, those of q and k
    /// become gradients towards x.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn unit_heads_backward(&self, shape: DeltaShape, x: &[f32], d: &mut [f32]) {
        assert_eq!(x.len(), d.len(), "unit_heads_backward");
        let (width, channels) = (shape.key_heads * shape.key_dim, shape.channels());
        let scale = 1.0 / (shape.key_dim as f32).sqrt();
        self.each_row(d, channels, |isa, row, d| {
            let x = &x[row * channels..][..channels];
            unit_back_row(isa, shape.key_dim, scale, &x[..width], &mut d[..width]);
            unit_back_row(isa, shape.key_dim, 1.0, &x[width..2 * width], &mut d[width..2 * width]);
        });
    }

    /// Backward of `delta_rule` over whole sequences, whose rows cover the batch, from d_out: (T, value heads, V).
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn delta_rule_backward(
        &self,
        shape: DeltaShape,
        seqs: &[Range<usize>],
        input: &DeltaInput<'_>,
        d_out: &[f32],
        grads: DeltaGrads<'_>,
    ) {
        let (tokens, heads, channels) = (seqs.last().map_or(0, |s| s.end), shape.value_heads, shape.channels());
        let fits = input.qkv.len() == tokens * channels
            && input.gates.write.len() == tokens * heads
            && input.gates.fade.len() == tokens * heads
            && d_out.len() == tokens * shape.value_width()
            && grads.qkv.len() == input.qkv.len()
            && grads.write.len() == input.gates.write.len()
            && grads.fade.len() == input.gates.fade.len();
        assert!(fits, "delta_rule_backward of {shape:?} over {tokens} tokens");
        let key_dim = shape.key_dim;
        // What each value head gives q and k: (value heads, T, 2 K).
        let mut parts = vec![0.0; heads * tokens * 2 * key_dim];
        {
            let (qkv, write) = (SharedOut::new(&mut *grads.qkv), SharedOut::new(grads.write));
            let (fade, parts) = (SharedOut::new(grads.fade), SharedOut::new(&mut parts));
            let (jobs, threads) = (seqs.len() * heads, self.pool.threads());
            self.pool.run(|i| {
                let mut room = Room::default();
                for job in (i..jobs).step_by(threads) {
                    let head = Head { shape, input, d_out, tokens, seq: seqs[job / heads].clone(), head: job % heads };
                    let outs = Outs { qkv: &qkv, write: &write, fade: &fade, parts: &parts };
                    head_back(self.isa, &head, &outs, &mut room);
                }
            });
        }
        self.each_row(grads.qkv, channels, |_, t, to| {
            to[..2 * shape.key_heads * key_dim].fill(0.0);
            for head in 0..heads {
                let part = &parts[(head * tokens + t) * 2 * key_dim..][..2 * key_dim];
                let at = shape.key_head(head) * key_dim;
                for (part, at) in part.chunks_exact(key_dim).zip([at, at + shape.key_heads * key_dim]) {
                    to[at..][..key_dim].iter_mut().zip(part).for_each(|(to, x)| *to += x);
                }
            }
        });
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct Room {
    /// Memories at the beginning of each stride, (strides, K, V)
    kept: Vec<f32>,
    /// Memories before each token of a stride and after its last, (STRIDE + 1, K, V)
    states: Vec<f32>,
    /// What each token of a stride found, and what it wrote, (STRIDE, V)
    held: Vec<f32>,
    written: Vec<f32>,
    /// Gradient towards the memory, (K, V)
    d_state: Vec<f32>,
    d_written: Vec<f32>,
}

/// One token's factors for one head, in 0..=1: what is left of the memory, and how much of a value is written.
#[derive(Clone, Copy)]
struct Gates {
    decay: f32,
    beta: f32,
}

/// One value head of one sequence.
pub(crate) struct Head<'a> {
    shape: DeltaShape,
    input: &'a DeltaInput<'a>,
    d_out: &'a [f32],
    tokens: usize,
    seq: Range<usize>,
    head: usize,
}

pub(crate) struct Outs<'a> {
    qkv: &'a SharedOut<'a, f32>,
    write: &'a SharedOut<'a, f32>,
    fade: &'a SharedOut<'a, f32>,
    parts: &'a SharedOut<'a, f32>,
}

impl Head<'_> {
    /// Query, key and value of row `t`.
    fn row(&self, t: usize) -> [&[f32]; 3] {
        let DeltaShape { key_heads, key_dim, value_dim, .. } = self.shape;
        let row = &self.input.qkv[t * self.shape.channels()..][..self.shape.channels()];
        let q_at = self.shape.key_head(self.head) * key_dim;
        let v_at = 2 * key_heads * key_dim + self.head * value_dim;
        [&row[q_at..][..key_dim], &row[q_at + key_heads * key_dim..][..key_dim], &row[v_at..][..value_dim]]
    }

    fn gates(&self, t: usize) -> Gates {
        let i = t * self.shape.value_heads + self.head;
        Gates { decay: self.input.gates.decay(i, self.head), beta: self.input.gates.beta(i) }
    }
}

for_each_isa! {
    /// y = s x / n with n = (x x + eps)^1/2, so dx = s / n (dy - x (x dy) / n^2).
    pub(crate) fn unit_back_row(dim: usize, scale: f32, x: &[f32], d: &mut [f32]) {
        for (x, d) in x.chunks_exact(dim).zip(d.chunks_exact_mut(dim)) {
            let square = lanes::sum_by(x, |x| x * x) + UNIT_EPS;
            let along: f32 = dot(x, d) / square;
            let factor = scale / square.sqrt();
            d.iter_mut().zip(x).for_each(|(d, x)| *d = factor * (*d - x * along));
        }
    }
}

for_each_isa! {
    pub(crate) fn head_back(head: &Head<'_>, outs: &Outs<'_>, room: &mut Room) {
        let DeltaShape { key_dim, value_dim, value_heads, .. } = head.shape;
        let size = key_dim * value_dim;
        let strides = head.seq.len().div_ceil(STRIDE);
        room.kept.resize(strides * size, 0.0);
        room.states.resize((STRIDE + 1) * size, 0.0);
        room.held.resize(STRIDE * value_dim, 0.0);
        room.written.resize(STRIDE * value_dim, 0.0);
        room.d_state.clear();
        room.d_state.resize(size, 0.0);
        room.d_written.resize(value_dim, 0.0);
        // Forward, keeping the memory at the beginning of each stride.
        let state = &mut room.states[..size];
        state.fill(0.0);
        for (i, t) in head.seq.clone().enumerate() {
            if i % STRIDE == 0 {
                room.kept[i / STRIDE * size..][..size].copy_from_slice(state);
            }
            let [_, k, v] = head.row(t);
            advance(state, k, v, head.gates(t), (&mut room.held[..value_dim], &mut room.written[..value_dim]));
        }
        for stride in (0..strides).rev() {
            let first = head.seq.start + stride * STRIDE;
            let rows = first..(first + STRIDE).min(head.seq.end);
            room.states[..size].copy_from_slice(&room.kept[stride * size..][..size]);
            for (i, t) in rows.clone().enumerate() {
                let (before, after) = room.states.split_at_mut((i + 1) * size);
                let after = &mut after[..size];
                after.copy_from_slice(&before[i * size..]);
                let [_, k, v] = head.row(t);
                let at = i * value_dim;
                let found = (&mut room.held[at..][..value_dim], &mut room.written[at..][..value_dim]);
                advance(after, k, v, head.gates(t), found);
            }
            for (i, t) in rows.enumerate().rev() {
                let [q, k, v] = head.row(t);
                let Gates { decay, beta } = head.gates(t);
                let (before, after) = room.states[i * size..][..2 * size].split_at(size);
                let (held, written) = (&room.held[i * value_dim..][..value_dim], &room.written[i * value_dim..][..value_dim]);
                let d_out = &head.d_out[(t * value_heads + head.head) * value_dim..][..value_dim];
                // SAFETY: each head of each row is in one job, and its outputs are taken once.
                let (d_qk, d_v, d_write, d_fade) = unsafe {
                    let v_at = 2 * head.shape.key_heads * key_dim + head.head * value_dim;
                    let gate_at = t * value_heads + head.head;
                    (
                        outs.parts.slice((head.head * head.tokens + t) * 2 * key_dim, 2 * key_dim),
                        outs.qkv.slice(t * head.shape.channels() + v_at, value_dim),
                        outs.write.slice(gate_at, 1),
                        outs.fade.slice(gate_at, 1),
                    )
                };
                let (d_q, d_k) = d_qk.split_at_mut(key_dim);
                let d_written = &mut room.d_written[..];
                d_written.fill(0.0);
                for (j, d_state) in room.d_state.chunks_exact_mut(value_dim).enumerate() {
                    d_state.iter_mut().zip(d_out).for_each(|(d, out)| *d += q[j] * out);
                    d_q[j] = dot(&after[j * value_dim..][..value_dim], d_out);
                    d_k[j] = dot(d_state, written);
                    d_written.iter_mut().zip(&*d_state).for_each(|(to, d)| *to += k[j] * d);
                }
                let mut d_beta = 0.0;
                for ((d_v, d_written), (v, held)) in d_v.iter_mut().zip(&*d_written).zip(v.iter().zip(held)) {
                    *d_v = beta * d_written;
                    d_beta += d_written * (v - held);
                }
                // The gradient towards what was held is minus that towards v.
                let mut d_decay = 0.0;
                for (j, d_state) in room.d_state.chunks_exact_mut(value_dim).enumerate() {
                    let before = &before[j * value_dim..][..value_dim];
                    d_k[j] -= decay * dot(before, d_v);
                    d_state.iter_mut().zip(&*d_v).for_each(|(d, d_v)| *d -= k[j] * d_v);
                    d_decay += dot(d_state, before);
                    d_state.iter_mut().for_each(|d| *d *= decay);
                }
                d_write[0] = d_beta * beta * (1.0 - beta);
                let x = head.input.gates.fade[t * value_heads + head.head] + head.input.gates.fade_bias[head.head];
                d_fade[0] = d_decay * decay * head.input.gates.rate[head.head] / (1.0 + (-x).exp());
            }
        }
    }
}

/// One token's change of a memory: (K, V); what it held for k, and what was written.
#[inline(always)]
fn advance(state: &mut [f32], k: &[f32], v: &[f32], gates: Gates, (held, written): (&mut [f32], &mut [f32])) {
    held.fill(0.0);
    for (state, k) in state.chunks_exact_mut(v.len()).zip(k) {
        for (s, held) in state.iter_mut().zip(&mut *held) {
            *s *= gates.decay;
            *held += *s * k;
        }
    }
    for ((written, v), held) in written.iter_mut().zip(v).zip(held) {
        *written = gates.beta * (v - *held);
    }
    for (state, k) in state.chunks_exact_mut(v.len()).zip(k) {
        state.iter_mut().zip(&*written).for_each(|(s, w)| *s += k * w);
    }
}
