//! Backward of the ops of recurrent layers against the slopes of their forward in f64, on every instruction set present.

mod slopes;

use qwenkit_kernels::{ConvShape, DeltaGates, DeltaGrads, DeltaInput, DeltaShape, HeadOrder};
use slopes::{assert_within, dot, f32s, on_every_isa, slopes, wave};

fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
    assert_within(3e-5, what, found, expected);
}

#[test]
fn convolution() {
    for step in [1, 2] {
        let shape = ConvShape { width: 4, step, channels: 5 };
        let (seqs, rows) = ([0..3usize, 3..12], 12);
        let (x, weight, dy) = (wave(rows * 5, 0.7), wave(4 * 5, 1.3), wave(rows * 5, 1.9));
        let expected = slopes(&x, |x| {
            let mut sum = 0.0;
            for seq in &seqs {
                for (t, c) in seq.clone().flat_map(|t| (0..5).map(move |c| (t, c))) {
                    let tap = |j: usize| {
                        (t - seq.start).checked_sub((3 - j) * step).map_or(0.0, |s| x[(seq.start + s) * 5 + c])
                    };
                    let pre: f64 = (0..4).map(|j| weight[j * 5 + c] * tap(j)).sum();
                    sum += dy[t * 5 + c] * pre / (1.0 + (-pre).exp());
                }
            }
            sum
        });
        on_every_isa(|compute, what| {
            let (mut room, mut dx) = (Vec::new(), vec![f32::NAN; rows * 5]);
            let (x, dy) = (f32s(&x), f32s(&dy));
            compute.causal_conv_silu_backward(shape, &seqs, &f32s(&weight), (&x, &dy), &mut room, &mut dx);
            assert_close(what, &dx, &expected);
        });
    }
}

const SHAPE: DeltaShape =
    DeltaShape { key_heads: 2, value_heads: 4, key_dim: 5, value_dim: 19, order: HeadOrder::Grouped };

#[test]
fn unit_heads() {
    let (rows, channels) = (5, SHAPE.channels());
    let (x, dy) = (wave(rows * channels, 0.7), wave(rows * channels, 1.7));
    let expected = slopes(&x, |x| {
        let mut sum = 0.0;
        for (x, dy) in x.chunks(channels).zip(dy.chunks(channels)) {
            for (head, (x, dy)) in x.chunks(5).zip(dy.chunks(5)).take(4).enumerate() {
                let scale = if head < 2 { 1.0 / 5f64.sqrt() } else { 1.0 };
                sum += dot(x, dy) * scale / (dot(x, x) + 1e-6).sqrt();
            }
            sum += dot(&x[20..], &dy[20..]);
        }
        sum
    });
    on_every_isa(|compute, what| {
        let mut d = f32s(&dy);
        compute.unit_heads_backward(SHAPE, &f32s(&x), &mut d);
        assert_close(what, &d, &expected);
    });
}

/// Two packed sequences, one longer than what lies between two kept memories, in both orders of heads.
#[test]
fn delta_rule() {
    let (seqs, rows) = ([0..4usize, 4..41], 41);
    let bias = [0.1, -0.4, 0.3, 2.0];
    let rate = [-0.3, -1.0, -0.01, -0.2];
    for order in [HeadOrder::Grouped, HeadOrder::Tiled] {
        let shape = DeltaShape { order, ..SHAPE };
        let (channels, heads, k_dim, v_dim) = (shape.channels(), 4, 5, 19);
        let (n_qkv, n_gates) = (rows * channels, rows * heads);
        let all = [wave(n_qkv, 0.71), wave(n_gates, 1.9), wave(n_gates, 2.3)].concat();
        let all: Vec<f64> = all.iter().enumerate().map(|(i, x)| if i < n_qkv { x * 0.4 } else { *x }).collect();
        let dy = wave(rows * heads * v_dim, 1.7);
        // The slope of one head's sum at one number needs that head's sequence alone, but all of them are few enough.
        let forward = |x: &[f64]| {
            let (qkv, gates) = x.split_at(n_qkv);
            let (write, fade) = gates.split_at(n_gates);
            let mut sum = 0.0;
            for (seq, head) in seqs.iter().flat_map(|seq| (0..heads).map(move |head| (seq, head))) {
                let key_head = if order == HeadOrder::Grouped { head / 2 } else { head % 2 };
                let mut state = vec![0.0; k_dim * v_dim];
                for t in seq.clone() {
                    let row = &qkv[t * channels..][..channels];
                    let (q, k) = (&row[key_head * k_dim..][..k_dim], &row[(2 + key_head) * k_dim..][..k_dim]);
                    let v = &row[4 * k_dim + head * v_dim..][..v_dim];
                    let softplus = (fade[t * heads + head] + bias[head]).exp().ln_1p();
                    let decay = (rate[head] * softplus).exp();
                    let beta = 1.0 / (1.0 + (-write[t * heads + head]).exp());
                    for j in 0..v_dim {
                        let held: f64 = (0..k_dim).map(|i| decay * state[i * v_dim + j] * k[i]).sum();
                        let written = beta * (v[j] - held);
                        let mut out = 0.0;
                        for i in 0..k_dim {
                            state[i * v_dim + j] = decay * state[i * v_dim + j] + k[i] * written;
                            out += state[i * v_dim + j] * q[i];
                        }
                        sum += out * dy[(t * heads + head) * v_dim + j];
                    }
                }
            }
            sum
        };
        let expected = slopes(&all, forward);
        on_every_isa(|compute, what| {
            let (all, dy) = (f32s(&all), f32s(&dy));
            let (qkv, gates) = all.split_at(n_qkv);
            let (write, fade) = gates.split_at(n_gates);
            let (fade_bias, rate) = (f32s(&bias), f32s(&rate));
            let input = DeltaInput { qkv, gates: DeltaGates { write, fade, fade_bias: &fade_bias, rate: &rate } };
            let (mut d_qkv, mut d_write, mut d_fade) = (vec![f32::NAN; n_qkv], vec![0.0; n_gates], vec![0.0; n_gates]);
            let grads = DeltaGrads { qkv: &mut d_qkv, write: &mut d_write, fade: &mut d_fade };
            compute.delta_rule_backward(shape, &seqs, &input, &dy, grads);
            assert_close(what, &[d_qkv, d_write, d_fade].concat(), &expected);
        });
    }
}
