//! Models with recurrent layers: the recorded answers, the same bits however a batch is made up, every spelling of the
//! same weights, and what may stand beside them in a file.

#[path = "moe_run/mod.rs"]
mod moe_run;
#[path = "hybrid_mtp/mod.rs"]
mod mtp;

use moe_run::{
    Tensor, assert_any_cut, assert_batch_as_alone, assert_hostile_numbers, assert_parity, assert_quantised,
    assert_same_bits, assert_taken_back, checkpoint, compute, expected, fixture, gguf, logits, tensors, try_load,
};
use qwenkit_formats::gguf::{Metadata, Value};
use qwenkit_models::{Batch, BatchSeq, Buffers, Model, ModelState, Outputs, StateNeed};
use qwenkit_tensor::{DType, TokenId};
use serde_json::json;

/// The record comes from the chunked form of the recurrence, whose sums are others.
const LIMIT: f32 = 2e-3;

const NAMES: [&str; 3] = ["qwen3-next", "qwen3.5", "qwen3.5-moe"];

#[test]
fn recorded_answers_from_checkpoints() {
    for name in NAMES {
        assert_parity(&fixture(name), name, LIMIT);
    }
}

#[test]
fn recorded_answers_from_gguf() {
    for name in NAMES {
        assert_parity(&fixture(name).join("model.gguf"), name, LIMIT);
    }
}

#[test]
fn any_cut_of_the_prompt_gives_the_same_bits() {
    assert_any_cut(&fixture("qwen3-next"), "qwen3-next");
    assert_any_cut(&fixture("qwen3.5").join("model.gguf"), "qwen3.5");
    assert_any_cut(&fixture("qwen3.5-moe"), "qwen3.5-moe");
}

#[test]
fn a_long_prompt_in_pieces_gives_the_same_bits() {
    let compute = compute();
    let model = try_load(&fixture("qwen3.5"), &compute).unwrap();
    let ids: Vec<TokenId> = (0..150).map(|i| TokenId(i * 37 % 384)).collect();
    let whole = logits(&model, &compute, &ids, &[]);
    for pieces in [vec![63], vec![64, 64], vec![1, 2, 3, 65], vec![149], vec![50; 2]] {
        assert_same_bits(&logits(&model, &compute, &ids, &pieces), &whole, &format!("pieces {pieces:?}"));
    }
}

#[test]
fn a_sequence_in_a_batch_answers_as_alone() {
    assert_batch_as_alone(&fixture("qwen3-next").join("model.gguf"), "qwen3-next");
    assert_batch_as_alone(&fixture("qwen3.5-moe"), "qwen3.5-moe");
}

#[test]
fn tokens_taken_back_leave_no_trace() {
    assert_taken_back(&fixture("qwen3-next"), "qwen3-next");
    assert_taken_back(&fixture("qwen3.5").join("model.gguf"), "qwen3.5");
}

#[test]
fn quantised_matrices_stay_near_and_keep_their_bits_in_any_cut() {
    assert_quantised("qwen3.5", |name| name.contains(".attn_") && !name.contains("norm") || name.contains("ssm_out"));
    assert_quantised("qwen3-next", |name| {
        name.contains("ssm_ba") || name.contains("_shexp.w") && name.contains("down")
    });
}

#[test]
fn hostile_numbers_are_refused_or_compute() {
    // Most are wrong; those that only change an answer are not.
    assert!(assert_hostile_numbers("qwen3.5-moe") > 100);
}

#[test]
fn the_plan_says_what_state_there_is() {
    let model = try_load(&fixture("qwen3.5"), &compute()).unwrap();
    let plan = model.plan();
    assert!(plan.has_recurrent_state());
    let recurrent: Vec<_> = plan.layers.iter().map(|l| matches!(l.state()[..], [StateNeed::Recurrent(_)])).collect();
    assert_eq!(recurrent, [true, true, true, false]);
    // 3 layers: 4 heads of (32, 32), the writes of 8 tokens and 16 places for their decays; the keys of 8 tokens for 2 heads; 3
    // columns that the next token needs and 7 to go back, of 2 (q and k) x 2 x 32 + 4 x 32 channels; f32.
    let heads = 4 * (32 * 32 + 8 * 32 + 16);
    assert_eq!(ModelState::slot_bytes(plan), 3 * 4 * (heads + 2 * 8 * 32 + 10 * 256));
    // 1 layer: 64 positions of 2 heads of 64, keys and values, f32.
    assert_eq!(ModelState::page_bytes(plan, model.kv_type()), 64 * 2 * 2 * 64 * 4);
}

/// Logits of the last row alone, of `ids` fed in two pieces.
fn last_logits(model: &Model, ids: &[TokenId], cut: usize) -> Vec<f32> {
    let (compute, mut buffers, mut logits) = (compute(), Buffers::default(), Vec::new());
    let mut state = ModelState::new(model.plan(), model.kv_type(), 1, 1).unwrap();
    for (rows, outputs) in [(0..cut, Outputs::None), (cut..ids.len(), Outputs::Last)] {
        let seq = BatchSeq {
            rows: 0..rows.len(),
            first: rows.start,
            pages: &[0],
            slot: 0,
            outputs,
            seen: None,
            adapter: None,
            best: None,
        };
        let batch = Batch { tokens: &ids[rows], seqs: &[seq] };
        model.forward(&compute, &mut state, &batch, &mut buffers, None, &mut logits);
    }
    logits
}

#[test]
fn rows_that_nobody_wants_are_left_out_of_a_last_layer_of_either_kind() {
    for (name, blocks) in [("qwen3.5", 3), ("qwen3.5", 4), ("qwen3.5-moe", 2)] {
        let mut all = tensors(&fixture(name).join("model.gguf"));
        let number = |name: &str| name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
        all.retain(|tensor| number(&tensor.name).is_none_or(|i: usize| i < blocks));
        let architecture = if name == "qwen3.5" { "qwen35" } else { "qwen35moe" };
        let set = |meta: &mut Metadata| meta.set(&format!("{architecture}.block_count"), Value::U32(blocks as u32));
        let (_folder, path) = gguf(name, set, &all);
        let (compute, ids) = (compute(), expected(name).input_ids);
        let model = try_load(&path, &compute).unwrap();
        let whole = logits(&model, &compute, &ids, &[]);
        let last = &whole[whole.len() - model.plan().vocab..];
        for cut in [1, 7, 8, ids.len() - 1] {
            assert_same_bits(
                &last_logits(&model, &ids, cut),
                last,
                &format!("{blocks} blocks of {name}, cut at {cut}"),
            );
        }
    }
}

fn named(name: &str, shape: &[usize]) -> Tensor {
    let bytes = vec![0; shape.iter().product::<usize>() * 4];
    Tensor { name: name.to_owned(), dtype: DType::F32, shape: shape.to_vec(), bytes }
}

/// A model of the fixture's weights has the fixture's answers, to the bit.
fn assert_same_model(model: &Model, name: &str, what: &str) {
    let (compute, ids) = (compute(), expected(name).input_ids);
    let original = try_load(&fixture(name), &compute).unwrap();
    let original = logits(&original, &compute, &ids, &[]);
    assert_same_bits(&logits(model, &compute, &ids, &[]), &original, what);
}

#[test]
fn the_text_model_of_a_multimodal_checkpoint_runs_by_itself() {
    for (body, head) in [("model.language_model.", ""), ("language_model.model.", "language_model.")] {
        let mut all = tensors(&fixture("qwen3.5"));
        for tensor in &mut all {
            tensor.name = match tensor.name.strip_prefix("model.") {
                Some(rest) => format!("{body}{rest}"),
                None => format!("{head}{}", tensor.name),
            };
        }
        all.push(named("model.visual.patch_embed.proj.bias", &[64]));
        all.push(named("mtp.fc.weight", &[64, 128]));
        let wrap = |config: &mut serde_json::Value| {
            *config = json!({ "model_type": "qwen3_5", "text_config": config.clone(), "vision_config": {} });
        };
        let folder = checkpoint("qwen3.5", wrap, &all);
        let model = try_load(folder.path(), &compute()).unwrap();
        assert_eq!(model.plan().architecture, "qwen3_5");
        assert_same_model(&model, "qwen3.5", body);
    }
}

#[test]
fn a_tensor_of_no_known_part_is_refused() {
    let mut all = tensors(&fixture("qwen3.5"));
    all.push(named("model.layers.0.linear_attn.extra", &[4]));
    let folder = checkpoint("qwen3.5", |_| {}, &all);
    let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
    assert!(message.contains("the first is `model.layers.0.linear_attn.extra`"), "{message}");
}

#[test]
fn blocks_behind_the_layers_are_left_out_only_if_the_file_counts_them() {
    let mut all = tensors(&fixture("qwen3.5").join("model.gguf"));
    all.push(named("blk.4.nextn.eh_proj.weight", &[64, 128]));
    all.push(named("blk.4.attn_q.weight", &[512, 64]));
    let (_folder, path) = gguf(
        "qwen3.5",
        |meta| {
            meta.set("qwen35.block_count", Value::U32(5));
            meta.set("qwen35.nextn_predict_layers", Value::U32(1));
        },
        &all,
    );
    let model = try_load(&path, &compute()).unwrap();
    assert_eq!((model.plan().layers.len(), model.plan().mtp_layers), (4, 1));
    let (compute, expected) = (compute(), expected("qwen3.5"));
    let found = logits(&model, &compute, &expected.input_ids, &[]);
    assert!(found.iter().zip(&expected.logits).all(|(a, b)| (a - b).abs() < LIMIT));

    let (_folder, path) = gguf("qwen3.5", |_| {}, &all);
    let message = try_load(&path, &compute).map(|_: Model| ()).unwrap_err().to_string();
    assert!(message.contains("2 tensors belong to no part") && message.contains("blk.4."), "{message}");
}

#[test]
fn layers_follow_from_the_interval_where_no_list_is_given() {
    let all = tensors(&fixture("qwen3.5"));
    let folder = checkpoint("qwen3.5", |config| config["layer_types"] = json!(null), &all);
    assert_same_model(&try_load(folder.path(), &compute()).unwrap(), "qwen3.5", "without layer_types");
}

#[test]
fn the_older_gguf_spelling_of_qwen3_next_is_read() {
    let mut all = tensors(&fixture("qwen3-next").join("model.gguf"));
    all.retain(|t| !t.name.contains(".attn_qkv.") && !t.name.contains(".attn_gate."));
    for tensor in tensors(&fixture("qwen3-next")) {
        if tensor.name.ends_with("in_proj_qkvz.weight") {
            let layer = tensor.name.split('.').nth(2).unwrap().to_owned();
            all.push(Tensor { name: format!("blk.{layer}.ssm_in.weight"), ..tensor });
        }
    }
    let (_folder, path) = gguf("qwen3-next", |_| {}, &all);
    assert_parity(&path, "qwen3-next", LIMIT);
}

#[test]
fn half_precision_scalars_are_taken() {
    let mut all = tensors(&fixture("qwen3.5"));
    let mut expected = all.clone();
    for (tensor, rounded) in all.iter_mut().zip(&mut expected) {
        if tensor.name.ends_with("A_log") || tensor.name.ends_with("linear_attn.norm.weight") {
            let values = tensor.bytes.as_chunks::<4>().0.iter().map(|b| half::bf16::from_f32(f32::from_le_bytes(*b)));
            let values: Vec<half::bf16> = values.collect();
            (tensor.dtype, tensor.bytes) = (DType::BF16, values.iter().flat_map(|x| x.to_le_bytes()).collect());
            rounded.bytes = values.iter().flat_map(|x| x.to_f32().to_le_bytes()).collect();
        }
    }
    let (compute, ids) = (compute(), moe_run::expected("qwen3.5").input_ids);
    let [found, expected] = [all, expected].map(|all| {
        let folder = checkpoint("qwen3.5", |_| {}, &all);
        logits(&try_load(folder.path(), &compute).unwrap(), &compute, &ids, &[])
    });
    assert_same_bits(&found, &expected, "BF16 for F32");
}

#[test]
fn wrong_numbers_of_linear_attention_are_refused_by_name() {
    let all = tensors(&fixture("qwen3.5"));
    for (key, value, part) in [
        ("linear_num_value_heads", json!(3), "`linear_num_value_heads` is 3, expected a multiple of the 2 key heads"),
        ("linear_num_key_heads", json!(0), "`linear_num_key_heads` is 0"),
        ("linear_num_key_heads", json!(1u64 << 50), "`linear_num_key_heads` is 1125899906842624"),
        ("linear_key_head_dim", json!(null), "`linear_key_head_dim` is absent"),
        ("linear_value_head_dim", json!(1 << 20), "`linear_value_head_dim` is 1048576"),
        ("linear_conv_kernel_dim", json!(17), "`linear_conv_kernel_dim` is 17, expected 1 to 16"),
        ("linear_conv_kernel_dim", json!(3), "conv1d.weight`: expected [256, 1, 3], found [256, 1, 4]"),
        ("linear_value_head_dim", json!(16), "in_proj_qkv.weight`: expected [192, 64], found [256, 64]"),
        ("layer_types", json!(["linear_attention"]), "`layer_types` is 1 entries"),
        ("layer_types", json!(["mamba", "a", "b", "c"]), "`layer_types` is `mamba`"),
        ("output_gate_type", json!("sigmoid"), "`output_gate_type` is `sigmoid`, expected `swish`"),
        ("attention_bias", json!(true), "`attention_bias` is true"),
        ("mtp_num_hidden_layers", json!(101), "`mtp_num_hidden_layers` is 101"),
    ] {
        let folder = checkpoint("qwen3.5", |config| config[key] = value.clone(), &all);
        let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
        assert!(message.contains(part), "{key} = {value}: {message}");
    }
}

#[test]
fn wrong_numbers_in_gguf_are_refused_by_name() {
    let all = tensors(&fixture("qwen3.5").join("model.gguf"));
    for (key, value, part) in [
        ("ssm.inner_size", 126, "`linear_value_head_dim` is 0"),
        ("ssm.group_count", 3, "`linear_num_value_heads` is 4, expected a multiple of the 3 key heads"),
        ("nextn_predict_layers", 5, "`qwen35.nextn_predict_layers` is 5, expected at most the 4 blocks"),
        ("nextn_predict_layers", 4, "`qwen35.block_count` is 0"),
    ] {
        let (_folder, path) = gguf("qwen3.5", |meta| meta.set(&format!("qwen35.{key}"), Value::U32(value)), &all);
        let message = try_load(&path, &compute()).map(|_: Model| ()).unwrap_err().to_string();
        assert!(message.contains(part), "{key} = {value}: {message}");
    }
}
