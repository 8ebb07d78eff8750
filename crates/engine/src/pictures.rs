//! Images and films of people, made ready for one model: patches for its tower, and the part of a message that stands for them.
//!
//! Not here: how files are decoded and cut (`qwenkit-media`), where patches stand in a prompt (`vision`).

use qwenkit_media::{Patches, Processor, Rgb};
use qwenkit_models::{Grid, Pixels};

use crate::{
    error::Error,
    vision::{VisionInfo, Visual, VisualKind},
};

/// Makes a model's visuals of images.
#[derive(Clone, Copy, Debug)]
pub struct Pictures<'a> {
    pub(crate) processor: &'a Processor,
    pub(crate) vision: &'a VisionInfo,
}

/// An image or a film, ready to be shown to a model.
#[derive(Clone, Debug)]
pub struct Picture {
    /// What the tower looks at: one, or of a film as many as the model is told times.
    pub visuals: Vec<Visual>,
    /// Seconds of each step of a film, for models that are told them.
    pub times: Vec<f64>,
    /// Patches: (steps, rows, columns).
    pub grid: Grid,
    /// Tokens of the prompt that it takes, words about times aside.
    pub tokens: usize,
    is_film: bool,
}

impl Picture {
    /// The word for it in the `type` of a message's part.
    pub fn part_type(&self) -> &'static str {
        if self.is_film { "video" } else { "image" }
    }
}

impl Pictures<'_> {
    /// An image, brought to at most `most_pixels`; to as many as the model takes where absent.
    ///
    /// # Errors
    /// When it is hardly more than a line.
    pub fn image(&self, image: &Rgb, most_pixels: Option<usize>) -> Result<Picture, Error> {
        let patches = match most_pixels.filter(|&most| most < self.processor.max_pixels) {
            None => self.processor.image(image)?,
            Some(most) => {
                let max_pixels = most.max(self.processor.min_pixels);
                Processor { max_pixels, ..self.processor.clone() }.image(image)?
            }
        };
        self.picture(patches, VisualKind::Image)
    }

    /// A film of frames, so many of which were taken in a second.
    ///
    /// # Errors
    /// When there are no frames, too many, or of several sizes.
    pub fn film(&self, frames: &[Rgb], frames_per_second: f32) -> Result<Picture, Error> {
        let patches = self.processor.film(frames)?;
        let each = self.processor.temporal_patch_size;
        let seconds_per_step = each as f32 / frames_per_second;
        let mut picture = self.picture(patches, VisualKind::Film { seconds_per_step })?;
        if self.vision.plan.films_by_step {
            // The middle of the step's first and last frame; the film's last frame may be repeated.
            let frame = |i: usize| i.min(frames.len() - 1) as f64 / f64::from(frames_per_second);
            let middle = |step: usize| (frame(step * each) + frame((step + 1) * each - 1)) / 2.0;
            picture.times = (0..picture.grid.steps).map(middle).collect();
        }
        Ok(picture)
    }

    fn picture(&self, patches: Patches, kind: VisualKind) -> Result<Picture, Error> {
        let grid = Grid { steps: patches.grid.steps, rows: patches.grid.rows, cols: patches.grid.cols };
        let visuals = self.vision.visuals(Pixels { values: patches.values, grid }, kind)?;
        let tokens = visuals.iter().map(|visual| self.vision.tokens(visual)).sum();
        Ok(Picture { visuals, times: Vec::new(), grid, tokens, is_film: kind != VisualKind::Image })
    }
}
