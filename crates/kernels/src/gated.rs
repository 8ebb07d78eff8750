//! The gated feed-forward unit as one op: down(silu(gate x) * up x). Source: Shazeer 2020, SwiGLU.
//!
//! Contract: the bits are those of `matmul`, `silu_mul` and `matmul` one after the other. The inner values, of which a token has
//! more than of any others, never lie in memory as results: some rows of both matrices are multiplied by some tokens, joined
//! while they are in cache, and leave it in the form that `down` multiplies.

use std::ops::Range;

use crate::{
    activations::{Activations, Filling},
    elementwise::silu_mul,
    layout::{GROUP_ROWS, UNIT},
    matmul::{Compute, MatmulScratch, Product, Rows, Task},
    pool::Deal,
    shared_out::SharedOut,
    weight::Weight,
};

/// Groups of each matrix that go together: as many inner values of a token as one unit of the 8-bit form has.
const PIECE_GROUPS: usize = UNIT / GROUP_ROWS;
/// Tokens that go together: results of both matrices are 32 KiB, and the activations of most models are a part of the second-level
/// cache. A multiple of every tile's.
const PIECE_TOKENS: usize = 128;
/// Results of one matrix.
const PIECE: usize = PIECE_TOKENS * UNIT;

/// The matrices of a gated unit.
#[derive(Clone, Copy)]
pub struct GatedUnit<'a> {
    /// (F, D)
    pub gate: &'a Weight,
    /// (F, D)
    pub up: &'a Weight,
    /// (D, F)
    pub down: &'a Weight,
}

/// Buffers of gated units.
#[derive(Default)]
pub(crate) struct GatedRoom {
    /// (T, F) in the form that `down` multiplies
    inner: Activations,
    /// The same in f32, where that is the form.
    values: Vec<f32>,
    /// For each thread, pieces of results of both matrices.
    pieces: Vec<f32>,
}

impl GatedRoom {
    pub(crate) fn held_bytes(&self) -> usize {
        self.inner.held_bytes() + size_of::<f32>() * (self.values.capacity() + self.pieces.capacity())
    }
}

impl Compute {
    /// `out`: (T, D) = down(silu(gate x) * up x) of x: (T, D).
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn gated_unit(&self, scratch: &mut MatmulScratch, x: &[f32], unit: GatedUnit<'_>, out: &mut [f32]) {
        let GatedUnit { gate, up, down } = unit;
        let (cols, inner) = (gate.cols(), gate.rows());
        let rows = x.len() / cols;
        assert!(
            x.len() == rows * cols && up.rows() == inner && up.cols() == cols && down.cols() == inner,
            "a gated unit of ({}, {cols}), ({}, {}) and ({}, {})",
            inner,
            up.rows(),
            up.cols(),
            down.rows(),
            down.cols()
        );
        let MatmulScratch { activations: prepared, gated: room, .. } = scratch;
        prepared.prepare(self.isa, &self.pool, x, cols, &[gate.operand(), up.operand()]);
        let x = Rows::of(prepared, x);
        let threads = self.pool.threads();
        room.pieces.resize(threads * 2 * PIECE, 0.0);
        let filling = room.inner.open(self.isa, (rows, inner), down.operand(), &mut room.values);
        let pieces = SharedOut::new(&mut room.pieces);
        let deal = Deal::new(gate.groups().div_ceil(PIECE_GROUPS), threads);
        self.pool.run(|i| {
            // SAFETY: each thread has pieces of its own.
            let own = unsafe { pieces.slice(i * 2 * PIECE, 2 * PIECE) }.split_at_mut(PIECE);
            let mut own = [own.0, own.1];
            deal.each(i, |mine| self.pieces(x, [gate, up], mine, &mut own, &filling));
        });
        let x = Rows::of(&room.inner, &room.values);
        self.multiply_prepared(x, &mut [Product { weight: down, out }], &[]);
    }

    /// The pieces `mine` of the inner values.
    fn pieces(
        &self,
        x: Rows<'_>,
        weights: [&Weight; 2],
        mine: Range<usize>,
        room: &mut [&mut [f32]; 2],
        to: &Filling<'_>,
    ) {
        for first in (0..x.rows).step_by(PIECE_TOKENS) {
            let tokens = first..(first + PIECE_TOKENS).min(x.rows);
            let x = x.part(tokens.clone());
            for piece in mine.clone() {
                let groups = piece * PIECE_GROUPS..((piece + 1) * PIECE_GROUPS).min(weights[0].groups());
                let cols = groups.start * GROUP_ROWS..(groups.end * GROUP_ROWS).min(weights[0].rows());
                for (weight, room) in weights.iter().zip(room.iter_mut()) {
                    let (groups, out) = (groups.clone(), &SharedOut::new(room));
                    let (joined, out_group) = (None, groups.start);
                    self.kernel(&Task { weight, groups, joined, x, out, out_step: cols.len(), out_group });
                }
                let values = tokens.len() * cols.len();
                let [gate, up] = room;
                silu_mul(self.isa, &up[..values], &mut gate[..values]);
                // SAFETY: a piece is one thread's.
                unsafe { to.put(tokens.clone(), cols.clone(), &gate[..values]) };
            }
        }
    }
}
