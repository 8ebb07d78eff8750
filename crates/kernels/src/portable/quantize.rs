//! Activations to 8 bits in plain Rust.

use crate::{
    activations::{Place, UnitFacts, scale_of},
    layout::UNIT,
};

/// Quantises a row: x (K/32, 32).
pub(crate) fn row(x: &[[f32; UNIT]], place: &mut Place<'_>) {
    for (u, x) in x.iter().enumerate() {
        let (quants, facts) = place.unit(u);
        let (scale, sums) = unit(x, quants);
        *facts = UnitFacts::new(scale, sums);
    }
}

/// Quantises 32 values; returns their scale and the sums of the first and the last 16 quants.
fn unit(x: &[f32; UNIT], quants: &mut [i8; UNIT]) -> (f32, [i32; 2]) {
    let (scale, inverse) = scale_of(x.iter().fold(0.0, |m: f32, x| m.max(x.abs())));
    let mut sums = [0; 2];
    for (i, (q, x)) in quants.iter_mut().zip(x).enumerate() {
        // A NaN becomes 0 here; its row's norm has already spread it if it came from the model.
        *q = (x * inverse).round_ties_even() as i8;
        sums[2 * i / UNIT] += i32::from(*q);
    }
    (scale, sums)
}
