//! Components of fewer pixels than the image -> rows of the image, as libjpeg's "fancy" upsampling makes them (`jdsample.c`):
//! halved sides are interpolated, the nearer value three times as heavy; other ratios repeat values.

use super::frame::{Component, Frame};
use super::idct;

/// A component's values and how they stretch.
pub(super) struct Plane {
    values: Vec<u8>,
    stride: usize,
    /// Of the pixels, without padding.
    width: usize,
    height: usize,
    /// How many of the image's columns and rows a value stands for.
    across: usize,
    down: usize,
}

impl Plane {
    pub(super) fn new(frame: &Frame, component: &Component) -> Plane {
        Plane {
            values: idct::plane(component),
            stride: component.stride * 8,
            width: component.width,
            height: component.height,
            across: frame.h_max / component.h,
            down: frame.v_max / component.v,
        }
    }

    fn row(&self, y: usize) -> &[u8] {
        let start = y.min(self.height - 1) * self.stride;
        &self.values[start..start + self.width]
    }

    /// Row `y` of the image, at least as long as the image is wide.
    pub(super) fn image_row(&self, y: usize, out: &mut Vec<u8>) {
        out.clear();
        // Very narrow ones are repeated.
        let is_wide = self.width > 2;
        match (self.across, self.down) {
            (1, 1) => out.extend_from_slice(self.row(y)),
            (2, 1) if is_wide => across(self.row(y), out),
            (1, 2) => {
                let (near, far) = self.neighbours(y);
                let bias = if y.is_multiple_of(2) { 1 } else { 2 };
                out.extend(near.iter().zip(far).map(|(&a, &b)| ((3 * u16::from(a) + u16::from(b) + bias) >> 2) as u8));
            }
            (2, 2) if is_wide => {
                let (near, far) = self.neighbours(y);
                across_and_down(near, far, out);
            }
            (n, down) => out.extend(self.row(y / down).iter().flat_map(|&x| std::iter::repeat_n(x, n))),
        }
    }

    /// The nearest row and the one on its other side, for twice as many rows.
    fn neighbours(&self, y: usize) -> (&[u8], &[u8]) {
        let near = y / 2;
        let far = if y.is_multiple_of(2) { near.saturating_sub(1) } else { near + 1 };
        (self.row(near), self.row(far))
    }
}

/// Twice as many columns.
fn across(row: &[u8], out: &mut Vec<u8>) {
    let last = row.len() - 1;
    for (i, &value) in row.iter().enumerate() {
        let near = 3 * u16::from(value);
        out.push(if i == 0 { value } else { ((near + u16::from(row[i - 1]) + 1) >> 2) as u8 });
        out.push(if i == last { value } else { ((near + u16::from(row[i + 1]) + 2) >> 2) as u8 });
    }
}

/// Twice as many columns of a row between two.
fn across_and_down(near: &[u8], far: &[u8], out: &mut Vec<u8>) {
    let sum = |i: usize| 3 * u16::from(near[i]) + u16::from(far[i]);
    let last = near.len() - 1;
    for i in 0..near.len() {
        let own = sum(i);
        let (before, after) = (if i == 0 { own } else { sum(i - 1) }, if i == last { own } else { sum(i + 1) });
        out.push(((3 * own + before + 8) >> 4) as u8);
        out.push(((3 * own + after + 7) >> 4) as u8);
    }
}
