//! Every backward op against the slopes of its forward in f64, on every instruction set present.

mod slopes;

use std::{cell::RefCell, collections::HashMap};

use qwenkit_kernels::{
    AttentionInput, AttentionShape, BackProduct, Compute, Isa, Join, LowRank, Mat, MatmulScratch, Product, Weight,
    dequantize_row, is_weight_type,
};
use qwenkit_tensor::DType;
use slopes::{assert_within, dot, f32s, on_every_isa, slopes, wave};

fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
    assert_within(2e-5, what, found, expected);
}

#[test]
fn rms_norm() {
    let (rows, width) = (5, 37);
    let (x, weight, dy) = (wave(rows * width, 0.7), wave(width, 1.1), wave(rows * width, 1.7));
    let expected = slopes(&x, |x| {
        let mut sum = 0.0;
        for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
            let scale = 1.0 / (dot(x, x) / width as f64 + 1e-6).sqrt();
            sum += (0..width).map(|i| x[i] * scale * weight[i] * dy[i]).sum::<f64>();
        }
        sum
    });
    on_every_isa(|compute, what| {
        let mut dx = vec![0.0; rows * width];
        compute.rms_norm_backward(&f32s(&x), &f32s(&weight), 1e-6, &f32s(&dy), &mut dx);
        assert_close(what, &dx, &expected);
    });
}

#[test]
fn gated_activations() {
    let (rows, width) = (5, 19);
    let n = rows * width;
    let (both, dy) = ([wave(n, 0.7), wave(n, 1.3)].concat(), wave(n, 1.9));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let silu = slopes(&both, |x| (0..n).map(|i| x[i] * sigmoid(x[i]) * x[n + i] * dy[i]).sum());
    let gated = slopes(&both, |x| (0..n).map(|i| x[i] * sigmoid(x[n + i]) * dy[i]).sum());
    on_every_isa(|compute, what| {
        let (mut a, mut b, mut d) = (f32s(&both[..n]), f32s(&both[n..]), f32s(&dy));
        compute.silu_mul_backward(&mut a, &mut b, &d, width);
        assert_close(what, &[a, b].concat(), &silu);
        let mut gate = f32s(&both[n..]);
        compute.sigmoid_mul_backward(&f32s(&both[..n]), &mut gate, &mut d, width);
        assert_close(what, &[d, gate].concat(), &gated);
    });
}

#[test]
fn rope_turns_back() {
    let (tokens, heads, dim, pairs) = (5, 3, 12, 4);
    let (x, dy, angles) = (wave(tokens * heads * dim, 0.7), wave(tokens * heads * dim, 1.7), wave(tokens * pairs, 2.3));
    let (cos, sin): (Vec<f64>, Vec<f64>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let expected = slopes(&x, |x| {
        let mut sum = 0.0;
        for (i, (x, dy)) in x.chunks(dim).zip(dy.chunks(dim)).enumerate() {
            let at = i / heads * pairs;
            for p in 0..pairs {
                sum += dy[p] * (x[p] * cos[at + p] - x[pairs + p] * sin[at + p]);
                sum += dy[pairs + p] * (x[pairs + p] * cos[at + p] + x[p] * sin[at + p]);
            }
            sum += dot(&x[2 * pairs..], &dy[2 * pairs..]);
        }
        sum
    });
    on_every_isa(|compute, what| {
        let mut dx = f32s(&dy);
        compute.rope_backward(&mut dx, dim, &f32s(&cos), &f32s(&sin), pairs);
        assert_close(what, &dx, &expected);
    });
}

#[test]
fn cross_entropy() {
    let (rows, vocab, scale) = (6, 1100, 0.25);
    let logits = wave(rows * vocab, 0.7).iter().map(|x| x * 8.0).collect::<Vec<_>>();
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 200 + 17).collect();
    let shares = |row: &[f64]| {
        let total: f64 = row.iter().map(|x| x.exp()).sum();
        (row.iter().map(|x| x.exp() / total).collect::<Vec<f64>>(), total.ln())
    };
    on_every_isa(|compute, what| {
        let (mut found, mut losses) = (f32s(&logits), vec![0.0; rows]);
        compute.cross_entropy(&mut found, &targets, scale as f32, &mut losses);
        for (row, logits) in logits.chunks(vocab).enumerate() {
            let (mut expected, log_total) = shares(logits);
            let target = targets[row] as usize;
            expected[target] -= 1.0;
            expected.iter_mut().for_each(|x| *x *= scale);
            assert_close(what, &found[row * vocab..][..vocab], &expected);
            assert!((f64::from(losses[row]) - (log_total - logits[target])).abs() < 5e-6, "{what}: loss {row}");
        }
    });
}

/// Two packed sequences whose lengths are no whole blocks; with and without a window; several heads to a kv head.
#[test]
fn attention() {
    let (heads, kv_heads, dim, lens) = (4, 2, 5, [3usize, 7]);
    let tokens: usize = lens.iter().sum();
    let (nq, nk) = (tokens * heads * dim, tokens * kv_heads * dim);
    let all = wave(nq + 2 * nk, 0.77);
    let dy = wave(nq, 1.7);
    for window in [None, Some(3)] {
        let expected = slopes(&all, |x| {
            let (q, rest) = x.split_at(nq);
            let (k, v) = rest.split_at(nk);
            let (mut sum, mut start) = (0.0, 0);
            for len in lens {
                for t in 0..len {
                    for h in 0..heads {
                        let at = ((start + t) * heads + h) * dim;
                        let kv = |s: usize| ((start + s) * kv_heads + h / (heads / kv_heads)) * dim;
                        let seen = window.map_or(0, |w: usize| (t + 1).saturating_sub(w))..t + 1;
                        let scores: Vec<f64> =
                            seen.clone().map(|s| (0.4 * dot(&q[at..at + dim], &k[kv(s)..kv(s) + dim])).exp()).collect();
                        let total: f64 = scores.iter().sum();
                        for (s, score) in seen.zip(scores) {
                            sum += score / total * dot(&v[kv(s)..kv(s) + dim], &dy[at..at + dim]);
                        }
                    }
                }
                start += len;
            }
            sum
        });
        on_every_isa(|compute, what| {
            let (q, k, v) = (f32s(&all[..nq]), f32s(&all[nq..nq + nk]), f32s(&all[nq + nk..]));
            let (mut dq, mut dk, mut dv) = (vec![9.0; nq], vec![9.0; nk], vec![9.0; nk]);
            let shape = AttentionShape { heads, kv_heads, head_dim: dim, window, scale: 0.4 };
            let input = AttentionInput { q: &q, k: &k, v: &v };
            let grads = [&mut dq[..], &mut dk[..], &mut dv[..]];
            compute.attention_backward(shape, &[0..3, 3..10], input, &f32s(&dy), grads);
            assert_close(&format!("{what}, window {window:?}"), &[dq, dk, dv].concat(), &expected);
        });
    }
}

/// The same sum whatever the block of queries it falls into: a sequence longer than a block against its own tail.
#[test]
fn attention_over_several_blocks_moves_no_other_sequence() {
    let (heads, kv_heads, dim, tokens) = (2, 1, 8, 150);
    let (q, k, v) = (wave(tokens * heads * dim, 0.7), wave(tokens * dim, 0.9), wave(tokens * dim, 1.3));
    let dy = f32s(&wave(tokens * heads * dim, 1.7));
    let (q, k, v) = (f32s(&q), f32s(&k), f32s(&v));
    let shape = AttentionShape { heads, kv_heads, head_dim: dim, window: Some(20), scale: 0.3 };
    let grads_of = |compute: &Compute, rows: std::ops::Range<usize>, seqs: &[std::ops::Range<usize>]| {
        let (wide, narrow) = (rows.start * heads * dim..rows.end * heads * dim, rows.start * dim..rows.end * dim);
        let mut grads = [vec![0.0; wide.len()], vec![0.0; narrow.len()], vec![0.0; narrow.len()]];
        let input = AttentionInput { q: &q[wide.clone()], k: &k[narrow.clone()], v: &v[narrow] };
        let [dq, dk, dv] = &mut grads;
        compute.attention_backward(shape, seqs, input, &dy[wide], [dq, dk, dv]);
        grads
    };
    on_every_isa(|compute, what| {
        let both = grads_of(compute, 0..tokens, &[0..13, 13..tokens]);
        let alone = grads_of(compute, 13..tokens, std::slice::from_ref(&(0..tokens - 13)));
        for (both, alone) in both.iter().zip(&alone) {
            assert_eq!(both[both.len() - alone.len()..], alone[..], "{what}");
        }
    });
}

#[test]
fn matmul_of_every_weight_type() {
    for dtype in DType::ALL.into_iter().filter(|&dtype| is_weight_type(dtype)) {
        let (rows, cols, tokens) = (37, if dtype.block_len() == 1 && dtype != DType::BF16 { 45 } else { 256 }, 9);
        let bytes = stored(dtype, rows, cols);
        let row_bytes = dtype.row_bytes(cols).unwrap();
        let mut values = vec![0.0; rows * cols];
        for (bytes, values) in bytes.chunks_exact(row_bytes).zip(values.chunks_exact_mut(cols)) {
            dequantize_row(dtype, bytes, values);
        }
        let dy = wave(tokens * rows, 1.7);
        // Two products over the same x: their gradients are added.
        let expected: Vec<f64> = (0..tokens * cols)
            .map(|i| {
                let (t, c) = (i / cols, i % cols);
                (0..rows).map(|r| 2.0 * dy[t * rows + r] * f64::from(values[r * cols + c])).sum()
            })
            .collect();
        on_every_isa(|compute, what| {
            let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap();
            let (dy, mut dx) = (f32s(&dy), vec![9.0; tokens * cols]);
            let product = || BackProduct { weight: &weight, dy: &dy };
            compute.matmul_backward(&[product(), product()], Join::OVER, &mut dx);
            // Quantised weights are turned in 8 bits, and gradients rounded to 8 bits; on tiles both become bf16.
            let share = match (dtype, compute.isa()) {
                (DType::F32 | DType::F16, _) => 2e-5,
                (_, Isa::Amx) => 1.5e-2,
                (DType::BF16, _) => 2e-5,
                _ => 3e-2,
            };
            assert_within(share, &format!("{what}, {dtype}"), &dx, &expected);
        });
    }
}

/// The forward of training: every type, groups and tiles of tokens that are not whole; the same bits for any number of threads
/// and for a row alone.
#[test]
fn matmul_forward_of_every_weight_type() {
    for dtype in DType::ALL.into_iter().filter(|&dtype| is_weight_type(dtype)) {
        let (rows, more, cols, tokens) = (37, 16, if dtype.block_len() == 1 { 45 } else { 512 }, 51);
        let (bytes, bytes_more) = (stored(dtype, rows, cols), stored(dtype, more, cols));
        let row_bytes = dtype.row_bytes(cols).unwrap();
        let mut values = vec![0.0; rows * cols];
        for (bytes, values) in bytes.chunks_exact(row_bytes).zip(values.chunks_exact_mut(cols)) {
            dequantize_row(dtype, bytes, values);
        }
        let values: Vec<f64> = values.into_iter().map(f64::from).collect();
        let x = wave(tokens * cols, 1.7);
        let expected: Vec<f64> = (0..tokens * rows)
            .map(|i| dot(&x[i / rows * cols..][..cols], &values[i % rows * cols..][..cols]))
            .collect();
        let x = f32s(&x);
        let first = RefCell::new(HashMap::new());
        on_every_isa(|compute, what| {
            let load = |rows, bytes| Weight::from_bytes(compute.pool(), dtype, rows, cols, bytes).unwrap();
            let (weight, second) = (load(rows, &bytes), load(more, &bytes_more));
            let run = |x: &[f32]| {
                let count = x.len() / cols;
                let (mut a, mut b) = (vec![9.0; count * rows], vec![9.0; count * more]);
                let products =
                    &mut [Product { weight: &weight, out: &mut a }, Product { weight: &second, out: &mut b }];
                compute.matmul_forward(&mut MatmulScratch::default(), x, products, &[]);
                (a, b)
            };
            let (a, b) = run(&x);
            // Elsewhere it is `matmul`, which rounds activations to 8 bits or to bf16.
            let share = match (dtype.block_len(), compute.isa()) {
                (1, _) => 2e-2,
                (_, Isa::Amx) => 1e-2,
                _ => 3e-2,
            };
            assert_within(share, &format!("{what}, {dtype}"), &a, &expected);
            for t in [0, 31, 50] {
                let (one, other) = run(&x[t * cols..][..cols]);
                assert!(one == a[t * rows..][..rows] && other == b[t * more..][..more], "{what}, {dtype}, row {t}");
            }
            let mut first = first.borrow_mut();
            let first = first.entry(compute.isa().name()).or_insert_with(|| (a.clone(), b.clone()));
            assert!(*first == (a, b), "{what}, {dtype}");
        });
    }
}

/// Several products of several types and row counts into what is there: the same bits on every instruction set - but for tiles,
/// which multiply bf16 - and any number of threads, and for a row alone.
#[test]
fn quantised_products_have_the_same_bits_everywhere() {
    let (cols, tokens, rows) = (256, 23, [130, 32, 17]);
    let dtypes = [DType::Q4_K, DType::Q8_0, DType::Q6_K];
    let bytes: Vec<_> = dtypes.iter().zip(rows).map(|(dtype, rows)| stored(*dtype, rows, cols)).collect();
    let dys: Vec<Vec<f32>> = rows.iter().map(|rows| f32s(&wave(tokens * rows, 1.7))).collect();
    let grads_of = |compute: &Compute, range: std::ops::Range<usize>| {
        let load = |i: usize| Weight::from_bytes(compute.pool(), dtypes[i], rows[i], cols, &bytes[i]).unwrap();
        let weights: Vec<Weight> = (0..3).map(load).collect();
        let product = |i: usize| {
            let (weight, rows): (&Weight, usize) = (&weights[i], rows[i]);
            BackProduct { weight, dy: &dys[i][range.start * rows..range.end * rows] }
        };
        let mut dx = vec![0.25; range.len() * cols];
        compute.matmul_backward(&[product(0), product(1), product(2)], Join { alpha: 0.5, add: true }, &mut dx);
        dx
    };
    let first_of = |isa| grads_of(&Compute::new(1, isa), 0..tokens);
    let first = first_of(Isa::Portable);
    let on_tiles = Isa::available().contains(&Isa::Amx).then(|| first_of(Isa::Amx));
    on_every_isa(|compute, what| {
        let first = on_tiles.as_ref().filter(|_| compute.isa() == Isa::Amx).unwrap_or(&first);
        assert!(grads_of(compute, 0..tokens) == *first, "{what}");
        for t in [0, 9, 22] {
            assert!(grads_of(compute, t..t + 1) == first[t * cols..][..cols], "{what}, row {t}");
        }
    });
}

/// An adapter added inside a product, forward and backward, has the bits of one added afterwards.
#[test]
fn what_is_added_inside_has_the_bits_of_afterwards() {
    let (tokens, rank, cols) = (19, 5, 256);
    let (x, h) = (f32s(&wave(tokens * cols, 0.7)), f32s(&wave(tokens * rank, 0.9)));
    for (dtype, rows) in [(DType::F32, 300), (DType::Q5_0, 300), (DType::Q4_K, 32)] {
        let (dy, b, a) = (wave(tokens * rows, 1.7), wave(rows * rank, 1.3), wave(rank * cols, 1.1));
        let (dy, b, a) = (f32s(&dy), f32s(&b), f32s(&a));
        on_every_isa(|compute, what| {
            let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &stored(dtype, rows, cols)).unwrap();
            let (b, a, h) = (Mat::new(&b, rows, rank), Mat::new(&a, rank, cols), Mat::new(&h, tokens, rank));
            let into = Join { alpha: 0.5, add: true };
            let (mut scratch, mut inside, mut after) =
                (MatmulScratch::default(), vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
            let added = LowRank { left: h, right: b.t(), alpha: 0.5 };
            let product = |out| Product { weight: &weight, out };
            compute.matmul_forward(&mut scratch, &x, &mut [product(&mut inside)], &[Some(added)]);
            compute.matmul_forward(&mut scratch, &x, &mut [product(&mut after)], &[]);
            compute.product(h, b.t(), into, &mut after);
            assert!(inside == after, "{what}, {dtype}");

            let (mut inside, mut after) = (vec![0.0; tokens * cols], vec![0.0; tokens * cols]);
            let added = LowRank { left: h, right: a, alpha: 0.5 };
            let products = [BackProduct { weight: &weight, dy: &dy }];
            compute.matmul_backward_added(&products, &[added, added], Join::OVER, &mut inside);
            compute.matmul_backward(&products, Join::OVER, &mut after);
            compute.product(h, a, into, &mut after);
            compute.product(h, a, into, &mut after);
            assert!(inside == after, "{what}, {dtype}, backward");
        });
    }
}

/// What is no number does not vanish in the rounding.
#[test]
fn no_number_stays_none() {
    let (rows, cols) = (32, 256);
    let bytes = stored(DType::Q4_K, rows, cols);
    on_every_isa(|compute, what| {
        let weight = Weight::from_bytes(compute.pool(), DType::Q4_K, rows, cols, &bytes).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut dy, mut dx) = (vec![0.5; 2 * rows], vec![0.0; 2 * cols]);
            dy[3] = bad;
            compute.matmul_backward(&[BackProduct { weight: &weight, dy: &dy }], Join::OVER, &mut dx);
            assert!(dx[..cols].iter().all(|x| !x.is_finite()), "{what}: {bad}");
            assert!(dx[cols..].iter().all(|x| x.is_finite()), "{what}: {bad}");
        }
    });
}

/// A stored matrix of pseudo-random bits whose f16 factors are moderate.
fn stored(dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
    let values = f32s(&wave(rows * cols, 0.83));
    match dtype {
        DType::F32 => return values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => return values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        DType::BF16 => return values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => {}
    }
    let factors: &[usize] = match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[0],
    };
    let size = dtype.tensor_bytes(&[rows, cols]).unwrap();
    let mut bytes: Vec<u8> = (0..size as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 37) as u8).collect();
    for (i, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        for &at in factors {
            let factor = half::f16::from_f32(0.002 + 0.001 * (i % 5) as f32);
            block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
        }
    }
    bytes
}
