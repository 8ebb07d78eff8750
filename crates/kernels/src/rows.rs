//! Work on the rows of an output, divided among the threads when there are enough of them.

use std::ops::Range;

use crate::{Isa, matmul::Compute, shared_out::SharedOut};

/// Rows below which a fork costs more than it gains.
const PARALLEL_ROWS: usize = 4;

impl Compute {
    /// Runs `f(isa, row, out's row)` for each row of `out`: (rows, width).
    ///
    /// # Panics
    /// If `out` is not of whole rows.
    pub(crate) fn each_row(&self, out: &mut [f32], width: usize, f: impl Fn(Isa, usize, &mut [f32]) + Sync) {
        let rows = out.len().checked_div(width).unwrap_or(0);
        assert_eq!(out.len(), rows * width, "rows of {width}");
        let out = SharedOut::new(out);
        let work = |range: Range<usize>| {
            for row in range {
                // SAFETY: each row is in exactly one range.
                f(self.isa, row, unsafe { out.slice(row * width, width) });
            }
        };
        if rows < PARALLEL_ROWS { work(0..rows) } else { self.pool.run_split(rows, 1, work) }
    }
}
