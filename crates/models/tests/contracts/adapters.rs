//! Adapters: the losses that PyTorch and PEFT have with the same ones, the same answers as a merged checkpoint, the same bits
//! whoever else is in the batch, and a refusal of every adapter that is another model's.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use qwenkit_formats::{
    Adapter as File, AdapterNames, AdapterSettings, ModelFiles, SafetensorsFile, read_safetensors_file,
    write_safetensors,
};
use qwenkit_kernels::{Compute, Isa, PAGE_TOKENS};
use qwenkit_models::{Adapter, Batch, BatchSeq, Buffers, LoraShape, Model, ModelState, Module, Outputs};
use qwenkit_tensor::{DType, TokenId};

use crate::run::{self, assert_same_bits};

const CASES: [&str; 5] = ["qwen2", "qwen2-tied", "qwen3", "qwen3-moe", "qwen3.5"];

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

/// The checkpoint of a case.
fn base(case: &str) -> &str {
    case.strip_suffix("-dora").unwrap_or(case)
}

fn adapter_file(case: &str) -> File {
    File::open(&fixture(&format!("parity-train/{case}/adapter_init"))).unwrap()
}

fn record(case: &str) -> SafetensorsFile {
    read_safetensors_file(&fixture(&format!("parity-train/{case}/train.safetensors"))).unwrap()
}

fn bytes(file: &SafetensorsFile, name: &str) -> Vec<u8> {
    let info = file.tensor(name).unwrap();
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes).unwrap();
    bytes
}

fn numbers(file: &SafetensorsFile, name: &str) -> Vec<i64> {
    bytes(file, name).as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
}

fn f32s(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    bytes(file, name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Logits of whole sequences in one batch, each under its adapter.
fn logits(model: &Model, compute: &Compute, seqs: &[(&[TokenId], Option<&Adapter>)]) -> Vec<f32> {
    let (mut tokens, mut parts, mut pages) = (Vec::new(), Vec::new(), Vec::new());
    for (ids, _) in seqs {
        let first = pages.last().map_or(0, |own: &Vec<u32>| own.last().unwrap() + 1);
        pages.push((first..first + ids.len().div_ceil(PAGE_TOKENS) as u32).collect::<Vec<u32>>());
    }
    for (slot, (ids, adapter)) in seqs.iter().enumerate() {
        let rows = tokens.len()..tokens.len() + ids.len();
        tokens.extend_from_slice(ids);
        let (first, outputs) = (0, Outputs::All);
        parts.push(BatchSeq {
            rows,
            first,
            pages: &pages[slot],
            slot,
            outputs,
            seen: None,
            adapter: *adapter,
            best: None,
        });
    }
    let all_pages = pages.iter().map(Vec::len).sum();
    let mut state = ModelState::new(model.plan(), model.kv_type(), all_pages, seqs.len()).unwrap();
    let mut logits = Vec::new();
    let batch = Batch { tokens: &tokens, seqs: &parts };
    model.forward(compute, &mut state, &batch, &mut Buffers::default(), None, &mut logits);
    logits
}

fn ids(seed: usize, len: usize) -> Vec<TokenId> {
    (0..len).map(|i| TokenId(((i * 31 + seed * 97) % 300) as u32)).collect()
}

#[test]
fn losses_are_those_of_pytorch_with_the_same_adapter() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for case in CASES.into_iter().chain(["qwen2-dora", "qwen3.5-dora"]) {
        let (model, record) = (run::load(&fixture(&format!("parity/{}", base(case))), &compute), record(case));
        let adapter = Adapter::of_file(model.plan(), &adapter_file(case)).unwrap();
        let (input, labels) = (numbers(&record, "input_ids"), numbers(&record, "labels"));
        let tokens: Vec<TokenId> = input.iter().map(|id| TokenId(*id as u32)).collect();
        let len = record.tensor("input_ids").unwrap().shape[1];
        let seqs: Vec<_> = tokens.chunks(len).map(|ids| (ids, Some(&adapter))).collect();
        let logits = logits(&model, &compute, &seqs);
        let (mut sum, mut count) = (0.0, 0);
        for (row, logits) in logits.chunks_exact(model.plan().vocab).enumerate() {
            // Row t says what comes at t + 1; the last of a sequence says nothing.
            if (row + 1) % len == 0 || labels[row + 1] < 0 {
                continue;
            }
            let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            sum += total.ln() - f64::from(logits[labels[row + 1] as usize]);
            count += 1;
        }
        let (found, expected) = (sum / f64::from(count), f64::from(f32s(&record, "losses")[0]));
        assert!((found - expected).abs() < 1e-5, "{case}: loss {found}, expected {expected}");
    }
}

#[test]
fn an_adapter_answers_as_the_checkpoint_that_it_is_merged_into() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for case in ["qwen2", "qwen3.5", "qwen2-dora", "qwen3.5-dora"] {
        let (folder, file) = (fixture(&format!("parity/{}", base(case))), adapter_file(case));
        let model = run::load(&folder, &compute);
        let adapter = Adapter::of_file(model.plan(), &file).unwrap();
        let merged = tempfile::tempdir().unwrap();
        fs::copy(folder.join("config.json"), merged.path().join("config.json")).unwrap();
        let weights = ModelFiles::open(&folder).unwrap();
        let mut tensors = Vec::new();
        for info in weights.tensors() {
            let mut data = vec![0; info.len_bytes];
            weights.read(info, 0, &mut data).unwrap();
            if let Some(m) = file.modules.iter().find(|m| format!("{}.weight", m.name) == info.name) {
                assert_eq!(info.dtype, DType::F32);
                for (row, bytes) in data.chunks_exact_mut(4 * m.inputs).enumerate() {
                    let bytes = bytes.as_chunks_mut().0;
                    let plain = bytes.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
                    let added = |col: usize| {
                        let one = |r: usize| f64::from(m.b[row * m.rank + r]) * f64::from(m.a[r * m.inputs + col]);
                        f64::from(m.scale) * (0..m.rank).map(one).sum::<f64>()
                    };
                    let merged: Vec<f64> = plain.enumerate().map(|(col, x)| x + added(col)).collect();
                    let length = merged.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let factor = m.magnitude.as_ref().map_or(1.0, |magnitude| f64::from(magnitude[row]) / length);
                    bytes.iter_mut().zip(merged).for_each(|(to, x)| *to = ((factor * x) as f32).to_le_bytes());
                }
            }
            tensors.push((info.name.clone(), info.dtype, info.shape.clone(), data));
        }
        let list: Vec<_> =
            tensors.iter().map(|(name, dtype, shape, data)| (name.as_str(), *dtype, &shape[..], &data[..])).collect();
        write_safetensors(&merged.path().join("model.safetensors"), &list, &BTreeMap::new()).unwrap();
        let merged = run::load(merged.path(), &compute);
        let ids = ids(1, 40);
        let (found, plain) =
            (logits(&model, &compute, &[(&ids, Some(&adapter))]), logits(&model, &compute, &[(&ids, None)]));
        let expected = logits(&merged, &compute, &[(&ids, None)]);
        let largest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Recurrent layers whose own matrices are adapted carry the last bits on, over 40 tokens of random weights.
        let most = if case == "qwen3.5-dora" { 1e-3 } else { 1e-4 };
        assert!(largest(&found, &expected) < most, "{case}: {} apart", largest(&found, &expected));
        assert!(largest(&found, &plain) > 1e-2, "{case}: an adapter that does nothing proves nothing");
    }
}

#[test]
fn a_sequence_has_the_same_bits_whatever_adapters_ride_in_its_batch() {
    for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
        let compute = Compute::new(threads, isa);
        for case in ["qwen2", "qwen3.5"] {
            let model = run::load(&fixture(&format!("parity/{case}")), &compute);
            let one = Adapter::of_file(model.plan(), &adapter_file(case)).unwrap();
            let mut two = Adapter::of_file(model.plan(), &adapter_file(&format!("{case}-dora"))).unwrap();
            two.values_mut().iter_mut().for_each(|x| *x *= -0.7);
            let texts: Vec<Vec<TokenId>> = [7, 70, 1, 33, 12].iter().enumerate().map(|(i, n)| ids(i, *n)).collect();
            let adapters = [Some(&one), None, Some(&two), Some(&two), Some(&one)];
            let seqs: Vec<_> = texts.iter().zip(adapters).map(|(ids, adapter)| (&ids[..], adapter)).collect();
            let together = logits(&model, &compute, &seqs);
            let mut at = 0;
            for (i, seq) in seqs.iter().enumerate() {
                let alone = logits(&model, &compute, &[*seq]);
                assert_same_bits(&together[at..at + alone.len()], &alone, &format!("{case}, {isa}, sequence {i}"));
                at += alone.len();
            }
        }
    }
}

#[test]
fn files_come_back_as_they_were_and_both_formats_mean_the_same() {
    let compute = Compute::new(1, Isa::detect().unwrap());
    for case in CASES.into_iter().chain(["qwen2-dora", "qwen3.5-dora"]) {
        let model = run::load(&fixture(&format!("parity/{}", base(case))), &compute);
        let file = adapter_file(case);
        let adapter = Adapter::of_file(model.plan(), &file).unwrap();
        let back = adapter.to_file(model.plan(), adapter.values(), AdapterSettings::default());
        assert_eq!(back.modules, file.modules, "{case}");
        assert_eq!(back.settings.target_modules, file.settings.target_modules, "{case}");
        assert_eq!(back.settings.use_dora, file.settings.use_dora, "{case}");
        if case.ends_with("-dora") {
            // No other format has magnitudes.
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter.gguf");
        let gguf = Adapter::in_form(model.plan(), file.clone(), &path, AdapterNames::Gguf).unwrap();
        gguf.write_gguf(&path, "qwen").unwrap();
        let again = Adapter::of_file(model.plan(), &File::open(&path).unwrap()).unwrap();
        assert_eq!(again.loras(), adapter.loras(), "{case}");
        assert_same_bits(again.values(), adapter.values(), case);
    }
}

#[test]
fn the_adapter_of_another_model_is_refused_and_says_what_does_not_fit() {
    let compute = Compute::new(1, Isa::detect().unwrap());
    let model = run::load(&fixture("parity/qwen2"), &compute);
    let refused = |change: &dyn Fn(&mut File)| {
        let mut file = adapter_file("qwen2");
        change(&mut file);
        Adapter::of_file(model.plan(), &file).err().expect("a refusal").to_string()
    };
    let says = |message: String, part: &str| assert!(message.contains(part), "`{message}` does not say `{part}`");
    says(Adapter::of_file(model.plan(), &adapter_file("qwen3")).err().unwrap().to_string(), "another model's adapter");
    says(refused(&|f| f.modules[0].name = "model.layers.9.mlp.up_proj".into()), "4 layers");
    says(refused(&|f| f.modules[0].name = "model.layers.0.mlp.experts".into()), "model.layers.0.mlp.experts");
    says(refused(&|f| f.modules.push(f.modules[0].clone())), "twice");
    says(refused(&|f| f.modules[0].magnitude = Some(Vec::new())), "0 magnitudes");
    let tensor = |name: &str, shape: [usize; 2]| qwenkit_formats::AdapterTensor {
        name: name.into(),
        shape: shape.to_vec(),
        values: vec![0.0; shape[0] * shape[1]],
    };
    says(refused(&|f| f.whole.push(tensor("lm_head.weight", [3, 64]))), "lm_head.weight");
    says(refused(&|f| f.whole.push(tensor("score.weight", [3, 63]))), "(labels, 64)");
    let twice = LoraShape { layer: 0, module: Module::QProj, rank: 2, scale: 1.0, magnitudes: false };
    says(Adapter::zeroed(model.plan(), &[twice, twice], None).err().unwrap().to_string(), "twice");
}

/// A GGUF file of Qwen3.5 has its value heads in another order than the checkpoint. An adapter of every recurrent module answers
/// alike over both, in either form, and what is trained over either is written in Hugging Face's order.
#[test]
fn adapters_of_recurrent_layers_mean_the_same_over_both_forms_of_base() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for case in ["qwen3.5", "qwen3-next"] {
        let folder = fixture(&format!("parity/{case}"));
        let bases = [run::load(&folder, &compute), run::load(&folder.join("model.gguf"), &compute)];
        let plan = bases[0].plan();
        let places = (0..plan.layers.len()).flat_map(|layer| Module::ALL.map(|module| (layer, module)));
        let shapes: Vec<_> = places
            .filter(|(layer, module)| module.shape(plan, *layer).is_some())
            .map(|(layer, module)| LoraShape { layer, module, rank: 2, scale: 1.0, magnitudes: case == "qwen3.5" })
            .collect();
        assert!(shapes.iter().any(|shape| shape.module == Module::OutProj), "{case}");
        let mut adapter = Adapter::zeroed(plan, &shapes, None).unwrap();
        adapter.values_mut().iter_mut().enumerate().for_each(|(i, x)| *x = 0.1 * (i as f32 * 0.73 + 0.4).sin());
        bases[0].set_magnitudes(&compute, &mut adapter);
        for range in adapter.loras().to_vec().iter().filter_map(|lora| lora.magnitudes()) {
            let magnitudes = adapter.values_mut()[range].iter_mut().enumerate();
            magnitudes.for_each(|(i, x)| *x *= 1.0 + 0.2 * (i as f32 * 1.9).sin());
        }
        let file = adapter.to_file(plan, adapter.values(), AdapterSettings::default());
        let path = Path::new("adapter.gguf");
        let gguf = Adapter::in_form(plan, file.clone(), path, AdapterNames::Gguf).unwrap();
        // In another order, be the modules' own order what it may.
        let is_turned = gguf.modules.iter().any(|gguf| file.modules.iter().all(|file| file.b != gguf.b));
        assert_eq!(is_turned, case == "qwen3.5", "{case}");
        let ids = ids(1, 40);
        let plain = logits(&bases[0], &compute, &[(&ids, None)]);
        let expected = logits(&bases[0], &compute, &[(&ids, Some(&adapter))]);
        let largest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest(&expected, &plain) > 0.1, "{case}: an adapter that does nothing proves nothing");
        for base in &bases {
            for file in [&file, &gguf] {
                let own = Adapter::of_file(base.plan(), file).unwrap();
                let apart = largest(&logits(base, &compute, &[(&ids, Some(&own))]), &expected);
                assert!(apart < 5e-3, "{case}, {:?}: {apart} apart", file.names);
                let back = own.to_file(base.plan(), own.values(), AdapterSettings::default());
                assert_eq!(back.modules, adapter.to_file(plan, adapter.values(), AdapterSettings::default()).modules);
            }
        }
    }
}
