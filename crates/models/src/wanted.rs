//! The rows of a batch whose results somebody wants.
//!
//! Of all other rows the last layer computes what later tokens need - keys, values, recurrent states - and nothing else. A
//! wanted row has the same bits either way.

use std::ops::Range;

use qwenkit_kernels::{AttentionSeq, Best};

use crate::forward::{BatchSeq, Outputs};

/// The wanted rows of a batch, counted among themselves.
pub(crate) struct Wanted<'a> {
    /// Their numbers in the batch, ascending.
    pub(crate) rows: Vec<usize>,
    /// The sequences that they belong to.
    pub(crate) seqs: Vec<AttentionSeq<'a>>,
    /// Angles of their positions, (rows, R)
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl<'a> BatchSeq<'a> {
    /// The rows whose results are wanted.
    pub(crate) fn wanted_rows(&self) -> Range<usize> {
        match self.outputs {
            Outputs::None => self.rows.end..self.rows.end,
            Outputs::Last | Outputs::Hidden => self.rows.end.saturating_sub(1).max(self.rows.start)..self.rows.end,
            Outputs::All => self.rows.clone(),
        }
    }

    /// For each row whose logits are wanted which of these, unless all are.
    pub(crate) fn best_of_rows(&self) -> impl Iterator<Item = Best<'a>> {
        let rows = if self.outputs == Outputs::Hidden { 0 } else { self.wanted_rows().len() };
        self.best.into_iter().flat_map(move |best| std::iter::repeat_n(best, rows))
    }
}

impl<'a> Wanted<'a> {
    /// The wanted rows of `seqs`, `cos` and `sin` being (T, R) with R = `pairs`.
    pub(crate) fn new(batch: &[BatchSeq<'a>], (cos, sin): (&[f32], &[f32]), pairs: usize) -> Wanted<'a> {
        let mut rows = Vec::new();
        let mut seqs = Vec::with_capacity(batch.len());
        for seq in batch {
            let (start, wanted) = (rows.len(), seq.wanted_rows());
            let first = seq.first + (wanted.start - seq.rows.start);
            rows.extend(wanted);
            seqs.push(AttentionSeq { rows: start..rows.len(), first, pages: seq.pages });
        }
        let of_rows = |x: &[f32]| rows.iter().flat_map(|row| &x[row * pairs..][..pairs]).copied().collect();
        let (cos, sin) = (of_rows(cos), of_rows(sin));
        Wanted { rows, seqs, cos, sin }
    }

    /// Leaves only the wanted rows in x: (T, `width`).
    pub(crate) fn keep(&self, x: &mut Vec<f32>, width: usize) {
        for (to, row) in self.rows.iter().enumerate() {
            x.copy_within(row * width..(row + 1) * width, to * width);
        }
        x.truncate(self.rows.len() * width);
    }

    /// Copies the wanted rows of x: (T, D) to out: (rows, D).
    pub(crate) fn copy(&self, x: &[f32], out: &mut [f32]) {
        let width = out.len().checked_div(self.rows.len()).unwrap_or(0);
        for (row, out) in self.rows.iter().zip(out.chunks_exact_mut(width.max(1))) {
            out.copy_from_slice(&x[row * width..][..width]);
        }
    }
}
