//! Causal attention of new tokens over a paged cache, for many sequences at once.
//!
//! Every query goes through its keys in chunks of one page, in ascending order: a chunk's scores, its own maximum, its own
//! weighted sum of values, and only then the merge into the running result of its span of 1,024 positions; spans merge in
//! the same way. Chunks and spans are fixed by absolute position, so a token's result has the same bits whether it came
//! alone, in a batch, or in any cut of the prompt, and whether one thread went through all spans or several shared them.
//! Source: Milakov and Gimelshein 2018 (online softmax), Dao et al. 2022 (tiling).

use std::{array, ops::Range};

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
/// Tiles of one kv head that go through each chunk together: its keys and values come from afar once for all of them.
const TILES: usize = 4;
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

/// What a kernel gets: up to `TILE_QUERIES` queries of one kv head.
pub(crate) struct Tile<'a, F: KvForm> {
    /// Pages of the sequence from chunk 0: keys and values of this kv head.
    cache: &'a KvCache,
    pages: &'a [u32],
    kv_head: usize,
    pub(crate) head_dim: usize,
    /// K' of the cache, the length of a result.
    pub(crate) value_dim: usize,
    /// Scaled, so that a weight is 2^score.
    pub(crate) queries: F::Queries,
    pub(crate) count: usize,
    /// Positions that each query sees; none of `count` is empty.
    ranges: [Range<usize>; TILE_QUERIES],
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
    /// Keys of chunk `c` that query `i` sees, counted from the chunk's first.
    pub(crate) fn seen(&self, i: usize, c: usize) -> Range<usize> {
        let (start, end) = (c * PAGE_TOKENS, (c + 1) * PAGE_TOKENS);
        self.ranges[i].start.clamp(start, end) - start..self.ranges[i].end.clamp(start, end) - start
    }

    /// Behind the last key of chunk `c` that any query sees, counted from the chunk's first; 0 if none sees any.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn seen_end(&self, c: usize) -> usize {
        (0..self.count).map(|i| self.seen(i, c)).filter(|seen| !seen.is_empty()).map(|seen| seen.end).max().unwrap_or(0)
    }

    pub(crate) fn head(&self, c: usize) -> Head<'_, F> {
        self.cache.head::<F>(self.pages[c], self.kv_head)
    }
}

/// The results of tiles over `chunks` into `outs`, with the kernel of the instruction set.
fn span<F: KvForm>(isa: Isa, tiles: &[Tile<'_, F>], chunks: Range<usize>, outs: &mut [Partial<'_>]) {
    debug_assert_eq!(tiles.len(), outs.len());
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::attention::span(tiles, chunks, outs) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::attention::span(tiles, chunks, outs) },
        _ => crate::portable::attention::span(tiles, chunks, outs),
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
        // Where a key was seen the largest weighs 1; a sum that is no number is not nothing, whatever the largest score is.
        for i in (0..queries).filter(|&i| next.total[i] != 0.0) {
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

/// Up to `TILES` tiles of queries of one kv head. Query number n is head n % R of token n / R.
#[derive(Clone, Copy)]
struct Place<'a> {
    seq: &'a AttentionSeq<'a>,
    kv_head: usize,
    first: usize,
    count: usize,
}

impl Place<'_> {
    /// First query and number of queries of each tile.
    fn tiles(&self) -> impl ExactSizeIterator<Item = (usize, usize)> {
        let end = self.first + self.count;
        (self.first..end).step_by(TILE_QUERIES).map(move |first| (first, TILE_QUERIES.min(end - first)))
    }

    /// `values`: (count, K'), cut into the tiles' empty results.
    fn none<'v>(&self, values: &'v mut [f32], value_dim: usize) -> Vec<Partial<'v>> {
        values[..self.count * value_dim].chunks_mut(TILE_QUERIES * value_dim).map(Partial::none).collect()
    }
}

/// A tile's largest scores and sums of weights.
type Sums = ([f32; TILE_QUERIES], [f32; TILE_QUERIES]);

impl Job<'_> {
    fn run_all<F: KvForm>(&self, seqs: &[AttentionSeq<'_>]) {
        let (pool, threads) = (&self.compute.pool, self.compute.pool.threads());
        let places = self.places(seqs);
        if threads > 1 && places.len() < JOBS_PER_THREAD * threads {
            return self.run_spans::<F>(&places);
        }
        let run = |i: usize| {
            let mut room = vec![0.0; 2 * TILES * TILE_QUERIES * self.cache.value_dim()];
            // Dealt like cards: neighbouring places of a causal prompt cost about the same.
            places.iter().skip(i).step_by(threads).for_each(|place| self.run::<F>(place, &mut room));
        };
        if places.len() == 1 { (0..threads).for_each(run) } else { pool.run(run) }
    }

    fn places<'s>(&self, seqs: &'s [AttentionSeq<'s>]) -> Vec<Place<'s>> {
        const QUERIES: usize = TILES * TILE_QUERIES;
        let per_kv = self.heads / self.cache.kv_heads;
        let mut places = Vec::new();
        for seq in seqs {
            let queries = seq.rows.len() * per_kv;
            for first in (0..queries).step_by(QUERIES) {
                let count = QUERIES.min(queries - first);
                places.extend((0..self.cache.kv_heads).map(|kv_head| Place { seq, kv_head, first, count }));
            }
        }
        places
    }

    /// Index of query `n` of a place's sequence and kv head in `q` and `out`.
    fn at(&self, place: &Place<'_>, n: usize) -> usize {
        let per_kv = self.heads / self.cache.kv_heads;
        let (token, head) = (n / per_kv, n % per_kv);
        ((place.seq.rows.start + token) * self.heads + place.kv_head * per_kv + head) * self.cache.head_dim
    }

    /// Positions that query `n` of a place's sequence sees.
    fn sight(&self, place: &Place<'_>, n: usize) -> Range<usize> {
        let last = place.seq.first + n / (self.heads / self.cache.kv_heads) + 1;
        match self.sight {
            Sight::Before(window) => window.map_or(0, |w| last.saturating_sub(w))..last,
            Sight::All => 0..place.seq.rows.len(),
        }
    }

    /// The chunks that any query of a place sees.
    fn chunks(&self, place: &Place<'_>) -> Range<usize> {
        // Later queries neither begin nor end to see before earlier ones.
        let (first, last) = (self.sight(place, place.first), self.sight(place, place.first + place.count - 1));
        first.start / PAGE_TOKENS..last.end.div_ceil(PAGE_TOKENS)
    }

    fn tiles<'s, F: KvForm>(&'s self, place: &Place<'s>) -> Vec<Tile<'s, F>> {
        let dim = self.cache.head_dim;
        let scale = self.scale * std::f32::consts::LOG2_E;
        let tile = |(first, count): (usize, usize)| {
            let mut queries = [0.0; TILE_QUERIES * HEAD_DIM_MAX];
            for (n, to) in queries.chunks_exact_mut(dim).take(count).enumerate() {
                to.iter_mut().zip(&self.q[self.at(place, first + n)..]).for_each(|(to, from)| *to = from * scale);
            }
            Tile {
                cache: self.cache,
                pages: place.seq.pages,
                kv_head: place.kv_head,
                head_dim: dim,
                value_dim: self.cache.value_dim(),
                queries: F::queries(&queries[..count * dim], dim),
                count,
                ranges: array::from_fn(|n| if n < count { self.sight(place, first + n) } else { 0..0 }),
            }
        };
        place.tiles().map(tile).collect()
    }

    /// One place, span after span. `room`: twice (count, K').
    fn run<F: KvForm>(&self, place: &Place<'_>, room: &mut [f32]) {
        let value_dim = self.cache.value_dim();
        let (results, own) = room.split_at_mut(room.len() / 2);
        let tiles = self.tiles::<F>(place);
        let mut results = place.none(results, value_dim);
        for chunks in spans(self.chunks(place)) {
            let mut found = place.none(own, value_dim);
            span(self.compute.isa, &tiles, chunks, &mut found);
            for ((result, found), tile) in results.iter_mut().zip(&found).zip(&tiles) {
                result.merge(found, tile.count);
            }
        }
        self.store(place, results);
    }

    /// Every place's spans on all threads, then their merges.
    fn run_spans<F: KvForm>(&self, places: &[Place<'_>]) {
        let pieces: Vec<_> = places.iter().flat_map(|p| spans(self.chunks(p)).map(move |chunks| (p, chunks))).collect();
        let (threads, value_dim) = (self.compute.pool.threads(), self.cache.value_dim());
        let width = places.iter().map(|place| place.count).max().unwrap_or(0) * value_dim;
        let mut values = vec![0.0; pieces.len() * width];
        let mut sums = vec![[Sums::default(); TILES]; pieces.len()];
        let (shared_values, shared_sums) = (SharedOut::new(&mut values), SharedOut::new(&mut sums));
        let run = |i: usize| {
            for (n, (place, chunks)) in pieces.iter().enumerate().skip(i).step_by(threads) {
                // SAFETY: each piece is dealt to exactly one thread.
                let (values, sums) = unsafe { (shared_values.slice(n * width, width), shared_sums.slice(n, 1)) };
                let mut found = place.none(values, value_dim);
                span(self.compute.isa, &self.tiles::<F>(place), chunks.clone(), &mut found);
                sums[0].iter_mut().zip(&found).for_each(|(to, found)| *to = (found.largest, found.total));
            }
        };
        if pieces.len() == 1 {
            (0..threads).for_each(run)
        } else {
            self.compute.pool.run(run)
        }
        let mut room = vec![0.0; width];
        let mut found = values.chunks_exact_mut(width).zip(&sums);
        for place in places {
            let mut results = place.none(&mut room, value_dim);
            for (values, sums) in found.by_ref().take(spans(self.chunks(place)).count()) {
                let values = values.chunks_mut(TILE_QUERIES * value_dim);
                for (((result, (_, count)), values), sums) in
                    results.iter_mut().zip(place.tiles()).zip(values).zip(sums)
                {
                    let (largest, total) = *sums;
                    result.merge(&Partial { largest, total, values: &mut values[..count * value_dim] }, count);
                }
            }
            self.store(place, results);
        }
    }

    /// Divides the results of a place by the sums of weights and stores them.
    fn store(&self, place: &Place<'_>, results: Vec<Partial<'_>>) {
        let (dim, value_dim) = (self.cache.head_dim, self.cache.value_dim());
        for (mut result, (first, count)) in results.into_iter().zip(place.tiles()) {
            result.finish(count);
            for (n, values) in result.values.chunks_exact(value_dim).enumerate() {
                // SAFETY: each query is in exactly one place.
                unsafe { self.out.slice(self.at(place, first + n), dim) }.copy_from_slice(&values[..dim]);
            }
        }
    }
}
