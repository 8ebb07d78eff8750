//! Causal attention of new tokens over a paged cache, for many sequences at once.
//!
//! Every query goes through its keys in chunks of one page, in ascending order: a chunk's scores, its own maximum, its own
//! weighted sum of values, and only then the merge into the running result. The chunks are fixed by absolute position,
//! so a token's result has the same bits whether it came alone, in a batch, or in any cut of the prompt.
//! Source: Milakov and Gimelshein 2018 (online softmax), Dao et al. 2022 (tiling).

use std::ops::Range;

use half::f16;

use crate::{
    Isa,
    kv::{KvCache, KvElement, KvType, PAGE_TOKENS},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Queries (token and head of one kv head) that share each load of keys and values.
pub(crate) const TILE_QUERIES: usize = 8;
/// The largest head that kernels keep on the stack; Qwen's are 64, 128 and 256.
pub const HEAD_DIM_MAX: usize = 256;
/// Query tiles of one kv head that a thread takes at once.
const TILES_PER_JOB: usize = 4;

/// The new tokens of one sequence.
pub struct AttentionSeq<'a> {
    /// Rows of the batch that are this sequence's.
    pub rows: Range<usize>,
    /// Position of the first of them.
    pub first: usize,
    /// The sequence's pages, enough for all positions; keys and values of the new tokens are already written.
    pub pages: &'a [u32],
}

/// What a tile's kernel gets.
pub(crate) struct Tile<'a, E> {
    /// Pages of the sequence from chunk 0: keys `[4][K][16]` and values `[64][K']` of this kv head.
    pub(crate) cache: &'a KvCache,
    pub(crate) pages: &'a [u32],
    pub(crate) kv_head: usize,
    pub(crate) head_dim: usize,
    /// K' of the cache, the length of a result.
    pub(crate) value_dim: usize,
    /// Queries, (`ranges.len()`, K), already scaled.
    pub(crate) queries: &'a [f32],
    /// Positions that each query sees; none is empty.
    pub(crate) ranges: &'a [Range<usize>],
    pub(crate) _element: std::marker::PhantomData<E>,
}

impl<E: KvElement> Tile<'_, E> {
    /// The chunks that any query sees.
    pub(crate) fn chunks(&self) -> Range<usize> {
        let first = self.ranges.iter().map(|r| r.start).min().unwrap_or(0);
        let end = self.ranges.iter().map(|r| r.end).max().unwrap_or(0);
        first / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS)
    }

    /// Keys of chunk `c` that query `i` sees, counted from the chunk's first.
    pub(crate) fn seen(&self, i: usize, c: usize) -> Range<usize> {
        let (start, end) = (c * PAGE_TOKENS, (c + 1) * PAGE_TOKENS);
        self.ranges[i].start.clamp(start, end) - start..self.ranges[i].end.clamp(start, end) - start
    }

    pub(crate) fn head(&self, c: usize) -> (&[E], &[E]) {
        self.cache.head(self.pages[c], self.kv_head)
    }
}

impl Compute {
    /// Attention of `q`: (T, H, K) into `out`: (T, H, K), rows of the batch belonging to `seqs`. A query sees its own
    /// position and those before it; with a `window` of w the last w of them.
    ///
    /// # Panics
    /// If shapes do not fit, or a head is larger than `HEAD_DIM_MAX`.
    pub fn attention(
        &self,
        cache: &KvCache,
        seqs: &[AttentionSeq<'_>],
        window: Option<usize>,
        scale: f32,
        (q, out): (&[f32], &mut [f32]),
    ) {
        let tokens: usize = seqs.iter().map(|s| s.rows.len()).sum();
        let Some(heads) = (q.len() / cache.head_dim).checked_div(tokens) else { return };
        assert!(q.len() == out.len() && q.len() == tokens * heads * cache.head_dim, "attention's queries");
        assert!(heads.is_multiple_of(cache.kv_heads), "{heads} heads on {} kv heads", cache.kv_heads);
        assert!(cache.head_dim <= HEAD_DIM_MAX, "heads of {}", cache.head_dim);
        let out = SharedOut::new(out);
        let job = Job { compute: self, cache, window, scale, heads, q, out: &out };
        let jobs = job.list(seqs);
        let threads = self.pool.threads();
        let run = |i: usize| {
            // Dealt like cards: neighbouring jobs of a causal prompt cost about the same.
            for &(seq, kv_head, first) in jobs.iter().skip(i).step_by(threads) {
                match cache.kv_type {
                    KvType::F32 => job.run::<f32>(&seqs[seq], kv_head, first),
                    KvType::F16 => job.run::<f16>(&seqs[seq], kv_head, first),
                }
            }
        };
        if jobs.len() == 1 { (0..threads).for_each(run) } else { self.pool.run(run) }
    }
}

struct Job<'a> {
    compute: &'a Compute,
    cache: &'a KvCache,
    window: Option<usize>,
    scale: f32,
    heads: usize,
    /// (T, H, K)
    q: &'a [f32],
    out: &'a SharedOut<'a, f32>,
}

impl Job<'_> {
    /// (sequence, kv head, first query) of every job.
    fn list(&self, seqs: &[AttentionSeq<'_>]) -> Vec<(usize, usize, usize)> {
        let per_kv = self.heads / self.cache.kv_heads;
        let mut jobs = Vec::new();
        for (i, seq) in seqs.iter().enumerate() {
            for first in (0..seq.rows.len() * per_kv).step_by(TILES_PER_JOB * TILE_QUERIES) {
                jobs.extend((0..self.cache.kv_heads).map(|kv_head| (i, kv_head, first)));
            }
        }
        jobs
    }

    /// The queries of `kv_head` from the `first`: some tiles of them. Query number n is head n % R of token n / R.
    fn run<E: KvElement>(&self, seq: &AttentionSeq<'_>, kv_head: usize, first: usize) {
        let (dim, per_kv) = (self.cache.head_dim, self.heads / self.cache.kv_heads);
        let value_dim = self.cache.value_dim();
        let end = (first + TILES_PER_JOB * TILE_QUERIES).min(seq.rows.len() * per_kv);
        let mut queries = [0.0; TILE_QUERIES * HEAD_DIM_MAX];
        let mut results = [0.0; TILE_QUERIES * HEAD_DIM_MAX];
        for tile_first in (first..end).step_by(TILE_QUERIES) {
            let count = TILE_QUERIES.min(end - tile_first);
            let row = |n: usize| {
                let (token, head) = ((tile_first + n) / per_kv, (tile_first + n) % per_kv);
                (token, ((seq.rows.start + token) * self.heads + kv_head * per_kv + head) * dim)
            };
            let mut ranges = [const { 0..0 }; TILE_QUERIES];
            for n in 0..count {
                let (token, at) = row(n);
                let last = seq.first + token + 1;
                ranges[n] = self.window.map_or(0, |w| last.saturating_sub(w))..last;
                for (to, from) in queries[n * dim..][..dim].iter_mut().zip(&self.q[at..at + dim]) {
                    *to = from * self.scale;
                }
            }
            let tile = Tile::<E> {
                cache: self.cache,
                pages: seq.pages,
                kv_head,
                head_dim: dim,
                value_dim,
                queries: &queries[..count * dim],
                ranges: &ranges[..count],
                _element: std::marker::PhantomData,
            };
            run_tile(self.compute.isa, &tile, &mut results[..count * value_dim]);
            for n in 0..count {
                // SAFETY: each query is in exactly one job.
                unsafe { self.out.slice(row(n).1, dim) }.copy_from_slice(&results[n * value_dim..][..dim]);
            }
        }
    }
}

/// Computes a tile's results, (queries, K), with the kernel of the instruction set.
fn run_tile<E: KvElement>(isa: Isa, tile: &Tile<'_, E>, out: &mut [f32]) {
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { crate::avx512::attention::tile(tile, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::attention::tile(tile, out) },
        _ => crate::portable::attention::tile(tile, out),
    }
}
