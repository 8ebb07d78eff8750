//! Recorded images become the patches that transformers' processors made of them, and files of every form the pixels that Pillow
//! made of them, value for value.

use std::path::{Path, PathBuf};

use qwenkit_media::{Limits, PatchGrid, Processor, read};
use safetensors::SafeTensors;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images")
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).expect("a fixture")
}

#[test]
fn patches_are_those_of_the_reference() {
    let cases: Value = serde_json::from_slice(&file("cases.json")).expect("JSON");
    let bytes = file("expected.safetensors");
    let expected = SafeTensors::deserialize(&bytes).expect("safetensors");
    let all = cases["cases"].as_array().expect("a list");
    assert_eq!(all.len(), expected.len());
    for case in all {
        let key = case["key"].as_str().expect("a key");
        let processor = &cases["processors"][case["processor"].as_str().expect("a name")];
        let processor = Processor::from_json(processor).expect("numbers");
        let image = read(&folder().join(case["file"].as_str().expect("a file")), &Limits::default()).expect("an image");
        let patches = processor.image(&image).expect("patches");
        let grid = |axis: usize| case["grid"][0][axis].as_u64().expect("a number") as usize;
        assert_eq!(patches.grid, PatchGrid { steps: grid(0), rows: grid(1), cols: grid(2) }, "{key}");
        // Colours of one frame, before normalisation: (patches, 3, p, p).
        let colours = expected.tensor(key).expect("a tensor").data();
        let square = processor.patch_size * processor.patch_size;
        let frames = patches.values.chunks_exact(square * processor.temporal_patch_size);
        assert_eq!(frames.len() * square, colours.len(), "{key}");
        for (i, (values, colours)) in frames.zip(colours.chunks_exact(square)).enumerate() {
            let (mean, std) = (processor.image_mean[i % 3], processor.image_std[i % 3]);
            for (j, value) in values.iter().enumerate() {
                let wanted = (f32::from(colours[j % square]) / 255.0 - mean) / std;
                assert!((value - wanted).abs() < 1e-5, "{key}: patch {}, value {j}: {value}, not {wanted}", i / 3);
            }
        }
    }
}

#[test]
fn every_form_of_file_has_the_pixels_that_pillow_finds() {
    let bytes = file("forms/expected.safetensors");
    let expected = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert!(expected.len() > 25);
    let mut wrong = Vec::new();
    for (name, tensor) in expected.iter() {
        let image = read(&folder().join("forms").join(name), &Limits::default()).expect(name);
        assert_eq!([image.height, image.width, 3], tensor.shape(), "{name}");
        let differing = image.values.iter().zip(tensor.data()).filter(|(a, b)| a != b).count();
        if differing > 0 {
            wrong.push(format!("{name}: {differing} of {}", image.values.len()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn sixteen_bits_of_grey_are_scaled() {
    // Pillow makes everything above 255 white.
    let chunk = |kind: &[u8], data: &[u8]| {
        let sum = [kind, data].concat().iter().fold(!0_u32, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
        });
        [&(data.len() as u32).to_be_bytes(), kind, data, &(!sum).to_be_bytes()].concat()
    };
    // Two pixels in a stored block of deflate, with its Adler sum.
    let row = [0, 0x80, 0x01, 0x12, 0xff];
    let (a, b) = row.iter().fold((1_u32, 0_u32), |(a, b), &x| (a + u32::from(x), b + a + u32::from(x)));
    let stored = [&[0x78, 0x01, 1, 5, 0, !5, !0][..], &row, &(b << 16 | a).to_be_bytes()].concat();
    let header = [&2_u32.to_be_bytes()[..], &1_u32.to_be_bytes(), &[16, 0, 0, 0, 0]].concat();
    let png =
        [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &stored), chunk(b"IEND", b"")].concat();
    let image = qwenkit_media::decode(&png, &Limits::default()).expect("an image");
    assert_eq!(image.values, [0x80, 0x80, 0x80, 0x12, 0x12, 0x12]);
}
