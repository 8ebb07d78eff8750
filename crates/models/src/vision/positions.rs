//! Rotary positions of a text with images in it (M-RoPE): three numbers for each token, in time, height and width.
//!
//! Text counts on in all three. An image's vectors have the position where it begins in time, and their row and column added
//! to it in the others; the text behind goes on after the larger side of the image, not after the number of its vectors.
//! Source: Wang et al. 2024 (Qwen2-VL), steps as in transformers 5.

use std::ops::Range;

use super::pixels::Grid;

/// An image's place in a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Its vectors as (steps, rows, columns); as many as tokens.
    pub grid: Grid,
    /// Positions in time from one step to the next.
    pub interval: f32,
}

/// Positions of a text with images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// In time, height and width, of each token.
    pub rows: Vec<[u32; 3]>,
    /// Of the token behind the last.
    pub next: u32,
}

impl Positions {
    /// Of `tokens` tokens with images at `spans`, which lie in order and do not overlap.
    pub fn new(tokens: usize, spans: &[Span]) -> Positions {
        let mut rows = Vec::with_capacity(tokens);
        let mut next = 0u32;
        let text = |rows: &mut Vec<[u32; 3]>, next: &mut u32, until: usize| {
            while rows.len() < until {
                rows.push([*next; 3]);
                *next += 1;
            }
        };
        for span in spans {
            text(&mut rows, &mut next, span.tokens.start);
            for step in 0..span.grid.steps {
                let time = next + (step as f32 * span.interval) as u32;
                for row in 0..span.grid.rows as u32 {
                    rows.extend((0..span.grid.cols as u32).map(|col| [time, next + row, next + col]));
                }
            }
            next += span.grid.rows.max(span.grid.cols) as u32;
        }
        text(&mut rows, &mut next, tokens);
        // What is generated goes on behind the largest of all, which is a film's time where that is longer than its side.
        let largest = rows.iter().flatten().max().map_or(0, |largest| largest + 1);
        Positions { rows, next: largest }
    }

    /// Of token `i`, which may lie behind the text.
    pub fn at(&self, i: usize) -> [u32; 3] {
        match self.rows.get(i) {
            Some(position) => *position,
            None => [self.next + (i - self.rows.len()) as u32; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: usize, steps: usize, rows: usize, cols: usize, interval: f32) -> Span {
        Span { tokens: start..start + steps * rows * cols, grid: Grid { steps, rows, cols }, interval }
    }

    #[test]
    fn text_alone_counts() {
        let positions = Positions::new(3, &[]);
        assert_eq!((positions.rows.as_slice(), positions.next), (&[[0; 3], [1; 3], [2; 3]][..], 3));
        assert_eq!(positions.at(7), [7; 3]);
    }

    #[test]
    fn an_image_takes_as_many_positions_as_its_longer_side() {
        let positions = Positions::new(2 + 6 + 1, &[span(2, 1, 2, 3, 1.0)]);
        let expected =
            [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4], [5, 5, 5]];
        assert_eq!(positions.rows, expected);
        assert_eq!((positions.next, positions.at(9), positions.at(11)), (6, [6; 3], [8; 3]));
    }

    #[test]
    fn a_films_time_goes_by_its_interval() {
        let positions = Positions::new(3, &[span(0, 3, 1, 1, 2.5)]);
        assert_eq!(positions.rows, [[0, 0, 0], [2, 0, 0], [5, 0, 0]]);
        assert_eq!(positions.next, 6);
        let positions = Positions::new(4, &[span(0, 3, 1, 1, 2.5)]);
        assert_eq!((positions.rows[3], positions.next), ([1; 3], 6));
    }
}
