//! PNG: every depth, palette and interlacing, to three colours of 8 bits. Decompressing is the `png` crate's; what its samples
//! mean is decided here.

use std::io::Cursor;

use ::png::{BitDepth, ColorType, Decoder, DecodingError, Limits as PngLimits};

use crate::decode::{Limits, Rgb, over_white};
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
    let form = Form { color: info.color_type, depth: info.bit_depth, palette, clear: info.trns.as_deref() };
    for row in rows {
        form.push_row(&mut values, row, width as usize);
    }
    // The data may stand behind the pixels; what cannot be read there is not missed.
    let _ = reader.finish();
    let orientation = reader.info().exif_metadata.as_deref().map_or(1, exif::orientation);
    Ok((Rgb { width: width as usize, height: height as usize, values }, orientation))
}

/// What samples mean.
struct Form<'a> {
    color: ColorType,
    depth: BitDepth,
    palette: &'a [u8],
    /// Alpha of the palette's colours, or the one colour that is clear: two bytes a sample.
    clear: Option<&'a [u8]>,
}

impl Form<'_> {
    /// Appends the colours of a row.
    fn push_row(&self, values: &mut Vec<u8>, row: &[u8], width: usize) {
        if self.depth == BitDepth::Sixteen {
            let pixels = row.chunks_exact(2 * self.color.samples());
            // The upper byte of each sample.
            values.extend(pixels.flat_map(|pixel| match (self.color, pixel) {
                (ColorType::Rgb, _) if Some(pixel) == self.clear => [255; 3],
                (ColorType::Rgb, _) => [pixel[0], pixel[2], pixel[4]],
                (ColorType::Rgba, _) => over_white([pixel[0], pixel[2], pixel[4]], pixel[6]),
                (ColorType::GrayscaleAlpha, _) => over_white([pixel[0]; 3], pixel[2]),
                _ if Some(pixel) == self.clear => [255; 3],
                _ => [pixel[0]; 3],
            }));
            return;
        }
        // The lower bytes of the clear colour's samples.
        let clear = |i: usize| self.clear.and_then(|clear| clear.get(2 * i + 1)).copied();
        match self.color {
            ColorType::Rgb => match [clear(0), clear(1), clear(2)] {
                [Some(r), Some(g), Some(b)] => {
                    let on_white = |&pixel: &[u8; 3]| if pixel == [r, g, b] { [255; 3] } else { pixel };
                    values.extend(row.as_chunks().0.iter().flat_map(on_white));
                }
                _ => values.extend_from_slice(row),
            },
            ColorType::Rgba => {
                values.extend(row.as_chunks().0.iter().flat_map(|&[r, g, b, alpha]| over_white([r, g, b], alpha)));
            }
            ColorType::GrayscaleAlpha => {
                values.extend(row.as_chunks().0.iter().flat_map(|&[grey, alpha]| over_white([grey; 3], alpha)));
            }
            ColorType::Grayscale => {
                let bits = self.depth as usize;
                // Grey of 1, 2 or 4 bits is stretched to 255.
                let unit = (255 / ((1_usize << bits) - 1)) as u8;
                let clear = clear(0);
                let colour = |sample: u8| if Some(sample) == clear { [255; 3] } else { [sample * unit; 3] };
                values.extend(samples(row, bits).take(width).flat_map(colour));
            }
            ColorType::Indexed => {
                let colours = self.palette.as_chunks::<3>().0;
                let alpha = |sample: u8| self.clear.and_then(|clear| clear.get(usize::from(sample)).copied());
                // Numbers beyond the palette are black.
                let colour = |sample: u8| {
                    let colour = colours.get(usize::from(sample)).copied().unwrap_or_default();
                    over_white(colour, alpha(sample).unwrap_or(255))
                };
                values.extend(samples(row, self.depth as usize).take(width).flat_map(colour));
            }
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
