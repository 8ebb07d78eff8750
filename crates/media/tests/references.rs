//! Every image of `fixtures/images` becomes the patches that transformers' processors made of it.
//!
//! The records hold the colours before normalisation, from 0 to 255, of a patch's first frame.

use std::path::{Path, PathBuf};

use qwenkit_media::{ImageGrid, Processor, read};
use safetensors::SafeTensors;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images")
}

/// Values that may be further off than a step and a half, of a thousand. JPEG leaves decoders some freedom: Pillow's and
/// this program's round colours differently where they are stored at half the size.
fn far_of_a_thousand(file: &str) -> usize {
    if file.ends_with(".jpg") { 10 } else { 1 }
}

#[test]
fn patches_agree_with_the_reference() {
    let cases = std::fs::read(folder().join("cases.json")).expect("cases");
    let cases: Value = serde_json::from_slice(&cases).expect("JSON");
    let bytes = std::fs::read(folder().join("expected.safetensors")).expect("expected values");
    let expected = SafeTensors::deserialize(&bytes).expect("safetensors");
    let all = cases["cases"].as_array().expect("a list");
    assert_eq!(all.len(), 16);
    for case in all {
        let text = |field: &str| case[field].as_str().expect("a text");
        let (key, file) = (text("key"), text("file"));
        let processor = Processor::from_json(&cases["processors"][text("processor")]).expect("numbers");
        let patches = processor.patches(&read(&folder().join(file)).expect("an image")).expect("patches");
        let grid = |axis: usize| case["grid"][0][axis].as_u64().expect("a number") as usize;
        assert_eq!(patches.grid, ImageGrid { steps: grid(0), rows: grid(1), cols: grid(2) }, "{key}");

        let reference = expected.tensor(key).expect("a tensor").data();
        let area = processor.patch_size * processor.patch_size;
        // (patches * 3) of (frames, area)
        let ours = patches.values.chunks_exact(2 * area);
        assert_eq!((ours.len(), ours.remainder().len()), (reference.len() / area, 0), "{key}");
        let (mut far, mut largest) = (0, 0.0_f32);
        for (i, (ours, reference)) in ours.zip(reference.chunks_exact(area)).enumerate() {
            assert_eq!(ours[..area], ours[area..], "{key}: both frames are the image");
            let (mean, std) = (processor.image_mean[i % 3], processor.image_std[i % 3]);
            for (x, &colour) in ours.iter().zip(reference) {
                let off = ((x * std + mean) * 255.0 - f32::from(colour)).abs();
                far += usize::from(off.is_nan() || off > 1.5);
                largest = largest.max(off);
            }
        }
        println!("{key}: {far} of {} further off than 1.5, at most {largest}", reference.len());
        assert!(far * 1000 <= reference.len() * far_of_a_thousand(file), "{key}: {far} of {}", reference.len());
    }
}
