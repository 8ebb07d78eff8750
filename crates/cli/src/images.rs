//! Images and films that are named on the command line: read, cut into patches, made parts of a message.
//!
//! Not here: how they are decoded and cut (`qwenkit-media`), where they stand in a prompt (`qwenkit-engine`).

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use qwenkit_engine::{Picture, Session, Visual};
use qwenkit_formats::Config;
use qwenkit_media::{Limits, Patches, Processor, Rgb, read, read_film};
use serde_json::{Value, json};

use crate::terminal;

/// Frames of a film for each second where nothing else is said; what the processors of films take.
pub(crate) const FRAMES_PER_SECOND: f32 = 2.0;

/// What a path of the command line holds.
pub(crate) struct Named {
    path: PathBuf,
    pub(crate) content: Content,
}

/// Pixels.
pub(crate) enum Content {
    /// Of a file.
    Image(Rgb),
    /// Of a folder, whose files are the frames.
    Film(Vec<Rgb>),
}

/// Reads the image or the film at `path`.
///
/// # Errors
/// When it cannot be read; the message names it.
pub(crate) fn open(path: &Path) -> anyhow::Result<Named> {
    let limits = Limits::default();
    let content = match path.is_dir() {
        true => read_film(path, &limits).map(Content::Film),
        false => read(path, &limits).map(Content::Image),
    };
    let content = content.map_err(|error| anyhow!("{}: {error}", path.display()))?;
    Ok(Named { path: path.to_owned(), content })
}

impl Named {
    /// Its patches.
    ///
    /// # Errors
    /// When it cannot be cut; the message names it.
    pub(crate) fn patches(&self, processor: &Processor) -> anyhow::Result<Patches> {
        let patches = match &self.content {
            Content::Image(image) => processor.image(image),
            Content::Film(frames) => processor.film(frames),
        };
        patches.map_err(|error| anyhow!("{}: {error}", self.path.display()))
    }

    /// Makes it ready for the model of `session`, and says how many tokens it takes.
    ///
    /// # Errors
    /// When the model reads text only, or the image cannot be cut.
    pub(crate) fn show(&self, session: &Session, frames_per_second: f32) -> anyhow::Result<Shown> {
        let pictures = session.pictures()?;
        let picture = match &self.content {
            Content::Image(image) => pictures.image(image, None),
            Content::Film(frames) => pictures.film(frames, frames_per_second),
        };
        let picture = picture.map_err(|error| anyhow!("{}: {error}", self.path.display()))?;
        let (grid, tokens) = (picture.grid, picture.tokens);
        terminal::note(&described(&self.path, [grid.steps, grid.rows, grid.cols], tokens));
        Ok(Shown { path: self.path.clone(), picture })
    }
}

/// What is said of an image before anything is computed.
pub(crate) fn described(path: &Path, [steps, rows, cols]: [usize; 3], tokens: usize) -> String {
    format!("{}: {steps} x {rows} x {cols} patches, {tokens} tokens", path.display())
}

/// An image or a film that is ready for a message.
pub(crate) struct Shown {
    path: PathBuf,
    pub(crate) picture: Picture,
}

/// The content of a message: images first, then the text.
pub(crate) fn content(shown: &[Shown], text: &str) -> Value {
    if shown.is_empty() {
        return json!(text);
    }
    let part = |shown: &Shown| {
        let kind = shown.picture.part_type();
        let mut part = json!({ "type": kind, kind: shown.path.display().to_string() });
        if !shown.picture.times.is_empty() {
            part["times"] = json!(shown.picture.times);
        }
        part
    };
    shown.iter().map(part).chain([json!({ "type": "text", "text": text })]).collect()
}

/// The visuals of several, in their order.
pub(crate) fn visuals(shown: &[Shown]) -> impl Iterator<Item = Visual> + '_ {
    shown.iter().flat_map(|shown| shown.picture.visuals.iter().cloned())
}

/// The processor whose numbers are in the file at `path`.
///
/// # Errors
/// When it cannot be read, or a number is missing or out of range.
pub(crate) fn processor(path: &Path) -> anyhow::Result<Processor> {
    let config = Config::open(path)?;
    Processor::from_json(config.value()).map_err(|error| anyhow!("{}: {error}", path.display()))
}

/// A number of frames above 0 that leaves a step a length.
pub(crate) fn frames_per_second(text: &str) -> Result<f32, String> {
    let fps: Option<f32> = text.parse().ok().filter(|fps| (0.001..=1000.0).contains(fps));
    fps.ok_or_else(|| "expected a number from 0.001 to 1000".to_owned())
}
