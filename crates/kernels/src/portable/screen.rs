//! The first part of a weight in two parts, in plain Rust; the order of operations that every instruction set keeps.

use crate::{
    layout::{GROUP_ROWS, UNIT},
    matmul::Rows,
    planes::{COARSE, OFFSET_TIMES_16},
    weight::Weight,
};

/// Coarse results of group `g` for all rows of `x`.
pub(crate) fn coarse(weight: &Weight, g: usize, x: &Rows<'_>, sums: &mut [[f32; GROUP_ROWS]]) {
    let group = weight.coarse(g).0;
    for (t, sums) in (0..x.rows).zip(sums) {
        sums.fill(0.0);
        for u in 0..x.cols / UNIT {
            let (quants, facts) = x.unit(t, u);
            for (r, sum) in sums.iter_mut().enumerate() {
                let row = COARSE.unit_row(COARSE.unit(group, u), r);
                let dot: i32 = row.iter().zip(quants).map(|(&n, &x)| i32::from(n) * i32::from(x)).sum();
                let twice = 16 * dot + OFFSET_TIMES_16 * facts.minus_sum[0];
                let scale = COARSE.scale(group, u, 0, r).0 * (0.5 * facts.scale);
                *sum = (twice as f32).mul_add(scale, *sum);
            }
        }
    }
}
