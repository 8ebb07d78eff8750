//! Floor 1: image files -> the patches that a vision tower reads, as Hugging Face's processors make them.
//!
//! Every file is treated as hostile: its kind, its sides and its number of pixels are judged before it is decoded, and memory
//! is bounded by them. What comes out are numbers and a grid. Not here: the tower (`qwenkit-models`), and where images stand in
//! a prompt (`qwenkit-engine`).
#![forbid(unsafe_code)]

mod decode;
mod error;
mod jpeg;
mod patches;
mod processor;
mod resample;
mod size;

pub use decode::{FILE_BYTES_MAX, PIXELS_MAX, Rgb, SIDE_MAX, decode, read};
pub use error::Error;
pub use patches::{ImageGrid, Patches};
pub use processor::Processor;
pub use resample::resize;
pub use size::smart_resize;
