//! What the tokens of a chunk mean to each other: the WY form of what each reads of those before it and writes for those behind it.

use std::ops::Range;

use super::{CHUNK, DeltaGates, PART, Tile};
use crate::{
    Isa,
    lanes::{self, Lanes, for_each_isa},
};

/// The products of a chunk's keys and queries with its keys. Row i is token i's.
pub(super) struct Products {
    /// Of its key.
    pub(super) held: [[f32; CHUNK]; CHUNK],
    /// Of its query.
    pub(super) read: [[f32; CHUNK]; CHUNK],
}

/// What the tokens of a chunk mean to each other, for one head. Row i is token i's.
pub(super) struct Between {
    /// In 0..=1: how much of a value is written.
    pub(super) beta: [f32; CHUNK],
    /// How much of S is left.
    pub(super) left: [f32; CHUNK],
    /// How much of what an earlier token wrote the key meets: what is left of it, times the product of the keys.
    pub(super) held: [[f32; CHUNK]; CHUNK],
    /// The same for the query, which meets the token's own write too.
    pub(super) read: [[f32; CHUNK]; CHUNK],
    /// Of each token's write, what is left behind the chunk's last token.
    pub(super) kept: [f32; CHUNK],
}

impl Products {
    /// Those of the tokens at `places`, whose keys and queries lie in the tiles beside the keys of those before.
    pub(super) fn of(isa: Isa, dim: usize, tiles: &[Tile], places: Range<usize>) -> Products {
        let zero = [[0.0; CHUNK]; CHUNK];
        let mut found = Products { held: zero, read: zero };
        for i in places {
            products(isa, dim, tiles, i, &mut found.held[i], &mut found.read[i]);
        }
        found
    }
}

impl Between {
    /// Of the tokens at `places` of one head, the first of which is row `row` of the batch; their decays are kept.
    pub(super) fn of(
        products: &Products,
        (input, row, heads, head): (&DeltaGates<'_>, usize, usize, usize),
        places: Range<usize>,
        decays: &mut Lanes,
    ) -> Between {
        let zero = [0.0; CHUNK];
        let mut between =
            Between { beta: zero, left: zero, held: [zero; CHUNK], read: [zero; CHUNK], kept: [1.0; CHUNK] };
        for (row, place) in (row..).zip(places.clone()) {
            let i = row * heads + head;
            decays[place] = input.decay(i, head);
            between.beta[place] = input.beta(i);
        }
        // What is left of S, and of each write, behind the token that the loop has come to.
        let mut left = 1.0;
        let mut kept = [1.0; CHUNK];
        for i in 0..places.end {
            left *= decays[i];
            kept[..i].iter_mut().for_each(|kept| *kept *= decays[i]);
            if places.contains(&i) {
                between.left[i] = left;
                for (to, of) in [(&mut between.held, &products.held), (&mut between.read, &products.read)] {
                    to[i][..=i].iter_mut().zip(&of[i]).zip(&kept).for_each(|((to, of), kept)| *to = of * kept);
                }
            }
        }
        between.kept = kept;
        between
    }
}

for_each_isa! {
    /// The products of token `i`'s key and query with the keys of the tokens before it and its own.
    pub(crate) fn products(dim: usize, tiles: &[Tile], i: usize, held: &mut [f32; CHUNK], read: &mut [f32; CHUNK]) {
        for j in 0..=i {
            (held[j], read[j]) = (0.0, 0.0);
            for (tile, first) in tiles.iter().zip((0..dim).step_by(PART)) {
                let len = PART.min(dim - first);
                held[j] += lanes::dot(&tile[j][..len], &tile[i][..len]);
                read[j] += lanes::dot(&tile[j][..len], &tile[CHUNK + i][..len]);
            }
        }
    }
}
