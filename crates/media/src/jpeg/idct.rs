//! The inverse transform, bit for bit libjpeg's slow-but-accurate integer one (Loeffler, Ligtenberg and Moschytz, with 13 bits
//! behind the point; `jidctint.c`). Sums are of 64 bits, so that no hostile coefficient overflows.

use super::frame::Component;
use super::scan::NATURAL;

const CONST_BITS: u32 = 13;
const PASS1_BITS: u32 = 2;

const FIX_0_298631336: i64 = 2446;
const FIX_0_390180644: i64 = 3196;
const FIX_0_541196100: i64 = 4433;
const FIX_0_765366865: i64 = 6270;
const FIX_0_899976223: i64 = 7373;
const FIX_1_175875602: i64 = 9633;
const FIX_1_501321110: i64 = 12299;
const FIX_1_847759065: i64 = 15137;
const FIX_1_961570560: i64 = 16069;
const FIX_2_053119869: i64 = 16819;
const FIX_2_562915447: i64 = 20995;
const FIX_3_072711026: i64 = 25172;

/// The values of a component: (rows * 8, stride * 8).
pub(super) fn plane(component: &Component) -> Vec<u8> {
    let stride = component.stride * 8;
    let mut values = vec![0; component.rows * 8 * stride];
    let mut table = [0_i64; 64];
    for (k, &value) in component.table.iter().flatten().enumerate() {
        table[NATURAL[k]] = value.into();
    }
    for (i, block) in component.coefficients.iter().enumerate() {
        let start = i / component.stride * 8 * stride + i % component.stride * 8;
        inverse(block, &table, &mut values[start..], stride);
    }
    values
}

fn inverse(block: &[i16; 64], table: &[i64; 64], out: &mut [u8], stride: usize) {
    if block[1..].iter().all(|&x| x == 0) {
        // What both passes come to for a constant.
        let value =
            ((((i64::from(block[0]) * table[0]) << PASS1_BITS) + (1 << (PASS1_BITS + 2))) >> (PASS1_BITS + 3)) + 128;
        for row in 0..8 {
            out[row * stride..row * stride + 8].fill(value.clamp(0, 255) as u8);
        }
        return;
    }
    let mut work = [0_i64; 64];
    for x in 0..8 {
        let column = std::array::from_fn(|y| i64::from(block[8 * y + x]) * table[8 * y + x]);
        let column = pass(column, CONST_BITS - PASS1_BITS);
        for (y, value) in column.into_iter().enumerate() {
            work[8 * y + x] = value;
        }
    }
    for (y, row) in work.as_chunks::<8>().0.iter().enumerate() {
        let row = pass(*row, CONST_BITS + PASS1_BITS + 3);
        for (value, place) in row.into_iter().zip(&mut out[y * stride..y * stride + 8]) {
            *place = (value + 128).clamp(0, 255) as u8;
        }
    }
}

/// Eight values through one dimension, the sums shifted right by `shift` and rounded.
fn pass(x: [i64; 8], shift: u32) -> [i64; 8] {
    // Even part.
    let z1 = (x[2] + x[6]) * FIX_0_541196100;
    let (even2, even3) = (z1 - x[6] * FIX_1_847759065, z1 + x[2] * FIX_0_765366865);
    let (even0, even1) = ((x[0] + x[4]) << CONST_BITS, (x[0] - x[4]) << CONST_BITS);
    let sums = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];
    // Odd part.
    let (z1, z2, z3, z4) = (x[7] + x[1], x[5] + x[3], x[7] + x[3], x[5] + x[1]);
    let z5 = (z3 + z4) * FIX_1_175875602;
    let (z1, z2) = (-z1 * FIX_0_899976223, -z2 * FIX_2_562915447);
    let (z3, z4) = (-z3 * FIX_1_961570560 + z5, -z4 * FIX_0_390180644 + z5);
    let odd = [
        x[1] * FIX_1_501321110 + z1 + z4,
        x[3] * FIX_3_072711026 + z2 + z3,
        x[5] * FIX_2_053119869 + z2 + z4,
        x[7] * FIX_0_298631336 + z1 + z3,
    ];
    let half = 1 << (shift - 1);
    std::array::from_fn(|i| match i {
        0..4 => (sums[i] + odd[i] + half) >> shift,
        _ => (sums[7 - i] - odd[7 - i] + half) >> shift,
    })
}
