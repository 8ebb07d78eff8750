//! Pixels -> patches: brought to size, normalised, cut, and put into the order that towers read.

use std::borrow::Cow;

use crate::decode::Rgb;
use crate::error::Error;
use crate::processor::{FilmBounds, Processor};
use crate::resample::resize;
use crate::size::{Film, film_resize, smart_resize};

/// As many frames as the processors of films take at most.
pub(crate) const FRAMES_MAX: usize = 768;

/// How many patches an image or a film has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchGrid {
    /// In time; 1 for an image.
    pub steps: usize,
    /// From top to bottom.
    pub rows: usize,
    /// From left to right.
    pub cols: usize,
}

/// An image or a film as a vision tower reads it: `pixel_values` and one row of `image_grid_thw`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patches {
    /// (patches, 3 * temporal_patch_size * patch_size * patch_size), the patches of one merged square one after the other.
    pub values: Vec<f32>,
    /// How many there are.
    pub grid: PatchGrid,
}

impl Processor {
    /// The patches of an image.
    ///
    /// # Errors
    /// When a number of the processor is out of range, or the image is hardly more than a line.
    pub fn image(&self, image: &Rgb) -> Result<Patches, Error> {
        self.check()?;
        let (height, width) = smart_resize(image.height, image.width, self.factor(), self.min_pixels, self.max_pixels)?;
        let frame = resized(image, height, width);
        let frames = vec![&*frame; self.temporal_patch_size];
        Ok(self.cut(&frames))
    }

    /// The patches of a film. The last frame is repeated where patches reach beyond it.
    ///
    /// # Errors
    /// As `image`, and when there is no frame, there are too many, or one has another size than the first.
    pub fn film(&self, frames: &[Rgb]) -> Result<Patches, Error> {
        self.check()?;
        let (Some(first), 1..=FRAMES_MAX) = (frames.first(), frames.len()) else {
            return Err(Error::Frames { found: frames.len(), limit: FRAMES_MAX });
        };
        let size = |frame: &Rgb| format!("{} x {}", frame.width, frame.height);
        if let Some((i, other)) = frames.iter().enumerate().find(|(_, frame)| size(frame) != size(first)) {
            return Err(Error::Frame { frame: i + 1, found: size(other), expected: size(first) });
        }
        let steps = frames.len().next_multiple_of(self.temporal_patch_size);
        let (film, min, max) = match self.films {
            FilmBounds::Frame { min_pixels, max_pixels } => (Film { frames: 1, steps: 1 }, min_pixels, max_pixels),
            FilmBounds::Film { min_pixels, max_pixels } => {
                (Film { frames: frames.len(), steps }, min_pixels, max_pixels)
            }
        };
        let (height, width) = film_resize(film, (first.height, first.width), self.factor(), min, max)?;
        let ready: Vec<Cow<Rgb>> = frames.iter().map(|frame| resized(frame, height, width)).collect();
        let frames: Vec<&Rgb> = (0..steps).map(|i| &*ready[i.min(ready.len() - 1)]).collect();
        Ok(self.cut(&frames))
    }

    /// (frames, height, width, 3) -> (steps, rows / m, cols / m, m, m, 3, frames of a patch, p, p); sides are multiples of
    /// `factor`, and frames of `temporal_patch_size`.
    fn cut(&self, frames: &[&Rgb]) -> Patches {
        let (p, m) = (self.patch_size, self.merge_size);
        let (height, width) = (frames[0].height, frames[0].width);
        let (steps, rows, cols) = (frames.len() / self.temporal_patch_size, height / p, width / p);
        let table = self.normalised();
        let mut values = Vec::with_capacity(frames.len() * height * width * 3);
        for frames in frames.chunks_exact(self.temporal_patch_size) {
            let squares = (0..rows / m).flat_map(|row| (0..cols / m).map(move |col| (row * m, col * m)));
            let patches = squares.flat_map(|(top, left)| {
                (top..top + m).flat_map(move |row| (left..left + m).map(move |col| (row, col)))
            });
            for (row, col) in patches {
                for (c, table) in table.iter().enumerate() {
                    for frame in frames {
                        for y in row * p..(row + 1) * p {
                            let start = (y * width + col * p) * 3;
                            let line = frame.values[start..start + p * 3].as_chunks::<3>().0;
                            values.extend(line.iter().map(|pixel| table[usize::from(pixel[c])]));
                        }
                    }
                }
            }
        }
        Patches { values, grid: PatchGrid { steps, rows, cols } }
    }

    /// What each colour from 0 to 255 becomes: division by 255 and normalisation in one step, as the processors fuse it.
    fn normalised(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|c| {
            let (mean, std) = (self.image_mean[c] * 255.0, self.image_std[c] * 255.0);
            std::array::from_fn(|colour| (colour as f32 - mean) / std)
        })
    }
}

fn resized(image: &Rgb, height: usize, width: usize) -> Cow<'_, Rgb> {
    match (image.height, image.width) == (height, width) {
        true => Cow::Borrowed(image),
        false => Cow::Owned(resize(image, height, width)),
    }
}
