//! Times the ops of one training step at the shapes of a 0.5B model: milliseconds and products a second for each.
//!
//! `cargo run --release -p qwenkit-kernels --example training-step -- [TOKENS [THREADS]]`. Weights are random Q4_K and Q8_0;
//! every op runs a few times and its median counts. Adapters have rank 16.

use std::time::Instant;

use qwenkit_kernels::{
    AttentionInput, AttentionSeq, AttentionShape, BackProduct, Compute, HeadLoss, Isa, Join, KvCache, KvType, LowRank,
    Mat, MatmulScratch, PAGE_TOKENS, Product, Weight, quantize_row,
};
use qwenkit_tensor::DType;

/// D, F, H, G, K, R and V of the model.
const WIDTH: usize = 896;
const FFN: usize = 4864;
const HEADS: usize = 14;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const RANK: usize = 16;
const VOCAB: usize = 151_936;

fn main() {
    let mut args = std::env::args().skip(1).filter_map(|arg| arg.parse::<usize>().ok());
    let (tokens, threads) = (args.next().unwrap_or(512), args.next().unwrap_or(2));
    let isa = Isa::detect().expect("a known instruction set");
    let compute = Compute::new(threads, isa);
    println!("{tokens} tokens, {threads} threads, {isa}");
    let bench = Bench { compute, tokens };
    bench.products();
    bench.adapters();
    bench.lengths();
    bench.attention();
    bench.between();
    bench.head();
}

struct Bench {
    compute: Compute,
    tokens: usize,
}

impl Bench {
    /// Runs `f` and prints its median; `macs` are the multiply-adds of one run.
    fn time(&self, what: &str, macs: usize, mut f: impl FnMut()) {
        f();
        let mut times: Vec<f64> = (0..5)
            .map(|_| {
                let start = Instant::now();
                f();
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{what:<44} {:8.2} ms {:7.1} GMAC/s", times[2] * 1e3, macs as f64 / times[2] / 1e9);
    }

    fn weight(&self, dtype: DType, rows: usize, cols: usize) -> Weight {
        let values = noise(rows * cols, 0.05);
        let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
        let mut bytes = vec![0; rows * row_bytes];
        for (values, bytes) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
            quantize_row(dtype, values, None, bytes);
        }
        Weight::from_bytes(self.compute.pool(), dtype, rows, cols, &bytes).expect("a weight")
    }

    fn products(&self) {
        let t = self.tokens;
        // Rows of 896 are no whole super-blocks: the file has them as Q5_0 or Q8_0.
        let kinds: [(&str, DType, &[usize], usize); 5] = [
            ("q, k, v", DType::Q5_0, &[896, 128, 128], WIDTH),
            ("o", DType::Q5_0, &[WIDTH], 896),
            ("gate, up", DType::Q5_0, &[FFN, FFN], WIDTH),
            ("down", DType::Q4_K, &[WIDTH], FFN),
            ("down", DType::Q6_K, &[WIDTH], FFN),
        ];
        for (name, dtype, rows, cols) in kinds {
            let weights: Vec<Weight> = rows.iter().map(|rows| self.weight(dtype, *rows, cols)).collect();
            let macs = t * cols * rows.iter().sum::<usize>();
            let x = noise(t * cols, 1.0);
            let (mut outs, mut dx): (Vec<_>, _) =
                (rows.iter().map(|n| vec![0.0; t * n]).collect(), vec![0.0; t * cols]);
            let mut scratch = MatmulScratch::default();
            self.time(&format!("{name} {dtype}, forward"), macs, || {
                let products = weights.iter().zip(&mut outs).map(|(weight, out)| Product { weight, out });
                self.compute.matmul(&mut scratch, &x, &mut products.collect::<Vec<_>>());
            });
            let products: Vec<_> =
                weights.iter().zip(&outs).map(|(weight, dy)| BackProduct { weight, dy: dy.as_slice() }).collect();
            self.time(&format!("{name} {dtype}, backward"), macs, || {
                self.compute.matmul_backward(&products, Join::OVER, &mut dx);
            });
            let (h, a) = (noise(t * RANK, 1.0), noise(RANK * cols, 0.02));
            let added = LowRank { left: Mat::new(&h, t, RANK), right: Mat::new(&a, RANK, cols), alpha: 2.0 };
            let added = vec![added; rows.len()];
            self.time(&format!("{name} {dtype}, backward with dx += dh A"), macs, || {
                self.compute.matmul_backward_added(&products, &added, Join::OVER, &mut dx);
            });
            let b: Vec<_> = rows.iter().map(|n| noise(n * RANK, 0.02)).collect();
            let added: Vec<_> = b
                .iter()
                .zip(rows)
                .map(|(b, n)| LowRank { left: Mat::new(&h, t, RANK), right: Mat::new(b, *n, RANK).t(), alpha: 2.0 })
                .map(Some)
                .collect();
            self.time(&format!("{name} {dtype}, forward with y += h B'"), macs, || {
                let products = weights.iter().zip(&mut outs).map(|(weight, out)| Product { weight, out });
                self.compute.matmul_forward(&mut scratch, &x, &mut products.collect::<Vec<_>>(), &added);
            });
        }
    }

    fn adapters(&self) {
        let t = self.tokens;
        for (name, cols, rows) in [("up", WIDTH, FFN), ("down", FFN, WIDTH)] {
            let (x, dy) = (noise(t * cols, 1.0), noise(t * rows, 1.0));
            let (a, b, h) = (noise(RANK * cols, 0.02), noise(rows * RANK, 0.02), noise(t * RANK, 1.0));
            let (x, dy, h) = (Mat::new(&x, t, cols), Mat::new(&dy, t, rows), Mat::new(&h, t, RANK));
            let (a, b) = (Mat::new(&a, RANK, cols), Mat::new(&b, rows, RANK));
            let ops: [(&str, Mat<'_>, Mat<'_>, Join); 6] = [
                ("h = x A'", x, a.t(), Join::OVER),
                ("y += h B'", h, b.t(), Join::ADD),
                ("dh = dy B", dy, b, Join::OVER),
                ("dB += dy' h", dy.t(), h, Join::ADD),
                ("dA += dh' x", h.t(), x, Join::ADD),
                ("dx += dh A", h, a, Join::ADD),
            ];
            for (op, left, right, into) in ops {
                let mut out = vec![0.0; left.rows() * right.cols()];
                let macs = left.rows() * left.cols() * right.cols();
                self.time(&format!("adapter of {name}: {op}"), macs, || {
                    self.compute.product(left, right, into, &mut out);
                });
            }
        }
    }

    /// What DoRA asks of each matrix once a step.
    fn lengths(&self) {
        let kinds =
            [("up", DType::Q5_0, FFN, WIDTH), ("down", DType::Q4_K, WIDTH, FFN), ("down", DType::Q6_K, WIDTH, FFN)];
        for (name, dtype, rows, cols) in kinds {
            let (weight, a, b) = (self.weight(dtype, rows, cols), noise(cols * RANK, 0.02), noise(RANK * rows, 0.02));
            let (a, b) = (Mat::new(&a, cols, RANK), Mat::new(&b, RANK, rows));
            let (added, mut out) = (LowRank { left: b.t(), right: a.t(), alpha: 2.0 }, vec![0.0; rows]);
            self.time(&format!("{name} {dtype}, lengths of rows with an adapter"), rows * cols * RANK, || {
                self.compute.row_lengths(&weight, &added, &mut out);
            });
        }
    }

    fn attention(&self) {
        let t = self.tokens;
        let (q, k, v) = (
            noise(t * HEADS * HEAD_DIM, 1.0),
            noise(t * KV_HEADS * HEAD_DIM, 1.0),
            noise(t * KV_HEADS * HEAD_DIM, 1.0),
        );
        let d_out = noise(q.len(), 1.0);
        let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
        let shape =
            AttentionShape { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, window: None, scale: shape_scale() };
        let pages: Vec<u32> = (0..t.div_ceil(PAGE_TOKENS) as u32).collect();
        for kv_type in [KvType::F32, KvType::F16] {
            let mut cache = KvCache::new(kv_type, KV_HEADS, HEAD_DIM, pages.len()).expect("memory");
            let mut heads = vec![0.0; q.len()];
            let two = 2 * HEADS * t * (t + 1) / 2 * HEAD_DIM;
            self.time(&format!("attention, forward, {kv_type:?}"), two, || {
                cache.write(&self.compute, &pages, 0, &k, &v);
                let seqs = [AttentionSeq { rows: 0..t, first: 0, pages: &pages }];
                self.compute.attention(&cache, &seqs, None, shape_scale(), (&q, &mut heads));
            });
        }
        // Five products over the lower triangle.
        let macs = 5 * HEADS * t * (t + 1) / 2 * HEAD_DIM;
        let whole = 0..t;
        let seqs = std::slice::from_ref(&whole);
        let input = AttentionInput { q: &q, k: &k, v: &v };
        self.time("attention, backward, f32", macs, || {
            self.compute.attention_backward(shape, seqs, input, &d_out, [&mut dq, &mut dk, &mut dv]);
        });
        self.time("attention, backward, rounded", macs, || {
            self.compute.attention_backward_rounded(shape, seqs, input, &d_out, [&mut dq, &mut dk, &mut dv]);
        });
    }

    fn head(&self) {
        let t = self.tokens;
        let head = self.weight(DType::Q8_0, VOCAB, WIDTH);
        // Logits of a few units, as a model's are.
        let (x, targets) = (noise(t * WIDTH, 4.0), (0..t as u32).map(|i| i * 61).collect::<Vec<_>>());
        let (mut losses, mut dx) = (vec![0.0; t], vec![0.0; t * WIDTH]);
        let mut scratch = MatmulScratch::default();
        let loss = HeadLoss { head: &head, targets: &targets, scale: 1.0 };
        let macs = t * WIDTH * VOCAB;
        self.time("head and loss", macs, || self.compute.head_loss(&mut scratch, &loss, &x, &mut losses, None));
        self.time("head and loss with gradient", macs, || {
            self.compute.head_loss(&mut scratch, &loss, &x, &mut losses, Some(&mut dx));
        });
    }

    fn between(&self) {
        let t = self.tokens;
        let (mut gate, mut up, dh) = (noise(t * FFN, 1.0), noise(t * FFN, 1.0), noise(t * FFN, 1.0));
        self.time("silu * up, forward", 0, || self.compute.silu_mul(&mut gate, &up, FFN));
        self.time("silu * up, backward", 0, || self.compute.silu_mul_backward(&mut gate, &mut up, &dh, FFN));
        let (x, weight, dy) = (noise(t * WIDTH, 1.0), noise(WIDTH, 1.0), noise(t * WIDTH, 1.0));
        let mut dx = x.clone();
        self.time("norm, backward", 0, || self.compute.rms_norm_backward(&x, &weight, 1e-6, &dy, &mut dx));
        let (cos, sin) = (noise(t * HEAD_DIM / 2, 1.0), noise(t * HEAD_DIM / 2, 1.0));
        self.time("rope of the queries, backward", 0, || {
            self.compute.rope_backward(&mut dx, HEAD_DIM, &cos, &sin, HEAD_DIM / 2);
        });
    }
}

fn shape_scale() -> f32 {
    (HEAD_DIM as f32).sqrt().recip()
}

/// Pseudo-random values around zero, some large (SplitMix64).
fn noise(n: usize, size: f32) -> Vec<f32> {
    let mut state = n as u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| size * next() * next().abs().sqrt()).collect()
}
