//! JPEG, by a decoder whose colours are those of libjpeg within a step or two: Hugging Face's processors read images through it.
//!
//! Not here: turning the image upright (`decode`).

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};
use jpeg_decoder::{Decoder, PixelFormat};

use crate::decode::{PIXELS_MAX, check_sides};
use crate::error::Error;

/// Decodes a JPEG file, and says how its camera was held.
pub(crate) fn decode(bytes: &[u8]) -> Result<(DynamicImage, Option<Orientation>), Error> {
    let damaged = |error: jpeg_decoder::Error| Error::Damaged { what: error.to_string() };
    let mut decoder = Decoder::new(bytes);
    // Four colours a pixel at most.
    decoder.set_max_decoding_buffer_size(usize::try_from(PIXELS_MAX * 4).unwrap_or(usize::MAX));
    decoder.read_info().map_err(damaged)?;
    let no_info = || Error::Damaged { what: "there is no image in it".to_owned() };
    let info = decoder.info().ok_or_else(no_info)?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    check_sides(width, height)?;
    let values = decoder.decode().map_err(damaged)?;
    let orientation = decoder.exif_data().and_then(Orientation::from_exif_chunk);
    let image = match info.pixel_format {
        PixelFormat::L8 => GrayImage::from_raw(width, height, values).map(DynamicImage::ImageLuma8),
        PixelFormat::L16 => {
            let high = values.as_chunks::<2>().0.iter().map(|pair| (u16::from_ne_bytes(*pair) >> 8) as u8);
            GrayImage::from_raw(width, height, high.collect()).map(DynamicImage::ImageLuma8)
        }
        PixelFormat::RGB24 => RgbImage::from_raw(width, height, values).map(DynamicImage::ImageRgb8),
        PixelFormat::CMYK32 => RgbImage::from_raw(width, height, without_black(&values)).map(DynamicImage::ImageRgb8),
    };
    Ok((image.ok_or_else(no_info)?, orientation))
}

/// Inks of four colours as three colours of light.
fn without_black(values: &[u8]) -> Vec<u8> {
    let light = |ink: u8, black: u8| (u16::from(255 - ink) * u16::from(255 - black) / 255) as u8;
    values.as_chunks().0.iter().flat_map(|&[c, m, y, k]| [c, m, y].map(|ink| light(ink, k))).collect()
}
