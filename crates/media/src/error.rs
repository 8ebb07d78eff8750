//! What can be wrong with an image or with the numbers of a processor.

use std::path::PathBuf;

/// Why an image does not become patches.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read image `{}`: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is larger than any image that is taken.
    #[error(
        "the image's file is too large: found {found_bytes} bytes, expected at most {max_bytes}\n\
         hint: save it smaller; models see a few million pixels at most"
    )]
    FileTooLarge {
        /// Bytes of the file, as far as they were counted.
        found_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The bytes are no image of a known kind.
    #[error(
        "this is no image that can be read: found {found}, expected PNG, JPEG, WebP or GIF\nhint: convert it to one of these"
    )]
    Kind {
        /// What the bytes look like.
        found: String,
    },
    /// The image has more pixels than are taken, or a longer side.
    #[error(
        "the image is too large: found {width} x {height} pixels, expected sides of at most {side_max} and at most \
         {pixels_max} pixels\nhint: scale it down first"
    )]
    TooLarge {
        /// Pixels from left to right.
        width: u32,
        /// Pixels from top to bottom.
        height: u32,
        /// The limit of a side.
        side_max: u32,
        /// The limit of all.
        pixels_max: u64,
    },
    /// The image is empty, or so narrow that the processor takes it for a mistake.
    #[error(
        "the image's sides do not fit: found {width} x {height} pixels, expected sides of at least 1 whose ratio is at most \
         200\nhint: cut it into pieces"
    )]
    Narrow {
        /// Pixels from left to right.
        width: usize,
        /// Pixels from top to bottom.
        height: usize,
    },
    /// The file is damaged, cut off, or of a kind within its format that is not known.
    #[error("the image cannot be decoded: {what}\nhint: the file is damaged or incomplete; save it anew")]
    Damaged {
        /// What the decoder says.
        what: String,
    },
    /// A number of a processor is missing or out of range.
    #[error("the image processor's `{field}`: found {found}, expected {expected}")]
    Processor {
        /// The field, as preprocessor_config.json names it.
        field: &'static str,
        /// What stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },
}
