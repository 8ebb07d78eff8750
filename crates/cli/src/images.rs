//! Images and films that are named on the command line, as patches.
//!
//! Not here: how they are decoded and cut (`qwenkit-media`), where they stand in a prompt (`qwenkit-engine`).

use std::path::Path;

use anyhow::anyhow;
use qwenkit_formats::Config;
use qwenkit_media::{Limits, Patches, Processor, read, read_film};

/// What a path of the command line names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file.
    Image,
    /// A folder, whose files are its frames.
    Film,
}

/// The patches of the image or the film at `path`.
///
/// # Errors
/// When it cannot be read or cut; the message names it.
pub(crate) fn patches(processor: &Processor, path: &Path) -> anyhow::Result<(Kind, Patches)> {
    let limits = Limits::default();
    let found = match path.is_dir() {
        true => read_film(path, &limits).and_then(|frames| Ok((Kind::Film, processor.film(&frames)?))),
        false => read(path, &limits).and_then(|image| Ok((Kind::Image, processor.image(&image)?))),
    };
    found.map_err(|error| anyhow!("{}: {error}", path.display()))
}

/// The processor whose numbers are in the file at `path`.
///
/// # Errors
/// When it cannot be read, or a number is missing or out of range.
pub(crate) fn processor(path: &Path) -> anyhow::Result<Processor> {
    let config = Config::open(path)?;
    Processor::from_json(config.value()).map_err(|error| anyhow!("{}: {error}", path.display()))
}
