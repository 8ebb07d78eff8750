//! Adapters through both file forms and back, and what is refused.

use super::*;
use std::collections::BTreeMap;

fn module(name: &str, rank: usize, inputs: usize, outputs: usize, scale: f32) -> AdapterModule {
    let ramp = |n: usize, step: f32| (0..n).map(|i| (i as f32 - 3.0) * step).collect();
    AdapterModule {
        name: name.into(),
        inputs,
        outputs,
        rank,
        scale,
        a: ramp(rank * inputs, 0.25),
        b: ramp(outputs * rank, -0.5),
        magnitude: None,
    }
}

fn sample() -> Adapter {
    let settings = AdapterSettings {
        rank: Some(2),
        alpha: 6.0,
        target_modules: vec!["k_proj".into(), "q_proj".into()],
        base_model: Some("Qwen/Qwen3-0.6B".into()),
        task_type: Some("CAUSAL_LM".into()),
        ..AdapterSettings::default()
    };
    let modules = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
        .map(|name| module(name, 2, 4, 3, 3.0))
        .to_vec();
    Adapter { settings, names: AdapterNames::HuggingFace, gguf_architecture: None, modules, whole: Vec::new() }
}

/// Writes `adapter`, lets `spoil` change the settings' text, and reads it again.
fn reread(adapter: &Adapter, spoil: impl Fn(String) -> String) -> Result<Adapter, Error> {
    let dir = tempfile::tempdir().unwrap();
    adapter.write_peft(dir.path(), &BTreeMap::new()).unwrap();
    let config = dir.path().join(CONFIG);
    let text = std::fs::read_to_string(&config).unwrap();
    let spoilt = spoil(text.clone());
    std::fs::write(&config, spoilt).unwrap();
    Adapter::open(dir.path())
}

#[test]
fn a_peft_folder_comes_back_as_it_was() {
    let mut adapter = sample();
    assert_eq!(reread(&adapter, |t| t).unwrap(), adapter);
    adapter.settings.use_rslora = true;
    adapter.settings.use_dora = true;
    adapter.settings.modules_to_save = vec!["score".into()];
    adapter.settings.rank_pattern = vec![("q_proj".into(), 1)];
    adapter.settings.alpha_pattern = vec![("layers.0.self_attn.q_proj".into(), 2.5)];
    adapter.modules[1] = module("model.layers.0.self_attn.q_proj", 1, 4, 3, 2.5);
    adapter.modules[0].scale = (6.0 / 2f64.sqrt()) as f32;
    adapter.modules.iter_mut().for_each(|m| m.magnitude = Some(vec![1.0, 2.0, 3.0]));
    let score = AdapterTensor { name: "score.weight".into(), shape: vec![2, 2], values: vec![1.0, 2.0, 3.0, 4.0] };
    adapter.whole.push(score);
    assert_eq!(reread(&adapter, |t| t).unwrap(), adapter);
}

#[test]
fn what_contradicts_the_settings_is_refused() {
    let cases: [(&str, &str, &str); 10] = [
        ("\"r\": 2", "\"r\": 4", "of rank 4"),
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"use_dora\": false", "\"use_dora\": true", "lora_magnitude_vector"),
        ("\"fan_in_fan_out\": false", "\"fan_in_fan_out\": true", "fan_in_fan_out"),
        ("\"q_proj\"", "\"v_proj\"", "v_proj"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\".*q_proj\": 8}", "the end of a module's path"),
        ("\"lora_alpha\": 6", "\"lora_alpha\": null", "lora_alpha"),
        ("\"lora_alpha\": 6", "\"lora_alpha\": 12", "written with"),
        ("\"use_rslora\": false", "\"use_rslora\": true", "written with"),
    ];
    for (old, new, part) in cases {
        let error = reread(&sample(), |text| {
            assert!(text.contains(old), "{old} in {text}");
            text.replace(old, new)
        })
        .unwrap_err();
        assert!(error.to_string().contains(part), "{new}: {error}");
    }
}

#[test]
fn a_half_module_and_a_stranger_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = sample();
    adapter.write_peft(dir.path(), &BTreeMap::new()).unwrap();
    let prefix = "base_model.model.model.layers.0.self_attn.";
    let (a, b) = (vec![0_u8; 32], vec![0_u8; 24]);
    let names: Vec<String> = ["k_proj.lora_A.weight", "k_proj.lora_B.weight", "q_proj.lora_A.weight"]
        .map(|n| format!("{prefix}{n}"))
        .to_vec();
    let mut tensors: Vec<(&str, qwenkit_tensor::DType, &[usize], &[u8])> = vec![
        (&names[0], qwenkit_tensor::DType::F32, &[2, 4], &a),
        (&names[1], qwenkit_tensor::DType::F32, &[3, 2], &b),
        (&names[2], qwenkit_tensor::DType::F32, &[2, 4], &a),
    ];
    crate::write_safetensors(&dir.path().join(WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
    let error = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("q_proj.lora_B") && error.contains("both halves"), "{error}");
    tensors[2].0 = "base_model.model.model.layers.0.self_attn.q_proj.weight";
    crate::write_safetensors(&dir.path().join(WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
    let error = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("q_proj.weight") && error.contains("modules_to_save"), "{error}");
}

#[test]
fn numbers_that_are_none_are_refused() {
    let mut adapter = sample();
    adapter.modules[0].b[1] = f32::NAN;
    let error = reread(&adapter, |t| t).unwrap_err().to_string();
    assert!(error.contains("k_proj") && error.contains("not finite"), "{error}");
}

#[test]
fn a_gguf_adapter_has_the_same_products() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lora.gguf");
    let mut adapter = sample();
    adapter.modules[1] = module("model.layers.0.self_attn.q_proj", 4, 4, 3, 0.75);
    let short = |name: &str| Some(name.replace("model.layers.0.self_attn.", "blk.0.attn_").replace("_proj", ""));
    let renamed = adapter.clone().renamed(&path, AdapterNames::Gguf, short).unwrap();
    renamed.write_gguf(&path, "qwen3").unwrap();
    let read = Adapter::open(&path).unwrap();
    assert_eq!((read.names, read.gguf_architecture.as_deref()), (AdapterNames::Gguf, Some("qwen3")));
    for (ours, theirs) in renamed.modules.iter().zip(&read.modules) {
        assert_eq!((&ours.name, ours.rank, &ours.a), (&theirs.name, theirs.rank, &theirs.a));
        for (x, y) in ours.b.iter().zip(&theirs.b) {
            assert!((x * ours.scale - y * theirs.scale).abs() <= 1e-6 * (x * ours.scale).abs());
        }
    }
    assert!(matches!(adapter.clone().renamed(&path, AdapterNames::Gguf, |_| None), Err(Error::AdapterTensor { .. })));
    let mut dora = renamed;
    dora.modules[0].magnitude = Some(vec![1.0; 3]);
    assert!(dora.write_gguf(&path, "qwen3").unwrap_err().to_string().contains("merge it instead"));
}

#[test]
fn what_is_no_adapter_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let error = Adapter::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a whole model"), "{error}");
}
