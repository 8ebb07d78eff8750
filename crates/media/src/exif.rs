//! Which way up a camera was held: the orientation in EXIF data, and turning pixels by it.
//!
//! Data that cannot be read state no orientation, as everywhere. Nothing else of EXIF is looked at.

use crate::decode::Rgb;

const ORIENTATION: u16 = 0x0112;
const TYPE_U16: u16 = 3;
const TYPE_U32: u16 = 4;

/// The orientation, 1 to 8, that EXIF data (a TIFF header and its first directory) state; 1 is upright.
pub(crate) fn orientation(data: &[u8]) -> u8 {
    // WebP and PNG files come with and without this prefix.
    let data = data.strip_prefix(b"Exif\0\0").unwrap_or(data);
    found(data).filter(|value| (1..=8).contains(value)).unwrap_or(1)
}

fn found(data: &[u8]) -> Option<u8> {
    let is_little = match data.get(..4)? {
        [b'I', b'I', 42, 0] => true,
        [b'M', b'M', 0, 42] => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = *data.get(at..)?.first_chunk()?;
        Some(if is_little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let u32_at = |at: usize| {
        let bytes = *data.get(at..)?.first_chunk()?;
        Some(if is_little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    };
    let directory = u32_at(4)? as usize;
    let entries = usize::from(u16_at(directory)?);
    for entry in (0..entries).map(|i| directory.saturating_add(2 + 12 * i)) {
        if u16_at(entry)? != ORIENTATION {
            continue;
        }
        let value = match u16_at(entry + 2)? {
            TYPE_U16 => u32::from(u16_at(entry + 8)?),
            TYPE_U32 => u32_at(entry + 8)?,
            _ => return None,
        };
        return u8::try_from(value).ok();
    }
    None
}

/// The image as it was seen.
pub(crate) fn upright(image: Rgb, orientation: u8) -> Rgb {
    let Rgb { width, height, .. } = image;
    let (is_turned, right_to_left, bottom_up) = match orientation {
        2 => (false, true, false),
        3 => (false, true, true),
        4 => (false, false, true),
        5 => (true, false, false),
        6 => (true, false, true),
        7 => (true, true, true),
        8 => (true, true, false),
        _ => return image,
    };
    let (new_width, new_height) = if is_turned { (height, width) } else { (width, height) };
    let mut values = Vec::with_capacity(image.values.len());
    let pixels = image.values.as_chunks::<3>().0;
    for y in 0..new_height {
        for x in 0..new_width {
            // Where the pixel comes from: rows and columns change places, then each may run the other way.
            let (column, row) = if is_turned { (y, x) } else { (x, y) };
            let column = if right_to_left { width - 1 - column } else { column };
            let row = if bottom_up { height - 1 - row } else { row };
            values.extend(pixels[row * width + column]);
        }
    }
    Rgb { width: new_width, height: new_height, values }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exif(is_little: bool, kind: u16, value: u32) -> Vec<u8> {
        let two = |x: u16| if is_little { x.to_le_bytes() } else { x.to_be_bytes() };
        let four = |x: u32| if is_little { x.to_le_bytes() } else { x.to_be_bytes() };
        let mut data = if is_little { b"II".to_vec() } else { b"MM".to_vec() };
        data.extend([&two(42)[..], &four(8), &two(2)].concat());
        data.extend([&two(0x010f)[..], &two(2), &four(1), &four(0)].concat());
        data.extend([&two(ORIENTATION)[..], &two(kind), &four(1)].concat());
        data.extend(if kind == TYPE_U16 { [two(value as u16), two(0)].concat() } else { four(value).to_vec() });
        data
    }

    #[test]
    fn both_byte_orders_are_read_and_nonsense_is_upright() {
        for is_little in [true, false] {
            assert_eq!(orientation(&exif(is_little, TYPE_U16, 6)), 6);
            assert_eq!(orientation(&[b"Exif\0\0", &exif(is_little, TYPE_U32, 3)[..]].concat()), 3);
            assert_eq!(orientation(&exif(is_little, TYPE_U16, 9)), 1);
            let whole = exif(is_little, TYPE_U16, 8);
            for cut in 0..whole.len() - 2 {
                assert_eq!(orientation(&whole[..cut]), 1, "{cut}");
            }
        }
        assert_eq!(orientation(b"II\x2a\0\xff\xff\xff\xff"), 1);
    }

    #[test]
    fn each_orientation_moves_pixels_as_the_standard_says() {
        // a b c
        // d e f
        let image = Rgb { width: 3, height: 2, values: b"abcdef".iter().flat_map(|&x| [x; 3]).collect() };
        let expected = ["abcdef", "cbafed", "fedcba", "defabc", "adbecf", "daebfc", "fcebda", "cfbead"];
        for (orientation, expected) in (1..).zip(expected) {
            let turned = upright(image.clone(), orientation);
            let seen: String = turned.values.iter().step_by(3).map(|&x| char::from(x)).collect();
            assert_eq!(seen, expected, "{orientation}");
            assert_eq!(turned.width, if orientation < 5 { 3 } else { 2 });
        }
    }
}
