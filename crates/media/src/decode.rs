//! Image files -> pixels of three colours, upright.
//!
//! Colours come as Pillow's `convert("RGB")` gives them to Hugging Face's processors: alpha is dropped and not blended with a
//! background, grey is repeated, 16 bits lose the lower 8. The orientation that a camera wrote into EXIF is carried out. Of an
//! animation the first frame is taken.

use std::io::{Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::error::Error;
use crate::jpeg;

/// The largest file that is read.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// The most pixels that are decoded. Scanners and telephones stay below it; models see at most a quarter.
pub const PIXELS_MAX: u64 = 64 << 20;
/// The longest side.
pub const SIDE_MAX: u32 = 32_768;
/// What a decoder may take: the largest image, in four colours of 16 bits.
const DECODER_BYTES_MAX: u64 = PIXELS_MAX * 8;

/// Pixels of three colours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels from left to right.
    pub width: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// (height, width, 3)
    pub values: Vec<u8>,
}

/// Reads an image's file.
///
/// # Errors
/// When it cannot be read, and as `decode`.
pub fn read(path: &Path) -> Result<Rgb, Error> {
    let unreadable = |source| Error::Unreadable { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    decode(&bytes)
}

/// Decodes the bytes of an image's file; what kind it is they say themselves.
///
/// # Errors
/// When they are no image, one of a kind that is not known, damaged, or too large.
pub fn decode(bytes: &[u8]) -> Result<Rgb, Error> {
    let found_bytes = bytes.len() as u64;
    if found_bytes > FILE_BYTES_MAX {
        return Err(Error::FileTooLarge { found_bytes, max_bytes: FILE_BYTES_MAX });
    }
    let format = kind(bytes)?;
    let (mut image, orientation) = match format {
        ImageFormat::Jpeg => jpeg::decode(bytes)?,
        _ => decode_as(format, bytes)?,
    };
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Rgb { width, height, values: colours(image) })
}

/// Decodes PNG, WebP and GIF.
fn decode_as(format: ImageFormat, bytes: &[u8]) -> Result<(DynamicImage, Option<Orientation>), Error> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    // Sides are judged below, with words of our own.
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(DECODER_BYTES_MAX);
    reader.limits(limits);
    let damaged = |error: image::ImageError| Error::Damaged { what: error.to_string() };
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    check_sides(width, height)?;
    // An orientation that cannot be read is none, as everywhere.
    let orientation = decoder.orientation().ok();
    Ok((DynamicImage::from_decoder(decoder).map_err(damaged)?, orientation))
}

/// Refuses an image by its sides, before it is decoded.
pub(crate) fn check_sides(width: u32, height: u32) -> Result<(), Error> {
    if width.max(height) > SIDE_MAX || u64::from(width) * u64::from(height) > PIXELS_MAX {
        return Err(Error::TooLarge { width, height, side_max: SIDE_MAX, pixels_max: PIXELS_MAX });
    }
    crate::size::check_ratio(height as usize, width as usize)
}

/// The kind of an image, by how its bytes begin.
fn kind(bytes: &[u8]) -> Result<ImageFormat, Error> {
    let known = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif];
    match image::guess_format(bytes) {
        Ok(format) if known.contains(&format) => Ok(format),
        Ok(format) => Err(Error::Kind { found: format!("{format:?}") }),
        Err(_) if bytes.is_empty() => Err(Error::Kind { found: "an empty file".to_owned() }),
        Err(_) => Err(Error::Kind { found: "other bytes".to_owned() }),
    }
}

/// Three colours of 8 bits: (height, width, 3).
fn colours(image: DynamicImage) -> Vec<u8> {
    let high = |values: &[u16], channels: usize| -> Vec<u8> {
        // One and two channels are grey, without and with alpha.
        let colour = |pixel: &[u16], c: usize| (pixel[if channels < 3 { 0 } else { c }] >> 8) as u8;
        values.chunks_exact(channels).flat_map(|pixel| [0, 1, 2].map(|c| colour(pixel, c))).collect()
    };
    match image {
        DynamicImage::ImageLuma16(image) => high(image.as_raw(), 1),
        DynamicImage::ImageLumaA16(image) => high(image.as_raw(), 2),
        DynamicImage::ImageRgb16(image) => high(image.as_raw(), 3),
        DynamicImage::ImageRgba16(image) => high(image.as_raw(), 4),
        other => other.into_rgb8().into_raw(),
    }
}
