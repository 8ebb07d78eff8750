//! Every tiny model in every kind of file loads, runs, and stays within a stated distance of its float result.

use std::collections::BTreeMap;
use std::path::Path;

use crate::models::{folders, ids, logits, name, write};

/// Root of the mean squared difference of logits, in units of their spread.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let n = expected.len() as f64;
    let mean = expected.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let spread = expected.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
    let off = found.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    (off / spread).sqrt()
}

/// The distance that a kind may have: of dense models, and of mixtures, where another choice of experts makes a jump. Random
/// weights of width 64 answer far more nervously than a trained model's; what has nothing to do with the model is at 1.4.
const LIMITS: [(&str, f64, f64); 3] = [("F32", 1e-5, 1e-5), ("Q8_0", 0.12, 0.3), ("Q4_K", 0.6, 0.7)];

#[test]
fn every_folder_runs_from_every_kind_of_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut found: BTreeMap<String, f64> = BTreeMap::new();
    let mut wrong = Vec::new();
    for folder in folders() {
        let ids = ids(&folder);
        let expected = logits(&folder, &ids);
        let has_experts = name(&folder).contains("moe") || matches!(name(&folder).as_str(), "qwen3-next" | "qwen4-exp");
        for (kind, dense, mixed) in LIMITS {
            let limit = if has_experts { mixed } else { dense };
            let out = dir.path().join(format!("{}-{kind}.gguf", name(&folder)));
            write(&folder, kind, &out);
            let distance = distance(&logits(&out, &ids), &expected);
            found.insert(format!("{} {kind}", name(&folder)), distance);
            if distance.is_nan() || distance > limit {
                wrong.push(format!("{} {kind}: {distance:.4}, expected up to {limit}", name(&folder)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}\nall: {found:#?}", wrong.join("\n"));
}

#[test]
fn a_file_has_the_same_bytes_whoever_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folders().into_iter().find(|folder| name(folder) == "qwen3.5-moe").unwrap();
    let read = |path: &Path| std::fs::read(path).unwrap();
    let (a, b) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    write(&folder, "Q5_K_M", &a);
    let files = qwenkit_formats::ModelFiles::open(&folder).unwrap();
    let importance = qwenkit_quantize::Importance::new();
    let step = qwenkit_quantize::Step {
        kind: "Q5_K_M".parse().unwrap(),
        out: &b,
        importance: &importance,
        threads: 7,
        prover: None,
    };
    step.quantize(&files, &mut |_, _| {}).unwrap();
    assert!(read(&a) == read(&b));
    // A file written from the float file is the one written from the folder.
    let (float, c) = (dir.path().join("float.gguf"), dir.path().join("c.gguf"));
    write(&folder, "F32", &float);
    write(&float, "Q5_K_M", &c);
    assert!(read(&a) == read(&c));
}
