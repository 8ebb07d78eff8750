//! PNG: every depth, palette and interlacing, to three colours of 8 bits. Decompressing is the `png` crate's; what its samples
//! mean is decided here.

use std::io::Cursor;

use ::png::{BitDepth, ColorType, Decoder, DecodingError, Limits as PngLimits};

use crate::decode::{Limits, Rgb};
use crate::error::Error;
use crate::exif;

/// Deflate makes no more than so many bytes of one.
const DEFLATE_RATIO_MAX: u64 = 1032;

/// The pixels and the orientation.
pub(crate) fn decode(bytes: &[u8], limits: &Limits) -> Result<(Rgb, u8), Error> {
    let bound = PngLimits { bytes: limits.decoder_bytes() };
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), bound);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let header = decoder.read_header_info().map_err(failed)?;
    let (width, height) = header.size();
    limits.check(width, height)?;
    let packed_bytes = header.raw_bytes() as u64;
    let possible_bytes = DEFLATE_RATIO_MAX.saturating_mul(bytes.len() as u64);
    if packed_bytes > possible_bytes {
        let found = format!("{} bytes, which hold {possible_bytes} at most", bytes.len());
        return Err(Error::cut_short(found, format!("{packed_bytes} for {width} x {height} pixels")));
    }
    let mut reader = decoder.read_info().map_err(failed)?;
    let size = reader.output_buffer_size().ok_or_else(|| Error::damaged("its size does not fit in memory"))?;
    let mut data = vec![0; size];
    let output = reader.next_frame(&mut data).map_err(failed)?;
    let info = reader.info();
    let rows = data.chunks_exact(output.line_size).take(height as usize);
    let mut values = Vec::with_capacity(width as usize * height as usize * 3);
    let palette = info.palette.as_deref().unwrap_or_default();
    if info.color_type == ColorType::Indexed && palette.is_empty() {
        return Err(Error::damaged("its colours are numbers of a palette, and it has none"));
    }
    for row in rows {
        push_row(&mut values, row, width as usize, (info.color_type, info.bit_depth), palette);
    }
    // The data may stand behind the pixels; what cannot be read there is not missed.
    let _ = reader.finish();
    let orientation = reader.info().exif_metadata.as_deref().map_or(1, exif::orientation);
    Ok((Rgb { width: width as usize, height: height as usize, values }, orientation))
}

/// Appends the colours of a row.
fn push_row(values: &mut Vec<u8>, row: &[u8], width: usize, kind: (ColorType, BitDepth), palette: &[u8]) {
    let (color, depth) = kind;
    if depth == BitDepth::Sixteen {
        // The upper byte of each sample.
        let upper = |pixel: &[u8]| match color {
            ColorType::Rgb | ColorType::Rgba => [pixel[0], pixel[2], pixel[4]],
            _ => [pixel[0]; 3],
        };
        values.extend(row.chunks_exact(2 * color.samples()).flat_map(upper));
        return;
    }
    match color {
        ColorType::Rgb => values.extend_from_slice(row),
        ColorType::Rgba => values.extend(row.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b])),
        ColorType::GrayscaleAlpha => values.extend(row.as_chunks::<2>().0.iter().flat_map(|&[grey, _]| [grey; 3])),
        ColorType::Grayscale => {
            let bits = depth as usize;
            // Grey of 1, 2 or 4 bits is stretched to 255.
            let unit = (255 / ((1_usize << bits) - 1)) as u8;
            values.extend(samples(row, bits).take(width).flat_map(|sample| [sample * unit; 3]));
        }
        ColorType::Indexed => {
            let colours = palette.as_chunks::<3>().0;
            // Numbers beyond the palette are black.
            let colour = |sample: u8| colours.get(usize::from(sample)).copied().unwrap_or_default();
            values.extend(samples(row, depth as usize).take(width).flat_map(colour));
        }
    }
}

/// Samples of 1, 2, 4 or 8 bits, the first in the upper bits.
fn samples(row: &[u8], bits: usize) -> impl Iterator<Item = u8> {
    let mask = ((1_u16 << bits) - 1) as u8;
    row.iter().flat_map(move |&byte| (0..8 / bits).rev().map(move |i| (byte >> (i * bits)) & mask))
}

fn failed(error: DecodingError) -> Error {
    match error {
        DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::cut_short("the end of the file", "the rest of the PNG")
        }
        DecodingError::LimitsExceeded => Error::damaged("decoding it takes more memory than its pixels"),
        other => Error::damaged(other),
    }
}
