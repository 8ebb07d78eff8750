//! JPEG, baseline and progressive, value for value as libjpeg-turbo decodes it, which Pillow uses.
//!
//! A decoder of our own, since the standard leaves the inverse transform and the upsampling of colours open: with the pure Rust
//! decoders there are, a tenth of an ordinary photograph's values is more than one step away from what the processors see
//! (docs/LOG.md). Files that libjpeg would decode with a warning (data that end early, codes that do not exist) are refused.
//! Not here: arithmetic coding, 12 bits, lossless forms.

mod bits;
mod colour;
mod frame;
mod idct;
mod scan;
mod upsample;

use crate::decode::{Limits, Rgb};
use crate::error::Error;
use crate::exif;

use bits::Huffman;
use colour::Colours;
use frame::Frame;

/// Scans over an image again and again are the cheapest way to keep a decoder busy; real files have ten.
const SCANS_MAX: usize = 100;

/// Everything that markers have said so far.
#[derive(Default)]
struct Tables {
    /// In the order of the file, which is zigzag.
    quantisation: [Option<[u16; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    restart_interval: usize,
    has_jfif: bool,
    adobe_transform: Option<u8>,
}

/// The pixels and the orientation.
pub(crate) fn decode(bytes: &[u8], limits: &Limits) -> Result<(Rgb, u8), Error> {
    let mut markers = Markers { bytes, at: 2 };
    let (mut tables, mut frame, mut scans, mut orientation) = (Tables::default(), None::<Frame>, 0, None);
    loop {
        let marker = match (markers.next(), &frame) {
            (Ok(marker), _) => marker,
            // Programs that write no end marker are common; a baseline image is whole without.
            (Err(_), Some(frame)) if frame.is_whole() => break,
            (Err(error), _) => return Err(error),
        };
        match marker {
            0xd9 => break,
            0x01 | 0xd0..=0xd7 => {}
            0xc4 => tables.read_huffman(markers.segment()?)?,
            0xdb => tables.read_quantisation(markers.segment()?)?,
            0xdd => {
                tables.restart_interval = markers.segment()?.first_chunk().map_or(0, |x| u16::from_be_bytes(*x)).into()
            }
            0xc0..=0xc2 if frame.is_none() => {
                let header = markers.segment()?;
                frame = Some(Frame::read(header, marker == 0xc2, bytes.len(), limits)?);
            }
            0xc0..=0xc2 => return Err(Error::damaged("it has two frames")),
            0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Err(unread(marker)),
            0xda => {
                let header = markers.segment()?;
                let frame = frame.as_mut().ok_or_else(|| Error::damaged("a scan comes before its frame"))?;
                scans += 1;
                if scans > SCANS_MAX {
                    return Err(Error::damaged(format!("it has more than {SCANS_MAX} scans")));
                }
                markers.at += scan::decode(frame, &tables, header, &bytes[markers.at..])?;
            }
            0xe0 => tables.has_jfif |= markers.segment()?.starts_with(b"JFIF\0"),
            0xe1 => {
                let exif_data = markers.segment()?.strip_prefix(b"Exif\0\0");
                orientation = orientation.or(exif_data.map(exif::orientation));
            }
            0xee => {
                if let Some([a, b, c, d, e, _, _, _, _, _, _, transform, ..]) = markers.segment()?.get(..)
                    && [*a, *b, *c, *d, *e] == *b"Adobe"
                {
                    tables.adobe_transform = Some(*transform);
                }
            }
            _ => drop(markers.segment()?),
        }
    }
    let frame = frame.ok_or_else(|| Error::cut_short("no frame", "the pixels of an image"))?;
    let colours = Colours::of(&frame, &tables)?;
    Ok((colour::pixels(frame, colours), orientation.unwrap_or(1)))
}

fn unread(marker: u8) -> Error {
    let found = match marker {
        0xc3 | 0xc7 | 0xcb | 0xcf => "lossless JPEG",
        0xc9..=0xcd => "JPEG with arithmetic coding",
        _ => "hierarchical JPEG",
    };
    Error::Form { found: found.to_owned(), expected: "baseline or progressive JPEG" }
}

/// Goes through a file from marker to marker.
struct Markers<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Markers<'a> {
    /// The next marker; what lies between is skipped.
    fn next(&mut self) -> Result<u8, Error> {
        loop {
            let rest = self.bytes.get(self.at..).unwrap_or_default();
            let Some(skipped) = rest.iter().position(|&byte| byte == 0xff) else {
                return Err(Error::cut_short("the end of the file", "the rest of the JPEG"));
            };
            self.at += skipped;
            let Some(&marker) = self.bytes.get(self.at + 1) else {
                return Err(Error::cut_short("the end of the file", "the rest of the JPEG"));
            };
            // Before a marker stand as many ff as somebody likes; ff 00 is data.
            self.at += if marker == 0xff { 1 } else { 2 };
            if marker != 0xff && marker != 0 {
                return Ok(marker);
            }
        }
    }

    /// The bytes behind a marker that states their number.
    fn segment(&mut self) -> Result<&'a [u8], Error> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.first_chunk().map(|x| usize::from(u16::from_be_bytes(*x)));
        let Some(segment) = length.and_then(|length| rest.get(2..length)) else {
            let expected = format!("a segment of {} bytes", length.unwrap_or(2));
            return Err(Error::cut_short(format!("{} bytes", rest.len()), expected));
        };
        self.at += 2 + segment.len();
        Ok(segment)
    }
}

impl Tables {
    fn read_quantisation(&mut self, mut segment: &[u8]) -> Result<(), Error> {
        let cut = || Error::damaged("a quantisation table is cut short");
        while let Some((&kind, rest)) = segment.split_first() {
            let mut table = [0; 64];
            let is_wide = kind >> 4 != 0;
            let size = if is_wide { 128 } else { 64 };
            let values = rest.get(..size).ok_or_else(cut)?;
            for (i, value) in table.iter_mut().enumerate() {
                *value = match is_wide {
                    true => u16::from_be_bytes([values[2 * i], values[2 * i + 1]]),
                    false => values[i].into(),
                };
            }
            let slot = self.quantisation.get_mut(usize::from(kind & 15));
            *slot.ok_or_else(|| Error::damaged("a quantisation table has a number above 3"))? = Some(table);
            segment = &rest[size..];
        }
        Ok(())
    }

    fn read_huffman(&mut self, mut segment: &[u8]) -> Result<(), Error> {
        let cut = || Error::damaged("a Huffman table is cut short");
        while let Some((&kind, rest)) = segment.split_first() {
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or_else(cut)?;
            let total = counts.iter().map(|&count| usize::from(count)).sum();
            let values = rest.get(..total).ok_or_else(cut)?;
            let tables = if kind >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            let slot = tables.get_mut(usize::from(kind & 15));
            *slot.ok_or_else(|| Error::damaged("a Huffman table has a number above 3"))? =
                Some(Huffman::new(counts, values)?);
            segment = &rest[total..];
        }
        Ok(())
    }
}
