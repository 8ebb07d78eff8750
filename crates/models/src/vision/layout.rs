//! Where an image's patches lie: in which order a tower goes through them, which see each other, how far each is from the
//! top and the left, and which rows of a table of positions it takes.
//!
//! Everything is a function of the grid and the plan alone.

use std::ops::Range;

use super::{
    pixels::Grid,
    plan::{PatchPlan, VisionPlan},
};

/// An image's patches in the order in which a tower goes through them.
pub(super) struct Layout {
    /// For each merged square in the tower's order, its number in the image's; absent where both are the same.
    pub(super) order: Option<Vec<usize>>,
    /// Patches that see each other: frames.
    pub(super) frames: Vec<Range<usize>>,
    /// The same in blocks with windows.
    pub(super) windows: Vec<Range<usize>>,
    /// (row, column) of each patch.
    pub(super) places: Vec<(usize, usize)>,
}

impl Layout {
    pub(super) fn new(plan: &VisionPlan, grid: Grid) -> Layout {
        let patch = &plan.patch;
        let per_frame = grid.rows * grid.cols;
        let frames = (0..grid.steps).map(|t| t * per_frame..(t + 1) * per_frame).collect();
        let (order, windows) = match &plan.windows {
            None => (None, Vec::new()),
            Some(windows) => {
                let (order, lengths) = windowed(grid.merged(patch), windows.side);
                let mut start = 0;
                let range = |squares: usize| {
                    let end = start + squares * patch.merged();
                    std::mem::replace(&mut start, end)..end
                };
                (Some(order), lengths.into_iter().map(range).collect())
            }
        };
        let natural = places(grid, patch);
        let places = match &order {
            None => natural,
            Some(order) => {
                let merged = patch.merged();
                order.iter().flat_map(|&square| natural[square * merged..(square + 1) * merged].to_vec()).collect()
            }
        };
        Layout { order, frames, windows, places }
    }
}

/// (row, column) of every patch in the image's order: time, then squares, then the patches of a square.
fn places(grid: Grid, patch: &PatchPlan) -> Vec<(usize, usize)> {
    let (m, squares) = (patch.merge, grid.merged(patch));
    let mut frame = Vec::with_capacity(grid.rows * grid.cols);
    for (square_row, square_col) in (0..squares.rows).flat_map(|r| (0..squares.cols).map(move |c| (r, c))) {
        for (row, col) in (0..m).flat_map(|r| (0..m).map(move |c| (r, c))) {
            frame.push((square_row * m + row, square_col * m + col));
        }
    }
    frame.repeat(grid.steps)
}

/// The squares of a grid window by window, and how many each window has; windows at the right and at the bottom are smaller.
fn windowed(squares: Grid, side: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut order, mut lengths) = (Vec::new(), Vec::new());
    for step in 0..squares.steps {
        for top in (0..squares.rows).step_by(side) {
            for left in (0..squares.cols).step_by(side) {
                let before = order.len();
                for row in top..(top + side).min(squares.rows) {
                    let first = (step * squares.rows + row) * squares.cols;
                    order.extend((left..(left + side).min(squares.cols)).map(|col| first + col));
                }
                lengths.push(order.len() - before);
            }
        }
    }
    (order, lengths)
}

/// Of a line of `side` learned positions stretched over `count` places, what place `i` takes: the two nearest and the share
/// of the second. The ends fall on the ends, as `align_corners` has it. Order of operations as in transformers 5.
pub(super) fn between(i: usize, count: usize, side: usize) -> (usize, usize, f32) {
    let at = i as f32 * (side - 1) as f32 / (count - 1).max(1) as f32;
    let low = (at.floor() as usize).min(side - 1);
    (low, (low + 1).min(side - 1), at - at.floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(steps: usize, rows: usize, cols: usize) -> Grid {
        Grid { steps, rows, cols }
    }

    #[test]
    fn windows_cover_the_grid_once_and_shrink_at_the_edges() {
        let (order, lengths) = windowed(grid(1, 4, 3), 2);
        assert_eq!(order, [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11]);
        assert_eq!(lengths, [4, 2, 4, 2]);
        for (steps, rows, cols, side) in [(1, 1, 1, 4), (3, 5, 7, 2), (2, 8, 8, 4), (1, 3, 9, 100)] {
            let (mut order, lengths) = windowed(grid(steps, rows, cols), side);
            assert_eq!(lengths.iter().sum::<usize>(), order.len());
            order.sort_unstable();
            assert!(order.iter().copied().eq(0..steps * rows * cols));
        }
    }

    #[test]
    fn patches_of_a_square_are_neighbours() {
        let patch = PatchPlan { side: 14, frames: 2, channels: 3, merge: 2, bias: false };
        let found = places(grid(1, 2, 4), &patch);
        assert_eq!(found, [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]);
        assert_eq!(places(grid(2, 2, 2), &patch).len(), 8);
    }

    #[test]
    fn a_stretched_line_keeps_its_ends() {
        assert_eq!(between(0, 5, 48), (0, 1, 0.0));
        assert_eq!(between(4, 5, 48), (47, 47, 0.0));
        assert_eq!(between(2, 5, 48), (23, 24, 0.5));
        assert_eq!(between(0, 1, 48), (0, 1, 0.0));
        assert_eq!(between(3, 4, 4), (3, 3, 0.0));
        assert_eq!(between(1, 3, 1), (0, 0, 0.0));
    }
}
