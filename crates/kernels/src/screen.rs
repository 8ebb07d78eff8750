//! The largest results of a product, exactly, without computing all: what an output head is mostly asked for.
//!
//! Of a weight in two parts (`planes`) only the first is read for all rows. It gives each row a coarse result and, with the
//! row's bound, one that its result cannot exceed. The groups of rows that may be highest are computed in full; their results
//! are a bar that as many rows as are wanted reach. What cannot reach it is not wanted; all other groups are computed in full
//! too. Contract: a result that is there has the bits that the whole product gives it, and those that are not there are
//! smaller than the `count` largest. Bounds hold with rounding (`planes::slack`); an `x` for which they might not goes the
//! ordinary way. Which groups are computed does not depend on the number of threads.

use std::cmp::Ordering;
#[cfg(target_arch = "x86_64")]
use std::marker::PhantomData;

use crate::{
    Isa,
    lanes::for_each_isa,
    layout::{GROUP_ROWS, UNIT},
    matmul::{Compute, MatmulScratch, Product, Rows, Task},
    planes::{Joined, coarse_bytes, rest_bytes},
    pool::Deal,
    shared_out::SharedOut,
    weight::{Operand, Weight},
};
#[cfg(target_arch = "x86_64")]
use crate::{
    activations::{UnitFacts, tile_of},
    planes::COARSE,
};

/// Rows of `x` up to which first parts are looked at: for more, the whole product is as fast (docs/LOG.md).
pub const BEST_ROWS_MAX: usize = 4;
/// |x| within which bounds are sure: sums overflow beyond, and lose bits below.
const NORMS: std::ops::Range<f64> = 1e-20..1e20;

/// Which results of a row of `x` are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Best<'a> {
    /// So many of the largest; of equals all.
    pub count: usize,
    /// Only of the first so many rows of the weight.
    pub among: usize,
    /// Rows of the weight whose results the caller makes smaller, or leaves, before it compares them. They are given where
    /// they may be among the largest, but that others are smaller does not follow from them.
    pub lowered: &'a [u32],
}

/// Buffers of `best`.
#[derive(Default)]
pub(crate) struct ScreenRoom {
    /// What no result of a group exceeds, and none of its rows that are a measure for others: (T, groups).
    upper: Vec<[f32; 2]>,
    /// Of each group the rows that are a measure for others, a bit each: (T, groups).
    measures: Vec<u16>,
    /// Groups to compute in full.
    groups: Vec<u32>,
    /// Whether a group is computed: (groups).
    done: Vec<bool>,
    scores: Vec<(f32, u32)>,
}

impl ScreenRoom {
    /// Bytes of the buffers.
    pub(crate) fn held_bytes(&self) -> usize {
        let ScreenRoom { upper, measures, groups, done, scores } = self;
        8 * upper.capacity() + 2 * measures.capacity() + 4 * groups.capacity() + done.capacity() + 8 * scores.capacity()
    }
}

impl Compute {
    /// `out`: (T, N) = x W^T for `x`: (T, K), of which only the `wanted` results of each row need to be there: all others are either
    /// what they are or -infinity. Returns the bytes of weights that were read for it.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn best(
        &self,
        scratch: &mut MatmulScratch,
        x: &[f32],
        weight: &Weight,
        wanted: &[Best<'_>],
        out: &mut [f32],
    ) -> usize {
        let (rows, cols) = (wanted.len(), weight.cols());
        assert!(x.len() == rows * cols && out.len() == rows * weight.rows(), "best of ({rows}, {cols})");
        let few = wanted.iter().all(|best| best.count > 0) && (1..=BEST_ROWS_MAX).contains(&rows);
        if few && weight.is_bounded() {
            scratch.activations.prepare(self.isa, &self.pool, x, cols, &[Operand::Quantized]);
            let MatmulScratch { activations: prepared, screen: room, .. } = &mut *scratch;
            let x = Rows::of(prepared, x);
            let norms: Vec<f64> = (0..rows).map(|t| norm(&x, t)).collect();
            if norms.iter().all(|norm| NORMS.contains(norm)) {
                return self.screen(room, weight, (x, &norms), wanted, out);
            }
        }
        self.matmul(scratch, x, &mut [Product { weight, out }]);
        weight.size_bytes()
    }

    fn screen(
        &self,
        room: &mut ScreenRoom,
        weight: &Weight,
        (x, norms): (Rows<'_>, &[f64]),
        wanted: &[Best<'_>],
        out: &mut [f32],
    ) -> usize {
        let (rows, groups) = (x.rows, weight.groups());
        let ScreenRoom { upper, measures, groups: list, done, scores } = room;
        upper.resize(rows * groups, [0.0; 2]);
        measures.resize(rows * groups, 0);
        for (best, measures) in wanted.iter().zip(measures.chunks_exact_mut(groups)) {
            mark(best, weight.rows(), measures);
        }
        done.clear();
        done.resize(groups, false);
        self.bound_groups(weight, (x, norms), wanted, measures, upper, out);

        // Of each row the groups that may be highest.
        list.clear();
        let mut own = Vec::with_capacity(rows);
        for (best, upper) in wanted.iter().zip(upper.chunks_exact(groups)) {
            scores.clear();
            scores.extend((0..).zip(upper).map(|(g, upper)| (upper[1], g)).filter(|s| s.0 > f32::NEG_INFINITY));
            let first = list.len();
            if scores.len() > best.count {
                scores.select_nth_unstable_by(best.count - 1, by_score);
            }
            list.extend(scores.iter().take(best.count).map(|score| score.1));
            own.push(first..list.len());
        }
        let firsts = list.clone();
        list.sort_unstable();
        list.dedup();
        let mut computed = list.len();
        self.groups_in_full(weight, x, list, out);
        list.iter().for_each(|&g| done[g as usize] = true);

        // The bar of each row, and who may reach it.
        list.clear();
        for (t, (best, own)) in wanted.iter().zip(own).enumerate() {
            let of_row = &out[t * weight.rows()..][..weight.rows()];
            let measures = &measures[t * groups..][..groups];
            let bar = bar(of_row, &firsts[own], measures, best.count);
            for (g, upper) in upper[t * groups..][..groups].iter().enumerate() {
                if upper[0] >= bar && !done[g] && upper[0] > f32::NEG_INFINITY {
                    done[g] = true;
                    list.push(g as u32);
                }
            }
        }
        list.sort_unstable();
        computed += list.len();
        self.groups_in_full(weight, x, list, out);
        let cols = weight.cols();
        groups * coarse_bytes(cols) + computed * (coarse_bytes(cols) + rest_bytes(cols))
    }

    /// What each group cannot exceed; `out` becomes -infinity.
    fn bound_groups(
        &self,
        weight: &Weight,
        (x, norms): (Rows<'_>, &[f64]),
        wanted: &[Best<'_>],
        measures: &[u16],
        upper: &mut [[f32; 2]],
        out: &mut [f32],
    ) {
        let groups = weight.groups();
        let (upper, out) = (SharedOut::new(upper), SharedOut::new(out));
        let deal = Deal::new(groups, self.pool.threads());
        self.pool.run(|i| {
            let mut sums = [[0.0; GROUP_ROWS]; BEST_ROWS_MAX];
            deal.each(i, |mine| {
                for g in mine {
                    coarse(self.isa, weight, g, &x, &mut sums);
                    let bounds = weight.coarse(g).1;
                    for (t, (best, sums)) in wanted.iter().zip(&sums).enumerate() {
                        let among = best.among.saturating_sub(g * GROUP_ROWS).min(weight.group_rows(g));
                        let all = ((1u32 << among) - 1) as u16;
                        let masks = [all, measures[t * groups + g]];
                        let highest = highest(self.isa, sums, bounds, norms[t] as f32, masks);
                        // SAFETY: each group is one thread's.
                        unsafe {
                            upper.slice(t * groups + g, 1)[0] = highest;
                            let at = t * weight.rows() + g * GROUP_ROWS;
                            out.slice(at, weight.group_rows(g)).fill(f32::NEG_INFINITY);
                        }
                    }
                }
            });
        });
    }

    /// Computes the groups of a list in full.
    fn groups_in_full(&self, weight: &Weight, x: Rows<'_>, list: &[u32], out: &mut [f32]) {
        if list.is_empty() {
            return;
        }
        let out = SharedOut::new(out);
        let task = Task { weight, groups: 0..0, joined: None, x, out: &out, out_step: weight.rows(), out_group: 0 };
        let work = |list: &[u32]| {
            let mut room = Joined::default();
            let mut rest = list;
            while let Some((&g, behind)) = rest.split_first() {
                rest = behind;
                // They lie anywhere, so the memory of the next is asked for while this one is computed.
                #[cfg(target_arch = "x86_64")]
                if let Some(&next) = rest.first() {
                    crate::prefetch::all(weight.coarse(next as usize).0);
                    crate::prefetch::all(weight.rest(next as usize));
                }
                self.joined_kernel(&task, g as usize, false, &mut room);
            }
        };
        let deal = Deal::new(list.len(), self.pool.threads());
        self.pool.run(|i| deal.each(i, |mine| work(&list[mine])));
    }
}

/// |x| of row `t` as it was rounded to 8 bits.
fn norm(x: &Rows<'_>, t: usize) -> f64 {
    let of_unit = |u: usize| {
        let (quants, facts) = x.unit(t, u);
        let squares: i32 = quants.iter().map(|&q| i32::from(q) * i32::from(q)).sum();
        f64::from(facts.scale) * f64::from(facts.scale) * f64::from(squares)
    };
    (0..x.cols / UNIT).map(of_unit).sum::<f64>().sqrt()
}

/// Marks the rows that are a measure for others.
fn mark(best: &Best<'_>, rows: usize, measures: &mut [u16]) {
    let among = best.among.min(rows);
    for (g, bits) in measures.iter_mut().enumerate() {
        let count = among.saturating_sub(g * GROUP_ROWS).min(GROUP_ROWS);
        *bits = ((1u32 << count) - 1) as u16;
    }
    for &row in best.lowered {
        if let Some(bits) = measures.get_mut(row as usize / GROUP_ROWS) {
            *bits &= !(1 << (row as usize % GROUP_ROWS));
        }
    }
}

/// Higher ones first, of equals the first in the matrix.
fn by_score(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The `count`-th largest of the results in `groups` that are a measure; -infinity where there are fewer.
fn bar(results: &[f32], groups: &[u32], measures: &[u16], count: usize) -> f32 {
    let mut found: Vec<f32> = Vec::with_capacity(groups.len() * GROUP_ROWS);
    for &g in groups {
        let of_group = results[g as usize * GROUP_ROWS..].iter().take(GROUP_ROWS).enumerate();
        found.extend(of_group.filter(|(r, _)| measures[g as usize] >> r & 1 == 1).map(|(_, result)| *result));
    }
    match found.len() < count {
        true => f32::NEG_INFINITY,
        false => *found.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1,
    }
}

for_each_isa! {
    /// The largest `sum + bound |x|` of the rows in each mask; -infinity where there is none.
    pub(crate) fn highest(sums: &[f32; GROUP_ROWS], bounds: &[f32; GROUP_ROWS], norm: f32, masks: [u16; 2]) -> [f32; 2] {
        let upper: [f32; GROUP_ROWS] = std::array::from_fn(|r| sums[r] + bounds[r] * norm);
        masks.map(|mask| {
            let in_mask = |r: usize| mask >> r & 1 == 1;
            let mut highest: [f32; GROUP_ROWS] =
                std::array::from_fn(|r| if in_mask(r) { upper[r] } else { f32::NEG_INFINITY });
            // Halves onto halves, which the compiler does side by side.
            let mut width = GROUP_ROWS / 2;
            while width > 0 {
                for i in 0..width {
                    highest[i] = if highest[i] > highest[i + width] { highest[i] } else { highest[i + width] };
                }
                width /= 2;
            }
            highest[0]
        })
    }
}

/// Some tokens of one group, as the kernels of first parts take them: pointers to what exists of a group of whole units and of
/// tokens from one on.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct CoarseTile<'a> {
    /// Scales and quants
    pub(crate) group: *const u8,
    /// The first token's quants; those of the next unit are `width` times 32 behind.
    pub(crate) x: *const i8,
    pub(crate) facts: *const UnitFacts,
    pub(crate) units: usize,
    /// Tokens of the tile of activations, which is as wide as what a kernel takes or wider.
    pub(crate) width: usize,
    _of: PhantomData<&'a [u8]>,
}

#[cfg(target_arch = "x86_64")]
impl<'a> CoarseTile<'a> {
    /// Row `t` of `x` and those behind it, by the first part `group`.
    pub(crate) fn new(group: &'a [u8], x: &Rows<'a>, t: usize) -> CoarseTile<'a> {
        let units = x.cols / UNIT;
        let (first, width) = tile_of(x.widest, t, x.rows);
        let at = first * units + (t - first);
        assert!(group.len() >= COARSE.group_bytes(x.cols));
        let (x, facts) = (x.quants[at * UNIT..].as_ptr(), x.facts[at..].as_ptr());
        CoarseTile { group: group.as_ptr(), x, facts, units, width, _of: PhantomData }
    }
}

/// Defines `coarse` of an instruction set with these features by its `tile`.
#[cfg(target_arch = "x86_64")]
macro_rules! coarse_by_tiles {
    ($features:literal) => {
        /// Coarse results of group `g` for all rows of `x`.
        ///
        /// # Safety
        /// The machine has the features.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn coarse(
            weight: &crate::weight::Weight,
            g: usize,
            x: &crate::matmul::Rows<'_>,
            sums: &mut [[f32; GROUP_ROWS]],
        ) {
            let group = weight.coarse(g).0;
            let mut t = 0;
            while t < x.rows {
                let (first, sums) = (CoarseTile::new(group, x, t), &mut sums[t..]);
                // SAFETY: each tile stays inside the rows.
                t += unsafe {
                    match x.rows - t {
                        4.. => {
                            tile::<4>(&first, sums);
                            4
                        }
                        2.. => {
                            tile::<2>(&first, sums);
                            2
                        }
                        _ => {
                            tile::<1>(&first, sums);
                            1
                        }
                    }
                };
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use coarse_by_tiles;

/// Coarse results of group `g` for all rows of `x`: the first part's integer sums, doubled so that they are whole, times half
/// the scales, in ascending k; the same bits on every instruction set.
fn coarse(isa: Isa, weight: &Weight, g: usize, x: &Rows<'_>, sums: &mut [[f32; GROUP_ROWS]; BEST_ROWS_MAX]) {
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::screen::coarse(weight, g, x, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::screen::coarse(weight, g, x, sums) },
        _ => crate::portable::screen::coarse(weight, g, x, sums),
    }
}
