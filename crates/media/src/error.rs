//! What can be wrong with an image or with the numbers of a processor: what was found, what was expected, what to do.
//!
//! Messages speak of "the image"; whoever knows its name puts it in front.

use std::io;

/// Why an image does not become patches.
#[allow(missing_docs)] // the message above each variant is its documentation, and the fields carry its names
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the image cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    #[error("the image is no file: found {found}, expected a PNG, JPEG, WebP or GIF file")]
    NotAFile { found: &'static str },
    #[error(
        "the image's file is too large: found {found_bytes} bytes or more, expected at most {limit_bytes}\n\
         hint: save it smaller; models see a few million pixels at most"
    )]
    FileTooLarge { found_bytes: u64, limit_bytes: u64 },
    #[error(
        "this is no image that can be read: found {found}, expected PNG, JPEG, WebP or GIF\nhint: convert it to one of these"
    )]
    Kind { found: &'static str },
    #[error(
        "the image is too large: found {width} x {height} pixels, expected sides of at most {limit_side} and at most \
         {limit_pixels} pixels in all\nhint: scale it down first"
    )]
    TooLarge { width: u32, height: u32, limit_side: u32, limit_pixels: u64 },
    #[error(
        "the image cannot be used: found {width} x {height} pixels, expected sides of at least 1, the longer at most 200 times \
         the shorter\nhint: cut it into pieces"
    )]
    Narrow { width: usize, height: usize },
    #[error("the image is cut short: found {found}, expected {expected}\nhint: fetch or save it anew")]
    CutShort { found: String, expected: String },
    #[error("the image is damaged: {problem}\nhint: fetch or save it anew")]
    Damaged { problem: String },
    #[error("the image has a form that is not read: found {found}, expected {expected}\nhint: save it anew as PNG")]
    Form { found: String, expected: &'static str },
    #[error(
        "frames of a film have one size: found {found} pixels in frame {frame}, expected {expected} as in the first"
    )]
    Frame { frame: usize, found: String, expected: String },
    #[error("the film has {found} frames, expected 1 to {limit}\nhint: take fewer frames for each second")]
    Frames { found: usize, limit: usize },
    #[error("frame `{name}` of the film: {source}")]
    OfFilm { name: String, source: Box<Error> },
    #[error(
        "the film is too large: found {found} pixels in its first frames, expected at most {limit} in all\nhint: scale frames down"
    )]
    FilmTooLarge { found: usize, limit: usize },
    #[error("image processor: `{field}`: found {found}, expected {expected}")]
    Processor { field: &'static str, found: String, expected: String },
}

impl Error {
    pub(crate) fn damaged(problem: impl ToString) -> Error {
        Error::Damaged { problem: problem.to_string() }
    }

    pub(crate) fn cut_short(found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::CutShort { found: found.into(), expected: expected.into() }
    }
}
