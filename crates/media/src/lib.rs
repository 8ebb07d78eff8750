//! Floor 1: image files -> the patches that a vision tower reads, as Hugging Face's processors make them.
//!
//! Every file is treated as hostile: its kind, its sides and its pixels are judged before anything is decoded, and memory is
//! bounded by them. What comes out are numbers and a grid, the same on every machine. Not here: the tower (`qwenkit-models`),
//! and where images stand in a prompt (`qwenkit-engine`).
#![forbid(unsafe_code)]

mod decode;
mod error;
mod exif;
mod film;
mod jpeg;
mod patches;
mod processor;
mod read_gif;
mod read_png;
mod read_webp;
mod resample;
mod size;

pub use decode::{Limits, Rgb, decode, read};
pub use error::Error;
pub use film::read_film;
pub use patches::{PatchGrid, Patches};
pub use processor::{FilmBounds, Processor};
pub use resample::resize;
