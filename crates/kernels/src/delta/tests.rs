//! The delta rule against its formula, and against itself cut otherwise.

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
        let gates = DeltaGates { write: &write[at(4)], fade: &fade[at(4)], fade_bias: &FADE_BIAS, rate: &RATE };
        let input = DeltaInput { qkv: &qkv[at(shape.channels())], gates };
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
            let input = DeltaInput { qkv: &qkv, gates: DeltaGates { write, fade, fade_bias: &FADE_BIAS, rate: &RATE } };
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
        let input = DeltaInput { qkv, gates: DeltaGates { write, fade, fade_bias: &FADE_BIAS, rate: &RATE } };
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
    let input =
        DeltaInput { qkv: &qkv, gates: DeltaGates { write: &write, fade: &fade, fade_bias: &FADE_BIAS, rate: &RATE } };
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
