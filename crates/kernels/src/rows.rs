//! Work on the rows of an output, divided among the threads when there are enough of them.

use std::ops::Range;

use crate::{Isa, matmul::Compute, shared_out::SharedOut, weight::Weight};

/// Rows below which a fork costs more than it gains.
const PARALLEL_ROWS: usize = 4;

impl Compute {
    /// `out`: (ids, K) = the rows of `table`: (N, K) that the ids name.
    ///
    /// # Panics
    /// If `out` has not one row for each id, or the table has no such row.
    pub fn look_up(&self, table: &Weight, ids: &[usize], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * table.cols(), "look_up");
        self.each_row(out, table.cols(), |_, i, out| table.row(ids[i], out));
    }

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
        self.split_rows(rows, work);
    }

    /// Runs `work` over `rows` rows, in ranges on all threads where there are enough.
    pub(crate) fn split_rows(&self, rows: usize, work: impl Fn(Range<usize>) + Sync) {
        if rows < PARALLEL_ROWS { work(0..rows) } else { self.pool.run_split(rows, 1, work) }
    }
}
