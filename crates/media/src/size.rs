//! The size that an image is brought to: `smart_resize` of Qwen's processors.

use crate::error::Error;

/// The largest ratio of the sides that the processors take.
const RATIO_MAX: usize = 200;

/// Refuses an image without pixels, and one that is hardly more than a line.
pub(crate) fn check_ratio(height: usize, width: usize) -> Result<(), Error> {
    let (short, long) = (height.min(width), height.max(width));
    match short == 0 || long > short.saturating_mul(RATIO_MAX) {
        true => Err(Error::Narrow { width, height }),
        false => Ok(()),
    }
}

/// Height and width that are multiples of `factor`, of at least `min_pixels` and at most `max_pixels` in all where that is
/// possible, with the ratio kept as well as that allows (transformers, `models/qwen2_vl`). Halves are rounded to even, as
/// Python does it.
///
/// # Errors
/// When the longer side is more than 200 times the shorter, or one is 0.
pub(crate) fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize), Error> {
    film_resize(Film { frames: 1, steps: 1 }, (height, width), factor, min_pixels, max_pixels)
}

/// How far a film reaches in time.
#[derive(Clone, Copy)]
pub(crate) struct Film {
    /// Frames that there are.
    pub(crate) frames: usize,
    /// Frames when the last is repeated to fill a patch.
    pub(crate) steps: usize,
}

/// The same with the limits for all frames together (transformers, `models/qwen3_vl`, the processor of films).
pub(crate) fn film_resize(
    film: Film,
    (height, width): (usize, usize),
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize), Error> {
    check_ratio(height, width)?;
    let (h, w, unit) = (height as f64, width as f64, factor as f64);
    let units = |count: f64| count as usize * factor;
    let (near_h, near_w) = (units((h / unit).round_ties_even()), units((w / unit).round_ties_even()));
    let pixels = film.steps * near_h * near_w;
    // A product of integers, as in Python; below 2^53 it is exact.
    let all = (film.frames * height * width) as f64;
    Ok(if pixels > max_pixels {
        let beta = (all / max_pixels as f64).sqrt();
        let fit = |side: f64| factor.max(units((side / beta / unit).floor()));
        (fit(h), fit(w))
    } else if pixels < min_pixels {
        let beta = (min_pixels as f64 / all).sqrt();
        let fit = |side: f64| units((side * beta / unit).ceil());
        (fit(h), fit(w))
    } else {
        // Only where no least number of pixels was asked for can a side come out as nothing.
        (near_h.max(factor), near_w.max(factor))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_go_to_even() {
        // 70 / 28 = 2.5 -> 2, 98 / 28 = 3.5 -> 4
        assert_eq!(smart_resize(70, 98, 28, 1, 1 << 20).expect("fits"), (56, 112));
    }

    #[test]
    fn limits_are_kept_and_lines_refused() {
        assert_eq!(smart_resize(1000, 1000, 28, 3136, 50_176).expect("fits"), (224, 224));
        assert_eq!(smart_resize(1, 1, 28, 3136, 50_176).expect("fits"), (56, 56));
        assert_eq!(smart_resize(5, 5, 28, 0, 50_176).expect("fits"), (28, 28));
        assert_eq!(smart_resize(1, 200, 28, 3136, 50_176).expect("fits"), (28, 812));
        assert!(smart_resize(1, 201, 28, 3136, 50_176).is_err());
        assert!(smart_resize(0, 10, 28, 3136, 50_176).is_err());
    }
}
