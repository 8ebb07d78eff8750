//! Backward ops that round, against those that do not, on every instruction set present.

use std::ops::Range;

use qwenkit_kernels::{
    AttentionInput, AttentionShape, Compute, HeadLoss, Isa, Join, Mat, MatmulScratch, Product, Weight, quantize_row,
};
use qwenkit_tensor::DType;

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f + 0.3).sin() + 0.3 * (i as f32 * f * 0.013).cos()).collect()
}

/// ‖a - b‖ / ‖b‖
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (off / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn on_every_isa(f: impl Fn(&Compute, &str)) {
    for isa in Isa::available() {
        for threads in [1, 3] {
            f(&Compute::new(threads, isa), &format!("{isa} on {threads} threads"));
        }
    }
}

/// Several sequences, blocks that are not whole, heads in groups, a window.
#[test]
fn attention_is_near_the_exact_one_and_the_same_however_packed() {
    let (heads, kv_heads) = (4, 2);
    for (dim, window) in [(64, None), (64, Some(37)), (96, None)] {
        let tokens = 210;
        let (q, d_out) = (wave(tokens * heads * dim, 0.7), wave(tokens * heads * dim, 1.7));
        let (k, v) = (wave(tokens * kv_heads * dim, 0.9), wave(tokens * kv_heads * dim, 1.3));
        let shape = AttentionShape { heads, kv_heads, head_dim: dim, window, scale: 0.3 };
        let grads_of = |compute: &Compute, exact: bool, rows: Range<usize>, seqs: &[Range<usize>]| {
            let (wide, narrow) = (
                rows.start * heads * dim..rows.end * heads * dim,
                rows.start * kv_heads * dim..rows.end * kv_heads * dim,
            );
            let mut grads = [vec![9.0; wide.len()], vec![9.0; narrow.len()], vec![9.0; narrow.len()]];
            let input = AttentionInput { q: &q[wide.clone()], k: &k[narrow.clone()], v: &v[narrow] };
            let [dq, dk, dv] = &mut grads;
            match exact {
                true => compute.attention_backward(shape, seqs, input, &d_out[wide], [dq, dk, dv]),
                false => compute.attention_backward_rounded(shape, seqs, input, &d_out[wide], [dq, dk, dv]),
            }
            grads
        };
        let seqs = [0..13, 13..13, 13..tokens];
        on_every_isa(|compute, what| {
            let exact = grads_of(compute, true, 0..tokens, &seqs);
            let found = grads_of(compute, false, 0..tokens, &seqs);
            for (name, (found, exact)) in ["q", "k", "v"].iter().zip(found.iter().zip(&exact)) {
                let apart = apart(found, exact);
                assert!(apart < 1e-2, "{what}, dim {dim}, window {window:?}: d{name} is off by {apart}");
            }
            let alone = grads_of(compute, false, 13..tokens, std::slice::from_ref(&(0..tokens - 13)));
            for (both, alone) in found.iter().zip(&alone) {
                assert!(both[both.len() - alone.len()..] == alone[..], "{what}");
            }
            let one = grads_of(&Compute::new(1, compute.isa()), false, 0..tokens, &seqs);
            assert!(one == found, "{what}");
        });
    }
}

#[test]
fn attention_refuses_sequences_with_rows_between_or_in_both() {
    let compute = Compute::new(1, Isa::detect().unwrap());
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 64, window: None, scale: 0.3 };
    let x = wave(10 * 64, 0.7);
    for (seqs, is_whole) in
        [([0..4, 4..10], true), ([0..4, 5..10], false), ([0..5, 4..10], false), ([1..4, 4..10], false)]
    {
        for exact in [true, false] {
            let run = || {
                let mut grads = [vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; x.len()]];
                let [dq, dk, dv] = &mut grads;
                let input = AttentionInput { q: &x, k: &x, v: &x };
                match exact {
                    true => compute.attention_backward(shape, &seqs, input, &x, [dq, dk, dv]),
                    false => compute.attention_backward_rounded(shape, &seqs, input, &x, [dq, dk, dv]),
                }
            };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            assert_eq!(outcome.is_ok(), is_whole, "{seqs:?}");
        }
    }
}

/// Logits, losses and gradients step by step, with the head's values as f32.
struct Plain {
    losses: Vec<f32>,
    dx: Vec<f32>,
}

fn plain(compute: &Compute, head: &Weight, x: &[f32], targets: &[u32], scale: f32) -> Plain {
    let (vocab, width, rows) = (head.rows(), head.cols(), targets.len());
    let (mut logits, mut losses, mut dx) = (vec![0.0; rows * vocab], vec![0.0; rows], vec![0.0; rows * width]);
    compute.matmul_forward(&mut MatmulScratch::default(), x, &mut [Product { weight: head, out: &mut logits }], &[]);
    compute.cross_entropy(&mut logits, targets, scale, &mut losses);
    let mut values = vec![0.0; vocab * width];
    values.chunks_exact_mut(width).enumerate().for_each(|(row, out)| head.row(row, out));
    compute.product(Mat::new(&logits, rows, vocab), Mat::new(&values, vocab, width), Join::OVER, &mut dx);
    Plain { losses, dx }
}

fn head(compute: &Compute, dtype: DType, vocab: usize, width: usize) -> Weight {
    let row_bytes = dtype.row_bytes(width).unwrap();
    let mut bytes = vec![0; vocab * row_bytes];
    for (values, bytes) in wave(vocab * width, 0.77).chunks_exact(width).zip(bytes.chunks_exact_mut(row_bytes)) {
        quantize_row(dtype, values, None, bytes);
    }
    Weight::from_bytes(compute.pool(), dtype, vocab, width, &bytes).unwrap()
}

/// Vocabularies of no whole piece, more rows than go through the head together, a target that is unlikely.
#[test]
fn the_head_cut_is_near_the_whole_one() {
    let (vocab, width, rows, scale) = (1_300, 64, 261, 0.25);
    let targets: Vec<u32> = (0..rows as u32).map(|i| (i * 977 + 5) % vocab as u32).collect();
    for (dtype, size, allowed) in [
        (DType::F32, 1.0, 1e-5),
        (DType::F16, 1.0, 1e-5),
        (DType::BF16, 1.0, 1e-2),
        (DType::Q8_0, 1.0, 1e-2),
        (DType::Q8_0, 0.01, 2e-2),
    ] {
        let x: Vec<f32> = wave(rows * width, 1.9).iter().map(|x| x * size).collect();
        on_every_isa(|compute, what| {
            let head = head(compute, dtype, vocab, width);
            let expected = plain(compute, &head, &x, &targets, scale);
            let (mut losses, mut dx) = (vec![0.0; rows], vec![9.0; rows * width]);
            let loss = HeadLoss { head: &head, targets: &targets, scale };
            compute.head_loss(&mut MatmulScratch::default(), &loss, &x, &mut losses, Some(&mut dx));
            for (i, (found, expected)) in losses.iter().zip(&expected.losses).enumerate() {
                assert!(
                    (found - expected).abs() < 1e-5 * expected.max(1.0),
                    "{what}, {dtype}: {i}: {found} {expected}"
                );
            }
            let apart = apart(&dx, &expected.dx);
            assert!(apart < allowed, "{what}, {dtype}, {size}: off by {apart}");
            // One row alone, and losses alone.
            let own = 200 * width..201 * width;
            let (mut one, mut d_one) = ([0.0], vec![9.0; width]);
            let single = HeadLoss { targets: &targets[200..201], ..loss };
            compute.head_loss(&mut MatmulScratch::default(), &single, &x[own.clone()], &mut one, Some(&mut d_one));
            assert!(d_one == dx[own.clone()] && one[0] == losses[200], "{what}, {dtype}: alone");
            compute.head_loss(&mut MatmulScratch::default(), &single, &x[own], &mut one, None);
            assert!(one[0] == losses[200], "{what}, {dtype}: the loss alone");
        });
    }
}

#[test]
fn the_head_cut_has_the_same_bits_on_any_number_of_threads() {
    let (vocab, width, rows) = (5_000, 64, 40);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 100).collect();
    let x = wave(rows * width, 1.9);
    for isa in Isa::available() {
        let run = |threads: usize| {
            let compute = Compute::new(threads, isa);
            let head = head(&compute, DType::Q4_0, vocab, width);
            let (mut losses, mut dx) = (vec![0.0; rows], vec![0.0; rows * width]);
            let loss = HeadLoss { head: &head, targets: &targets, scale: 1.0 };
            compute.head_loss(&mut MatmulScratch::default(), &loss, &x, &mut losses, Some(&mut dx));
            (losses, dx)
        };
        assert!(run(1) == run(4), "{isa}");
    }
}

/// What is no number in a row is seen in its loss and in all of its gradient, and other rows are as without it. Heads whose
/// products round rows to 8 bits are left out: that rounding has no way to say it.
#[test]
fn what_is_no_number_stays_none_through_the_head() {
    let (vocab, width, rows) = (1_300, 64, 9);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 100).collect();
    let clean = wave(rows * width, 1.9);
    on_every_isa(|compute, what| {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let run = |head: &Weight, x: &[f32]| {
                let (mut losses, mut dx) = (vec![0.0; rows], vec![9.0; rows * width]);
                let loss = HeadLoss { head, targets: &targets, scale: 1.0 };
                compute.head_loss(&mut MatmulScratch::default(), &loss, x, &mut losses, Some(&mut dx));
                (losses, dx)
            };
            let head = head(compute, dtype, vocab, width);
            let (losses, dx) = run(&head, &clean);
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = clean.clone();
                x[4 * width + 7] = bad;
                let (found, d_found) = run(&head, &x);
                for row in 0..rows {
                    let (own, d_own) = (found[row], &d_found[row * width..][..width]);
                    match row {
                        4 => assert!(
                            !own.is_finite() && d_own.iter().all(|x| !x.is_finite()),
                            "{what}, {dtype}: {bad} gives {own}"
                        ),
                        _ => assert!(
                            own == losses[row] && *d_own == dx[row * width..][..width],
                            "{what}, {dtype}: row {row} beside {bad}"
                        ),
                    }
                }
            }
        }
    });
}
