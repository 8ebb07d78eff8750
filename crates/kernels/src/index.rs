//! Which positions an attention layer with an index looks at: small keys beside the cache, and the choice by their scores.
//!
//! Positions come in blocks of a few tokens, counted from the sequence's first. A block has one key: the mean of its tokens'
//! index keys, normed and rotated to the block's first position. A query scores every whole block before it, takes the
//! best, and sees these and the tokens behind the last whole block. All is f32, as rounding would change what is seen. A
//! token's choice is a function of its own query and the keys before it: any cut of the prompt gives the same. Where no
//! more blocks stand before a query than it may take, it sees all. Source: the indexer of transformers' Qwen4-exp.

use std::ops::Range;

use qwenkit_tensor::{AllocError, HugeBuf};

use crate::{
    attention::AttentionSeq,
    elementwise::{norm_row_in_place, rope_row},
    kv::PAGE_TOKENS,
    lanes::{self, for_each_isa},
    matmul::Compute,
    nth::best_to_front,
    shared_out::SharedOut,
};

/// One layer's index keys, in pages as the keys and values are.
pub struct IndexCache {
    head_dim: usize,
    block_tokens: usize,
    /// (pages, 64, K). A position has its token's own key, but the last of a block has the block's: the tokens' keys are
    /// needed only until the block is whole.
    data: HugeBuf,
}

/// New index keys of one sequence.
pub struct IndexKeys<'a> {
    /// The sequence's pages, enough for all positions.
    pub pages: &'a [u32],
    /// Position of the first key.
    pub first: usize,
    /// (T, K)
    pub keys: &'a [f32],
    /// Weights of the norm of a block's key, (K)
    pub norm: &'a [f32],
    /// Added to the mean square in the norm.
    pub eps: f32,
    /// Angles of the first positions of the blocks that these keys complete, (blocks, R) each.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
}

/// The positions that queries see.
#[derive(Default)]
pub struct Selection {
    /// Room for one query's positions.
    stride: usize,
    /// (T, stride)
    positions: Vec<u32>,
    /// How many of a query's are filled; 0 where it sees all.
    counts: Vec<usize>,
}

impl Selection {
    /// The positions that row `row` of the batch sees, ascending; `None` where it sees all up to its own.
    pub(crate) fn of(&self, row: usize) -> Option<&[u32]> {
        let count = self.counts[row];
        (count > 0).then(|| &self.positions[row * self.stride..][..count])
    }

    /// The selection of one row.
    #[cfg(test)]
    pub(crate) fn single(positions: Option<&[u32]>) -> Selection {
        let positions = positions.unwrap_or_default().to_vec();
        Selection { stride: positions.len(), counts: vec![positions.len()], positions }
    }

    /// Whether any row does not see all.
    pub(crate) fn is_partial(&self) -> bool {
        self.counts.iter().any(|count| *count > 0)
    }
}

impl IndexCache {
    /// A cache of `pages` pages of keys of K = `head_dim` for blocks of `block_tokens`. Memory is used as pages are written.
    ///
    /// # Errors
    /// When the system refuses the address range.
    ///
    /// # Panics
    /// If a block has no tokens.
    pub fn new(head_dim: usize, block_tokens: usize, pages: usize) -> Result<IndexCache, AllocError> {
        assert!(block_tokens > 0, "blocks without tokens");
        let too_large = AllocError { wanted_bytes: usize::MAX };
        let bytes = IndexCache::page_bytes(head_dim).checked_mul(pages).ok_or(too_large)?;
        Ok(IndexCache { head_dim, block_tokens, data: HugeBuf::zeroed(bytes)? })
    }

    /// Bytes of one page of one layer.
    pub fn page_bytes(head_dim: usize) -> usize {
        PAGE_TOKENS * head_dim * size_of::<f32>()
    }

    /// Copies a page's keys over another's.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (self.bytes_of(from), self.bytes_of(to));
        self.data.as_mut_slice::<u8>().copy_within(from, to.start);
    }

    /// The bytes of a page's keys, to be kept elsewhere.
    pub fn page(&self, page: u32) -> &[u8] {
        &self.data.as_slice::<u8>()[self.bytes_of(page)]
    }

    /// The same, to be put back.
    pub fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let bytes = self.bytes_of(page);
        &mut self.data.as_mut_slice::<u8>()[bytes]
    }

    fn bytes_of(&self, page: u32) -> Range<usize> {
        let bytes = IndexCache::page_bytes(self.head_dim);
        let start = page as usize * bytes;
        start..start + bytes
    }

    /// The blocks that `keys` new positions from `first` complete.
    pub fn completed(first: usize, keys: usize, block_tokens: usize) -> Range<usize> {
        first / block_tokens..(first + keys) / block_tokens
    }

    fn at(&self, pages: &[u32], position: usize) -> Range<usize> {
        let row = pages[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS;
        row * self.head_dim..(row + 1) * self.head_dim
    }

    /// Stores new keys, and the keys of the blocks that they complete.
    ///
    /// # Panics
    /// If the positions lie outside the pages given, or the angles do not fit the blocks.
    pub fn write(&mut self, compute: &Compute, new: &IndexKeys<'_>) {
        let (dim, len) = (self.head_dim, self.block_tokens);
        let blocks = IndexCache::completed(new.first, new.keys.len() / dim, len);
        let pairs = new.cos.len().checked_div(blocks.len()).unwrap_or(0);
        assert!(new.cos.len() == blocks.len() * pairs && new.sin.len() == new.cos.len(), "angles of {blocks:?}");
        for (i, key) in new.keys.chunks_exact(dim).enumerate() {
            let at = self.at(new.pages, new.first + i);
            self.data.as_mut_slice::<f32>()[at].copy_from_slice(key);
        }
        let mut sum = vec![0.0; dim];
        for block in blocks.clone() {
            sum.fill(0.0);
            for position in block * len..(block + 1) * len {
                let key = &self.data.as_slice::<f32>()[self.at(new.pages, position)];
                sum.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
            }
            sum.iter_mut().for_each(|x| *x /= len as f32);
            norm_row_in_place(compute.isa, new.norm, new.eps, &mut sum);
            let angles = (block - blocks.start) * pairs..(block + 1 - blocks.start) * pairs;
            rope_row(compute.isa, dim, &new.cos[angles.clone()], &new.sin[angles], &mut sum);
            let at = self.at(new.pages, (block + 1) * len - 1);
            self.data.as_mut_slice::<f32>()[at].copy_from_slice(&sum);
        }
    }
}

impl Compute {
    /// Chooses for each row of `queries`: (T, heads, K) the `blocks` best blocks by the sum over heads of what is positive
    /// of query times key; `nth` says which of equals. The sequences' keys, those of their new tokens too, are in the cache.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn select(
        &self,
        cache: &IndexCache,
        seqs: &[AttentionSeq<'_>],
        queries: &[f32],
        blocks: usize,
        out: &mut Selection,
    ) {
        let rows = seqs.last().map_or(0, |seq| seq.rows.end);
        let width = queries.len().checked_div(rows).unwrap_or(0);
        assert!(queries.len() == rows * width && width.is_multiple_of(cache.head_dim), "index queries of {width}");
        let len = cache.block_tokens;
        out.counts.clear();
        out.counts.resize(rows, 0);
        let chooses = |position: usize| (position + 1) / len > blocks;
        if !seqs.iter().any(|seq| seq.rows.end > seq.rows.start && chooses(seq.first + seq.rows.len() - 1)) {
            return;
        }
        out.stride = (blocks + 1) * len;
        out.positions.resize(rows * out.stride, 0);
        let (stride, positions) = (out.stride, SharedOut::new(&mut out.positions));
        let counts = SharedOut::new(&mut out.counts);
        self.pool.run_split(rows, 1, |range| {
            let mut scores = Vec::new();
            for row in range {
                let seq = &seqs[seqs.partition_point(|seq| seq.rows.end <= row)];
                let seen = seq.first + row - seq.rows.start + 1;
                if !chooses(seen - 1) {
                    continue;
                }
                let query = &queries[row * width..][..width];
                let score = |block: usize| {
                    let key = &cache.data.as_slice::<f32>()[cache.at(seq.pages, (block + 1) * len - 1)];
                    score_row(self.isa, query, key)
                };
                scores.clear();
                scores.extend((0..seen / len).map(|block| (score(block), block)));
                best_to_front(&mut scores, blocks);
                scores.truncate(blocks);
                scores.sort_unstable_by_key(|(_, block)| *block);
                // SAFETY: each row is in exactly one range.
                let (to, count) = unsafe { (positions.slice(row * stride, stride), counts.slice(row, 1)) };
                let chosen = scores.iter().flat_map(|(_, block)| block * len..(block + 1) * len);
                for (to, position) in to.iter_mut().zip(chosen.chain(seen / len * len..seen)) {
                    *to = position as u32;
                    count[0] += 1;
                }
            }
        });
    }
}

for_each_isa! {
    pub(crate) fn score_row(query: &[f32], key: &[f32]) -> f32 {
        query.chunks_exact(key.len()).map(|query| lanes::dot(query, key).max(0.0)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    const DIM: usize = 6;
    const BLOCK: usize = 3;
    const TOKENS: usize = 80;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin()).collect()
    }

    /// Index keys written in pieces and one choice of 4 blocks for each token.
    fn chosen(isa: Isa, threads: usize, pieces: &[usize]) -> Vec<Option<Vec<u32>>> {
        let compute = Compute::new(threads, isa);
        let mut cache = IndexCache::new(DIM, BLOCK, 4).unwrap();
        cache.data.as_mut_slice::<f32>().fill(f32::NAN); // what a sequence before left
        let (keys, queries, norm) = (wave(TOKENS * DIM, 0.7), wave(TOKENS * 2 * DIM, 1.1), wave(DIM, 0.3));
        let pages = [3, 1];
        let (mut found, mut first) = (Vec::new(), 0);
        for &piece in pieces {
            let angles = |f: fn(f32) -> f32| {
                let starts = IndexCache::completed(first, piece, BLOCK).map(|b| (b * BLOCK) as f32);
                starts.flat_map(|p| [f(p), f(p * 0.1)]).collect::<Vec<f32>>()
            };
            let (cos, sin) = (angles(f32::cos), angles(f32::sin));
            let keys = &keys[first * DIM..(first + piece) * DIM];
            let new = IndexKeys { pages: &pages, first, keys, norm: &norm, eps: 1e-6, cos: &cos, sin: &sin };
            cache.write(&compute, &new);
            let seqs = [AttentionSeq { rows: 0..piece, first, pages: &pages }];
            let mut selection = Selection::default();
            let own = &queries[first * 2 * DIM..(first + piece) * 2 * DIM];
            compute.select(&cache, &seqs, own, 4, &mut selection);
            found.extend((0..piece).map(|row| selection.of(row).map(<[u32]>::to_vec)));
            first += piece;
        }
        found
    }

    #[test]
    fn any_cut_chooses_the_same() {
        for isa in Isa::available() {
            let whole = chosen(isa, 1, &[TOKENS]);
            for cut in 1..TOKENS {
                assert_eq!(chosen(isa, 2, &[cut, TOKENS - cut]), whole, "{isa} cut at {cut}");
            }
            assert_eq!(chosen(isa, 3, &[1; TOKENS]), whole);
        }
    }

    #[test]
    fn a_query_sees_the_best_blocks_and_the_tail() {
        let found = chosen(Isa::Portable, 1, &[TOKENS]);
        assert!(found[..14].iter().all(Option::is_none), "four whole blocks or fewer: all is seen");
        let (keys, queries, norm) = (wave(TOKENS * DIM, 0.7), wave(TOKENS * 2 * DIM, 1.1), wave(DIM, 0.3));
        let at = |x: &[f32], i: usize| f64::from(x[i]);
        let block_key = |block: usize| {
            let mean = |d: usize| (0..BLOCK).map(|t| at(&keys, (block * BLOCK + t) * DIM + d)).sum::<f64>() / 3.0;
            let mut key: Vec<f64> = (0..DIM).map(mean).collect();
            let scale = (key.iter().map(|x| x * x).sum::<f64>() / DIM as f64 + 1e-6).sqrt();
            key.iter_mut().enumerate().for_each(|(d, x)| *x = *x / scale * at(&norm, d));
            for pair in 0..2 {
                let angle = (block * BLOCK) as f64 * [1.0, 0.1][pair];
                let (a, b) = (key[pair], key[pair + 2]);
                (key[pair], key[pair + 2]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
            }
            key
        };
        for (t, found) in found.iter().enumerate().take(TOKENS).skip(14) {
            let score = |block: usize| {
                let key = block_key(block);
                let head = |h: usize| (0..DIM).map(|d| at(&queries, (t * 2 + h) * DIM + d) * key[d]).sum::<f64>();
                head(0).max(0.0) + head(1).max(0.0)
            };
            let (seen, chosen) = (t + 1, found.as_deref().unwrap());
            let (blocks, tail) = chosen.split_at(4 * BLOCK);
            assert!(tail.iter().map(|p| *p as usize).eq(seen / BLOCK * BLOCK..seen), "token {t}: the tail");
            let is_whole =
                |b: &[u32]| (b[0] as usize).is_multiple_of(BLOCK) && b.iter().zip(b[0]..).all(|(p, i)| *p == i);
            assert!(blocks.chunks(BLOCK).all(is_whole) && blocks.is_sorted_by(|a, b| a < b), "token {t}: {blocks:?}");
            let is_chosen = |b: &usize| blocks.contains(&((b * BLOCK) as u32));
            let worst = (0..seen / BLOCK).filter(is_chosen).map(score).fold(f64::INFINITY, f64::min);
            let missed = (0..seen / BLOCK).filter(|b| !is_chosen(b)).map(score).fold(0.0, f64::max);
            assert!(worst >= missed - 1e-5, "token {t}: a block of {missed} was missed, one of {worst} taken");
        }
    }
}
