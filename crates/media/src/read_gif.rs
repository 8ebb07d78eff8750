//! GIF: the first frame on its screen. Decompressing is the `gif` crate's.
//!
//! What the frame leaves free is transparent, which lies on white, where the frame knows transparency; else it has the first colour
//! of the palette, as in Pillow.

use std::io::Cursor;

use ::gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use crate::decode::{Limits, Rgb};
use crate::error::Error;

/// The pixels.
pub(crate) fn decode(bytes: &[u8], limits: &Limits) -> Result<Rgb, Error> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    if let Ok(bound) = (limits.decoder_bytes() as u64).try_into() {
        options.set_memory_limit(MemoryLimit::Bytes(bound));
    }
    let mut decoder = options.read_info(Cursor::new(bytes)).map_err(failed)?;
    let (screen_width, screen_height) = (decoder.width(), decoder.height());
    limits.check(screen_width.into(), screen_height.into())?;
    let Some(frame) = decoder.next_frame_info().map_err(failed)? else {
        return Err(Error::cut_short("no frame", "one at least"));
    };
    let [left, top, wide, high] = [frame.left, frame.top, frame.width, frame.height].map(usize::from);
    let (transparent, own_palette) = (frame.transparent, frame.palette.clone());
    // A frame that reaches beyond its screen widens it.
    let (width, height) = (usize::from(screen_width).max(left + wide), usize::from(screen_height).max(top + high));
    limits.check(width as u32, height as u32)?;
    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(failed)?;
    let palette = own_palette.or_else(|| decoder.global_palette().map(<[u8]>::to_vec));
    let colour = |index: u8| match &palette {
        _ if Some(index) == transparent => [255; 3],
        Some(palette) => palette.as_chunks::<3>().0.get(usize::from(index)).copied().unwrap_or_default(),
        None => [index; 3],
    };
    let mut values = colour(transparent.unwrap_or(0)).repeat(width * height);
    if wide > 0 {
        for (y, row) in indices.chunks_exact(wide).take(high).enumerate() {
            let start = ((top + y) * width + left) * 3;
            let place = values[start..start + wide * 3].as_chunks_mut::<3>().0;
            place.iter_mut().zip(row).for_each(|(pixel, &index)| *pixel = colour(index));
        }
    }
    Ok(Rgb { width, height, values })
}

fn failed(error: DecodingError) -> Error {
    match error {
        DecodingError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::cut_short("the end of the file", "the rest of the GIF")
        }
        other => Error::damaged(other),
    }
}
