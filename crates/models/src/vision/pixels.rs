//! Images as a tower takes them: patches of numbers, and the grid that they lie in.

use super::plan::{PatchPlan, VisionPlan};
use crate::error::Error;

/// Patches of an image or a film, as Hugging Face's processors make them.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// (patches, channels, frames, side, side). Patches go through the time steps, in each through the squares that become
    /// one vector, row by row, and in each square row by row.
    pub values: Vec<f32>,
    /// How they lie.
    pub grid: Grid,
}

/// A grid of patches: (time steps, rows, columns).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Time steps; 1 for images.
    pub steps: usize,
    /// Rows of patches.
    pub rows: usize,
    /// Columns of patches.
    pub cols: usize,
}

/// A film of more steps, or an image of more patches, is a mistake.
const STEPS_MAX: usize = 1 << 20;
const SIDE_MAX: usize = 1 << 14;

impl Grid {
    /// Patches in all; none where the numbers are beyond anything that an image or a film has.
    pub fn patches(&self) -> Option<usize> {
        let fits = self.steps <= STEPS_MAX && self.rows <= SIDE_MAX && self.cols <= SIDE_MAX;
        fits.then(|| self.steps * self.rows * self.cols)
    }

    /// Vectors of the text model that it becomes, as (steps, rows, columns).
    pub fn merged(&self, patch: &PatchPlan) -> Grid {
        Grid { rows: self.rows / patch.merge, cols: self.cols / patch.merge, ..*self }
    }

    /// Vectors of the text model that it becomes.
    pub fn tokens(&self, patch: &PatchPlan) -> usize {
        let merged = self.merged(patch);
        merged.steps.saturating_mul(merged.rows).saturating_mul(merged.cols)
    }
}

impl Pixels {
    /// Refuses what a tower cannot take.
    ///
    /// # Errors
    /// When the grid is empty or not of whole squares, or there are more or fewer values than its patches have.
    pub fn check(&self, plan: &VisionPlan) -> Result<(), Error> {
        let (Grid { steps, rows, cols }, patch) = (self.grid, &plan.patch);
        let merge = patch.merge;
        let whole = steps > 0 && rows > 0 && cols > 0 && rows.is_multiple_of(merge) && cols.is_multiple_of(merge);
        let expected_values = self.grid.patches().filter(|_| whole).map(|n| n.saturating_mul(patch.values()));
        let Some(expected_values) = expected_values else {
            let expected = format!("rows and columns in multiples of {merge}, 1 to {SIDE_MAX} of them");
            return Err(Error::Pixels { found: format!("a grid of ({steps}, {rows}, {cols}) patches"), expected });
        };
        if self.values.len() != expected_values {
            let found = format!("{} values for a grid of ({steps}, {rows}, {cols}) patches", self.values.len());
            let expected = format!("{expected_values}, {} for each patch", patch.values());
            return Err(Error::Pixels { found, expected });
        }
        Ok(())
    }

    /// Vectors of the text model that they become.
    pub fn tokens(&self, patch: &PatchPlan) -> usize {
        self.grid.tokens(patch)
    }
}
