//! Attention over some positions of a sequence only, each query having its own.
//!
//! The keys and values that a query sees are laid side by side, in ascending order of position, and the ordinary attention
//! goes through them as through a short sequence. So a result is a function of the query and what it sees alone, and a
//! query that sees everything has the bits of ordinary attention. Copying costs as much memory traffic as reading once
//! more; a query of a long context sees a few thousand positions, however long the context is.

use qwenkit_tensor::AllocError;

use crate::{
    attention::AttentionSeq,
    index::Selection,
    kv::{KvCache, KvType, PAGE_TOKENS},
    kv_form::{Full, Half, KvForm},
    matmul::Compute,
    shared_out::SharedOut,
};

/// Queries whose keys and values lie side by side at a time: enough work for a fork on many threads.
const QUERIES: usize = 16;

/// Room for the keys and values that some queries see.
pub struct SelectedKv {
    cache: KvCache,
    /// Pages of one query.
    pages_each: usize,
}

impl SelectedKv {
    /// Room for queries that see up to `positions` positions each, of a cache of this shape.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(kv_type: KvType, kv_heads: usize, head_dim: usize, positions: usize) -> Result<SelectedKv, AllocError> {
        let pages_each = positions.div_ceil(PAGE_TOKENS);
        let pages = pages_each.checked_mul(QUERIES).ok_or(AllocError { wanted_bytes: usize::MAX })?;
        Ok(SelectedKv { cache: KvCache::new(kv_type, kv_heads, head_dim, pages)?, pages_each })
    }
}

/// Some queries of one sequence: its pages, and the positions that each sees.
struct Queries<'a> {
    pages: &'a [u32],
    positions: Vec<&'a [u32]>,
}

impl Compute {
    /// As `attention`, each query seeing only what `selection` says.
    ///
    /// # Panics
    /// As `attention`; and if `room` is of another shape than the cache, or too small for what queries see, or absent
    /// where one does not see all.
    pub fn attention_selected(
        &self,
        cache: &KvCache,
        seqs: &[AttentionSeq<'_>],
        (selection, room): (&Selection, Option<&mut SelectedKv>),
        scale: f32,
        (q, out): (&[f32], &mut [f32]),
    ) {
        if !selection.is_partial() {
            return self.attention(cache, seqs, None, scale, (q, out));
        }
        let Some(room) = room else { panic!("no room for selected keys and values") };
        let rows: usize = seqs.iter().map(|seq| seq.rows.len()).sum();
        let width = q.len() / rows;
        for seq in seqs {
            // A later query has more positions before it, so those that see all come first.
            let whole = seq.rows.clone().take_while(|row| selection.of(*row).is_none()).count();
            let at = seq.rows.start * width..(seq.rows.start + whole) * width;
            let own = AttentionSeq { rows: 0..whole, first: seq.first, pages: seq.pages };
            self.attention(cache, &[own], None, scale, (&q[at.clone()], &mut out[at]));
            let partial: Vec<usize> = seq.rows.clone().skip(whole).collect();
            for rows in partial.chunks(QUERIES) {
                let positions = rows.iter().filter_map(|row| selection.of(*row)).collect();
                self.gather(cache, room, &Queries { pages: seq.pages, positions });
                let at = rows[0] * width..(rows[0] + rows.len()) * width;
                let pages: Vec<u32> = (0..(rows.len() * room.pages_each) as u32).collect();
                let of = |(i, row): (usize, &usize)| AttentionSeq {
                    rows: i..i + 1,
                    first: selection.of(*row).map_or(0, <[u32]>::len) - 1,
                    pages: &pages[i * room.pages_each..][..room.pages_each],
                };
                let own: Vec<_> = rows.iter().enumerate().map(of).collect();
                self.attention(&room.cache, &own, None, scale, (&q[at.clone()], &mut out[at]));
            }
        }
    }

    fn gather(&self, cache: &KvCache, room: &mut SelectedKv, queries: &Queries<'_>) {
        let shape = |c: &KvCache| (c.kv_type, c.kv_heads, c.head_dim);
        assert_eq!(shape(cache), shape(&room.cache), "room for keys and values of another shape");
        let (each, data) = (room.pages_each, room.cache.shared());
        assert!(queries.positions.len() <= QUERIES && queries.positions.iter().all(|p| p.len() <= each * PAGE_TOKENS));
        match cache.kv_type {
            KvType::F32 => self.gather_as::<Full>(cache, each, &data, queries),
            KvType::F16 => self.gather_as::<Half>(cache, each, &data, queries),
        }
    }

    fn gather_as<F: KvForm>(&self, cache: &KvCache, each: usize, data: &SharedOut<'_, u8>, queries: &Queries<'_>) {
        let jobs = queries.positions.len() * cache.kv_heads;
        self.pool.run_split(jobs, 1, |range| {
            for job in range {
                let (i, head) = (job / cache.kv_heads, job % cache.kv_heads);
                let from = (queries.pages, queries.positions[i]);
                // SAFETY: each head of each query's pages is in exactly one job.
                unsafe { cache.gather::<F>(from, head, data, i * each..(i + 1) * each) }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Isa,
        index::{IndexCache, IndexKeys},
    };

    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const DIM: usize = 20;
    const TOKENS: usize = 150;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin()).collect()
    }

    /// A choice of up to `blocks` of blocks of 2, by keys that are waves.
    fn selection(compute: &Compute, blocks: usize, seqs: &[AttentionSeq<'_>]) -> Selection {
        let mut index = IndexCache::new(8, 2, 3).unwrap();
        let angles = vec![0.5; TOKENS / 2];
        let keys = IndexKeys {
            pages: seqs[0].pages,
            first: 0,
            keys: &wave(TOKENS * 8, 0.9),
            norm: &[1.0; 8],
            eps: 1e-6,
            cos: &angles,
            sin: &angles,
        };
        index.write(compute, &keys);
        let mut selection = Selection::default();
        let rows = seqs.iter().map(|seq| seq.rows.len()).sum::<usize>();
        compute.select(&index, seqs, &wave(rows * 16, 0.77), blocks, &mut selection);
        selection
    }

    fn cache(compute: &Compute, kv_type: KvType) -> (KvCache, Vec<f32>, Vec<f32>) {
        let mut cache = KvCache::new(kv_type, KV_HEADS, DIM, 3).unwrap();
        let (k, v) = (wave(TOKENS * KV_HEADS * DIM, 0.31), wave(TOKENS * KV_HEADS * DIM, 0.53));
        cache.write(compute, &[2, 0, 1], 0, &k, &v);
        (cache, k, v)
    }

    #[test]
    fn selected_positions_give_the_formulas_result_and_all_of_them_the_ordinary_bits() {
        for (isa, kv_type) in Isa::available().into_iter().flat_map(|isa| [(isa, KvType::F32), (isa, KvType::F16)]) {
            let compute = Compute::new(2, isa);
            let (cache, k, v) = cache(&compute, kv_type);
            let seqs = [AttentionSeq { rows: 0..TOKENS, first: 0, pages: &[2, 0, 1] }];
            let q = wave(TOKENS * HEADS * DIM, 0.17);
            let mut all = vec![0.0; q.len()];
            compute.attention(&cache, &seqs, None, 0.3, (&q, &mut all));
            let mut out = vec![0.0; q.len()];
            let selected = selection(&compute, 80, &seqs);
            compute.attention_selected(&cache, &seqs, (&selected, None), 0.3, (&q, &mut out));
            assert!(out.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}: everything selected");

            let selected = selection(&compute, 35, &seqs);
            let mut room = SelectedKv::new(kv_type, KV_HEADS, DIM, 72).unwrap();
            compute.attention_selected(&cache, &seqs, (&selected, Some(&mut room)), 0.3, (&q, &mut out));
            let limit = if kv_type == KvType::F32 { 1e-5 } else { 1e-2 };
            for (t, h) in [0, 70, 71, 72, 100, TOKENS - 1].into_iter().flat_map(|t| (0..HEADS).map(move |h| (t, h))) {
                let everything: Vec<u32> = (0..=t as u32).collect();
                let seen = selected.of(t).unwrap_or(&everything);
                let query = &q[(t * HEADS + h) * DIM..][..DIM];
                let of = |x: &[f32], p: u32, d: usize| f64::from(x[(p as usize * KV_HEADS + h / 2) * DIM + d]);
                let score = |p: u32| (0..DIM).map(|d| f64::from(query[d]) * of(&k, p, d)).sum::<f64>() * 0.3;
                let weights: Vec<f64> = seen.iter().map(|p| score(*p).exp()).collect();
                for d in 0..DIM {
                    let sum: f64 = seen.iter().zip(&weights).map(|(p, w)| w * of(&v, *p, d)).sum();
                    let (exact, found) = (sum / weights.iter().sum::<f64>(), out[(t * HEADS + h) * DIM + d]);
                    assert!((f64::from(found) - exact).abs() < limit, "{isa} token {t} head {h}: {found} and {exact}");
                }
            }
        }
    }

    #[test]
    fn a_query_alone_has_the_bits_that_it_has_among_others() {
        let compute = Compute::new(3, Isa::detect().unwrap());
        let (cache, ..) = cache(&compute, KvType::F16);
        let pages = [2, 0, 1];
        let seqs = [AttentionSeq { rows: 0..TOKENS, first: 0, pages: &pages }];
        let q = wave(TOKENS * HEADS * DIM, 0.17);
        let mut out = vec![0.0; q.len()];
        let selected = selection(&compute, 20, &seqs);
        let mut room = SelectedKv::new(KvType::F16, KV_HEADS, DIM, 42).unwrap();
        compute.attention_selected(&cache, &seqs, (&selected, Some(&mut room)), 0.3, (&q, &mut out));
        for t in [10, 50, 99, TOKENS - 1] {
            let one = [AttentionSeq { rows: 0..1, first: t, pages: &pages }];
            let at = t * HEADS * DIM..(t + 1) * HEADS * DIM;
            let own = Selection::single(selected.of(t));
            let mut alone = vec![0.0; HEADS * DIM];
            compute.attention_selected(&cache, &one, (&own, Some(&mut room)), 0.3, (&q[at.clone()], &mut alone));
            assert!(alone.iter().zip(&out[at]).all(|(a, b)| a.to_bits() == b.to_bits()), "token {t}");
        }
    }
}
