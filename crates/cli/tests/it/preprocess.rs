//! `preprocess`: the file that it writes, from every source of a processor's numbers, and what it refuses.

use std::path::{Path, PathBuf};

use qwenkit_formats::read_safetensors_file;

use crate::program::{self, Place};

fn image(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images").join(name)
}

fn fixture(name: &str) -> PathBuf {
    program::fixture(name).into()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

fn bytes(path: &Path, tensor: &str) -> (Vec<usize>, Vec<u8>) {
    let file = read_safetensors_file(path).expect("safetensors");
    let info = file.tensor(tensor).unwrap_or_else(|| panic!("no {tensor}"));
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes).expect("data");
    (info.shape.clone(), bytes)
}

#[test]
fn a_processors_file_gives_the_recorded_patches() {
    let place = Place::new();
    let (numbers, out) = (place.path("processor.json"), place.path("out.safetensors"));
    let json = r#"{"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "min_pixels": 4096, "max_pixels": 50176}"#;
    std::fs::write(&numbers, json).expect("written");
    let (first, second) = (image("tiny.png"), image("alpha.png"));
    let args = ["preprocess", text(&first), text(&second), "--processor", text(&numbers), "--out", text(&out)];
    let outcome = place.run(&args).exits(0);
    assert!(outcome.err.contains("1 x 4 x 6 patches, 6 tokens") && outcome.out.is_empty(), "{outcome:?}");
    let (shape, grids) = bytes(&out, "image_grid_thw");
    let grids: Vec<i64> = grids.as_chunks().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect();
    assert_eq!((shape, grids), (vec![2, 3], vec![1, 4, 6, 1, 4, 4]));
    let (shape, values) = bytes(&out, "pixel_values");
    assert_eq!(shape, [24 + 16, 3 * 2 * 16 * 16]);
    let values: Vec<f32> = values.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect();
    // Colours of one frame: (patches, 3, p, p).
    let recorded = ["tiny.qwen3-vl", "alpha.qwen3-vl"].map(|key| bytes(&image("expected.safetensors"), key).1).concat();
    let frame = 16 * 16;
    for (i, value) in values.iter().enumerate() {
        let wanted = f32::from(recorded[i / (2 * frame) * frame + i % frame]) / 127.5 - 1.0;
        assert!((value - wanted).abs() < 1e-5, "value {i}: {value}, not {wanted}");
    }
}

#[test]
fn a_folder_and_a_mmproj_of_one_model_give_the_same() {
    let place = Place::new();
    let photo = image("photo.png");
    for model in ["qwen2-vl", "qwen3-vl"] {
        let folder = fixture(&format!("parity/{model}"));
        let gguf = folder.join("model.gguf");
        let (a, b) = (place.path("a.safetensors"), place.path("b.safetensors"));
        place.run(&["preprocess", "--model", text(&folder), text(&photo), "--out", text(&a)]).exits(0);
        place.run(&["preprocess", "--model", text(&gguf), text(&photo), "--out", text(&b)]).exits(0);
        assert_eq!(bytes(&a, "image_grid_thw"), bytes(&b, "image_grid_thw"), "{model}");
        assert_eq!(bytes(&a, "pixel_values"), bytes(&b, "pixel_values"), "{model}");
    }
}

#[test]
fn a_folder_of_frames_is_a_film() {
    let place = Place::new();
    let frames = place.path("frames");
    std::fs::create_dir(&frames).expect("a folder");
    for name in ["1.png", "2.png", "10.png"] {
        std::fs::copy(image("exact.png"), frames.join(name)).expect("copied");
    }
    let (folder, out) = (fixture("parity/qwen3-vl"), place.path("film.safetensors"));
    let args = ["preprocess", "--model", text(&folder), text(&frames), "--fps", "4", "--out", text(&out)];
    place.run(&args).exits(0);
    let (shape, grid) = bytes(&out, "video_grid_thw");
    let grid: Vec<i64> = grid.as_chunks().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect();
    assert_eq!((shape, grid[0]), (vec![1, 3], 2));
    assert_eq!(bytes(&out, "pixel_values_videos").0[0] as i64, grid.iter().product::<i64>());
    assert_eq!(bytes(&out, "second_per_grid_ts").1, 0.5_f32.to_le_bytes());
}

#[test]
fn what_cannot_be_done_is_said_in_one_message() {
    let place = Place::new();
    let out = place.path("out.safetensors");
    let (photo, vision, blind) = (image("photo.png"), fixture("parity/qwen3-vl"), fixture("parity/qwen3"));
    let broken = place.path("broken.png");
    std::fs::write(&broken, &std::fs::read(&photo).expect("a fixture")[..5000]).expect("written");
    let words = place.path("words.txt");
    std::fs::write(&words, "hello").expect("written");
    let run = |model: &Path, image: &Path| {
        place.run(&["preprocess", "--model", text(model), text(image), "--out", text(&out)])
    };
    run(&vision, &broken).fails_with(1, &["broken.png", "cut short", "hint: "]);
    run(&vision, &words).fails_with(1, &["words.txt", "found other bytes, expected PNG, JPEG, WebP or GIF"]);
    run(&vision, &place.path("none.png")).fails_with(1, &["none.png", "cannot be read"]);
    run(&blind, &photo).fails_with(1, &["qwen3"]);
    let alone = fixture("parity/qwen3-vl/model.gguf");
    let elsewhere = place.path("model.gguf");
    std::fs::copy(alone, &elsewhere).expect("copied");
    run(&elsewhere, &photo).fails_with(1, &["model.gguf", "mmproj"]);
    assert!(!out.exists());
    place.run(&["preprocess", text(&photo), "--out", text(&out)]).fails_with(2, &["--model"]);
    let timed = ["preprocess", "--model", text(&vision), text(&photo), "--fps", "4", "--out", text(&out)];
    place.run(&timed).fails_with(2, &["--fps is for films", "folder of frames"]);
    place.run(&["preprocess", "--model", text(&vision), "--out", text(&out)]).fails_with(2, &["IMAGE"]);
}
