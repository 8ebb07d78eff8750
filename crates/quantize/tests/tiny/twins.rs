//! A converted folder says the same as its twin, which llama.cpp's converter made of the same checkpoint: every key and every
//! tensor. What differs on purpose is listed here with its reason, and nothing else may.

use std::path::Path;

use qwenkit_formats::{Gguf, gguf::Array, gguf::Value};

use crate::models::{folders, name, write};

/// Keys that only our files have.
const MORE: [&str; 5] = [
    // The reader takes Qwen2-VL's and 2.5-VL's for 2 where it is missing; it is stated all the same.
    "clip.vision.spatial_merge_size",
    // Without it a reader has to guess the published models' 112 pixels.
    "clip.vision.window_size",
    "clip.vision.tokens_per_second",
    // Limits of the checkpoint's own image processor.
    "clip.vision.image_min_pixels",
    "clip.vision.image_max_pixels",
];

/// Keys whose values differ.
fn differs(key: &str, folder: &str, ours: &Value, theirs: &Value) -> bool {
    match key {
        // The twins' converter found no tokens for the first three ids, as the tiny tokenizer has its end token at another id
        // in another of its files; tokenizer.json says what they are.
        "tokenizer.ggml.tokens" => {
            let (Value::Array(Array::String(ours)), Value::Array(Array::String(theirs))) = (ours, theirs) else {
                return true;
            };
            let rest = |strings: &qwenkit_formats::gguf::Strings| {
                strings.iter().skip(3).map(str::to_owned).collect::<Vec<_>>()
            };
            let (mut ours, mut theirs) = (rest(ours), rest(theirs));
            // There, `<|im_end|>` stands a second time.
            let at = 277 - 3;
            (ours[at], theirs[at]) = (String::new(), String::new());
            ours != theirs
        }
        "tokenizer.ggml.token_type" => {
            let (Value::Array(Array::I32(ours)), Value::Array(Array::I32(theirs))) = (ours, theirs) else {
                return true;
            };
            ours[..3] != [3, 3, 3] || ours[3..277] != theirs[3..277] || ours[278..] != theirs[278..]
        }
        // The converter writes the text model's width there; the tower's own is what its tensors have.
        "clip.vision.feed_forward_length" => folder != "qwen2-vl" && ours != theirs,
        _ => ours != theirs,
    }
}

fn compare(folder: &str, ours: &Path, theirs: &Path) {
    let (ours, theirs) = (Gguf::open(ours).unwrap(), Gguf::open(theirs).unwrap());
    for (key, value) in theirs.metadata().iter() {
        let found = ours.metadata().get(key).unwrap_or_else(|| panic!("{folder}: no {key}; the twin has {value:?}"));
        assert!(!differs(key, folder, found, value), "{folder}: {key} is {found:?}, the twin has {value:?}");
    }
    for (key, value) in ours.metadata().iter() {
        let known = theirs.metadata().get(key).is_some() || MORE.contains(&key);
        assert!(known, "{folder}: {key} = {value:?} is not in the twin");
    }
    assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{folder}");
    for theirs_info in theirs.tensors() {
        let at = &theirs_info.name;
        let info = ours.tensor(at).unwrap_or_else(|| panic!("{folder}: no tensor {at}"));
        assert_eq!((&info.shape, info.dtype), (&theirs_info.shape, theirs_info.dtype), "{folder}: {at}");
        let (mut found, mut expected) = (vec![0; info.len_bytes], vec![0; info.len_bytes]);
        ours.read(info, 0, &mut found).unwrap();
        theirs.read(theirs_info, 0, &mut expected).unwrap();
        if at.ends_with("ssm_a") {
            // An exponential of another library: the last bit may differ.
            let value = |b: &[u8; 4]| f32::from_le_bytes(*b);
            let pairs = found.as_chunks().0.iter().zip(expected.as_chunks().0);
            assert!(
                pairs.into_iter().all(|(a, b)| (value(a) - value(b)).abs() <= 1e-6 * value(b).abs()),
                "{folder}: {at}"
            );
        } else {
            assert!(found == expected, "{folder}: the values of {at} differ");
        }
    }
}

#[test]
fn converted_folders_equal_their_twins() {
    let mut compared = 0;
    for folder in folders() {
        let dir = tempfile::tempdir().unwrap();
        // The name of the file's folder is the model's.
        let out = dir.path().join("model.gguf");
        let twin = folder.join("model.gguf");
        if !twin.is_file() {
            continue;
        }
        write(&folder, "F32", &out);
        compare(&name(&folder), &out, &twin);
        compared += 1;
        let tower = folder.join("mmproj.gguf");
        if tower.is_file() {
            compare(&name(&folder), &dir.path().join("mmproj-model.gguf"), &tower);
        }
    }
    assert!(compared >= 9, "{compared} twins");
}
