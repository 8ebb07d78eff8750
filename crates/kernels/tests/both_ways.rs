//! Attention where a query sees all of its segment: exact on every instruction set, for the head sizes of vision towers, and
//! the same bits whatever other segments there are and however many threads.

use qwenkit_kernels::{AttentionSeq, Compute, Isa, KvCache, KvType, PAGE_TOKENS};

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 * f).sin() + (i as f32 * f * 0.37).cos()) * 0.9).collect()
}

/// One segment by its formula, in f64.
fn exact(q: &[f32], k: &[f32], v: &[f32], heads: usize, dim: usize, scale: f32) -> Vec<f64> {
    let tokens = q.len() / heads / dim;
    let mut out = vec![0.0; q.len()];
    for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
        let at = |t: usize| (t * heads + h) * dim;
        let score = |s: usize| {
            let dot: f64 = (0..dim).map(|d| f64::from(q[at(t) + d]) * f64::from(k[at(s) + d])).sum();
            dot * f64::from(scale)
        };
        let scores: Vec<f64> = (0..tokens).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (s, weight) in weights.iter().enumerate() {
            (0..dim).for_each(|d| out[at(t) + d] += weight / total * f64::from(v[at(s) + d]));
        }
    }
    out
}

struct Case {
    heads: usize,
    dim: usize,
    kv_type: KvType,
    segments: Vec<usize>,
}

impl Case {
    fn scale(&self) -> f32 {
        2.0 / (self.dim as f32).sqrt()
    }

    fn run(&self, compute: &Compute, [q, k, v]: [&[f32]; 3]) -> Vec<f32> {
        let row = self.heads * self.dim;
        let pages: usize = self.segments.iter().map(|n| n.div_ceil(PAGE_TOKENS)).sum();
        let mut cache = KvCache::new(self.kv_type, self.heads, self.dim, pages).unwrap();
        let numbers: Vec<u32> = (0..pages as u32).rev().collect();
        let (mut seqs, mut start, mut page) = (Vec::new(), 0, 0);
        for &len in &self.segments {
            let own = &numbers[page..page + len.div_ceil(PAGE_TOKENS)];
            page += own.len();
            let values = start * row..(start + len) * row;
            cache.write(compute, own, 0, &k[values.clone()], &v[values]);
            seqs.push(AttentionSeq { rows: start..start + len, first: 0, pages: own });
            start += len;
        }
        let mut out = vec![0.0; q.len()];
        compute.attention_both_ways(&cache, &seqs, self.scale(), (q, &mut out));
        out
    }
}

#[test]
fn every_query_sees_its_whole_segment_and_nothing_else() {
    for (heads, dim, kv_type, segments) in [
        (1, 16, KvType::F32, vec![1]),
        (2, 72, KvType::F32, vec![3, 64, 1, 70]),
        (3, 80, KvType::F16, vec![64, 16, 130]),
        (16, 80, KvType::F32, vec![24, 32]),
        (2, 64, KvType::F16, vec![1100]),
    ] {
        let case = Case { heads, dim, kv_type, segments };
        let row = heads * dim;
        let n = case.segments.iter().sum::<usize>() * row;
        let (q, k, v) = (wave(n, 0.71), wave(n, 1.13), wave(n, 0.29));
        // Integers of 12 bits and a sign for queries are the coarsest of what caches of 16 bits round.
        let allowed = if kv_type == KvType::F32 { 1e-5 } else { 1e-3 };
        for isa in Isa::available() {
            let what = format!("{isa}, {:?} of ({heads}, {dim}), {kv_type:?}", case.segments);
            let whole = case.run(&Compute::new(3, isa), [&q, &k, &v]);
            assert_eq!(case.run(&Compute::new(1, isa), [&q, &k, &v]), whole, "{what}: one thread");
            let mut start = 0;
            for &len in &case.segments {
                let part = start * row..(start + len) * row;
                let own = [&q, &k, &v].map(|x| &x[part.clone()]);
                let expected = exact(own[0], own[1], own[2], heads, dim, case.scale());
                for (i, (found, exact)) in whole[part.clone()].iter().zip(expected).enumerate() {
                    let error = (f64::from(*found) - exact).abs();
                    assert!(error < allowed, "{what}: value {i} of segment at {start}: {found} and {exact}");
                }
                let alone = Case { segments: vec![len], heads, dim, kv_type };
                assert_eq!(alone.run(&Compute::new(2, isa), own), whole[part], "{what}: alone");
                start += len;
            }
        }
    }
}
