//! Frames of a film: how they are brought to size, and where their values stand.

use qwenkit_media::{Error, FilmBounds, PatchGrid, Processor, Rgb};

fn plain(width: usize, height: usize, colour: u8) -> Rgb {
    Rgb { width, height, values: vec![colour; width * height * 3] }
}

fn processor(films: FilmBounds) -> Processor {
    Processor { films, ..Processor::of_patches(16, 2, 2) }
}

#[test]
fn an_odd_film_ends_with_its_last_frame_twice() {
    let processor = processor(FilmBounds::Film { min_pixels: 1, max_pixels: 1 << 20 });
    let frames: Vec<Rgb> = [0, 100, 200].map(|colour| plain(32, 64, colour)).into();
    let patches = processor.film(&frames).expect("a film");
    assert_eq!(patches.grid, PatchGrid { steps: 2, rows: 4, cols: 2 });
    let value = |colour: u8| (f32::from(colour) - 127.5) / 127.5;
    let frame = 16 * 16;
    let found: Vec<f32> = patches.values.chunks_exact(frame).map(|values| values[0]).collect();
    // Eight patches of three colours for each step, two frames in each.
    let expected = [[value(0), value(100)].repeat(24), [value(200), value(200)].repeat(24)].concat();
    assert_eq!(found, expected);
}

#[test]
fn limits_hold_for_the_film_or_for_each_frame() {
    let frames = vec![plain(640, 480, 9); 8];
    let max_pixels = 64 * 32 * 32;
    // 8 frames of 8 tokens, as near to 4:3 as whole squares come.
    let whole = processor(FilmBounds::Film { min_pixels: 1024, max_pixels }).film(&frames).expect("a film");
    assert_eq!(whole.grid, PatchGrid { steps: 4, rows: 4, cols: 6 });
    let each = processor(FilmBounds::Frame { min_pixels: 1024, max_pixels }).film(&frames).expect("a film");
    assert_eq!(each.grid, PatchGrid { steps: 4, rows: 12, cols: 18 });
}

#[test]
fn frames_of_other_sizes_and_none_are_refused() {
    let processor = processor(FilmBounds::Film { min_pixels: 1, max_pixels: 1 << 20 });
    assert!(matches!(processor.film(&[]), Err(Error::Frames { found: 0, .. })));
    let error = processor.film(&[plain(32, 32, 0), plain(32, 33, 0)]).expect_err("two sizes").to_string();
    assert!(error.contains("32 x 33 pixels in frame 2, expected 32 x 32"), "{error}");
}
