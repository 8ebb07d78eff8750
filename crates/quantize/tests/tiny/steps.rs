//! Merging and exporting: the same model whichever way it went.

use std::path::{Path, PathBuf};

use qwenkit_engine::text_of;
use qwenkit_formats::{Adapter, AdapterModule, AdapterNames, AdapterSettings, AdapterTensor, ModelFiles};
use qwenkit_kernels::dequantize_row;
use qwenkit_quantize::{Change, Error, Importance, Method, Prover, Step, record_path};
use qwenkit_text::SpecialTokens;

use crate::models::{compute, folders, ids, logits, name, write};

fn folder(wanted: &str) -> PathBuf {
    folders().into_iter().find(|folder| name(folder) == wanted).unwrap()
}

fn values(files: &ModelFiles, at: &str) -> Vec<f32> {
    let info = files.tensor(at).unwrap_or_else(|| panic!("no {at} in {}", files.path().display()));
    let (mut bytes, mut values) = (vec![0; info.len_bytes], vec![0.0; info.shape.iter().product()]);
    files.read(info, 0, &mut bytes).unwrap();
    dequantize_row(info.dtype, &bytes, &mut values);
    values
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// An adapter of these modules of a checkpoint, with numbers that are neither small nor alike.
fn adapter(files: &ModelFiles, modules: &[&str], dora: bool) -> Adapter {
    let mut state = 5_u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let rank = 3;
    let module = |module: &&str| {
        let shape = &files.tensor(&format!("{module}.weight")).unwrap().shape;
        let (outputs, inputs) = (shape[0], shape[1]);
        AdapterModule {
            name: (*module).to_owned(),
            inputs,
            outputs,
            rank,
            scale: 4.0,
            a: (0..rank * inputs).map(|_| 0.2 * number()).collect(),
            b: (0..rank * outputs).map(|_| 0.2 * number()).collect(),
            magnitude: dora.then(|| (0..outputs).map(|_| 1.0 + number()).collect()),
        }
    };
    let modules: Vec<AdapterModule> = modules.iter().map(module).collect();
    let settings = AdapterSettings { rank: Some(rank), alpha: 12.0, use_dora: dora, ..AdapterSettings::default() };
    Adapter { settings, names: AdapterNames::HuggingFace, gguf_architecture: None, modules, whole: Vec::new() }
}

fn merged(base: &Path, changes: &[Change<'_>], out: &Path) -> Result<(), Error> {
    let (files, importance) = (ModelFiles::open(base).unwrap(), Importance::new());
    let step = Step { kind: "F32".parse().unwrap(), out, importance: &importance, threads: 2, prover: None };
    step.merge(&files, changes, &mut |_, _| {}).map(|_| ())
}

#[test]
fn an_adapter_becomes_part_of_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let base = ModelFiles::open(&folder("qwen2")).unwrap();
    let at = "model.layers.1.mlp.down_proj";
    for dora in [false, true] {
        let adapter = adapter(&base, &[at, "model.layers.0.self_attn.q_proj"], dora);
        let out = dir.path().join(format!("merged-{dora}"));
        merged(base.path(), &[Change::Adapter(&adapter, Path::new("adapter"))], &out).unwrap();
        let files = ModelFiles::open(&out).unwrap();
        let (before, after) = (values(&base, &format!("{at}.weight")), values(&files, &format!("{at}.weight")));
        let m = adapter.modules.iter().find(|m| m.name == at).unwrap();
        for (row, (before, after)) in before.chunks(m.inputs).zip(after.chunks(m.inputs)).enumerate() {
            let mut expected: Vec<f64> = before
                .iter()
                .enumerate()
                .map(|(col, w)| {
                    let product = |r: usize| f64::from(m.b[row * m.rank + r]) * f64::from(m.a[r * m.inputs + col]);
                    f64::from(*w) + 4.0 * (0..m.rank).map(product).sum::<f64>()
                })
                .collect();
            if let Some(magnitude) = &m.magnitude {
                let length = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                expected.iter_mut().for_each(|x| *x *= f64::from(magnitude[row]) / length);
            }
            let off = expected.iter().zip(after).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
            assert!(off < 1e-6, "row {row}: {off}");
        }
        let same = "model.layers.2.mlp.down_proj.weight";
        assert_eq!(values(&base, same), values(&files, same));
    }
}

#[test]
fn the_base_may_be_of_either_format() {
    let dir = tempfile::tempdir().unwrap();
    for (model, modules) in [
        ("qwen3", &["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"][..]),
        // Rows and columns stand in another order in GGUF.
        ("qwen3.5", &["model.layers.0.linear_attn.in_proj_qkv", "model.layers.1.linear_attn.out_proj"]),
        ("qwen3-next", &["model.layers.0.linear_attn.in_proj_qkvz", "model.layers.3.self_attn.q_proj"]),
    ] {
        let source = folder(model);
        let base = ModelFiles::open(&source).unwrap();
        let adapter = adapter(&base, modules, false);
        let change = || [Change::Adapter(&adapter, Path::new("adapter"))];
        let gguf = dir.path().join(format!("{model}.gguf"));
        write(&source, "F32", &gguf);
        let ids = ids(&source);
        let plain = logits(&source, &ids);
        let mut all = Vec::new();
        for (n, from) in [&source, &gguf].into_iter().enumerate() {
            for ending in ["", ".gguf"] {
                let out = dir.path().join(format!("{model}-{n}{ending}"));
                merged(from, &change(), &out).unwrap_or_else(|error| panic!("{model}: {error}"));
                all.push(logits(&out, &ids));
            }
        }
        assert!(largest_difference(&all[0], &plain) > 0.01, "{model}: the adapter does nothing");
        for other in &all[1..] {
            let off = largest_difference(&all[0], other);
            assert!(off < 2e-4, "{model}: {off}");
        }
    }
}

#[test]
fn what_does_not_belong_to_the_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (qwen2, tied) = (ModelFiles::open(&folder("qwen2")).unwrap(), ModelFiles::open(&folder("qwen2-tied")).unwrap());
    let good = adapter(&qwen2, &["model.layers.0.self_attn.q_proj"], false);
    let refused = |base: &ModelFiles, adapter: &Adapter, part: &str| {
        let error =
            merged(base.path(), &[Change::Adapter(adapter, Path::new("adapter"))], &out).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!out.exists());
    };
    let mut other = good.clone();
    other.modules[0].name = "model.layers.9.self_attn.q_proj".into();
    refused(&qwen2, &other, "layers.9");
    let mut other = good.clone();
    other.modules[0].inputs = 32;
    other.modules[0].a.truncate(3 * 32);
    refused(&qwen2, &other, "[64, 32]");
    let mut other = good.clone();
    other.modules.push(other.modules[0].clone());
    refused(&qwen2, &other, "there twice");
    // A head of its own would be lost in a model whose head is the embedding.
    let shape = qwen2.tensor("lm_head.weight").unwrap().shape.clone();
    let head = AdapterTensor { name: "lm_head.weight".into(), values: vec![0.0; shape.iter().product()], shape };
    let other = Adapter { whole: vec![head], ..good };
    refused(&tied, &other, "one tensor in this model");
}

#[test]
fn a_merge_says_how_far_answers_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (base, compute, importance) = (ModelFiles::open(&folder("qwen3")).unwrap(), compute(), Importance::new());
    let adapter = adapter(&base, &["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"], false);
    let prover = Prover { compute: &compute, text: None, limit: None, positions: Prover::POSITIONS };
    let out = dir.path().join("merged");
    let run = |limit: Option<f64>, out: &Path| {
        let prover = Prover { limit, ..prover };
        let kind = "F32".parse().unwrap();
        let step = Step { kind, out, importance: &importance, threads: 1, prover: Some(&prover) };
        step.merge(&base, &[Change::Adapter(&adapter, Path::new("adapter"))], &mut |_, _| {})
    };
    let proof = run(None, &out).unwrap().proof.unwrap();
    // The adapter moves answers, and the merge answers as the model under it.
    assert!(proof.holds() && proof.adapter_kl.unwrap() > 1e-3, "{proof:?}");
    assert!(proof.kl_mean.abs() < 1e-7 && proof.moved[0].relative < 1e-12, "{proof:?}");
    assert!(out.join("proof.json").is_file());
    // Whoever knows how far it may go can say so.
    let other = dir.path().join("other");
    assert!(matches!(run(Some(-1.0), &other), Err(Error::NotProved { .. })) && !other.exists());
    // A folder that changed after its merge is no longer what was merged.
    let config = out.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    let files = ModelFiles::open(&out).unwrap();
    let (kind, gguf) = ("Q8_0".parse().unwrap(), dir.path().join("next.gguf"));
    let step = Step { kind, out: &gguf, importance: &importance, threads: 1, prover: None };
    assert!(matches!(step.quantize(&files, &mut |_, _| {}), Err(Error::Changed { .. })));
}

#[test]
fn a_quantised_model_can_be_written_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let (compute, importance) = (compute(), Importance::new());
    let prover = Prover { compute: &compute, text: None, limit: None, positions: 64 };
    let quantized = dir.path().join("q8_0.gguf");
    write(&folder("qwen3"), "Q8_0", &quantized);
    let files = ModelFiles::open(&quantized).unwrap();
    // Its own activations are rounded, those of the full file are not.
    let (kind, out) = ("F32".parse().unwrap(), dir.path().join("full"));
    let step = Step { kind, out: &out, importance: &importance, threads: 1, prover: Some(&prover) };
    let proof = step.export(&files, &mut |_, _| {}).unwrap().proof.unwrap();
    assert!(proof.kl_mean > 1e-6 && proof.moved[0].relative < 1e-12, "{proof:?}");
}

#[test]
fn models_are_blended() {
    let dir = tempfile::tempdir().unwrap();
    let base = ModelFiles::open(&folder("qwen2")).unwrap();
    let adapter = adapter(&base, &["model.layers.0.self_attn.q_proj"], false);
    let changed = dir.path().join("changed");
    merged(base.path(), &[Change::Adapter(&adapter, Path::new("adapter"))], &changed).unwrap();
    let changed = ModelFiles::open(&changed).unwrap();
    let out = dir.path().join("half.gguf");
    merged(base.path(), &[Change::Blend(vec![(&changed, 0.5)], Method::Linear)], &out).unwrap();
    let half = values(&ModelFiles::open(&out).unwrap(), "blk.0.attn_q.weight");
    let at = "model.layers.0.self_attn.q_proj.weight";
    for ((half, a), b) in half.iter().zip(values(&base, at)).zip(values(&changed, at)) {
        assert!((half - 0.5 * (a + b)).abs() < 1e-6);
    }
    let other = ModelFiles::open(&folder("qwen3")).unwrap();
    let error = merged(base.path(), &[Change::Blend(vec![(&other, 0.5)], Method::Linear)], &dir.path().join("no"));
    assert!(matches!(error, Err(Error::Unsayable { .. })));
}

#[test]
fn exported_folders_are_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut exported = 0;
    for source in folders() {
        let model = name(&source);
        // Towers stay in their own folders, and one has no class in transformers yet.
        if model.contains("vl") || model.contains("vision") || model == "qwen4-exp" {
            continue;
        }
        let (gguf, out) = (dir.path().join(format!("{model}.gguf")), dir.path().join(&model));
        write(&source, "F32", &gguf);
        let (files, importance) = (ModelFiles::open(&gguf).unwrap(), Importance::new());
        let step = Step { kind: "F32".parse().unwrap(), out: &out, importance: &importance, threads: 1, prover: None };
        step.export(&files, &mut |_, _| {}).unwrap_or_else(|error| panic!("{model}: {error}"));
        let ids = ids(&source);
        let off = largest_difference(&logits(&out, &ids), &logits(&source, &ids));
        assert!(off < 2e-4, "{model}: {off}");
        let (ours, theirs) = (ModelFiles::open(&out).unwrap(), ModelFiles::open(&source).unwrap());
        let encode = |files: &ModelFiles| {
            let text = text_of(files).unwrap();
            let ids = text.tokenizer.encode("The rain in Spain<|im_end|>\n42", SpecialTokens::Parse).unwrap();
            (ids, text.stop_tokens, text.template.is_some())
        };
        assert_eq!(encode(&ours), encode(&theirs), "{model}");
        exported += 1;
    }
    assert_eq!(exported, 11);
}

#[test]
fn a_model_that_changed_after_its_proof_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (source, compute, importance) = (folder("qwen3"), compute(), Importance::new());
    let prover = Prover { compute: &compute, text: None, limit: None, positions: Prover::POSITIONS };
    let run = |from: &Path, out: &Path| {
        let files = ModelFiles::open(from).unwrap();
        let step =
            Step { kind: "Q8_0".parse().unwrap(), out, importance: &importance, threads: 1, prover: Some(&prover) };
        step.quantize(&files, &mut |_, _| {})
    };
    let (first, second) = (dir.path().join("first.gguf"), dir.path().join("second.gguf"));
    let proof = run(&source, &first).unwrap().proof.unwrap();
    assert!(proof.holds() && proof.tokens > 100 && proof.kl_mean > 0.0, "{proof:?}");
    let ModelFiles::Gguf(gguf) = ModelFiles::open(&first).unwrap() else { panic!("a GGUF file") };
    assert_eq!(gguf.metadata().f32("qwenkit.proof.kl_mean").unwrap(), Some(proof.kl_mean as f32));
    assert!(record_path(&first).is_file());
    run(&first, &second).unwrap();
    let mut bytes = std::fs::read(&first).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&first, bytes).unwrap();
    let error = run(&first, &second).unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    // A limit below what the type costs is one that the file does not keep.
    let strict = Prover { limit: Some(1e-12), ..prover };
    let files = ModelFiles::open(&source).unwrap();
    let out = dir.path().join("strict.gguf");
    let kind = "Q4_0".parse().unwrap();
    let step = Step { kind, out: &out, importance: &importance, threads: 1, prover: Some(&strict) };
    let error = step.quantize(&files, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::NotProved { .. }) && !out.exists(), "{error}");
}

/// Squares of the differences of two files' tensor, each column's weighed.
fn weighed_error(a: &ModelFiles, b: &ModelFiles, at: &str, weights: &[f32]) -> f64 {
    let (a, b) = (values(a, at), values(b, at));
    let squares = a.iter().zip(&b).zip(weights.iter().cycle());
    squares.map(|((a, b), weight)| f64::from(*weight) * f64::from(a - b).powi(2)).sum()
}

#[test]
fn a_text_says_which_columns_matter() {
    let dir = tempfile::tempdir().unwrap();
    let (compute, none) = (compute(), Importance::new());
    let text = "The harbour office opens at seven, and the night watch goes home. ".repeat(8);
    for (model, known) in
        [("qwen2", "blk.3.ffn_down.weight"), ("qwen3.5-moe", "blk.0.ssm_out.weight"), ("qwen2-tied", "output.weight")]
    {
        let write = |files: &ModelFiles, kind: &str, importance: &Importance| {
            let out = dir.path().join(format!("{model}-{kind}-{}.gguf", importance.len()));
            let step = Step { kind: kind.parse().unwrap(), out: &out, importance, threads: 1, prover: None };
            step.quantize(files, &mut |_, _| {}).unwrap();
            ModelFiles::open(&out).unwrap()
        };
        let files = ModelFiles::open(&folder(model)).unwrap();
        let learn = |files| qwenkit_quantize::calibrate(files, &compute, &text, &mut |_, _| {}).unwrap();
        let importance = learn(&files);
        assert!(importance.values().flatten().all(|x| x.is_finite() && *x >= 0.0), "{model}");
        assert!(importance.contains_key(known), "{model}");
        // The same model with its heads in a GGUF file's order has the same numbers.
        let whole = write(&files, "F32", &none);
        for (name, expected) in learn(&whole) {
            let largest = expected.iter().fold(0.0, |a: f32, x| a.max(*x));
            let (found, expected) = (&importance[&name], &expected);
            assert!(largest_difference(found, expected) <= 1e-3 * largest, "{model}: {name}");
        }
        // What counts more comes nearer.
        let (with, without) = (write(&files, "Q3_K_S", &importance), write(&files, "Q3_K_S", &none));
        for (name, weights) in
            importance.iter().filter(|(name, _)| name.contains("attn_q.") || name.contains("ffn_up."))
        {
            // Names of tensors that this model lacks are of another form of the same layer.
            let Some(info) = whole.tensor(name) else { continue };
            assert_eq!(weights.len(), *info.shape.last().unwrap(), "{model}: {name}");
            let [with, without] = [&with, &without].map(|files| weighed_error(files, &whole, name, weights));
            assert!(with < without, "{model}: {name}: {with} with, {without} without");
        }
    }
}

#[test]
fn importance_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&folder("qwen2")).unwrap();
    for (name, numbers, part) in [
        ("blk.0.attn_q.weight", 128, "the importance of `blk.0.attn_q.weight` is 128 numbers"),
        ("elsewhere", 64, "names tensors"),
    ] {
        let importance = Importance::from([(name.to_owned(), vec![1.0; numbers])]);
        let out = dir.path().join("out.gguf");
        let step =
            Step { kind: "Q4_K_M".parse().unwrap(), out: &out, importance: &importance, threads: 1, prover: None };
        let error = step.quantize(&files, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains(part) && !out.exists(), "{error}");
    }
}

#[test]
fn a_merge_that_would_lose_the_tower_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&folder("qwen2.5-vl")).unwrap();
    let blend = || Change::Blend(vec![(&files, 0.5)], Method::Linear);
    let importance = Importance::new();
    let merge = |out: &str, change| {
        let out = dir.path().join(out);
        let step = Step { kind: "F32".parse().unwrap(), out: &out, importance: &importance, threads: 1, prover: None };
        step.merge(&files, &[change], &mut |_, _| {}).map(|_| ModelFiles::open(&out).unwrap())
    };
    let error = merge("blend.gguf", blend()).unwrap_err();
    assert!(error.to_string().contains("the vision tower"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let merged = merge("blend", blend()).unwrap();
    let is_of_tower = |name: &str| name.starts_with("visual.") || name.starts_with("model.visual.");
    let towers = |files: &ModelFiles| files.tensors().iter().filter(|tensor| is_of_tower(&tensor.name)).count();
    assert!(towers(&files) > 0 && towers(&merged) == towers(&files));
}
