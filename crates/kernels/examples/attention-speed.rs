//! Times attention of new tokens behind a context, at the heads of a 0.5B model: milliseconds and products a second.
//!
//! `cargo run --release -p qwenkit-kernels --example attention-speed -- [TOKENS [CONTEXT [THREADS]]]`. The fastest of a few runs
//! counts. A product is one multiply-add of a query with a key, or of a weight with a value.

use std::time::Instant;

use qwenkit_kernels::{AttentionSeq, Compute, Isa, KvCache, KvType, PAGE_TOKENS};

const HEADS: usize = 14;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

fn main() {
    let mut args = std::env::args().skip(1).filter_map(|arg| arg.parse::<usize>().ok());
    let (tokens, context, threads) =
        (args.next().unwrap_or(512), args.next().unwrap_or(8192), args.next().unwrap_or(2));
    let isa = Isa::detect().expect("a known instruction set");
    let compute = Compute::new(threads, isa);
    println!("{tokens} tokens behind {context}, {threads} threads, {isa}");
    let pages: Vec<u32> = (0..(context + tokens).div_ceil(PAGE_TOKENS) as u32).collect();
    let kv = |seed| noise((context + tokens) * KV_HEADS * HEAD_DIM, seed);
    let q = noise(tokens * HEADS * HEAD_DIM, 3);
    let mut out = vec![0.0; q.len()];
    for kv_type in [KvType::F16, KvType::F32] {
        let mut cache = KvCache::new(kv_type, KV_HEADS, HEAD_DIM, pages.len()).expect("memory for a cache");
        cache.write(&compute, &pages, 0, &kv(1), &kv(2));
        let seqs = [AttentionSeq { rows: 0..tokens, first: context, pages: &pages }];
        let seconds = (0..7).map(|_| {
            let start = Instant::now();
            compute.attention(&cache, &seqs, None, 0.125, (&q, &mut out));
            start.elapsed().as_secs_f64()
        });
        let seconds = seconds.fold(f64::INFINITY, f64::min);
        let products = 2 * HEADS * HEAD_DIM * (0..tokens).map(|t| context + t + 1).sum::<usize>();
        println!("{kv_type:?} {:9.3} ms {:7.1} GMAC/s", seconds * 1e3, products as f64 / seconds / 1e9);
    }
}

/// Numbers from -1 to 1 of a fixed sequence.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
