//! Numbers in 8 bits, block by block: each block of 256 has its largest as scale, and a number is the place of the nearest of 256
//! values that lie the closer the smaller they are. Source: Dettmers et al. 2021 (8-bit Optimizers via Block-wise Quantization),
//! whose values these are.
//!
//! Contract: a block's bits depend on its numbers alone. Numbers are finite. Not here: what they are of.

use std::sync::LazyLock;

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 256;

/// Seven powers of ten, each with more values than the one below.
const DECADES: i32 = 7;

/// Numbers in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Blocks {
    /// One for each number.
    pub(crate) codes: Vec<u8>,
    /// The largest of each block.
    pub(crate) scales: Vec<f32>,
}

impl Blocks {
    /// So many zeros.
    pub(crate) fn zeros(len: usize, map: &Map) -> Blocks {
        Blocks { codes: vec![map.nearest(0.0); len], scales: vec![0.0; len.div_ceil(BLOCK)] }
    }

    /// Codes and scales of so many numbers at a time, which are whole blocks.
    pub(crate) fn pieces(&mut self, len: usize) -> impl Iterator<Item = (&mut [u8], &mut [f32])> {
        self.codes.chunks_mut(len).zip(self.scales.chunks_mut(len / BLOCK))
    }
}

/// The values that codes stand for, ascending, for numbers from -1 or from 0 to 1.
pub(crate) struct Map {
    values: [f32; 256],
    /// Between a value and the next.
    middles: [f32; 255],
    /// For the leading bits of a number's size, the first code whose number it may be; one list for each sign.
    first: [Vec<u8>; 2],
    /// Whether what is not zero may become it.
    keeps_nonzero: bool,
}

/// For numbers of both signs.
pub(crate) static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
/// For numbers that are not negative. None that is not zero becomes it: these are divided by.
pub(crate) static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// Bits of an f32 behind those that `first` is looked up by: 6 of its fraction are among them.
const SHIFT: u32 = 17;
/// Sizes below are as good as zero: the smallest value is 3e-7 or more.
const LEAST: f32 = 1.0 / (1 << 24) as f32;

impl Map {
    fn new(is_signed: bool) -> Map {
        let mut found = vec![0.0f64, 1.0];
        for i in 0..DECADES {
            let parts = 1 << if is_signed { i } else { i + 1 };
            let power = 10f64.powi(i + 1 - DECADES);
            for part in 0..parts {
                let value = power * (0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts));
                found.push(value);
                if is_signed {
                    found.push(-value);
                }
            }
        }
        found.sort_by(f64::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| found[i] as f32);
        let middles = std::array::from_fn(|i| ((found[i] + found[i + 1]) / 2.0) as f32);
        let code = |x: f32| middles.partition_point(|middle| *middle < x) as u8;
        // A negative number's leading bits stand for sizes from there on, so that the largest of them is the first.
        let first = [1.0f32, -1.0].map(|sign| {
            let of = |bits: u32| match sign > 0.0 {
                true => code(f32::from_bits(bits << SHIFT)),
                false => code(-f32::from_bits(((bits + 1) << SHIFT) - 1)),
            };
            (LEAST.to_bits() >> SHIFT..=1f32.to_bits() >> SHIFT).map(of).collect()
        });
        Map { values, middles, first, keeps_nonzero: !is_signed }
    }

    /// The code of the value that is nearest to x, of two the smaller; x is from -1 to 1.
    pub(crate) fn nearest(&self, x: f32) -> u8 {
        let place = (x.abs().max(LEAST).to_bits() - LEAST.to_bits()) >> SHIFT;
        let of_sign = &self.first[usize::from(x < 0.0)];
        let mut code = match x.abs() < LEAST {
            // Near zero the code before it is the first.
            true => self.first[1][0],
            false => of_sign[(place as usize).min(of_sign.len() - 1)],
        };
        while self.middles.get(usize::from(code)).is_some_and(|middle| *middle < x) {
            code += 1;
        }
        code
    }

    /// `x` = the numbers of one block.
    pub(crate) fn expand(&self, codes: &[u8], scale: f32, x: &mut [f32]) {
        x.iter_mut().zip(codes).for_each(|(x, code)| *x = scale * self.values[usize::from(*code)]);
    }

    /// Rounds one block's numbers; returns its scale.
    pub(crate) fn round(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        let scale = x.iter().fold(0.0, |most, x| f32::max(most, x.abs()));
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (x, code) in x.iter().zip(codes) {
            // A scale so small that its inverse is none leaves nothing to tell apart.
            let share = if inverse.is_finite() { (x * inverse).clamp(-1.0, 1.0) } else { 0.0 };
            *code = self.nearest(share);
            if self.keeps_nonzero && *x > 0.0 {
                *code = (*code).max(1);
            }
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_paper() {
        for (map, least, count) in [(&SIGNED, 5.5e-7, 127), (&UNSIGNED, 3.25e-7, 255)] {
            assert!(map.values.windows(2).all(|pair| pair[0] < pair[1]));
            let above: Vec<f32> = map.values.iter().copied().filter(|x| *x > 0.0).collect();
            assert!((above[0] / least - 1.0).abs() < 1e-5, "{}", above[0]);
            assert_eq!((map.values[255], above.len()), (1.0, count + usize::from(count == 127)));
        }
        assert_eq!(SIGNED.values[127], 0.0);
        // The largest decade of the signed ones: 64 from 0.1 to 1.
        assert!((SIGNED.values[254] - (1.0 - 0.9 / 128.0)).abs() < 1e-6);
    }

    #[test]
    fn the_code_is_that_of_the_nearest_value() {
        let mut numbers = crate::order::Numbers::new(3, 1);
        for (map, is_signed) in [(&SIGNED, true), (&UNSIGNED, false)] {
            let mut xs = vec![0.0f32, 1.0, 1e-9, 5e-8, 1e-7, 3e-7, 6e-8, LEAST];
            xs.extend((0..20_000).map(|_| 10f32.powf(4.0 * numbers.signed() - 4.0).min(1.0)));
            if is_signed {
                xs.extend(xs.clone().iter().map(|x| -x));
            }
            for x in xs {
                let code = map.nearest(x);
                let expected = map.middles.partition_point(|middle| *middle < x);
                assert_eq!(usize::from(code), expected, "{x:e}");
            }
        }
    }

    #[test]
    fn blocks_come_back_nearly_and_small_squares_never_as_zero() {
        let x: Vec<f32> = (0..BLOCK).map(|i| 3.0 * (i as f32 * 0.7).sin() * 10f32.powi(-(i as i32 % 5))).collect();
        let (mut codes, mut back) = (vec![0; BLOCK], vec![0.0; BLOCK]);
        let scale = SIGNED.round(&x, &mut codes);
        SIGNED.expand(&codes, scale, &mut back);
        for (x, back) in x.iter().zip(&back) {
            let limit = match x.abs() / scale {
                0.1.. => 0.071,
                0.01.. => 0.142,
                0.001.. => 0.282,
                _ => 1.0,
            };
            assert!((x - back).abs() <= limit * x.abs(), "{x} {back}");
        }
        let mut squares = [1.0, 1e-12, 0.0, 0.3];
        let mut codes = [0; 4];
        let scale = UNSIGNED.round(&squares, &mut codes);
        UNSIGNED.expand(&codes, scale, &mut squares);
        assert!(squares[1] > 0.0 && squares[2] == 0.0 && squares[0] == 1.0, "{squares:?}");
        assert_eq!(SIGNED.round(&[0.0; 3], &mut codes[..3]), 0.0);
    }
}
