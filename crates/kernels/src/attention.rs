//! Causal attention of new tokens over a paged cache, for many sequences at once.
//!
//! Every query goes through its keys in chunks of one page, in ascending order: a chunk's scores, its own maximum, its own
//! weighted sum of values, and only then the merge into the running result of its span of 1,024 positions; spans merge in
//! the same way. Chunks and spans are fixed by absolute position, so a token's result has the same bits whether it came
//! alone, in a batch, or in any cut of the prompt, and whether one thread went through all spans or several shared them.
//! Source: Milakov and Gimelshein 2018 (online softmax), Dao et al. 2022 (tiling).

use std::{marker::PhantomData, ops::Range};

use crate::{
    Isa,
    kv::{KvCache, KvType, PAGE_TOKENS},
    kv_form::{Full, Half, Head, KvForm},
    lanes,
    matmul::Compute,
    shared_out::SharedOut,
};

/// Queries (token and head of one kv head) that share each load of keys and values.
pub(crate) const TILE_QUERIES: usize = 8;
/// The largest head that kernels keep on the stack; Qwen's are 64, 128 and 256.
pub const HEAD_DIM_MAX: usize = 256;
/// Query tiles of one kv head that a thread takes at once.
const TILES_PER_JOB: usize = 4;
/// Chunks of a span: few enough that the threads of a large machine share one long sequence, many enough that merging
/// costs nothing.
const SPAN_CHUNKS: usize = 16;
/// With fewer jobs than this for each thread, spans are jobs of their own.
const JOBS_PER_THREAD: usize = 4;

/// The new tokens of one sequence.
pub struct AttentionSeq<'a> {
    /// Rows of the batch that are this sequence's.
    pub rows: Range<usize>,
    /// Position of the first of them.
    pub first: usize,
    /// The sequence's pages, enough for all positions; keys and values of the new tokens are already written.
    pub pages: &'a [u32],
}

/// Which positions a query sees.
#[derive(Clone, Copy)]
enum Sight {
    /// Its own and those before it; with a window of w the last w of them.
    Before(Option<usize>),
    /// All of its sequence.
    All,
}

/// What a tile's kernel gets.
pub(crate) struct Tile<'a, F> {
    /// Pages of the sequence from chunk 0: keys and values of this kv head.
    pub(crate) cache: &'a KvCache,
    pub(crate) pages: &'a [u32],
    pub(crate) kv_head: usize,
    pub(crate) head_dim: usize,
    /// K' of the cache, the length of a result.
    pub(crate) value_dim: usize,
    /// Queries, (`ranges.len()`, K), already scaled, so that a weight is 2^score.
    pub(crate) queries: &'a [f32],
    /// Positions that each query sees; none is empty.
    pub(crate) ranges: &'a [Range<usize>],
    /// Whether the next chunk's memory is asked for while this one is computed: with few queries, reading takes longer than
    /// computing.
    pub(crate) ahead: bool,
    pub(crate) _form: PhantomData<F>,
}

/// Results of a tile's queries over some chunks, before the division by the sum of weights.
pub(crate) struct Partial<'a> {
    /// The largest score; minus infinity where no key was seen.
    pub(crate) largest: [f32; TILE_QUERIES],
    /// Sum of 2^(score - largest).
    pub(crate) total: [f32; TILE_QUERIES],
    /// Values weighted in the same way, (queries, K').
    pub(crate) values: &'a mut [f32],
}

impl<F: KvForm> Tile<'_, F> {
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

    pub(crate) fn head(&self, c: usize) -> Head<'_, F> {
        self.cache.head::<F>(self.pages[c], self.kv_head)
    }

    /// Computes chunks `chunks` with the kernel of the instruction set.
    fn span(&self, isa: Isa, chunks: Range<usize>, out: &mut Partial<'_>) {
        match isa {
            // SAFETY: `Compute::new` has checked that the machine has this instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::attention::span(self, chunks, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { crate::avx2::attention::span(self, chunks, out) },
            _ => crate::portable::attention::span(self, chunks, out),
        }
    }
}

/// `chunks` cut at the ends of spans.
fn spans(chunks: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    (chunks.start / SPAN_CHUNKS..chunks.end.div_ceil(SPAN_CHUNKS))
        .map(move |s| (s * SPAN_CHUNKS).max(chunks.start)..((s + 1) * SPAN_CHUNKS).min(chunks.end))
}

impl Partial<'_> {
    /// Adds what comes from the chunks behind.
    fn merge(&mut self, next: &Partial<'_>, queries: usize) {
        let dim = self.values.len() / queries;
        for i in (0..queries).filter(|&i| next.largest[i] > f32::NEG_INFINITY) {
            let largest = f32::max(self.largest[i], next.largest[i]);
            let (old, new) = (lanes::exp_2(self.largest[i] - largest), lanes::exp_2(next.largest[i] - largest));
            let (to, from) = (&mut self.values[i * dim..][..dim], &next.values[i * dim..][..dim]);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *to * old + from * new);
            self.total[i] = self.total[i] * old + next.total[i] * new;
            self.largest[i] = largest;
        }
    }

    /// Divides by the sums of weights.
    fn finish(&mut self, queries: usize) {
        let dim = self.values.len() / queries;
        for (values, total) in self.values.chunks_exact_mut(dim).zip(self.total) {
            let scale = 1.0 / total;
            values.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

impl<'a> Partial<'a> {
    /// Nothing seen yet.
    fn none(values: &'a mut [f32]) -> Partial<'a> {
        values.fill(0.0);
        Partial { largest: [f32::NEG_INFINITY; TILE_QUERIES], total: [0.0; TILE_QUERIES], values }
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
        self.attend(cache, seqs, Sight::Before(window), scale, (q, out));
    }

    /// Attention of `q`: (T, H, K) into `out`: (T, H, K), where a query sees all rows of its sequence, before and behind it;
    /// each sequence begins at position 0.
    ///
    /// # Panics
    /// As `attention`.
    pub fn attention_both_ways(
        &self,
        cache: &KvCache,
        seqs: &[AttentionSeq<'_>],
        scale: f32,
        (q, out): (&[f32], &mut [f32]),
    ) {
        self.attend(cache, seqs, Sight::All, scale, (q, out));
    }

    fn attend(
        &self,
        cache: &KvCache,
        seqs: &[AttentionSeq<'_>],
        sight: Sight,
        scale: f32,
        (q, out): (&[f32], &mut [f32]),
    ) {
        let tokens: usize = seqs.iter().map(|s| s.rows.len()).sum();
        let Some(heads) = (q.len() / cache.head_dim).checked_div(tokens) else { return };
        assert!(q.len() == out.len() && q.len() == tokens * heads * cache.head_dim, "attention's queries");
        assert!(heads.is_multiple_of(cache.kv_heads), "{heads} heads on {} kv heads", cache.kv_heads);
        assert!(cache.head_dim <= HEAD_DIM_MAX, "heads of {}", cache.head_dim);
        let out = SharedOut::new(out);
        let job = Job { compute: self, cache, sight, scale, heads, q, out: &out };
        match cache.kv_type {
            KvType::F32 => job.run_all::<Full>(seqs),
            KvType::F16 => job.run_all::<Half>(seqs),
        }
    }
}

/// Room for one row of values for each query of a tile.
type Room = [f32; TILE_QUERIES * HEAD_DIM_MAX];

struct Job<'a> {
    compute: &'a Compute,
    cache: &'a KvCache,
    sight: Sight,
    scale: f32,
    heads: usize,
    /// (T, H, K)
    q: &'a [f32],
    out: &'a SharedOut<'a, f32>,
}

/// Up to `TILE_QUERIES` queries of one kv head. Query number n is head n % R of token n / R.
#[derive(Clone, Copy)]
struct Place<'a> {
    seq: &'a AttentionSeq<'a>,
    kv_head: usize,
    first: usize,
    count: usize,
}

impl Job<'_> {
    fn run_all<F: KvForm>(&self, seqs: &[AttentionSeq<'_>]) {
        let (pool, threads) = (&self.compute.pool, self.compute.pool.threads());
        let places = self.places(seqs);
        if threads > 1 && places.len() < JOBS_PER_THREAD * threads {
            return self.run_spans::<F>(&places);
        }
        let jobs: Vec<&[Place<'_>]> = places.chunks(TILES_PER_JOB).collect();
        let run = |i: usize| {
            let mut rooms: [Room; 3] = [[0.0; _]; 3];
            // Dealt like cards: neighbouring jobs of a causal prompt cost about the same.
            for place in jobs.iter().skip(i).step_by(threads).copied().flatten() {
                self.run::<F>(place, &mut rooms);
            }
        };
        if jobs.len() == 1 { (0..threads).for_each(run) } else { pool.run(run) }
    }

    /// All tiles: those of one sequence and kv head lie together.
    fn places<'s>(&self, seqs: &'s [AttentionSeq<'s>]) -> Vec<Place<'s>> {
        let per_kv = self.heads / self.cache.kv_heads;
        let mut places = Vec::new();
        for seq in seqs {
            let queries = seq.rows.len() * per_kv;
            for first in (0..queries).step_by(TILES_PER_JOB * TILE_QUERIES) {
                for kv_head in 0..self.cache.kv_heads {
                    for first in (first..queries.min(first + TILES_PER_JOB * TILE_QUERIES)).step_by(TILE_QUERIES) {
                        places.push(Place { seq, kv_head, first, count: TILE_QUERIES.min(queries - first) });
                    }
                }
            }
        }
        places
    }

    /// Index of query `n` of a place in `q` and `out`.
    fn at(&self, place: &Place<'_>, n: usize) -> usize {
        let per_kv = self.heads / self.cache.kv_heads;
        let (token, head) = ((place.first + n) / per_kv, (place.first + n) % per_kv);
        ((place.seq.rows.start + token) * self.heads + place.kv_head * per_kv + head) * self.cache.head_dim
    }

    /// Calls `f` with the tile of `place`, whose queries are laid into `queries`.
    fn with_tile<F: KvForm, R>(&self, place: &Place<'_>, queries: &mut Room, f: impl FnOnce(&Tile<'_, F>) -> R) -> R {
        let (dim, per_kv) = (self.cache.head_dim, self.heads / self.cache.kv_heads);
        let mut ranges = [const { 0..0 }; TILE_QUERIES];
        let scale = self.scale * std::f32::consts::LOG2_E;
        for n in 0..place.count {
            let last = place.seq.first + (place.first + n) / per_kv + 1;
            ranges[n] = match self.sight {
                Sight::Before(window) => window.map_or(0, |w| last.saturating_sub(w))..last,
                Sight::All => 0..place.seq.rows.len(),
            };
            for (to, from) in queries[n * dim..][..dim].iter_mut().zip(&self.q[self.at(place, n)..]) {
                *to = from * scale;
            }
        }
        f(&Tile {
            cache: self.cache,
            pages: place.seq.pages,
            kv_head: place.kv_head,
            head_dim: dim,
            value_dim: self.cache.value_dim(),
            queries: &queries[..place.count * dim],
            ranges: &ranges[..place.count],
            ahead: place.seq.rows.len() == 1,
            _form: PhantomData,
        })
    }

    /// One tile, span after span.
    fn run<F: KvForm>(&self, place: &Place<'_>, [queries, results, own]: &mut [Room; 3]) {
        self.with_tile::<F, _>(place, queries, |tile| {
            let len = place.count * tile.value_dim;
            let mut result = Partial::none(&mut results[..len]);
            for chunks in spans(tile.chunks()) {
                let mut span = Partial::none(&mut own[..len]);
                tile.span(self.compute.isa, chunks, &mut span);
                result.merge(&span, place.count);
            }
            result.finish(place.count);
            self.store(place, &result);
        });
    }

    /// Every tile's spans on all threads, then their merges.
    fn run_spans<F: KvForm>(&self, places: &[Place<'_>]) {
        let chunks_of = |p: &Place<'_>| self.with_tile::<F, _>(p, &mut [0.0; _], |tile| tile.chunks());
        let pieces: Vec<_> = places.iter().flat_map(|p| spans(chunks_of(p)).map(move |chunks| (p, chunks))).collect();
        let (threads, value_dim) = (self.compute.pool.threads(), self.cache.value_dim());
        let width = TILE_QUERIES * value_dim;
        let mut values = vec![0.0; pieces.len() * width];
        let mut sums = vec![([0.0; TILE_QUERIES], [0.0; TILE_QUERIES]); pieces.len()];
        let (shared_values, shared_sums) = (SharedOut::new(&mut values), SharedOut::new(&mut sums));
        let run = |i: usize| {
            let mut queries: Room = [0.0; _];
            for (n, (place, chunks)) in pieces.iter().enumerate().skip(i).step_by(threads) {
                // SAFETY: each piece is dealt to exactly one thread.
                let (values, sums) =
                    unsafe { (shared_values.slice(n * width, place.count * value_dim), shared_sums.slice(n, 1)) };
                let mut span = Partial::none(values);
                self.with_tile::<F, _>(place, &mut queries, |tile| {
                    tile.span(self.compute.isa, chunks.clone(), &mut span)
                });
                sums[0] = (span.largest, span.total);
            }
        };
        if pieces.len() == 1 {
            (0..threads).for_each(run)
        } else {
            self.compute.pool.run(run)
        }
        let mut results = vec![0.0; width];
        let mut n = 0;
        for place in places {
            let len = place.count * value_dim;
            let mut result = Partial::none(&mut results[..len]);
            for _ in spans(chunks_of(place)) {
                let (largest, total) = sums[n];
                result.merge(&Partial { largest, total, values: &mut values[n * width..][..len] }, place.count);
                n += 1;
            }
            result.finish(place.count);
            self.store(place, &result);
        }
    }

    fn store(&self, place: &Place<'_>, result: &Partial<'_>) {
        let (dim, value_dim) = (self.cache.head_dim, self.cache.value_dim());
        for n in 0..place.count {
            // SAFETY: each query is in exactly one place.
            unsafe { self.out.slice(self.at(place, n), dim) }.copy_from_slice(&result.values[n * value_dim..][..dim]);
        }
    }
}
