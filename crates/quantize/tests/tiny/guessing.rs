//! A model with a block that guesses the token after the next keeps it on the way into another file and back.

#[path = "../../../../fixtures/guessing_block.rs"]
mod guessing_block;

use std::{collections::BTreeMap, path::Path};

use qwenkit_formats::{Gguf, ModelFiles, gguf::Array, gguf::Value};
use qwenkit_models::arch;
use qwenkit_quantize::{Importance, Step};

use crate::models::{folders, name, write};

/// The checkpoint of this name in `to`, with a block that guesses.
fn with_block(checkpoint: &str, to: &Path) {
    let from = folders().into_iter().find(|folder| name(folder) == checkpoint).unwrap();
    guessing_block::with_block(&from, to, &[]);
}

#[test]
fn a_block_that_is_left_out_is_told() {
    let dir = tempfile::tempdir().unwrap();
    for (checkpoint, left_out) in [("qwen3-next", true), ("qwen3.5", false)] {
        let source = dir.path().join(checkpoint);
        std::fs::create_dir(&source).unwrap();
        with_block(checkpoint, &source);
        let (importance, out) = (Importance::new(), dir.path().join(format!("{checkpoint}.gguf")));
        let step = Step { kind: "F32".parse().unwrap(), out: &out, importance: &importance, threads: 1, prover: None };
        let written = step.quantize(&ModelFiles::open(&source).unwrap(), &mut |_, _| {}).unwrap();
        assert_eq!(written.without_block.is_some(), left_out, "{checkpoint}");
    }
}

#[test]
fn the_block_goes_into_a_gguf_file_and_back() {
    let dir = tempfile::tempdir().unwrap();
    for checkpoint in ["qwen3.5", "qwen3.5-moe"] {
        let [source, back] = ["source", "back"].map(|name| dir.path().join(format!("{checkpoint}-{name}")));
        let file = dir.path().join(format!("{checkpoint}.gguf"));
        std::fs::create_dir(&source).unwrap();
        with_block(checkpoint, &source);
        write(&source, "F32", &file);
        let gguf = Gguf::open(&file).unwrap();
        let number = |key: &str| {
            let (_, value) = gguf.metadata().iter().find(|(name, _)| name.ends_with(key)).unwrap();
            match value {
                Value::U32(value) => *value as usize,
                other => panic!("{key}: {other:?}"),
            }
        };
        assert_eq!((number(".block_count"), number(".nextn_predict_layers")), (5, 1), "{checkpoint}");
        // llama.cpp refuses a list of another length than the block count.
        let (_, kinds) = gguf.metadata().iter().find(|(name, _)| name.ends_with(".recurrent_layers")).unwrap();
        let Value::Array(Array::Bool(kinds)) = kinds else { panic!("{kinds:?}") };
        assert_eq!(kinds[..], [true, true, true, false, false], "{checkpoint}");
        let importance = Importance::new();
        let step = Step { kind: "F32".parse().unwrap(), out: &back, importance: &importance, threads: 2, prover: None };
        step.export(&ModelFiles::open(&file).unwrap(), &mut |_, _| {}).unwrap();
        let tensors = |path: &Path| {
            let files = ModelFiles::open(path).unwrap();
            assert!(arch::plan(&files).unwrap().mtp.is_some(), "{}", path.display());
            let read = |info: &qwenkit_formats::TensorInfo| {
                let mut bytes = vec![0; info.len_bytes];
                files.read(info, 0, &mut bytes).unwrap();
                (info.name.clone(), bytes)
            };
            files.tensors().iter().filter(|info| info.name.starts_with("mtp.")).map(read).collect::<BTreeMap<_, _>>()
        };
        let (before, after) = (tensors(&source), tensors(&back));
        assert!(before.len() > 10 && before.keys().eq(after.keys()), "{:?} {:?}", before.keys(), after.keys());
        for (name, bytes) in &before {
            let values =
                |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
            let off = values(bytes).iter().zip(values(&after[name])).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Norms are stored with 1 added in between.
            assert!(bytes.len() == after[name].len() && off < 2e-7, "{checkpoint}: {name} differs by {off}");
        }
    }
}
