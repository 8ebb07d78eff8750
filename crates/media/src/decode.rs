//! Image files -> pixels of three colours, upright.
//!
//! Colours come as Hugging Face's processors have them of Pillow's images: what shows through lies on white, grey is repeated,
//! colours of 16 bits lose the lower 8. (Pillow whitens 16-bit grey instead of scaling it; that is not followed.) The orientation that a camera wrote down is carried out. Of an animation the first frame is taken.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::Error;
use crate::{exif, jpeg, read_gif, read_png, read_webp, size};

/// What an image may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Pixels in all. Decoding takes up to twelve times as many bytes.
    pub pixels: u64,
    /// Pixels of a side.
    pub side: u32,
}

impl Default for Limits {
    /// What scanners and telephones make stays below; models see a quarter of it at most.
    fn default() -> Limits {
        Limits { file_bytes: 64 << 20, pixels: 64 << 20, side: 32_768 }
    }
}

impl Limits {
    /// Refuses sides beyond the limits, and those that no processor takes. For decoders, before they take memory.
    pub(crate) fn check(&self, width: u32, height: u32) -> Result<(), Error> {
        if width.max(height) > self.side || u64::from(width) * u64::from(height) > self.pixels {
            return Err(Error::TooLarge { width, height, limit_side: self.side, limit_pixels: self.pixels });
        }
        size::check_ratio(height as usize, width as usize)
    }

    /// What a decoder may take beside its result, where it can be told.
    pub(crate) fn decoder_bytes(&self) -> usize {
        usize::try_from(self.pixels.saturating_mul(8)).unwrap_or(usize::MAX)
    }
}

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
pub fn read(path: &Path, limits: &Limits) -> Result<Rgb, Error> {
    // Looked at before opening: opening a pipe would wait for its writer.
    let found = std::fs::metadata(path)?;
    if !found.is_file() {
        return Err(Error::NotAFile { found: if found.is_dir() { "a folder" } else { "a device or pipe" } });
    }
    let too_large = |found_bytes| Err(Error::FileTooLarge { found_bytes, limit_bytes: limits.file_bytes });
    if found.len() > limits.file_bytes {
        return too_large(found.len());
    }
    let mut bytes = Vec::new();
    // The file may have grown since.
    File::open(path)?.take(limits.file_bytes + 1).read_to_end(&mut bytes)?;
    decode(&bytes, limits)
}

/// Decodes the bytes of an image's file; what kind it is they say themselves.
///
/// # Errors
/// When they are no image, one of a kind that is not read, damaged, or beyond the limits.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Rgb, Error> {
    let found_bytes = bytes.len() as u64;
    if found_bytes > limits.file_bytes {
        return Err(Error::FileTooLarge { found_bytes, limit_bytes: limits.file_bytes });
    }
    let (rgb, orientation) = match kind(bytes) {
        Kind::Png => read_png::decode(bytes, limits)?,
        Kind::Jpeg => jpeg::decode(bytes, limits)?,
        Kind::WebP => read_webp::decode(bytes, limits)?,
        Kind::Gif => (read_gif::decode(bytes, limits)?, 1),
        Kind::Other(found) => return Err(Error::Kind { found }),
    };
    Ok(exif::upright(rgb, orientation))
}

/// A colour of this alpha on white, in the integers of Pillow's `alpha_composite`.
pub(crate) fn over_white(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    let (own, white) = (u32::from(alpha) * 128, (255 - u32::from(alpha)) * 128);
    colour.map(|value| {
        let sum = u32::from(value) * own + 255 * white + 0x4000;
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    })
}

enum Kind {
    Png,
    Jpeg,
    WebP,
    Gif,
    Other(&'static str),
}

/// The kind of an image, by how its bytes begin.
fn kind(bytes: &[u8]) -> Kind {
    let box_of = |bytes: &[u8]| bytes.get(4..12).map(<[u8]>::to_vec);
    match bytes {
        [] => Kind::Other("an empty file"),
        [0x89, b'P', b'N', b'G', ..] => Kind::Png,
        [0xff, 0xd8, ..] => Kind::Jpeg,
        [b'G', b'I', b'F', b'8', ..] => Kind::Gif,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Kind::WebP,
        [b'B', b'M', ..] => Kind::Other("BMP"),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => Kind::Other("TIFF"),
        [0, 0, 1, 0, ..] => Kind::Other("an icon"),
        [b'%', b'P', b'D', b'F', ..] => Kind::Other("PDF"),
        [b'<', ..] => Kind::Other("SVG or HTML"),
        _ => match box_of(bytes).as_deref() {
            Some(b"ftypavif" | b"ftypavis") => Kind::Other("AVIF"),
            Some(b"ftypheic" | b"ftypheix" | b"ftypmif1" | b"ftyphevc") => Kind::Other("HEIC"),
            Some([b'f', b't', b'y', b'p', ..]) => Kind::Other("a film"),
            _ => Kind::Other("other bytes"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_kinds_are_named() {
        let cases: [(&[u8], &str); 6] = [
            (b"", "an empty file"),
            (b"BM1234", "BMP"),
            (b"\0\0\0\x1cftypavif", "AVIF"),
            (b"\0\0\0\x1cftypheic", "HEIC"),
            (b"<svg/>", "SVG"),
            (b"hello", "other bytes"),
        ];
        for (bytes, named) in cases {
            let error = decode(bytes, &Limits::default()).expect_err(named).to_string();
            assert!(error.contains(named) && error.contains("expected PNG, JPEG, WebP or GIF"), "{error}");
        }
    }

    #[test]
    fn what_shows_through_lies_on_white() {
        assert_eq!(over_white([10, 200, 255], 255), [10, 200, 255]);
        assert_eq!(over_white([10, 200, 255], 0), [255; 3]);
        // 0.5 * 10 + 0.5 * 255 and so on, rounded.
        assert_eq!(over_white([10, 200, 255], 128), [132, 227, 255]);
        for (value, alpha) in (0..=255).flat_map(|value| [1, 77, 254].map(|alpha| (value, alpha))) {
            let share = f64::from(alpha) / 255.0;
            let exact = f64::from(value) * share + 255.0 * (1.0 - share);
            assert!((f64::from(over_white([value; 3], alpha)[0]) - exact).abs() < 0.51, "{value} {alpha}");
        }
    }

    #[test]
    fn a_folder_and_a_missing_file_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(read(folder.path(), &Limits::default()), Err(Error::NotAFile { .. })));
        assert!(matches!(read(&folder.path().join("none"), &Limits::default()), Err(Error::Unreadable(_))));
    }
}
