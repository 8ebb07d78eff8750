//! The header of a frame: sides, components, and the room for their coefficients.

use crate::decode::Limits;
use crate::error::Error;

/// A frame and what its scans have filled in so far.
pub(super) struct Frame {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) is_progressive: bool,
    pub(super) components: Vec<Component>,
    /// The largest sampling factors.
    pub(super) h_max: usize,
    pub(super) v_max: usize,
}

/// One component: luma, a colour difference, or a colour.
pub(super) struct Component {
    pub(super) id: u8,
    /// Sampling factors.
    pub(super) h: usize,
    pub(super) v: usize,
    pub(super) quantisation: usize,
    /// Its own pixels.
    pub(super) width: usize,
    pub(super) height: usize,
    /// Blocks that hold them.
    pub(super) blocks_wide: usize,
    pub(super) blocks_high: usize,
    /// Blocks of a row, and rows, of whole interleaved units.
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// (rows, stride, 64), natural order
    pub(super) coefficients: Vec<[i16; 64]>,
    /// The table that stood there when its first scan began, zigzag.
    pub(super) table: Option<[u16; 64]>,
}

impl Frame {
    /// Reads the segment of a start-of-frame marker, and takes memory for a file of `file_bytes`.
    pub(super) fn read(
        segment: &[u8],
        is_progressive: bool,
        file_bytes: usize,
        limits: &Limits,
    ) -> Result<Frame, Error> {
        let cut = || Error::damaged("the header of its frame is cut short");
        let (&[bits, h1, h0, w1, w0, count], rest) = segment.split_first_chunk::<6>().ok_or_else(cut)?;
        let (height, width) = (u16::from_be_bytes([h1, h0]), u16::from_be_bytes([w1, w0]));
        if bits != 8 {
            return Err(Error::Form { found: format!("JPEG of {bits} bits"), expected: "8 bits" });
        }
        limits.check(width.into(), height.into())?;
        if ![1, 3, 4].contains(&count) {
            return Err(Error::Form { found: format!("JPEG of {count} components"), expected: "1, 3 or 4" });
        }
        let (width, height) = (usize::from(width), usize::from(height));
        let parts = rest.as_chunks::<3>().0.get(..count.into()).ok_or_else(cut)?;
        let factors = |sampling: u8| (usize::from(sampling >> 4), usize::from(sampling & 15));
        let (mut h_max, mut v_max) = (1, 1);
        for [_, sampling, table] in parts {
            let (h, v) = factors(*sampling);
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) || *table > 3 {
                return Err(Error::damaged("a component's sampling factors or table are out of range"));
            }
            (h_max, v_max) = (h_max.max(h), v_max.max(v));
        }
        let (units_wide, units_high) = (width.div_ceil(8 * h_max), height.div_ceil(8 * v_max));
        let mut components: Vec<Component> = Vec::with_capacity(parts.len());
        for &[id, sampling, quantisation] in parts {
            let (h, v) = factors(sampling);
            if h_max % h != 0 || v_max % v != 0 {
                let found = format!("JPEG with sampling factors {h} x {v} beside {h_max} x {v_max}");
                return Err(Error::Form { found, expected: "factors that divide each other" });
            }
            if components.iter().any(|other| other.id == id) {
                return Err(Error::damaged("two components have one number"));
            }
            let (own_width, own_height) = ((width * h).div_ceil(h_max), (height * v).div_ceil(v_max));
            components.push(Component {
                id,
                h,
                v,
                quantisation: quantisation.into(),
                width: own_width,
                height: own_height,
                blocks_wide: own_width.div_ceil(8),
                blocks_high: own_height.div_ceil(8),
                stride: units_wide * h,
                rows: units_high * v,
                coefficients: Vec::new(),
                table: None,
            });
        }
        // Each block takes a bit at least, so memory is bounded by the file too.
        let blocks: usize = components.iter().map(|c| c.stride * c.rows).sum();
        if blocks > file_bytes.saturating_mul(8) {
            let expected = format!("{} or more for {width} x {height} pixels", blocks.div_ceil(8));
            return Err(Error::cut_short(format!("{file_bytes} bytes"), expected));
        }
        for component in &mut components {
            component.coefficients = vec![[0; 64]; component.stride * component.rows];
        }
        Ok(Frame { width, height, is_progressive, components, h_max, v_max })
    }

    /// Whether nothing can be missing: each component of a baseline frame has had its scan.
    pub(super) fn is_whole(&self) -> bool {
        !self.is_progressive && self.components.iter().all(|component| component.table.is_some())
    }
}
