//! Mixtures of experts: the recorded answers, the same bits however a batch is made up, and every layout of experts.

#[path = "moe_run/mod.rs"]
mod moe_run;

use moe_run::{
    Tensor, assert_any_cut, assert_batch_as_alone, assert_hostile_numbers, assert_parity, assert_quantised,
    assert_same_bits, checkpoint, compute, expected, fixture, gguf, logits, tensors, try_load,
};
use qwenkit_formats::ModelFiles;
use qwenkit_models::{Ffn, LayerPlan, Mixer, Model, arch};
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
    assert_any_cut(&fixture("qwen2-moe"), "qwen2-moe");
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
fn a_config_is_read_as_transformers_reads_it() {
    let plan = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let folder = checkpoint(name, change, &tensors(&fixture(name)));
        arch::plan(&ModelFiles::open(folder.path()).unwrap()).unwrap()
    };
    // With images the weights of the chosen are divided by their sum whatever the file says.
    let vl = plan("qwen3-vl-moe", &|config| config["text_config"]["norm_topk_prob"] = false.into());
    let is_normed = |layer: &LayerPlan| matches!(layer.ffn, Ffn::Moe(moe) if moe.router.norm_topk);
    assert!(vl.layers.iter().all(is_normed));
    // Its window is in all layers.
    let windowed = plan("qwen3-moe", &|config| {
        config["use_sliding_window"] = true.into();
        config["sliding_window"] = 8.into();
        config["max_window_layers"] = 3.into();
    });
    let has_window = |layer: &LayerPlan| matches!(&layer.mixer, Mixer::Attention(a) if a.window == Some(8));
    assert!(windowed.layers.iter().all(has_window));
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
        for (name, matrices) in [("gate_up_proj", vec!["gate_proj", "up_proj"]), ("down_proj", vec!["down_proj"])] {
            let [rows, cols] = expert(0, matrices[0]).shape[..] else { panic!("a matrix") };
            let rows = rows * matrices.len();
            let mut bytes = Vec::new();
            for e in 0..8 {
                let matrix: Vec<u8> = matrices.iter().flat_map(|m| expert(e, m).bytes.clone()).collect();
                let values = matrix.as_chunks::<4>().0;
                if is_transposed {
                    bytes.extend((0..cols).flat_map(|c| values.iter().skip(c).step_by(cols)).flatten());
                } else {
                    bytes.extend(values.as_flattened());
                }
            }
            let shape = if is_transposed { vec![8, cols, rows] } else { vec![8, rows, cols] };
            let name = format!("model.layers.{layer}.mlp.experts.{name}");
            out.push(Tensor { name, dtype: DType::F32, shape, bytes });
        }
    }
    out
}

/// The checkpoint's tensors with experts of width `f` only: the first rows of gate and up, the first columns of down.
fn narrowed(mut all: Vec<Tensor>, f: usize) -> Vec<Tensor> {
    for tensor in all.iter_mut().filter(|t| t.name.contains(".experts.")) {
        let cols = tensor.shape[1];
        if tensor.name.ends_with("down_proj.weight") {
            tensor.bytes = tensor.bytes.chunks_exact(4 * cols).flat_map(|row| row[..4 * f].to_vec()).collect();
            tensor.shape[1] = f;
        } else {
            tensor.bytes.truncate(4 * cols * f);
            tensor.shape[0] = f;
        }
    }
    all
}

#[test]
fn packed_experts_are_the_same_experts() {
    let (compute, ids) = (compute(), expected("qwen3-moe").input_ids);
    // D is 64: one of the packed tensors is square for 64 and 32, none for 24.
    for f in [64, 32, 24] {
        let apart = narrowed(tensors(&fixture("qwen3-moe")), f);
        let of = |all: &[Tensor]| {
            let folder = checkpoint("qwen3-moe", |config| config["moe_intermediate_size"] = json!(f), all);
            logits(&try_load(folder.path(), &compute).unwrap(), &compute, &ids, &[])
        };
        let expected = of(&apart);
        for is_transposed in [false, true] {
            let what = format!("width {f}, transposed: {is_transposed}");
            assert_same_bits(&of(&packed(&apart, is_transposed)), &expected, &what);
        }
    }
}

#[test]
fn quantised_experts_stay_near_and_keep_their_bits_in_any_cut() {
    assert_quantised("qwen3-moe", |name| name.ends_with("_exps.weight"));
}

#[test]
fn biases_that_a_file_goes_without_are_zeros() {
    let (name, compute) = ("qwen2-moe", compute());
    let ids = expected(name).input_ids;
    let is_bias = |t: &Tensor| t.name.ends_with(".bias");
    for form in ["", "model.gguf"] {
        let write = |all: &[Tensor], qkv_bias: Option<bool>| match form {
            "" => {
                let folder = checkpoint(name, |config| config["qkv_bias"] = json!(qkv_bias), all);
                let path = folder.path().to_owned();
                (folder, path)
            }
            _ => gguf(name, |_| {}, all),
        };
        let load = |all: &[Tensor], qkv_bias| try_load(&write(all, qkv_bias).1, &compute);
        let refusal = |all: &[Tensor], qkv_bias| load(all, qkv_bias).map(|_: Model| ()).unwrap_err().to_string();
        let mut all = tensors(&fixture(name).join(form));
        all.iter_mut().filter(|t| is_bias(t)).for_each(|t| t.bytes.fill(0));
        let zeros = load(&all, Some(true)).unwrap();
        let without: Vec<Tensor> = all.iter().filter(|t| !is_bias(t)).cloned().collect();
        assert_eq!(all.len() - without.len(), 3 * 4, "queries, keys and values of four layers");
        let model = load(&without, Some(false)).unwrap();
        let of = |model: &Model| logits(model, &compute, &ids, &[]);
        assert_same_bits(&of(&model), &of(&zeros), "zeros and nothing");
        // A layer that lacks one among others that have them is not whole.
        let first = all.iter().position(is_bias).unwrap();
        let named = format!("`{}`", all.remove(first).name);
        let message = refusal(&all, Some(true));
        assert!(message.contains(&named) && message.contains("is missing"), "{message}");
        if form.is_empty() {
            let message = refusal(&all, Some(false));
            assert!(message.contains("11 tensors belong to no part of a qwen2_moe model"), "{message}");
            let message = refusal(&without, None);
            assert!(message.contains("is missing, and so are 11 others"), "{message}");
        }
    }
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
fn hostile_numbers_are_refused_or_compute() {
    // Most are wrong; those that only change an answer are not.
    assert!(assert_hostile_numbers("qwen2-moe") > 100);
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
