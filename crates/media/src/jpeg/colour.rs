//! Components -> red, green and blue, with libjpeg's fixed-point tables (`jdcolor.c`), and Pillow's way from the four of print.

use super::Tables;
use super::frame::Frame;
use super::upsample::Plane;
use crate::decode::Rgb;
use crate::error::Error;

/// What a frame's components are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    Grey,
    Rgb,
    YCbCr,
    /// Cyan, magenta, yellow and black, each inverted.
    Cmyk,
    /// The same with the first three as luma and colour differences.
    Ycck,
}

impl Colours {
    /// What libjpeg takes them for.
    pub(super) fn of(frame: &Frame, tables: &Tables) -> Result<Colours, Error> {
        if let Some(missing) = frame.components.iter().position(|component| component.table.is_none()) {
            return Err(Error::cut_short("the end of the file", format!("the scan of component {missing}")));
        }
        let ids: Vec<u8> = frame.components.iter().map(|component| component.id).collect();
        Ok(match (ids.len(), tables.adobe_transform) {
            (1, _) => Colours::Grey,
            (3, _) if tables.has_jfif => Colours::YCbCr,
            (3, Some(0)) => Colours::Rgb,
            (3, None) if ids == *b"RGB" => Colours::Rgb,
            (3, _) => Colours::YCbCr,
            (_, None | Some(0)) => Colours::Cmyk,
            _ => Colours::Ycck,
        })
    }
}

/// The image's pixels.
pub(super) fn pixels(mut frame: Frame, colours: Colours) -> Rgb {
    let (width, height) = (frame.width, frame.height);
    let mut planes = Vec::with_capacity(frame.components.len());
    for i in 0..frame.components.len() {
        planes.push(Plane::new(&frame, &frame.components[i]));
        // Coefficients take twice the memory of values.
        frame.components[i].coefficients = Vec::new();
    }
    let mut rows: Vec<Vec<u8>> = vec![Vec::with_capacity(width + 8); planes.len()];
    let mut values = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for (plane, row) in planes.iter().zip(&mut rows) {
            plane.image_row(y, row);
        }
        match (&rows[..], colours) {
            ([grey], _) => values.extend(grey[..width].iter().flat_map(|&x| [x; 3])),
            ([r, g, b], Colours::Rgb) => values.extend((0..width).flat_map(|x| [r[x], g[x], b[x]])),
            ([l, cb, cr], _) => values.extend((0..width).flat_map(|x| rgb(l[x], cb[x], cr[x]))),
            ([l, cb, cr, k], Colours::Ycck) => {
                values.extend((0..width).flat_map(|x| printed(rgb(l[x], cb[x], cr[x]), k[x])));
            }
            ([c, m, y, k], _) => {
                values.extend((0..width).flat_map(|x| printed([255 - c[x], 255 - m[x], 255 - y[x]], k[x])));
            }
            _ => {}
        }
    }
    Rgb { width, height, values }
}

const HALF: i32 = 1 << 15;

/// From luma and colour differences, with 16 bits behind the point.
fn rgb(luma: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (luma, cb, cr) = (i32::from(luma), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = luma + ((91_881 * cr + HALF) >> 16);
    let green = luma + ((-22_554 * cb - 46_802 * cr + HALF) >> 16);
    let blue = luma + ((116_130 * cb + HALF) >> 16);
    [red, green, blue].map(|x| x.clamp(0, 255) as u8)
}

/// Pillow's conversion, for files that keep the four inverted as Photoshop does: `ink` is what remains to be inverted of the
/// first three, `light` the inverted black.
fn printed(ink: [u8; 3], light: u8) -> [u8; 3] {
    ink.map(|ink| {
        let product = u32::from(ink) * u32::from(light) + 128;
        let taken = ((product >> 8) + product) >> 8;
        light.saturating_sub(taken as u8)
    })
}
