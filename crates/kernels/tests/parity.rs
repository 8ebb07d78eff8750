//! Every op and weight type on every instruction set present, against plain arithmetic in f64 and against `portable`.

use qwenkit_kernels::{
    AttentionSeq, Compute, GatedUnit, Isa, KvCache, KvType, MatmulScratch, PAGE_TOKENS, Product, Weight, dequantize_row,
};
use qwenkit_tensor::DType;

const WEIGHT_TYPES: [DType; 15] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
];

/// A small deterministic generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// Where the f16 factors of a block lie.
fn factor_offsets(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[],
    }
}

/// A stored matrix with every bit of its quants and integer scales random, and its f16 factors moderate.
fn stored(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let n = rows * cols;
    match dtype {
        DType::F32 => random.values(n).iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => random.values(n).iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        DType::BF16 => random.values(n).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => {
            let mut bytes: Vec<u8> =
                (0..dtype.tensor_bytes(&[rows, cols]).unwrap()).map(|_| random.next() as u8).collect();
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                for &at in factor_offsets(dtype) {
                    block[at..at + 2].copy_from_slice(&half::f16::from_f32(random.value() * 0.01).to_le_bytes());
                }
            }
            bytes
        }
    }
}

fn dequantized(dtype: DType, bytes: &[u8], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    if cols > 0 {
        let row_bytes = dtype.row_bytes(cols).unwrap();
        for (out, bytes) in out.chunks_exact_mut(cols).zip(bytes.chunks_exact(row_bytes)) {
            dequantize_row(dtype, bytes, out);
        }
    }
    out
}

/// Prints the worst place when two results differ by more than `tolerance` of the expected results' largest.
fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let spread = expected.iter().fold(1e-9f32, |m, x| m.max(x.abs()));
    let worst =
        (0..found.len()).max_by(|&a, &b| (found[a] - expected[a]).abs().total_cmp(&(found[b] - expected[b]).abs()));
    if let Some(i) = worst {
        let error = (found[i] - expected[i]).abs();
        assert!(
            error <= tolerance * spread,
            "{what}: at {i} found {}, expected {}; error {error:e}, relative to the largest {:e}, allowed {tolerance:e}",
            found[i],
            expected[i],
            error / spread
        );
    }
}

fn matmul(compute: &Compute, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / weight.cols() * weight.rows()];
    compute.matmul(&mut MatmulScratch::default(), x, &mut [Product { weight, out: &mut out }]);
    out
}

fn shapes(dtype: DType) -> Vec<(usize, usize, usize)> {
    // (tokens, rows, cols): one, odd, tails of every tile, several groups, panels and blocks of columns.
    let block = dtype.block_len();
    let cols = |n: usize| if block == 1 { n } else { n.div_ceil(block) * block };
    [
        (1, 1, 1),
        (1, 16, 32),
        (2, 17, 33),
        (3, 31, 64),
        (5, 48, 97),
        (7, 5, 255),
        (8, 16, 256),
        (9, 33, 768),
        (29, 40, 513),
        (50, 40, 2305),
    ]
    .map(|(t, n, k)| (t, n, cols(k)))
    .to_vec()
}

#[test]
fn rows_come_back_as_stored() {
    let compute = Compute::new(2, Isa::Portable);
    let mut random = Random(1);
    for dtype in WEIGHT_TYPES {
        for (_, rows, cols) in shapes(dtype) {
            let bytes = stored(dtype, rows, cols, &mut random);
            let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap();
            let expected = dequantized(dtype, &bytes, rows, cols);
            let mut row = vec![0.0; cols];
            for (r, expected) in expected.chunks_exact(cols).enumerate() {
                weight.row(r, &mut row);
                assert_eq!(row, expected, "{dtype} row {r} of ({rows}, {cols})");
            }
        }
    }
}

/// y = w . x in f64, and how far a product of this type may be from it: half a step of each rounded activation times
/// its weight - of those of BF16 weights, which some machines round -, and f32's own rounding of sums.
fn exact_dot(dtype: DType, w: &[f32], x: &[f32]) -> (f32, f32) {
    let (mut sum, mut magnitude, mut rounding) = (0.0, 0.0, 0.0);
    for (w, x) in w.chunks(32).zip(x.chunks(32)) {
        let step = f64::from(x.iter().fold(0.0f32, |m, x| m.max(x.abs()))) / 127.0;
        for (w, x) in w.iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x))) {
            sum += w * x;
            magnitude += (w * x).abs();
            rounding += w.abs()
                * match dtype {
                    DType::F32 | DType::F16 => 0.0,
                    DType::BF16 => x.abs() / 256.0,
                    _ => step / 2.0,
                };
        }
    }
    (sum as f32, (rounding * 1.001 + magnitude * w.len() as f64 * 6e-8) as f32)
}

#[test]
fn products_agree_with_exact_arithmetic() {
    let mut random = Random(2);
    for dtype in WEIGHT_TYPES {
        for (tokens, rows, cols) in shapes(dtype) {
            let bytes = stored(dtype, rows, cols, &mut random);
            let w = dequantized(dtype, &bytes, rows, cols);
            let x = random.values(tokens * cols);
            let expected: Vec<_> =
                x.chunks_exact(cols).flat_map(|x| w.chunks_exact(cols).map(move |w| exact_dot(dtype, w, x))).collect();
            for isa in Isa::available() {
                let compute = Compute::new(2, isa);
                let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap();
                for (i, (found, (expected, bound))) in matmul(&compute, &weight, &x).iter().zip(&expected).enumerate() {
                    assert!(
                        (found - expected).abs() <= *bound,
                        "{dtype} on {isa}, ({tokens}, {rows}, {cols}) at {i}: found {found}, expected {expected} within {bound}"
                    );
                }
            }
        }
    }
}

#[test]
fn quantized_products_have_the_same_bits_everywhere() {
    let mut random = Random(3);
    for dtype in WEIGHT_TYPES.into_iter().filter(|t| t.is_quantized()) {
        for (tokens, rows, cols) in shapes(dtype) {
            let bytes = stored(dtype, rows, cols, &mut random);
            let x = random.values(tokens * cols);
            let results: Vec<_> = Isa::available()
                .into_iter()
                .map(|isa| {
                    let compute = Compute::new(1, isa);
                    let weight = Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap();
                    (isa, matmul(&compute, &weight, &x))
                })
                .collect();
            for (isa, result) in &results {
                assert_eq!(result, &results[0].1, "{dtype} on {isa}, ({tokens}, {rows}, {cols})");
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    let mut random = Random(4);
    for isa in Isa::available() {
        // Plain types also with rows that end within a step, and groups of which one is left over.
        let plain = WEIGHT_TYPES.into_iter().filter(|dtype| dtype.block_len() == 1).map(|dtype| (dtype, 70, 333));
        for (dtype, rows, cols) in WEIGHT_TYPES.into_iter().map(|dtype| (dtype, 50, 512)).chain(plain) {
            let tokens = 43;
            let bytes = stored(dtype, rows, cols, &mut random);
            let x = random.values(tokens * cols);
            let one = Compute::new(1, isa);
            let three = Compute::new(3, isa);
            let weight = Weight::from_bytes(three.pool(), dtype, rows, cols, &bytes).unwrap();
            let all = matmul(&three, &weight, &x);
            for (x, expected) in x.chunks_exact(cols).zip(all.chunks_exact(rows)) {
                assert_eq!(matmul(&one, &weight, x), expected, "{dtype} on {isa}");
            }
            for cut in [1, 2, 3, 5, 8, 13, 20] {
                let mut parts = matmul(&one, &weight, &x[..cut * cols]);
                parts.extend(matmul(&one, &weight, &x[cut * cols..]));
                assert_eq!(parts, all, "{dtype} on {isa}, cut at {cut}");
            }
        }
    }
}

#[test]
fn several_products_in_one_fork() {
    let mut random = Random(5);
    for isa in Isa::available() {
        let compute = Compute::new(3, isa);
        let cols = 256;
        let x = random.values(4 * cols);
        let types = [DType::Q5_0, DType::Q8_0, DType::F32, DType::BF16];
        let weights: Vec<_> = types
            .iter()
            .enumerate()
            .map(|(i, &dtype)| {
                let rows = 7 + 40 * i;
                let bytes = stored(dtype, rows, cols, &mut random);
                Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap()
            })
            .collect();
        let mut outs: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; 4 * w.rows()]).collect();
        let mut products: Vec<_> = weights.iter().zip(&mut outs).map(|(weight, out)| Product { weight, out }).collect();
        compute.matmul(&mut MatmulScratch::default(), &x, &mut products);
        for (weight, out) in weights.iter().zip(&outs) {
            assert_eq!(out, &matmul(&compute, weight, &x), "{} on {isa}", weight.dtype());
        }
    }
}

#[test]
fn a_gated_unit_has_the_bits_of_its_ops() {
    let mut random = Random(6);
    // (tokens, D, F): one, tails of tiles, several pieces of tokens; rows of groups and units that end early.
    let shapes = [(1, 33, 5), (7, 64, 70), (8, 64, 33), (129, 40, 333), (300, 17, 48)];
    for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
        let compute = Compute::new(threads, isa);
        for dtype in WEIGHT_TYPES.into_iter().filter(|dtype| dtype.block_len() <= 32) {
            let whole = |n: usize| n.next_multiple_of(dtype.block_len());
            let mut scratch = MatmulScratch::default();
            for (tokens, width, inner) in shapes.map(|(t, d, f)| (t, whole(d), whole(f))) {
                let mut weight = |rows: usize, cols: usize| {
                    let bytes = stored(dtype, rows, cols, &mut random);
                    Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap()
                };
                let (gate, up, down) = (weight(inner, width), weight(inner, width), weight(width, inner));
                let x = random.values(tokens * width);
                let mut hidden = matmul(&compute, &gate, &x);
                compute.silu_mul(&mut hidden, &matmul(&compute, &up, &x), inner);
                let expected = matmul(&compute, &down, &hidden);
                let mut out = vec![f32::NAN; tokens * width];
                let unit = GatedUnit { gate: &gate, up: &up, down: &down };
                compute.gated_unit(&mut scratch, &x, unit, &mut out);
                assert_eq!(out, expected, "{dtype} on {isa}, {threads} threads, ({tokens}, {width}, {inner})");
            }
        }
    }
}

struct AttentionCase {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<usize>,
    kv_type: KvType,
}

impl AttentionCase {
    /// Plain attention in f64: out (T, H, K).
    fn exact(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let tokens = q.len() / self.heads / self.dim;
        let mut out = Vec::new();
        for t in 0..tokens {
            for h in 0..self.heads {
                let q = &q[(t * self.heads + h) * self.dim..][..self.dim];
                let at = |s: usize| (s * self.kv_heads + h / (self.heads / self.kv_heads)) * self.dim;
                let first = self.window.map_or(0, |w| (t + 1).saturating_sub(w));
                let scores: Vec<f64> = (first..=t)
                    .map(|s| {
                        (0..self.dim).map(|d| f64::from(q[d]) * f64::from(k[at(s) + d])).sum::<f64>() * self.scale()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..self.dim {
                    let sum: f64 = (first..=t).zip(&weights).map(|(s, w)| w * f64::from(v[at(s) + d])).sum();
                    out.push((sum / total) as f32);
                }
            }
        }
        out
    }

    /// Integers of 12 bits and a sign for queries are the coarsest of what caches of 16 bits round.
    fn allowed(&self) -> f32 {
        match self.kv_type {
            KvType::F32 => 5e-6,
            KvType::F16 => 4e-4,
        }
    }

    fn scale(&self) -> f64 {
        3.0 / (self.dim as f64).sqrt()
    }

    /// The same through the cache, the prompt cut after each of `cuts`.
    fn cached(&self, compute: &Compute, cuts: &[usize], q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let tokens = q.len() / self.heads / self.dim;
        let count = tokens.div_ceil(PAGE_TOKENS);
        let mut cache = KvCache::new(self.kv_type, self.kv_heads, self.dim, count + 3).unwrap();
        // Pages out of order, so that a page's number is not its place.
        let pages: Vec<u32> = (1..=count as u32).rev().collect();
        let mut out = vec![0.0; q.len()];
        let (q_row, kv_row) = (self.heads * self.dim, self.kv_heads * self.dim);
        let mut first = 0;
        for end in cuts.iter().copied().chain([tokens]) {
            cache.write(compute, &pages, first, &k[first * kv_row..end * kv_row], &v[first * kv_row..end * kv_row]);
            let seqs = [AttentionSeq { rows: 0..end - first, first, pages: &pages }];
            let range = first * q_row..end * q_row;
            let scale = self.scale() as f32;
            compute.attention(&cache, &seqs, self.window, scale, (&q[range.clone()], &mut out[range]));
            first = end;
        }
        out
    }
}

#[test]
fn attention_is_exact_and_the_same_for_any_cut() {
    let mut random = Random(6);
    let cases = [
        (1, 1, 16, None, KvType::F32),
        (4, 2, 32, None, KvType::F32),
        (14, 2, 64, None, KvType::F16),
        (5, 5, 48, Some(1), KvType::F32),
        (6, 2, 32, Some(70), KvType::F16),
        (8, 1, 256, Some(8), KvType::F32),
        (4, 2, 10, None, KvType::F16),
        (3, 1, 24, None, KvType::F32),
    ];
    for (heads, kv_heads, dim, window, kv_type) in cases {
        let case = AttentionCase { heads, kv_heads, dim, window, kv_type };
        for tokens in [1, 2, 63, 64, 65, 150] {
            let q = random.values(tokens * heads * dim);
            let (k, v) = (random.values(tokens * kv_heads * dim), random.values(tokens * kv_heads * dim));
            let expected = case.exact(&q, &k, &v);
            for isa in Isa::available() {
                let what =
                    format!("{isa}, {tokens} tokens of ({heads}/{kv_heads}, {dim}), window {window:?}, {kv_type:?}");
                let whole = case.cached(&Compute::new(3, isa), &[], &q, &k, &v);
                assert_close(&what, &whole, &expected, case.allowed());
                let cuts: Vec<usize> = [1, 2, 40, 64, 100].into_iter().filter(|c| *c < tokens).collect();
                let cut = case.cached(&Compute::new(1, isa), &cuts, &q, &k, &v);
                assert_eq!(cut, whole, "{what}, cut at {cuts:?}");
            }
        }
    }
}

/// A broken weight has to be seen at the end of the model, whatever op it goes through.
#[test]
fn what_is_no_number_stays_none() {
    let mut random = Random(11);
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        for kv_type in [KvType::F32, KvType::F16] {
            let case = AttentionCase { heads: 4, kv_heads: 2, dim: 64, window: None, kv_type };
            let tokens = 3 * PAGE_TOKENS + 5;
            let (q, k) = (random.values(tokens * 4 * 64), random.values(tokens * 2 * 64));
            let v = random.values(k.len());
            let positions = [2, 2 * PAGE_TOKENS + 3, tokens - 1];
            let bad =
                positions.map(|p| (p, "key")).into_iter().chain(positions.map(|p| (p, "value"))).chain([(70, "query")]);
            for (bad, part) in bad {
                let (mut q, mut k, mut v) = (q.clone(), k.clone(), v.clone());
                match part {
                    "query" => q[bad * 4 * 64 + 7] = f32::NAN,
                    "key" => k[bad * 2 * 64 + 7] = f32::NAN,
                    _ => v[bad * 2 * 64..][..64].fill(f32::NAN),
                }
                for cuts in [&[][..], &[PAGE_TOKENS + 9, tokens - 1]] {
                    let out = case.cached(&compute, cuts, &q, &k, &v);
                    for (t, row) in out.chunks_exact(4 * 64).enumerate() {
                        let expected = if part == "query" { t == bad } else { t >= bad };
                        let found = row[..64].iter().all(|x| x.is_nan());
                        let what = format!("{kv_type:?} on {isa}: position {t}, bad {bad}, a {part}");
                        // In f32 a weight of 0 times a value of its chunk that is no number is none either.
                        let reaches = part == "value" && kv_type == KvType::F32 && t / PAGE_TOKENS == bad / PAGE_TOKENS;
                        assert!(found == expected || reaches && !expected, "{what}");
                        assert!(row[2 * 64..].iter().all(|x| x.is_finite()), "{what}");
                    }
                }
            }
        }
        let (mut gate, up) = (vec![0.5; 40], vec![1.0; 40]);
        gate[3] = f32::NAN;
        gate[33] = f32::NAN;
        compute.silu_mul(&mut gate, &up, 20);
        assert!(gate.iter().enumerate().all(|(i, x)| x.is_nan() == (i == 3 || i == 33)), "silu on {isa}: {gate:?}");
    }
}

/// Keys that are no number at the border of a span, and before the border of a page that a tile of queries crosses.
#[test]
fn what_is_no_number_stays_none_in_later_spans() {
    let mut random = Random(12);
    let tokens = 1100;
    for (isa, kv_type) in Isa::available().into_iter().flat_map(|isa| [(isa, KvType::F32), (isa, KvType::F16)]) {
        let compute = Compute::new(2, isa);
        let case = AttentionCase { heads: 14, kv_heads: 2, dim: 16, window: None, kv_type };
        let (q, k) = (random.values(tokens * 14 * 16), random.values(tokens * 2 * 16));
        for (bad, cuts) in [(1024, &[][..]), (1024, &[1024]), (1087, &[]), (1087, &[1087]), (1023, &[1022])] {
            let mut k = k.clone();
            k[bad * 2 * 16 + 3] = f32::NAN;
            let out = case.cached(
                &compute,
                cuts,
                &q,
                &k,
                &k.iter().map(|x| if x.is_nan() { 0.0 } else { *x }).collect::<Vec<_>>(),
            );
            for (t, row) in out.chunks_exact(14 * 16).enumerate() {
                let what = format!("{kv_type:?} on {isa}: position {t}, bad {bad}, cut at {cuts:?}");
                assert!(row[..7 * 16].iter().all(|x| x.is_nan() == (t >= bad)), "{what}");
                assert!(row[7 * 16..].iter().all(|x| x.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn long_sequences_are_shared_among_threads_span_by_span() {
    let mut random = Random(16);
    for (kv_type, window) in [(KvType::F32, None), (KvType::F16, None), (KvType::F16, Some(1500))] {
        let case = AttentionCase { heads: 3, kv_heads: 1, dim: 16, window, kv_type };
        let tokens = 2100;
        let q = random.values(tokens * 3 * 16);
        let (k, v) = (random.values(tokens * 16), random.values(tokens * 16));
        let expected = case.exact(&q, &k, &v);
        for isa in Isa::available() {
            let whole = case.cached(&Compute::new(1, isa), &[], &q, &k, &v);
            let what = format!("{isa}, window {window:?}, {kv_type:?}");
            assert_close(&what, &whole, &expected, case.allowed());
            // The last parts have few queries, so several threads share their spans.
            for threads in [1, 4] {
                let cut = case.cached(&Compute::new(threads, isa), &[1000, 1025, 2090, 2099], &q, &k, &v);
                assert_eq!(cut, whole, "{what}, {threads} threads");
            }
        }
    }
}

#[test]
fn sequences_share_a_batch_without_touching_each_other() {
    let mut random = Random(7);
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let (heads, kv_heads, dim) = (4, 2, 32);
        let (q_row, kv_row) = (heads * dim, kv_heads * dim);
        let lengths = [3usize, 1, 70];
        let tokens: usize = lengths.iter().sum();
        let (q, k, v) = (random.values(tokens * q_row), random.values(tokens * kv_row), random.values(tokens * kv_row));
        let mut cache = KvCache::new(KvType::F32, kv_heads, dim, 4).unwrap();
        let pages: [&[u32]; 3] = [&[3], &[1], &[0, 2]];
        let (mut seqs, mut start) = (Vec::new(), 0);
        for (len, pages) in lengths.into_iter().zip(pages) {
            let rows = start..start + len;
            cache.write(
                &compute,
                pages,
                0,
                &k[start * kv_row..rows.end * kv_row],
                &v[start * kv_row..rows.end * kv_row],
            );
            start = rows.end;
            seqs.push(AttentionSeq { rows, first: 0, pages });
        }
        let mut batch = vec![0.0; q.len()];
        compute.attention(&cache, &seqs, None, 0.2, (&q, &mut batch));
        for seq in &seqs {
            let range = seq.rows.start * q_row..seq.rows.end * q_row;
            let mut alone = vec![0.0; range.len()];
            let own = [AttentionSeq { rows: 0..seq.rows.len(), first: 0, pages: seq.pages }];
            compute.attention(&cache, &own, None, 0.2, (&q[range.clone()], &mut alone));
            assert_eq!(alone, batch[range]);
        }
    }
}

#[test]
fn small_ops_agree_with_exact_arithmetic_on_every_set() {
    let mut random = Random(8);
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        for (tokens, width) in [(1, 1), (2, 17), (5, 64), (9, 100)] {
            let x = random.values(tokens * width);
            let weight = random.values(width);
            let mut expected = Vec::new();
            for row in x.chunks_exact(width) {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-6).sqrt();
                expected.extend(row.iter().zip(&weight).map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32));
            }
            let mut out = vec![0.0; x.len()];
            compute.rms_norm(&x, &weight, 1e-6, &mut out);
            assert_close(&format!("norm on {isa}"), &out, &expected, 1e-6);
            let mut in_place = x.clone();
            compute.rms_norm_in_place(&mut in_place, &weight, 1e-6);
            assert_eq!(in_place, out);

            let up = random.values(x.len());
            let mut gate = x.iter().map(|x| x * 20.0).collect::<Vec<_>>();
            let expected: Vec<f32> = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| (f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u)) as f32)
                .collect();
            compute.silu_mul(&mut gate, &up, width);
            assert_close(&format!("silu on {isa}"), &gate, &expected, 1e-6);
        }
    }
}

#[test]
fn rope_rotates_halves_and_leaves_the_tail() {
    for isa in Isa::available() {
        let compute = Compute::new(1, isa);
        // One token, two heads of 6, of which 4 values are rotated by a quarter turn and by none.
        let mut x = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0];
        compute.rope(&mut x, 6, &[0.0, 1.0], &[1.0, 0.0], 2);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, 5.0, 6.0, -30.0, 20.0, 10.0, 40.0, 50.0, 60.0], "{isa}");
    }
}
