//! Bicubic resizing with antialiasing, value for value as Pillow does it on 8-bit colours: first along rows, then along
//! columns, with weights in fixed point and colours rounded to 8 bits in between (Pillow, `Resample.c`). PyTorch's antialiased
//! bicubic on 8-bit tensors follows the same plan.

use crate::decode::Rgb;

/// Bits behind the point of a weight: 32 less the 8 of a colour and 2 for sums that overshoot.
const WEIGHT_BITS: u32 = 32 - 8 - 2;

/// For each result the sources that go into it.
struct Taps {
    /// The first source of each result, and how many follow.
    ranges: Vec<(usize, usize)>,
    /// Their weights, `stride` for each result.
    weights: Vec<i32>,
    stride: usize,
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
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let stride = support.ceil() as usize * 2 + 1;
        let (mut ranges, mut weights) = (Vec::with_capacity(results), vec![0; stride * results]);
        let mut own = Vec::with_capacity(stride);
        for (i, fixed) in weights.chunks_exact_mut(stride).enumerate() {
            let center = (i as f64 + 0.5) * scale;
            // Conversion cuts towards 0 and stops at 0.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(sources);
            own.clear();
            own.extend((first..end).map(|source| cubic((source as f64 - center + 0.5) / stretch)));
            let sum: f64 = own.iter().sum();
            for (fixed, weight) in fixed.iter_mut().zip(&own) {
                *fixed = (weight / sum * f64::from(1 << WEIGHT_BITS)).round() as i32;
            }
            ranges.push((first, end - first));
        }
        Taps { ranges, weights, stride }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let weights = self.weights.chunks_exact(self.stride);
        self.ranges.iter().zip(weights).map(|(&(first, count), weights)| (first, &weights[..count]))
    }
}

const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn rounded(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// Brings an image to a size. A side that has its length already is left alone.
///
/// # Panics
/// When a side, old or new, is 0.
pub fn resize(image: &Rgb, height: usize, width: usize) -> Rgb {
    assert!(image.height > 0 && image.width > 0 && height > 0 && width > 0, "sides of at least 1");
    let rows = match image.width == width {
        true => image.values.clone(),
        false => along_rows(image, width),
    };
    let values = match image.height == height {
        true => rows,
        false => along_columns(&rows, image.height, width, height),
    };
    Rgb { width, height, values }
}

/// (height, old width, 3) -> (height, width, 3)
fn along_rows(image: &Rgb, width: usize) -> Vec<u8> {
    let taps = Taps::new(image.width, width);
    let mut values = Vec::with_capacity(image.height * width * 3);
    for row in image.values.chunks_exact(image.width * 3) {
        for (first, weights) in taps.iter() {
            let mut sums = [HALF; 3];
            for (pixel, weight) in row[first * 3..].as_chunks::<3>().0.iter().zip(weights) {
                for (sum, &colour) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(colour) * weight;
                }
            }
            values.extend(sums.map(rounded));
        }
    }
    values
}

/// (old height, width, 3) -> (height, width, 3)
fn along_columns(rows: &[u8], old_height: usize, width: usize, height: usize) -> Vec<u8> {
    let taps = Taps::new(old_height, height);
    let (mut values, mut sums) = (Vec::with_capacity(height * width * 3), vec![0; width * 3]);
    for (first, weights) in taps.iter() {
        sums.fill(HALF);
        for (row, weight) in rows[first * width * 3..].chunks_exact(width * 3).zip(weights) {
            for (sum, &colour) in sums.iter_mut().zip(row) {
                *sum += i32::from(colour) * weight;
            }
        }
        values.extend(sums.iter().map(|&sum| rounded(sum)));
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
        for (w, h) in [(1, 1), (7, 3), (40, 200), (3, 5)] {
            let resized = resize(&plain(5, 9, [0, 128, 255]), h, w);
            assert_eq!(resized, plain(w, h, [0, 128, 255]));
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
}
