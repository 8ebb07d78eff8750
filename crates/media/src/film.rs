//! A folder of frames -> the frames of a film, in the order of the numbers in their names.

use std::path::Path;

use crate::decode::{Limits, Rgb, read};
use crate::error::Error;
use crate::patches::FRAMES_MAX;

/// Pixels of all frames together, of which each takes three bytes.
const FILM_PIXELS_MAX: usize = 256 << 20;

/// Reads the images of a folder, sorted by name with numbers by value (`2.png` before `10.png`). Hidden files are passed over.
///
/// # Errors
/// When there is none, there are too many, or one cannot be read.
pub fn read_film(folder: &Path, limits: &Limits) -> Result<Vec<Rgb>, Error> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with('.') {
            names.push(name);
        }
    }
    if names.is_empty() || names.len() > FRAMES_MAX {
        return Err(Error::Frames { found: names.len(), limit: FRAMES_MAX });
    }
    names.sort_by_cached_key(|name| by_numbers(&name.to_string_lossy()));
    let (mut frames, mut pixels) = (Vec::with_capacity(names.len()), 0);
    for name in names {
        let named = |source| Error::OfFilm { name: name.to_string_lossy().into_owned(), source: Box::new(source) };
        let frame = read(&folder.join(&name), limits).map_err(named)?;
        pixels += frame.width * frame.height;
        if pixels > FILM_PIXELS_MAX {
            return Err(Error::FilmTooLarge { found: pixels, limit: FILM_PIXELS_MAX });
        }
        frames.push(frame);
    }
    Ok(frames)
}

/// A name as texts and numbers in turn; a number is its digits without leading zeros, their count first.
fn by_numbers(name: &str) -> Vec<(usize, String)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let (text, behind) = rest.split_at(rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len()));
        let (digits, behind) = behind.split_at(behind.find(|c: char| !c.is_ascii_digit()).unwrap_or(behind.len()));
        let number = digits.trim_start_matches('0');
        parts.push((0, text.to_owned()));
        parts.push((number.len(), number.to_owned()));
        rest = behind;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_in_the_order_of_their_numbers() {
        let mut names = ["f10.png", "f2.png", "f002.png", "f1-b.png", "f1-a.png", "g1.png"];
        names.sort_by_cached_key(|name| by_numbers(name));
        assert_eq!(names, ["f1-a.png", "f1-b.png", "f2.png", "f002.png", "f10.png", "g1.png"]);
    }

    #[test]
    fn what_cannot_be_a_film_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let read = || read_film(folder.path(), &Limits::default());
        assert!(matches!(read(), Err(Error::Frames { found: 0, .. })));
        std::fs::write(folder.path().join(".hidden"), b"x").expect("written");
        assert!(matches!(read(), Err(Error::Frames { found: 0, .. })));
        std::fs::write(folder.path().join("1.txt"), b"x").expect("written");
        let error = read().expect_err("no image").to_string();
        assert!(error.contains("1.txt") && error.contains("expected PNG"), "{error}");
    }
}
