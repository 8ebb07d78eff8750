//! Backward of attention with operands rounded to bf16, where the machine multiplies such pairs, by vectors or on tiles.

use std::{ops::Range, sync::PoisonError};

use crate::{
    Isa,
    attention_back::{AttentionInput, AttentionShape},
    matmul::Compute,
    shared_out::SharedOut,
};
#[cfg(target_arch = "x86_64")]
use crate::{
    avx512::{attention_back as half, transpose::Square},
    pool::Deal,
};

/// Tokens whose heads' parts are added together.
#[cfg(target_arch = "x86_64")]
const STEP: usize = 16;

/// Buffers of the op.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
pub(crate) struct AttentionRoom {
    threads: Vec<HeadRoom>,
    parts: Vec<Square<f32>>,
}

/// Of one thread, for either kind of products.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
struct HeadRoom {
    vectors: half::Room,
    tiles: crate::amx::attention_back::HeadRoom,
}

impl Compute {
    /// As `attention_backward`, where the machine can with operands rounded to bf16, except those of the scores: gradients
    /// within about 0.3% of their size in half the time. For models whose weights are themselves rounded.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn attention_backward_rounded(
        &self,
        shape: AttentionShape,
        seqs: &[Range<usize>],
        input: AttentionInput<'_>,
        d_out: &[f32],
        grads: [&mut [f32]; 3],
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.isa.pairs_bf16() && half::fits(shape.head_dim) {
            shape.check(seqs, input, d_out, &grads);
            return self.half_backward(shape, seqs, input, d_out, grads);
        }
        self.attention_backward(shape, seqs, input, d_out, grads);
    }

    #[cfg(target_arch = "x86_64")]
    fn half_backward(
        &self,
        shape: AttentionShape,
        seqs: &[Range<usize>],
        input: AttentionInput<'_>,
        d_out: &[f32],
        [dq, dk, dv]: [&mut [f32]; 3],
    ) {
        let AttentionShape { heads, kv_heads, head_dim: dim, window, scale } = shape;
        let (group, q_step, kv_step) = (heads / kv_heads, heads * dim, kv_heads * dim);
        // What each query head gives the keys and values of a sequence lies in squares, head by head.
        let squares_of = |seq: &Range<usize>| seq.len().next_multiple_of(half::KEYS) / STEP * (dim / STEP);
        let (mut places, mut total) = (Vec::new(), 0);
        for seq in seqs {
            places.push((total, seq));
            total += heads * squares_of(seq);
        }
        let mut room = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        let AttentionRoom { threads: rooms, parts } = &mut room.attention;
        rooms.resize_with(self.pool.threads(), HeadRoom::default);
        if parts.len() < 2 * total {
            parts.resize(2 * total, Square([[0.0; STEP]; STEP]));
        }
        let (dk_parts, dv_parts) = parts[..2 * total].split_at_mut(total);
        {
            let (dq, dk, dv) = (SharedOut::new(dq), SharedOut::new(dk_parts), SharedOut::new(dv_parts));
            let (rooms, deal) = (SharedOut::new(rooms), Deal::new(seqs.len() * heads, self.pool.threads()));
            self.pool.run(|i| {
                deal.each(i, |mine| {
                    for job in mine {
                        let ((place, seq), head) = (places[job / heads], job % heads);
                        let q_at = seq.start * q_step + head * dim;
                        let kv_at = seq.start * kv_step + head / group * dim;
                        let one = half::Head {
                            q: from(input.q, q_at),
                            d_out: from(d_out, q_at),
                            q_step,
                            k: from(input.k, kv_at),
                            v: from(input.v, kv_at),
                            kv_step,
                            len: seq.len(),
                            dim,
                            window,
                            scale,
                        };
                        let size = squares_of(seq);
                        // SAFETY: a thread has one room; a head of a sequence is one job, so its rows and parts are one thread's. The
                        // machine has the instruction set by `Compute::new`, and its bf16 products by `fits`.
                        unsafe {
                            let at = place + head * size;
                            let parts = [dk.slice(at, size), dv.slice(at, size)];
                            let HeadRoom { vectors, tiles } = &mut rooms.slice(i, 1)[0];
                            match self.isa {
                                Isa::Amx => crate::amx::attention_back::run(&one, tiles, &dq, q_at, parts),
                                _ => half::run(&one, vectors, &dq, q_at, parts),
                            }
                        }
                    }
                });
            });
        }
        let steps_of = |&(place, seq): &(usize, &Range<usize>)| {
            let seq = seq.clone();
            (0..seq.len()).step_by(STEP).map(move |first| (place, seq.clone(), first))
        };
        let steps: Vec<(usize, Range<usize>, usize)> = places.iter().flat_map(steps_of).collect();
        for (to, parts) in [(dk, &*dk_parts), (dv, &*dv_parts)] {
            let to = SharedOut::new(to);
            self.pool.run_split(steps.len(), 1, |own| {
                for (place, seq, first) in &steps[own] {
                    let size = squares_of(seq);
                    for kv_head in 0..kv_heads {
                        let own = (kv_head * group..(kv_head + 1) * group).map(|h| &parts[place + h * size..][..size]);
                        let row = |i: usize| {
                            let at = (seq.start + first + i) * kv_step + kv_head * dim;
                            // SAFETY: a token's row of a kv head is in one step.
                            (first + i < seq.len()).then(|| unsafe { to.slice(at, dim) })
                        };
                        // SAFETY: the machine has the instruction set by `Compute::new`.
                        unsafe { half::sum_turned(own, dim, *first, row) };
                    }
                }
            });
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// On machines that have the products and do not choose them too.
    #[test]
    fn rounded_gradients_are_near_the_exact_ones() {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64, window: Some(37), scale: 0.3 };
        let value = |i: f32, f: f32| (i * f + 0.3).sin() + 0.3 * (i * f * 0.013).cos();
        let wave = |n: usize, f: f32| (0..n).map(|i| value(i as f32, f)).collect::<Vec<_>>();
        let (q, d_out) = (wave(90 * 256, 0.7), wave(90 * 256, 1.7));
        let (k, v) = (wave(90 * 128, 0.9), wave(90 * 128, 1.3));
        let (input, seqs) = (AttentionInput { q: &q, k: &k, v: &v }, [0..13, 13..90]);
        for isa in Isa::available().into_iter().filter(|isa| *isa >= Isa::Avx512 && half::fits(64)) {
            let compute = Compute::new(2, isa);
            let mut grads = [0, 1].map(|_| [vec![9.0; q.len()], vec![9.0; k.len()], vec![9.0; v.len()]]);
            let [[dq, dk, dv], [exact_dq, exact_dk, exact_dv]] = &mut grads;
            compute.half_backward(shape, &seqs, input, &d_out, [dq, dk, dv]);
            compute.attention_backward(shape, &seqs, input, &d_out, [exact_dq, exact_dk, exact_dv]);
            for (found, exact) in grads[0].iter().zip(&grads[1]) {
                let off: f32 = found.iter().zip(exact).map(|(a, b)| (a - b) * (a - b)).sum();
                let size: f32 = exact.iter().map(|b| b * b).sum();
                assert!(off.sqrt() < 1e-2 * size.sqrt(), "{isa}: off by {} of {}", off.sqrt(), size.sqrt());
            }
        }
    }
}

/// What begins at `at`; nothing where a sequence has no tokens.
#[cfg(target_arch = "x86_64")]
fn from(x: &[f32], at: usize) -> &[f32] {
    &x[at.min(x.len())..]
}
