//! Mixtures of experts: the recorded answers, the same bits however a batch is made up, and every layout of experts.

#[path = "moe_run/mod.rs"]
mod moe_run;

use half::f16;
use moe_run::{
    Tensor, assert_any_cut, assert_batch_as_alone, assert_parity, assert_same_bits, checkpoint, compute, expected,
    fixture, gguf, logits, tensors, try_load,
};
use qwenkit_models::{Ffn, Model};
use qwenkit_tensor::DType;
use serde_json::json;

/// Sums of f32 in another order differ by this much at most.
const LIMIT: f32 = 5e-4;

#[test]
fn recorded_answers_from_checkpoints() {
    for name in ["qwen2-moe", "qwen2-moe-mixed", "qwen3-moe"] {
        assert_parity(&fixture(name), name, LIMIT);
    }
}

#[test]
fn recorded_answers_from_gguf() {
    for name in ["qwen2-moe", "qwen3-moe"] {
        assert_parity(&fixture(name).join("model.gguf"), name, LIMIT);
    }
}

#[test]
fn any_cut_of_the_prompt_gives_the_same_bits() {
    assert_any_cut(&fixture("qwen2-moe-mixed"), "qwen2-moe-mixed");
    assert_any_cut(&fixture("qwen3-moe").join("model.gguf"), "qwen3-moe");
}

#[test]
fn a_sequence_in_a_batch_answers_as_alone() {
    assert_batch_as_alone(&fixture("qwen2-moe"), "qwen2-moe");
    assert_batch_as_alone(&fixture("qwen3-moe"), "qwen3-moe");
}

#[test]
fn dense_layers_among_mixtures_are_planned_as_such() {
    let model = try_load(&fixture("qwen2-moe-mixed"), &compute()).unwrap();
    let dense: Vec<_> = model.plan().layers.iter().map(|l| matches!(l.ffn, Ffn::Dense { .. })).collect();
    assert_eq!(dense, [false, true, false, false]);
    assert!(!model.plan().has_recurrent_state());
}

#[test]
fn a_token_reads_the_experts_it_goes_to() {
    let model = try_load(&fixture("qwen3-moe"), &compute()).unwrap();
    // 4 layers of 8 experts of three (64, 64) f32 matrices; each token goes to 3, and the embedding is looked up.
    let expert_bytes = 3 * 64 * 64 * 4;
    let embedding_bytes = 384 * 64 * 4;
    assert_eq!(model.weight_bytes() - model.bytes_per_token(), 4 * 5 * expert_bytes + embedding_bytes);
}

/// Experts' tensors of a checkpoint packed: (E, 2F, D) and (E, D, F), or both with their last two axes changed round.
fn packed(all: &[Tensor], is_transposed: bool) -> Vec<Tensor> {
    let find = |name: &str| all.iter().find(|t| t.name == name).unwrap();
    let mut out: Vec<Tensor> = all.iter().filter(|t| !t.name.contains(".experts.")).cloned().collect();
    for layer in 0..4 {
        let expert = |e: usize, m: &str| find(&format!("model.layers.{layer}.mlp.experts.{e}.{m}.weight"));
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        let add = |to: &mut Vec<u8>, parts: &[&Tensor]| {
            let matrix: Vec<u8> = parts.iter().flat_map(|t| t.bytes.iter().copied()).collect();
            let (values, cols) = (matrix.as_chunks::<4>().0, parts[0].shape[1]);
            if is_transposed {
                to.extend((0..cols).flat_map(|c| values.iter().skip(c).step_by(cols)).flatten());
            } else {
                to.extend(values.as_flattened());
            }
        };
        for e in 0..8 {
            add(&mut gate_up, &[expert(e, "gate_proj"), expert(e, "up_proj")]);
            add(&mut down, &[expert(e, "down_proj")]);
        }
        let gate_up_shape = if is_transposed { [8, 64, 128] } else { [8, 128, 64] };
        for (name, shape, bytes) in [("gate_up_proj", gate_up_shape, gate_up), ("down_proj", [8, 64, 64], down)] {
            let (name, shape) = (format!("model.layers.{layer}.mlp.experts.{name}"), shape.to_vec());
            out.push(Tensor { name, dtype: DType::F32, shape, bytes });
        }
    }
    out
}

#[test]
fn packed_experts_are_the_same_experts() {
    let (compute, ids) = (compute(), expected("qwen3-moe").input_ids);
    let apart = try_load(&fixture("qwen3-moe"), &compute).unwrap();
    let apart = logits(&apart, &compute, &ids, &[]);
    for is_transposed in [false, true] {
        let folder = checkpoint("qwen3-moe", |_| {}, &packed(&tensors(&fixture("qwen3-moe")), is_transposed));
        let model = try_load(folder.path(), &compute).unwrap();
        assert_same_bits(&logits(&model, &compute, &ids, &[]), &apart, &format!("transposed: {is_transposed}"));
    }
}

/// f32 values as Q8_0 blocks: an f16 scale and 32 integers each.
fn q8_0(bytes: &[u8]) -> Vec<u8> {
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let block = |x: &[f32]| {
        let scale = f16::from_f32(x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
        let quants = x.iter().map(|v| (v / scale.to_f32()).round() as i8 as u8).collect::<Vec<_>>();
        scale.to_le_bytes().into_iter().chain(quants).collect::<Vec<u8>>()
    };
    values.chunks_exact(32).flat_map(block).collect()
}

#[test]
fn quantised_experts_stay_near_and_keep_their_bits_in_any_cut() {
    let name = "qwen3-moe";
    let mut all = tensors(&fixture(name).join("model.gguf"));
    for tensor in all.iter_mut().filter(|t| t.name.ends_with("_exps.weight")) {
        (tensor.dtype, tensor.bytes) = (DType::Q8_0, q8_0(&tensor.bytes));
    }
    let (_folder, path) = gguf(name, |_| {}, &all);
    assert_any_cut(&path, name);
    let (compute, expected) = (compute(), expected(name));
    let model = try_load(&path, &compute).unwrap();
    let found = logits(&model, &compute, &expected.input_ids, &[]);
    // Eight bits for weights and activations cost some three percent here. The middle error, as a token whose router is
    // nearly undecided may go to other experts.
    let mut errors: Vec<f32> = found.iter().zip(&expected.logits).map(|(a, b)| (a - b).abs()).collect();
    errors.sort_unstable_by(f32::total_cmp);
    let error = errors[errors.len() / 2];
    let size = expected.logits.iter().map(|x| x.abs()).sum::<f32>() / found.len() as f32;
    assert!(error > 0.0 && error < 0.05 * size, "middle error {error} of logits around {size}");
}

/// Why a checkpoint with a changed config.json is refused.
fn refusal(name: &str, key: &str, value: serde_json::Value) -> String {
    let folder = checkpoint(name, |config| config[key] = value, &tensors(&fixture(name)));
    try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string()
}

#[test]
fn wrong_numbers_of_experts_are_refused_by_name() {
    for (key, value, part) in [
        ("num_experts", json!(0), "`num_experts` is 0, expected 1 to"),
        ("num_experts", json!(null), "`num_experts` is absent"),
        ("num_experts", json!(1_000_000), "`num_experts` is 1000000"),
        ("num_experts", json!(9), "mlp.gate.weight`: expected [9, 64], found [8, 64]"),
        ("num_experts_per_tok", json!(9), "`num_experts_per_tok` is 9, expected 1 to 8"),
        ("moe_intermediate_size", json!(32), "gate_proj.weight`: expected [32, 64], found [64, 64]"),
        ("shared_expert_intermediate_size", json!(0), "`shared_expert_intermediate_size` is 0"),
        ("decoder_sparse_step", json!(0), "`decoder_sparse_step` is 0"),
        ("mlp_only_layers", json!([0]), "tensor `model.layers.0.mlp.gate_proj.weight` [96, 64] is missing"),
    ] {
        let message = refusal("qwen2-moe", key, value.clone());
        assert!(message.contains(part), "{key} = {value}: {message}");
    }
    assert!(refusal("qwen3-moe", "num_local_experts", json!(null)).contains("`num_experts` is absent"));
}

#[test]
fn experts_of_a_type_that_cannot_be_turned_are_refused() {
    let mut all = packed(&tensors(&fixture("qwen3-moe")), true);
    for tensor in all.iter_mut().filter(|t| t.name.contains(".experts.")) {
        tensor.dtype = DType::I32;
    }
    let folder = checkpoint("qwen3-moe", |_| {}, &all);
    let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
    assert!(message.contains("experts.gate_up_proj` has type I32, expected F32, F16 or BF16"), "{message}");
}
