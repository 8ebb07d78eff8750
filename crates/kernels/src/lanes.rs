//! Small arithmetic over sixteen values at a time, compiled once for each instruction set.
//!
//! Sums have a fixed shape - sixteen partial sums, folded as a tree - so that results do not depend on the width of the
//! machine's registers. Everything is inlined into its caller and takes on the caller's instruction set.

use std::f32::consts::LN_2;

/// Values handled together: one 512-bit register, two 256-bit ones.
pub(crate) const LANES: usize = 16;

pub(crate) type Lanes = [f32; LANES];

/// Adds the lanes as a tree: halves onto halves.
#[inline(always)]
pub(crate) fn sum(mut lanes: Lanes) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest lane.
#[inline(always)]
pub(crate) fn max(lanes: Lanes) -> f32 {
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Sum of `f(x)` over a row, in sixteen partial sums.
#[inline(always)]
pub(crate) fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut partial = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        partial.iter_mut().zip(x).for_each(|(p, &x)| *p += f(x));
    }
    partial.iter_mut().zip(rest).for_each(|(p, &x)| *p += f(x));
    sum(partial)
}

/// The largest |x| of a row; no number if any is none or infinite.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let (mut most, mut odd) = ([0.0; LANES], [0.0; LANES]);
    let mut take = |block: &[f32]| {
        for ((most, odd), x) in most.iter_mut().zip(&mut odd).zip(block) {
            *most = if x.abs() > *most { x.abs() } else { *most };
            // What is finite times 0 is 0.
            *odd += x * 0.0;
        }
    };
    let (whole, rest) = x.as_chunks::<LANES>();
    whole.iter().for_each(|block| take(block));
    take(rest);
    max(most) + sum(odd)
}

/// Sum of products of two rows of one length, in sixteen partial sums.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut partial = [0.0; LANES];
    let ((x_whole, x_rest), (y_whole, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x_whole.iter().zip(y_whole) {
        partial.iter_mut().zip(x).zip(y).for_each(|((p, x), y)| *p += x * y);
    }
    partial.iter_mut().zip(x_rest).zip(y_rest).for_each(|((p, x), y)| *p += x * y);
    sum(partial)
}

/// Sum of products of three rows of one length, in sixteen partial sums.
#[inline(always)]
pub(crate) fn dot_3(x: &[f32], y: &[f32], z: &[f32]) -> f32 {
    let mut partial = [0.0; LANES];
    let (x, y, z) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>(), z.as_chunks::<LANES>());
    for ((x, y), z) in x.0.iter().zip(y.0).zip(z.0) {
        partial.iter_mut().zip(x).zip(y).zip(z).for_each(|(((p, x), y), z)| *p += x * y * z);
    }
    partial.iter_mut().zip(x.1).zip(y.1).zip(z.1).for_each(|(((p, x), y), z)| *p += x * y * z);
    sum(partial)
}

/// 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even, and stands in the low bits of the sum. A
/// conversion in Rust's way, which saturates, the compiler would do value by value.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// e^x to within 3e-7 of itself for -87 to 88, outside which x is taken for the nearer end: Cody-Waite reduction and the
/// Taylor polynomial of degree 7 over half an octave.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    // 2^n through the exponent's bits; n is within -126..=127.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// The polynomial of 2^r for r within half an octave, from the highest power down: least relative error, 1e-7, with 1 at 0.
pub(crate) const EXP_2: [f32; 6] = [1.326_472_6e-3, 9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, LN_2, 1.0];

/// 2^x to within 4e-7 of itself for -126 to 127, outside which x is taken for the nearer end.
#[inline(always)]
pub(crate) fn exp_2(x: f32) -> f32 {
    let x = x.clamp(-126.0, 127.0);
    let n = x.round_ties_even();
    let p = EXP_2.into_iter().fold(0.0, |p, c| p * (x - n) + c);
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// Defines a function once and compiles it for every instruction set; the public wrapper takes the set first.
macro_rules! for_each_isa {
    ($(#[$meta:meta])* pub(crate) fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match isa {
                // SAFETY: an `Isa` reaches the ops only through `Compute::new`, which has checked that it is present.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx512 | $crate::Isa::Amx => unsafe { avx512($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use for_each_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let (found, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - exact).abs() <= exact * 3e-7, "exp({x}): {found} and {exact}");
        }
        assert!(exp(-1e30) < 2e-38);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn powers_of_two_are_close_everywhere() {
        for i in -1_259_999..=1_270_000 {
            let x = i as f32 * 1e-4;
            let (found, exact) = (f64::from(exp_2(x)), f64::from(x).exp2());
            assert!((found - exact).abs() <= exact * 4e-7, "2^{x}: {found} and {exact}");
        }
        assert!(exp_2(f32::NEG_INFINITY) < 2e-38);
        assert_eq!((-3..3).map(|n| exp_2(n as f32)).collect::<Vec<_>>(), [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]);
    }

    #[test]
    fn sums_have_one_shape() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32).sin()).collect();
        let exact: f64 = x.iter().map(|&x| f64::from(x * x)).sum();
        assert!((f64::from(sum_by(&x, |x| x * x)) - exact).abs() < 1e-5);
        assert_eq!(sum_by(&[], |x| x), 0.0);
        assert_eq!(dot(&x, &x), sum_by(&x, |x| x * x));
    }
}
