//! WebP, with and without loss; of an animation the first frame. Decoding is the `image-webp` crate's.

use std::io::Cursor;

use image_webp::{DecodingError, WebPDecoder};

use crate::decode::{Limits, Rgb};
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
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    decoder.set_memory_limit(limits.decoder_bytes());
    let size = decoder.output_buffer_size().ok_or_else(|| Error::damaged("its size does not fit in memory"))?;
    let mut values = vec![0; size];
    decoder.read_image(&mut values).map_err(failed)?;
    if decoder.has_alpha() {
        values = values.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
    }
    let orientation = decoder.exif_metadata().ok().flatten().map_or(1, |data| exif::orientation(&data));
    Ok((Rgb { width: width as usize, height: height as usize, values }, orientation))
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
