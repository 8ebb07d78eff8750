//! Pixels -> patches: brought to size, normalised, cut, and put into the order that towers read.

use crate::decode::Rgb;
use crate::error::Error;
use crate::processor::Processor;
use crate::resample::resize;
use crate::size::smart_resize;

/// How many patches an image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGrid {
    /// In time; 1 for an image.
    pub steps: usize,
    /// From top to bottom.
    pub rows: usize,
    /// From left to right.
    pub cols: usize,
}

/// An image as a vision tower reads it: `pixel_values` and one row of `image_grid_thw`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patches {
    /// (patches, 3 * temporal_patch_size * patch_size * patch_size), the patches of one merged square one after the other.
    pub values: Vec<f32>,
    /// How many there are.
    pub grid: ImageGrid,
}

impl Processor {
    /// The patches of an image.
    ///
    /// # Errors
    /// When a number of the processor is out of range, or the image is hardly more than a line.
    pub fn patches(&self, image: &Rgb) -> Result<Patches, Error> {
        self.check()?;
        let (height, width) = smart_resize(image.height, image.width, self.factor(), self.min_pixels, self.max_pixels)?;
        Ok(self.cut(&resize(image, height, width)))
    }

    /// (height, width, 3) -> (rows / m, cols / m, m, m, 3, frames, p, p); sides are multiples of `factor`.
    fn cut(&self, image: &Rgb) -> Patches {
        let (p, m) = (self.patch_size, self.merge_size);
        let (rows, cols) = (image.height / p, image.width / p);
        let table = self.normalised();
        let mut values = Vec::with_capacity(image.values.len() * self.temporal_patch_size);
        let squares = (0..rows / m).flat_map(|row| (0..cols / m).map(move |col| (row * m, col * m)));
        for (top, left) in squares {
            for (row, col) in (top..top + m).flat_map(|row| (left..left + m).map(move |col| (row, col))) {
                for (c, table) in table.iter().enumerate() {
                    let first = values.len();
                    for y in row * p..(row + 1) * p {
                        let start = (y * image.width + col * p) * 3;
                        let line = image.values[start..start + p * 3].as_chunks::<3>().0;
                        values.extend(line.iter().map(|pixel| table[usize::from(pixel[c])]));
                    }
                    let frame = first..values.len();
                    for _ in 1..self.temporal_patch_size {
                        values.extend_from_within(frame.clone());
                    }
                }
            }
        }
        Patches { values, grid: ImageGrid { steps: 1, rows, cols } }
    }

    /// What each colour from 0 to 255 becomes: division by 255 and normalisation in one step, as the processors fuse it.
    fn normalised(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|c| {
            let (mean, std) = (self.image_mean[c] * 255.0, self.image_std[c] * 255.0);
            std::array::from_fn(|colour| (colour as f32 - mean) / std)
        })
    }
}
