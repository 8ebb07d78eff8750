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

/// Where the twins' converter has put the tokenizer's three special tokens a second time, over the last ordinary ones, in another
/// way in each of them; their own places (0 to 2) it has left without tokens. tokenizer.json says what they are.
const SHUFFLED: std::ops::Range<usize> = 275..278;

/// The twin of this one was made as if its packed experts stood transposed: gate and up are the left and the right half of the packed
/// matrix, and everything is turned. The reader puts that right; what is written is as in the other mixtures.
const TURNED: (&str, &str) = ("qwen3-vl-moe", "_exps.weight");

/// Whether a key's values differ in another way than on purpose.
fn differs(key: &str, folder: &str, ours: &Value, theirs: &Value) -> bool {
    let kept = |i: &usize| *i >= 3 && !SHUFFLED.contains(i);
    match (key, ours, theirs) {
        ("tokenizer.ggml.tokens", Value::Array(Array::String(ours)), Value::Array(Array::String(theirs))) => {
            let special: Vec<_> = ours.iter().take(3).collect();
            special != ["<|pad|>", "<|endoftext|>", "<|im_end|>"]
                || ours.len() != theirs.len()
                || (0..ours.len()).filter(kept).any(|i| ours.get(i) != theirs.get(i))
        }
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(ours)), Value::Array(Array::I32(theirs))) => {
            ours[..3] != [3, 3, 3]
                || ours.len() != theirs.len()
                || (0..ours.len()).filter(kept).any(|i| ours[i] != theirs[i])
        }
        // The converter writes another width there; the tower's own is what its tensors have.
        ("clip.vision.feed_forward_length", ..) => folder != "qwen2-vl" && ours != theirs,
        _ => ours != theirs,
    }
}

/// What differs and is not listed.
fn compare(folder: &str, ours: &Path, theirs: &Path, wrong: &mut Vec<String>) {
    let (ours, theirs) = (Gguf::open(ours).unwrap(), Gguf::open(theirs).unwrap());
    let mut say = |what: String| wrong.push(format!("{folder}: {what}"));
    for (key, value) in theirs.metadata().iter() {
        match ours.metadata().get(key) {
            None => say(format!("no {key}; the twin has {value:?}")),
            Some(found) if differs(key, folder, found, value) => {
                say(format!("{key} is {}, the twin has {}", found.describe(), value.describe()));
            }
            Some(_) => {}
        }
    }
    for (key, value) in ours.metadata().iter() {
        if theirs.metadata().get(key).is_none() && !MORE.contains(&key) {
            say(format!("{key} = {value:?} is not in the twin"));
        }
    }
    if ours.tensors().len() != theirs.tensors().len() {
        say(format!("{} tensors, the twin has {}", ours.tensors().len(), theirs.tensors().len()));
    }
    for expected in theirs.tensors() {
        let at = &expected.name;
        let Some(info) = ours.tensor(at) else {
            say(format!("no tensor {at}"));
            continue;
        };
        if folder == TURNED.0 && at.ends_with(TURNED.1) {
            let (here, there) = (info.shape.iter().product::<usize>(), expected.shape.iter().product::<usize>());
            if here != there {
                say(format!("{at} has {here} values, the twin has {there}"));
            }
            continue;
        }
        if (&info.shape, info.dtype) != (&expected.shape, expected.dtype) {
            say(format!("{at} is {:?}, the twin has {:?}", info.shape, expected.shape));
            continue;
        }
        let values = |gguf: &Gguf, info| {
            let info: &qwenkit_formats::TensorInfo = info;
            let mut bytes = vec![0; info.len_bytes];
            gguf.read(info, 0, &mut bytes).unwrap();
            bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>()
        };
        let (found, expected) = (values(&ours, info), values(&theirs, expected));
        // Exponentials come from another library: their last bit may differ.
        let slack = if at.ends_with("ssm_a") { 1e-6 } else { 0.0 };
        if found.iter().zip(&expected).any(|(a, b)| (a - b).abs() > slack * b.abs()) {
            say(format!("the values of {at} differ"));
        }
    }
}

#[test]
fn converted_folders_equal_their_twins() {
    let (mut compared, mut wrong) = (0, Vec::new());
    for folder in folders() {
        let twin = folder.join("model.gguf");
        if !twin.is_file() {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model.gguf");
        write(&folder, "F32", &out);
        compare(&name(&folder), &out, &twin, &mut wrong);
        compared += 1;
        let tower = folder.join("mmproj.gguf");
        if tower.is_file() {
            compare(&name(&folder), &dir.path().join("mmproj-model.gguf"), &tower, &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared >= 9, "{compared} twins");
}
