//! WebP, with and without loss; of an animation the first frame. Decoding is the `image-webp` crate's.

use std::io::Cursor;

use image_webp::{DecodingError, WebPDecoder};

use crate::decode::{Limits, Rgb, over_white};
use crate::error::Error;
use crate::exif;

/// The pixels and the orientation.
pub(crate) fn decode(bytes: &[u8], limits: &Limits) -> Result<(Rgb, u8), Error> {
    // The decoder makes up what is missing at the end of lossy data.
    let stated =
        bytes.get(4..8).and_then(<[u8]>::first_chunk).map_or(0, |size| u64::from(u32::from_le_bytes(*size)) + 8);
    if (bytes.len() as u64) < stated {
        return Err(Error::cut_short(format!("{} bytes", bytes.len()), format!("{stated}")));
    }
    check_frames(bytes.get(12..).unwrap_or_default(), limits, true)?;
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    decoder.set_memory_limit(limits.decoder_bytes());
    let size = decoder.output_buffer_size().ok_or_else(|| Error::damaged("its size does not fit in memory"))?;
    let mut values = vec![0; size];
    decoder.read_image(&mut values).map_err(failed)?;
    if decoder.has_alpha() {
        values = values.as_chunks().0.iter().flat_map(|&[r, g, b, alpha]| over_white([r, g, b], alpha)).collect();
    }
    let orientation = decoder.exif_metadata().ok().flatten().map_or(1, |data| exif::orientation(&data));
    Ok((Rgb { width: width as usize, height: height as usize, values }, orientation))
}

/// Holds the sides that frames state for themselves to the limits: the decoder takes memory for a frame before it compares
/// it with the file's own sides. `bytes` are chunks; those of an animation's frame are looked into, not those inside them.
fn check_frames(mut bytes: &[u8], limits: &Limits, enters: bool) -> Result<(), Error> {
    while let Some((&[a, b, c, d, s0, s1, s2, s3], rest)) = bytes.split_first_chunk::<8>() {
        let size = u32::from_le_bytes([s0, s1, s2, s3]) as usize;
        let data = rest.get(..size).unwrap_or(rest);
        match (&[a, b, c, d], data) {
            // A tag of three bytes and a start code stand before the sides, whose upper two bits are a scale.
            (b"VP8 ", [_, _, _, _, _, _, w0, w1, h0, h1, ..]) => {
                let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
                limits.check(side(*w0, *w1), side(*h0, *h1))?;
            }
            // Behind a signature, 14 bits each, less one.
            (b"VP8L", [_, b0, b1, b2, b3, ..]) => {
                let bits = u32::from_le_bytes([*b0, *b1, *b2, *b3]);
                limits.check((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1)?;
            }
            (b"ANMF", _) if enters => check_frames(data.get(16..).unwrap_or_default(), limits, false)?,
            _ => {}
        }
        bytes = rest.get(size.saturating_add(size & 1)..).unwrap_or_default();
    }
    Ok(())
}

fn failed(error: DecodingError) -> Error {
    match error {
        DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::cut_short("the end of the file", "the rest of the WebP")
        }
        DecodingError::MemoryLimitExceeded => Error::damaged("decoding it takes more memory than its pixels"),
        other => Error::damaged(other),
    }
}
