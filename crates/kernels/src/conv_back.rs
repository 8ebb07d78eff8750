//! Backward of the short causal convolution over whole sequences, towards its input.

use std::ops::Range;

use crate::{
    conv::{ConvShape, add_product},
    lanes::{self, for_each_isa},
    matmul::Compute,
};

impl Compute {
    /// Backward of `causal_conv_silu` over whole sequences, whose rows cover the batch: `dx` becomes the gradient towards x from
    /// `dy`, both (T, C). `room` becomes the gradient before the activation.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn causal_conv_silu_backward(
        &self,
        shape: ConvShape,
        seqs: &[Range<usize>],
        weight: &[f32],
        (x, dy): (&[f32], &[f32]),
        room: &mut Vec<f32>,
        dx: &mut [f32],
    ) {
        let ConvShape { width, step, channels } = shape;
        let rows = seqs.last().map_or(0, |seq| seq.end);
        let fits = x.len() == rows * channels && dy.len() == x.len() && dx.len() == x.len();
        assert!(fits && weight.len() == width * channels, "backward of a convolution of {channels} channels");
        let seq_of = |row: usize| &seqs[seqs.partition_point(|seq| seq.end <= row)];
        room.resize(x.len(), 0.0);
        self.each_row(room, channels, |isa, row, d| {
            let start = seq_of(row).start;
            d.fill(0.0);
            for (j, weight) in weight.chunks_exact(channels).enumerate() {
                let back = (width - 1 - j) * step;
                if row - start >= back {
                    add_row(isa, &x[(row - back) * channels..][..channels], weight, d);
                }
            }
            silu_back_row(isa, &dy[row * channels..][..channels], d);
        });
        let before = &*room;
        self.each_row(dx, channels, |isa, row, dx| {
            let end = seq_of(row).end;
            dx.fill(0.0);
            for (j, weight) in weight.chunks_exact(channels).enumerate() {
                let later = row + (width - 1 - j) * step;
                if later < end {
                    add_row(isa, &before[later * channels..][..channels], weight, dx);
                }
            }
        });
    }
}

for_each_isa! {
    pub(crate) fn add_row(x: &[f32], weight: &[f32], out: &mut [f32]) {
        add_product(x, weight, out);
    }
}

for_each_isa! {
    /// x becomes `dy` times the slope of silu at x.
    pub(crate) fn silu_back_row(dy: &[f32], x: &mut [f32]) {
        for (x, dy) in x.iter_mut().zip(dy) {
            let sigmoid = 1.0 / (1.0 + lanes::exp(-*x));
            *x = dy * sigmoid * (1.0 + *x * (1.0 - sigmoid));
        }
    }
}
