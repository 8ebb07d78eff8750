//! The inner loops of the delta rule: some tokens of one chunk, for all columns of one head.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has the vector's instruction set.

// Loops over the registers of some tokens index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::{array, ops::Range};

use super::{Between, CHUNK, DeltaShape, PART, Tile};
use crate::{
    Isa,
    lanes::{LANES, Lanes},
    shared_out::SharedOut,
    vector::Vector,
};

/// Some tokens of one chunk of one head.
pub(super) struct Chunk<'a> {
    pub(super) shape: DeltaShape,
    pub(super) isa: Isa,
    pub(super) tiles: &'a [Tile],
    pub(super) between: &'a Between,
    /// Their places in the chunk.
    pub(super) places: Range<usize>,
    /// The head's values of the first token, those of the next so many further on.
    pub(super) v: (&'a [f32], usize),
    /// Where the head's results go: from where on, and how far from token to token. Nobody else writes there.
    pub(super) out: (&'a SharedOut<'a, f32>, usize, usize),
}

impl Chunk<'_> {
    /// Takes all columns through the tokens. `state`: (blocks, K, 16); `writes`: (blocks, 8, 16).
    pub(super) fn run(&self, state: &mut [Lanes], writes: &mut [Lanes]) {
        match self.isa {
            // SAFETY: an `Isa` reaches the ops only through `Compute::new`, which has checked that it is present.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { avx512(self, state, writes) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2(self, state, writes) },
            // SAFETY: plain arrays need nothing.
            _ => unsafe { self.blocks::<Lanes, 2>(state, writes) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512(chunk: &Chunk<'_>, state: &mut [Lanes], writes: &mut [Lanes]) {
    // Sixteen sums of eight tokens, the memory's row and the broadcasts fill half of the registers.
    // SAFETY: the caller's promise.
    unsafe { chunk.blocks::<crate::vector::x86::Avx512, 8>(state, writes) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(chunk: &Chunk<'_>, state: &mut [Lanes], writes: &mut [Lanes]) {
    // Four sums of two tokens take eight of the sixteen registers.
    // SAFETY: the caller's promise.
    unsafe { chunk.blocks::<crate::vector::x86::Avx2, 2>(state, writes) }
}

/// Up to sixteen columns, and zeros behind them.
#[inline(always)]
unsafe fn load_columns<V: Vector>(x: &[f32]) -> V {
    let mut part = [0.0; LANES];
    let whole = x.first_chunk().unwrap_or_else(|| {
        part[..x.len()].copy_from_slice(x);
        &part
    });
    // SAFETY: the caller's promise.
    unsafe { V::load(whole) }
}

/// As many of the columns as there is room for.
#[inline(always)]
unsafe fn store_columns<V: Vector>(x: V, to: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match to.first_chunk_mut() {
            Some(to) => x.store(to),
            None => {
                let mut part = [0.0; LANES];
                x.store(&mut part);
                to.copy_from_slice(&part[..to.len()]);
            }
        }
    }
}

impl Chunk<'_> {
    /// All blocks of columns, of which each is read while it lies in the first-level cache; AT_ONCE tokens at most together.
    #[inline(always)]
    unsafe fn blocks<V: Vector, const AT_ONCE: usize>(&self, state: &mut [Lanes], writes: &mut [Lanes]) {
        let (blocks, dim) = (self.shape.blocks(), self.shape.key_dim);
        let mut block = 0;
        while block < blocks {
            // Few tokens have few sums, which would wait for each other: several blocks have more.
            let some = if self.places.len() < 4 && AT_ONCE > 2 && blocks - block >= 4 { 4 } else { 1 };
            let mut place = self.places.start;
            while place < self.places.end {
                // SAFETY: the caller's promise.
                place += unsafe {
                    match (some, (self.places.end - place).min(AT_ONCE)) {
                        (4, 2..) => self.step::<V, 4, 2>(block, place, state, writes),
                        (4, _) => self.step::<V, 4, 1>(block, place, state, writes),
                        (_, 8..) => self.step::<V, 1, 8>(block, place, state, writes),
                        (_, 4..) => self.step::<V, 1, 4>(block, place, state, writes),
                        (_, 2..) => self.step::<V, 1, 2>(block, place, state, writes),
                        _ => self.step::<V, 1, 1>(block, place, state, writes),
                    }
                };
            }
            if self.places.end == CHUNK {
                for b in block..block + some {
                    // SAFETY: the caller's promise.
                    unsafe { self.join::<V>(&mut state[b * dim..][..dim], &writes[b * CHUNK..][..CHUNK]) };
                }
            }
            block += some;
        }
    }

    /// What N tokens from `place` on write and read in B blocks of columns; gives N.
    #[inline(always)]
    unsafe fn step<V: Vector, const B: usize, const N: usize>(
        &self,
        block: usize,
        place: usize,
        state: &[Lanes],
        writes: &mut [Lanes],
    ) -> usize {
        let Chunk { shape, between, .. } = self;
        let ((values, step), (out, out_at, out_step)) = (self.v, self.out);
        // SAFETY: the caller's promise.
        let sums = unsafe { self.sums::<V, B, N>(block, place, state) };
        for (b, sums) in sums.iter().enumerate() {
            let block = block + b;
            let writes = &mut writes[block * CHUNK..][..CHUNK];
            let column = block * LANES;
            let columns = LANES.min(shape.value_dim - block * LANES);
            let token = |n: usize| place + n - self.places.start;
            // Each write goes into what all later tokens hold and read as soon as it is known: so none waits for the sums of all
            // that come before it, which are added in the same order.
            // SAFETY: the caller's promise.
            unsafe {
                let left: [V; N] = array::from_fn(|n| V::splat(between.left[place + n]));
                let mut held: [V; N] = array::from_fn(|n| sums[n][0].times(left[n]));
                let mut read: [V; N] = array::from_fn(|n| sums[n][1].times(left[n]));
                for (i, write) in writes[..place].iter().enumerate() {
                    let write = V::load(write);
                    for n in 0..N {
                        held[n] = held[n].plus(write, V::splat(between.held[place + n][i]));
                        read[n] = read[n].plus(write, V::splat(between.read[place + n][i]));
                    }
                }
                for n in 0..N {
                    let i = place + n;
                    let v = load_columns::<V>(&values[token(n) * step + column..][..columns]);
                    let write = v.minus(held[n]).times(V::splat(between.beta[i]));
                    write.store(&mut writes[i]);
                    for later in n + 1..N {
                        held[later] = held[later].plus(write, V::splat(between.held[place + later][i]));
                    }
                    for later in n..N {
                        read[later] = read[later].plus(write, V::splat(between.read[place + later][i]));
                    }
                }
                for n in 0..N {
                    // Each token's columns of a head are in exactly one job.
                    store_columns(read[n], out.slice(out_at + token(n) * out_step + column, columns));
                }
            }
        }
        N
    }

    /// `S^T k` and `S^T q` of N tokens from `place` on for B blocks, with S as it was at the chunk's beginning.
    #[inline(always)]
    unsafe fn sums<V: Vector, const B: usize, const N: usize>(
        &self,
        block: usize,
        place: usize,
        state: &[Lanes],
    ) -> [[[V; 2]; N]; B] {
        let dim = self.shape.key_dim;
        // SAFETY: the caller's promise.
        let mut sums = unsafe { [[[V::splat(0.0); 2]; N]; B] };
        for (tile, first) in self.tiles.iter().zip((0..dim).step_by(PART)) {
            let len = PART.min(dim - first);
            let state: [&[Lanes]; B] = array::from_fn(|b| &state[(block + b) * dim + first..][..len]);
            let rows = &tile[place..place + CHUNK + N];
            for d in 0..len {
                for (state, sums) in state.iter().zip(&mut sums) {
                    // SAFETY: the caller's promise; `d` is below the lengths of the slices, which are `len`, and of a tile's
                    // rows, and `rows` has CHUNK + N of these.
                    unsafe {
                        let s = V::load(state.get_unchecked(d));
                        for (n, [of_key, of_query]) in sums.iter_mut().enumerate() {
                            let value = |row: usize| V::splat(*rows.get_unchecked(row).get_unchecked(d));
                            (*of_key, *of_query) = (of_key.plus(s, value(n)), of_query.plus(s, value(CHUNK + n)));
                        }
                    }
                }
            }
        }
        sums
    }

    /// Joins the chunk's writes with a block of S: (K, 16).
    #[inline(always)]
    unsafe fn join<V: Vector>(&self, state: &mut [Lanes], writes: &[Lanes]) {
        let dim = self.shape.key_dim;
        // SAFETY: the caller's promise.
        unsafe {
            let left = V::splat(self.between.left[CHUNK - 1]);
            let kept: [V; CHUNK] = array::from_fn(|i| V::load(&writes[i]).times(V::splat(self.between.kept[i])));
            for (tile, first) in self.tiles.iter().zip((0..dim).step_by(PART)) {
                let len = PART.min(dim - first);
                for (d, s) in state[first..][..len].iter_mut().enumerate() {
                    let mut sum = V::load(s).times(left);
                    for (kept, row) in kept.iter().zip(tile) {
                        // `d` is below `len`, which a tile's rows are not shorter than.
                        sum = sum.plus(*kept, V::splat(*row.get_unchecked(d)));
                    }
                    sum.store(s);
                }
            }
        }
    }
}
