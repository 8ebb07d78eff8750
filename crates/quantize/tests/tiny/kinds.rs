//! Every tiny model in every kind of file loads, runs, and stays within a stated distance of its float result.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use qwenkit_formats::Gguf;
use qwenkit_tensor::TokenId;

use crate::models::{folders, logits, name, recorded_logits, write, write_wide};

/// Root of the mean squared difference of logits, in units of their spread.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let n = expected.len() as f64;
    let mean = expected.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let spread = expected.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
    let off = found.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    (off / spread).sqrt()
}

/// The kinds, and the distance that each may have. Random weights of width 64 answer far more nervously than a trained model's; what has
/// nothing to do with the model is at 1.4.
const KINDS: [&str; 3] = ["F32", "Q8_0", "Q4_K"];

/// Of each family about a quarter above the largest that was seen (docs/LOG.md): in mixtures another choice of experts makes a jump, and
/// images go through a tower of the same kind first.
const LIMITS: [(&str, [f64; 3]); 5] = [
    ("dense", [1e-5, 0.12, 0.62]),
    ("mixture", [1e-5, 0.25, 0.58]),
    ("hybrid", [1e-5, 0.11, 0.48]),
    ("hybrid mixture", [1e-5, 0.27, 0.7]),
    ("vision", [1e-5, 0.075, 0.42]),
];

fn family(name: &str) -> &'static str {
    match name {
        "qwen2-moe" | "qwen2-moe-mixed" | "qwen3-moe" => "mixture",
        "qwen3.5" => "hybrid",
        "qwen3-next" | "qwen3.5-moe" | "qwen4-exp" => "hybrid mixture",
        _ if name.contains("-vl") || name.contains("vision") => "vision",
        _ => "dense",
    }
}

#[test]
fn every_folder_runs_from_every_kind_of_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut largest: BTreeMap<String, f64> = BTreeMap::new();
    let mut wrong = Vec::new();
    for folder in folders() {
        let (name, expected) = (name(&folder), recorded_logits(&folder, &folder));
        let family = family(&name);
        let limits = LIMITS.iter().find(|(other, _)| *other == family).map(|(_, limits)| limits).unwrap();
        for (kind, limit) in KINDS.iter().zip(limits) {
            let out = dir.path().join(format!("{name}-{kind}.gguf"));
            write(&folder, kind, &out);
            let distance = distance(&recorded_logits(&out, &folder), &expected);
            println!("{name} {kind}: {distance:.4}");
            let most = largest.entry(format!("{family} {kind}")).or_insert(0.0);
            *most = most.max(distance);
            if distance.is_nan() || distance > *limit {
                wrong.push(format!("{name} {kind}: {distance:.4}, expected up to {limit}"));
            }
        }
    }
    println!("{largest:#?}");
    assert!(wrong.is_empty(), "{}\nall: {largest:#?}", wrong.join("\n"));
}

/// Rows of 64 have no whole block of the K types, and get others in their place. Rows of 256 have.
#[test]
fn wide_rows_have_the_type_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<TokenId> = (0..64).map(|i| TokenId(3 + (i * 37) % 250)).collect();
    for (has_experts, limits) in [(false, [0.03, 0.27]), (true, [0.03, 0.4])] {
        let folder = dir.path().join(format!("wide-{has_experts}"));
        write_wide(&folder, has_experts);
        let expected = logits(&folder, &ids);
        for (kind, limit) in ["Q8_0", "Q4_K"].into_iter().zip(limits) {
            let out = dir.path().join(format!("wide-{has_experts}-{kind}.gguf"));
            write(&folder, kind, &out);
            let gguf = Gguf::open(&out).unwrap();
            let types: BTreeSet<&str> = gguf
                .tensors()
                .iter()
                .filter(|t| t.shape.len() > 1 && t.name.contains(".ffn_"))
                .map(|t| t.dtype.name())
                .collect();
            let own = gguf.tensors().iter().filter(|t| t.dtype.name() == kind).count();
            assert!(own >= 6, "{kind}: {own} tensors, {types:?}");
            assert!(!types.contains("Q5_0") && !types.contains("Q5_1"), "{kind}: {types:?}");
            let distance = distance(&logits(&out, &ids), &expected);
            println!("wide, experts {has_experts}, {kind}: {distance:.4}");
            assert!(distance <= limit, "experts {has_experts}, {kind}: {distance:.4}, expected up to {limit}");
        }
    }
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
