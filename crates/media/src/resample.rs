//! Bicubic resizing with antialiasing, value for value as PyTorch does it on 8-bit colours, which is what torchvision's `resize`
//! in Hugging Face's processors comes to: first along rows, then along columns, rounded to 8 bits in between, with weights of 16
//! bits (`UpSampleKernelAVXAntialias.h`). Pillow does the same with weights of 22 bits and differs by one step here and there.

use crate::decode::Rgb;

/// Weights have to fit in 16 bits with their sign.
const WEIGHT_LIMIT: i64 = 1 << 15;
const WEIGHT_BITS_MAX: u32 = 22;

/// For each result the sources that go into it.
struct Taps {
    /// The first source of each result, and how many follow.
    ranges: Vec<(usize, usize)>,
    /// Their weights, `stride` for each result, with `bits` behind the point.
    weights: Vec<i32>,
    stride: usize,
    bits: u32,
}

/// Keys' cubic with a = -0.5, which has support 2.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

impl Taps {
    fn new(sources: usize, results: usize) -> Taps {
        let scale = sources as f64 / results as f64;
        // Shrinking stretches the filter over all sources that a result stands for.
        let (support, inverse) = if scale >= 1.0 { (2.0 * scale, 1.0 / scale) } else { (2.0, 1.0) };
        let stride = support.ceil() as usize * 2 + 1;
        let (mut ranges, mut exact) = (Vec::with_capacity(results), vec![0.0; stride * results]);
        for (i, own) in exact.chunks_exact_mut(stride).enumerate() {
            let center = scale * (i as f64 + 0.5);
            // Conversion cuts towards 0 and stops at 0.
            let first = (center - support + 0.5) as usize;
            let count = ((center + support + 0.5) as usize).min(sources) - first;
            let own = &mut own[..count];
            for (j, weight) in own.iter_mut().enumerate() {
                *weight = cubic(((j + first) as f64 - center + 0.5) * inverse);
            }
            let sum: f64 = own.iter().sum();
            own.iter_mut().for_each(|weight| *weight /= sum);
            ranges.push((first, count));
        }
        // As many bits as the largest weight leaves.
        let largest = exact.iter().copied().fold(0.0, f64::max);
        let fits = |bits: &u32| ((0.5 + largest * f64::from(1 << (bits + 1))) as i64) < WEIGHT_LIMIT;
        let bits = (0..WEIGHT_BITS_MAX).find(|bits| !fits(bits)).unwrap_or(WEIGHT_BITS_MAX);
        let fixed = |weight: f64| (weight * f64::from(1 << bits) + 0.5_f64.copysign(weight)) as i32;
        Taps { ranges, weights: exact.into_iter().map(fixed).collect(), stride, bits }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let weights = self.weights.chunks_exact(self.stride);
        self.ranges.iter().zip(weights).map(|(&(first, count), weights)| (first, &weights[..count]))
    }

    /// What sums begin with, so that cutting them rounds.
    fn half(&self) -> i32 {
        1 << (self.bits - 1)
    }

    fn rounded(&self, sum: i32) -> u8 {
        (sum >> self.bits).clamp(0, 255) as u8
    }
}

/// Brings an image to a size. A side that has its length already is left alone.
///
/// # Panics
/// When a side, old or new, is 0.
pub fn resize(image: &Rgb, height: usize, width: usize) -> Rgb {
    assert!(image.height > 0 && image.width > 0 && height > 0 && width > 0, "sides of at least 1");
    let rows = match image.width == width {
        true => None,
        false => Some(along_rows(image, width)),
    };
    let rows = rows.as_ref().unwrap_or(&image.values);
    let values = match image.height == height {
        true => rows.clone(),
        false => along_columns(rows, image.height, width, height),
    };
    Rgb { width, height, values }
}

/// (height, old width, 3) -> (height, width, 3)
fn along_rows(image: &Rgb, width: usize) -> Vec<u8> {
    let taps = Taps::new(image.width, width);
    let mut values = Vec::with_capacity(image.height * width * 3);
    for row in image.values.chunks_exact(image.width * 3) {
        let row = row.as_chunks::<3>().0;
        for (first, weights) in taps.iter() {
            let mut sums = [taps.half(); 3];
            for (pixel, weight) in row[first..].iter().zip(weights) {
                for (sum, &colour) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(colour) * weight;
                }
            }
            values.extend(sums.map(|sum| taps.rounded(sum)));
        }
    }
    values
}

/// (old height, width, 3) -> (height, width, 3)
fn along_columns(rows: &[u8], old_height: usize, width: usize, height: usize) -> Vec<u8> {
    let taps = Taps::new(old_height, height);
    let (mut values, mut sums) = (Vec::with_capacity(height * width * 3), vec![0; width * 3]);
    for (first, weights) in taps.iter() {
        sums.fill(taps.half());
        for (row, weight) in rows[first * width * 3..].chunks_exact(width * 3).zip(weights) {
            for (sum, &colour) in sums.iter_mut().zip(row) {
                *sum += i32::from(colour) * weight;
            }
        }
        values.extend(sums.iter().map(|&sum| taps.rounded(sum)));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(width: usize, height: usize, colour: [u8; 3]) -> Rgb {
        Rgb { width, height, values: colour.repeat(width * height) }
    }

    #[test]
    fn one_colour_stays_that_colour() {
        for (w, h) in [(1, 1), (7, 3), (40, 200), (3, 5), (5, 9)] {
            assert_eq!(resize(&plain(5, 9, [0, 128, 255]), h, w), plain(w, h, [0, 128, 255]));
        }
    }

    #[test]
    fn hard_edges_do_not_wrap() {
        let mut image = plain(8, 1, [0; 3]);
        image.values[12..].fill(255);
        let resized = resize(&image, 1, 32);
        let red: Vec<u8> = resized.values.iter().step_by(3).copied().collect();
        assert!(red[..13].iter().all(|&x| x < 20) && red[19..].iter().all(|&x| x > 235), "{red:?}");
    }

    #[test]
    fn extreme_ratios_keep_their_sums_within_range() {
        // One column of the largest image to one pixel, and back.
        let tall = resize(&plain(1, 32_768, [255; 3]), 1, 1);
        assert_eq!(tall, plain(1, 1, [255; 3]));
        assert_eq!(resize(&tall, 300, 2), plain(2, 300, [255; 3]));
    }
}
