//! Configurations that no model has: every number missing, of another kind, and absurd, in both forms of a model.

use qwenkit_formats::gguf::{Array, Value};
use serde_json::{Map, json};

use crate::{
    refusal::{FORMS, Form, assert_refused, outcome},
    tiny::{SMALL, Shape, Tiny},
};

type Json = serde_json::Value;

/// A tiny checkpoint whose config.json has `key` as `value`.
fn with_config(key: &str, value: Json) -> Tiny {
    let mut tiny = Tiny::new(&SMALL);
    tiny.config.insert(key.to_owned(), value);
    tiny
}

/// A tiny GGUF model whose metadata have `key`, below the architecture, as `value`.
fn with_metadata(key: &str, value: Value) -> Tiny {
    let mut tiny = Tiny::new(&SMALL);
    set_metadata(&mut tiny, &format!("qwen3.{key}"), value);
    tiny
}

fn set_metadata(tiny: &mut Tiny, key: &str, value: Value) {
    tiny.metadata.retain(|(k, _)| k != key);
    tiny.metadata.push((key.to_owned(), value));
}

/// `key` of config.json as `value` is refused in words that have the key and all of `parts`.
fn refuse_config(key: &str, value: Json, parts: &[&str]) {
    let what = format!("{key} = {value}");
    let parts: Vec<&str> = [key].into_iter().chain(parts.iter().copied()).collect();
    assert_refused(&with_config(key, value), Form::Checkpoint, &parts, &what);
}

/// `key` of the metadata as `value` is refused in words that have all of `parts`.
fn refuse_metadata(key: &str, value: Value, parts: &[&str]) {
    let what = format!("{key} = {value:?}");
    assert_refused(&with_metadata(key, value), Form::Gguf, parts, &what);
}

#[test]
fn what_is_spoiled_below_is_whole() {
    for architecture in ["qwen2", "qwen3"] {
        let tiny = Tiny::new(&Shape { architecture, ..SMALL });
        for form in FORMS {
            assert_eq!(outcome(&tiny, form), Ok(()), "{architecture} as {form:?}");
        }
    }
}

#[test]
fn unknown_architectures_are_told_the_nearest() {
    for (found, nearest) in
        [("qwen2xl", "the nearest is qwen"), ("qwen9", "the nearest is qwen"), ("llama", "the nearest is qwen2")]
    {
        let mut tiny = with_config("model_type", json!(found));
        set_metadata(&mut tiny, "general.architecture", found.into());
        for form in FORMS {
            assert_refused(&tiny, form, &[&format!("`{found}`"), "qwen3", nearest], found);
        }
    }
    let mut tiny = with_config("model_type", json!("llama"));
    set_metadata(&mut tiny, "general.architecture", "llama".into());
    // The first generation is read from one of the two forms.
    let first = with_config("model_type", json!("qwen"));
    assert_refused(&first, Form::Checkpoint, &["`qwen`", "it runs qwen2, qwen2_moe", "from GGUF files only"], "qwen");
    // A name of a megabyte is not repeated whole.
    set_metadata(&mut tiny, "general.architecture", Value::String("x".repeat(1 << 20)));
    assert!(outcome(&tiny, Form::Gguf).unwrap_err().len() < 1_000);
}

#[test]
fn what_contradicts_the_tensors_is_refused() {
    refuse_config("architectures", json!(["LlamaForCausalLM"]), &["`LlamaForCausalLM`", "a class of Qwen"]);
    let scaling = json!({"rope_type": "yarn", "factor": 4.0, "truncate": false});
    assert_refused(
        &with_config("rope_parameters", scaling),
        Form::Checkpoint,
        &["truncate", "expected true"],
        "truncate",
    );
    // Its head is another matrix than its embedding.
    let tied = &["expected false", "`lm_head.weight` is another matrix than `model.embed_tokens.weight`"];
    refuse_config("tie_word_embeddings", json!(true), tied);
    let mut copied = with_config("tie_word_embeddings", json!(true));
    let embedding = copied.tensors[0].bytes.clone();
    copied
        .tensors
        .iter_mut()
        .filter(|t| t.hugging_face == "lm_head.weight")
        .for_each(|t| t.bytes.clone_from(&embedding));
    assert_eq!(outcome(&copied, Form::Checkpoint), Ok(()));
    // The last layer counted as a block that guesses.
    refuse_metadata("nextn_predict_layers", 1_u32.into(), &["nextn_predict_layers", "all are layers"]);
    // Parts that such a model does not have.
    for part in ["visual.patch_embed.proj.weight", "mtp.fc.weight"] {
        let mut tiny = Tiny::new(&SMALL);
        let extra = crate::tiny::Tensor { hugging_face: part.to_owned(), ..tiny.tensors[0].clone() };
        tiny.tensors.push(extra);
        assert_refused(&tiny, Form::Checkpoint, &[part], part);
    }
}

#[test]
fn files_beside_a_model_are_called_what_they_are() {
    for (key, value, parts) in [
        ("general.architecture", "clip", ["image part", "mmproj"]),
        ("general.type", "mmproj", ["image part", "language model"]),
        ("general.type", "adapter", ["adapter (LoRA)", "base model"]),
        ("general.type", "imatrix", ["importance matrix", "made for"]),
        ("general.type", "vocab", ["vocabulary", "weights"]),
    ] {
        let mut tiny = Tiny::new(&SMALL);
        set_metadata(&mut tiny, key, value.into());
        assert_refused(&tiny, Form::Gguf, &parts, value);
    }
    refuse_config_as_architecture("qwen2_audio");
    refuse_config_as_architecture("bert");
}

fn refuse_config_as_architecture(found: &str) {
    assert_refused(&with_config("model_type", json!(found)), Form::Checkpoint, &[found, "it runs qwen2"], found);
}

#[test]
fn every_required_key_is_missed_by_name() {
    for key in [
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ] {
        let mut tiny = Tiny::new(&SMALL);
        tiny.config.remove(key);
        assert_refused(&tiny, Form::Checkpoint, &[key, "expected", "config.json"], key);
        refuse_config(key, Json::Null, &["expected"]);
        assert!(says_it_is_missing(&outcome(&tiny, Form::Checkpoint)), "{key}");
    }
    for key in [
        "general.architecture",
        "qwen3.block_count",
        "qwen3.embedding_length",
        "qwen3.attention.head_count",
        "qwen3.feed_forward_length",
        "qwen3.context_length",
        "qwen3.attention.layer_norm_rms_epsilon",
    ] {
        let mut tiny = Tiny::new(&SMALL);
        tiny.metadata.retain(|(k, _)| k != key);
        // A size is named as config.json names it where it is checked beside others.
        let named = if key == "qwen3.feed_forward_length" { "expected" } else { key };
        assert_refused(&tiny, Form::Gguf, &[named, "expected"], key);
        assert!(says_it_is_missing(&outcome(&tiny, Form::Gguf)), "{key}");
    }
}

fn says_it_is_missing(outcome: &Result<(), String>) -> bool {
    outcome.as_ref().is_err_and(|message| message.contains("found none") || message.contains("is absent"))
}

#[test]
fn values_of_another_kind_name_key_and_kind() {
    let whole = [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ];
    for key in whole {
        for value in [json!("32"), json!([32]), json!({"is": 32}), json!(true), json!(-32), json!(2.5), json!(1e300)] {
            refuse_config(key, value, &["found", "expected a non-negative integer"]);
        }
    }
    refuse_config("rms_norm_eps", json!("1e-6"), &["expected a number"]);
    refuse_config("rms_norm_eps", json!(1e300), &["f32"]);
    refuse_config("tie_word_embeddings", json!("yes"), &["expected true or false"]);
    refuse_config("hidden_act", json!("gelu"), &["`gelu`", "`silu`"]);
    refuse_config("attention_bias", json!(true), &["true", "expected false"]);
    refuse_config("layer_types", json!("full_attention"), &["a list of strings"]);
    refuse_config("rope_parameters", json!([1]), &["an object"]);
    for key in ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "context_length"]
    {
        for value in [
            Value::from("2"),
            Value::F32(2.0),
            Value::Bool(true),
            Value::I32(-2),
            Value::I64(i64::MIN),
            Value::Array(Array::U32(vec![2, 2])),
        ] {
            refuse_metadata(key, value, &[key, "found", "expected a non-negative integer"]);
        }
    }
    refuse_metadata("attention.layer_norm_rms_epsilon", Value::U32(0), &["expected an f32"]);
    refuse_metadata("rope.freq_base", "10000".into(), &["rope.freq_base", "expected an f32"]);
    refuse_metadata("rope.scaling.type", Value::U8(1), &["rope.scaling.type", "expected a string"]);
}

#[test]
fn absurd_sizes_name_the_range() {
    let absurd = [0, 1_000_000_000, u64::from(u32::MAX) + 1, u64::MAX / 2, u64::MAX];
    for key in [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ] {
        for found in absurd {
            refuse_config(key, json!(found), &["expected"]);
        }
    }
    for found in [0, u64::MAX / 2, u64::MAX] {
        refuse_config("max_position_embeddings", json!(found), &[&found.to_string(), "expected 1 to"]);
        refuse_metadata("context_length", Value::U64(found), &[&found.to_string(), "expected 1 to"]);
    }
    for found in absurd {
        let text = found.to_string();
        refuse_config("num_hidden_layers", json!(found), &[&text, "expected 1 to 1000"]);
        refuse_metadata("block_count", Value::U64(found), &["qwen3.block_count", &text, "expected 1 to 1000"]);
        refuse_metadata("embedding_length", Value::U64(found), &["hidden_size", &text, "expected 1 to"]);
        refuse_metadata("feed_forward_length", Value::U64(found), &["intermediate_size", &text, "expected 1 to"]);
        refuse_metadata("attention.head_count", Value::U64(found), &["num_attention_heads", &text, "expected 1 to"]);
        refuse_metadata("attention.head_count_kv", Value::U64(found), &["num_key_value_heads", &text, "expected 1 to"]);
        refuse_metadata("attention.key_length", Value::U64(found), &["head_dim", &text, "expected 1 to"]);
        if found != 0 {
            refuse_metadata("rope.dimension_count", Value::U64(found), &["rotary", &text, "the head size 16"]);
        }
    }
}

#[test]
fn heads_must_divide_and_be_even() {
    refuse_config("num_key_value_heads", json!(3), &["3", "a divisor of the 4 attention heads"]);
    refuse_metadata("attention.head_count_kv", Value::U8(3), &["num_key_value_heads", "a divisor of the 4"]);
    assert_refused(&with_config("head_dim", json!(15)), Form::Checkpoint, &["15", "an even number"], "an odd head");
    refuse_metadata("attention.key_length", Value::U16(15), &["15", "an even number"]);
    refuse_config("head_dim", json!(4096), &["4096", "1 to 256"]);
    refuse_metadata("rope.dimension_count", Value::U32(0), &["rotary dimensions", "0", "an even number"]);
    refuse_metadata("rope.dimension_count", Value::U32(18), &["rotary dimensions", "18", "up to the head size 16"]);
    for partial in [0.0, -1.0, 1.5, 1e300] {
        let tiny = with_config("partial_rotary_factor", json!(partial));
        assert_refused(&tiny, Form::Checkpoint, &["rotary dimensions"], "a share of the head");
    }
}

#[test]
fn epsilon_and_theta_must_be_numbers_that_work() {
    for eps in [-1e-6, 1.0, 2.0] {
        refuse_config("rms_norm_eps", json!(eps), &["small positive"]);
    }
    for eps in [f32::NAN, -1e-6, 1.0, f32::INFINITY, f32::NEG_INFINITY] {
        refuse_metadata("attention.layer_norm_rms_epsilon", Value::F32(eps), &["rms_norm_eps", "small positive"]);
    }
    for theta in [0.0, -1.0, 1.0] {
        let rope = json!({"rope_type": "default", "rope_theta": theta});
        assert_refused(&with_config("rope_parameters", rope), Form::Checkpoint, &["rope_theta", "above 1"], "theta");
    }
    for theta in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refuse_metadata("rope.freq_base", Value::F32(theta), &["rope_theta", "above 1"]);
    }
}

/// `rope_parameters` of a YaRN model with `key` as `value`; without it where that is null.
fn yarn_config(key: &str, value: Json) -> Tiny {
    let mut rope = Map::new();
    for (key, value) in [("rope_type", json!("yarn")), ("rope_theta", json!(10000.0)), ("factor", json!(4.0))] {
        rope.insert(key.into(), value);
    }
    rope.insert("original_max_position_embeddings".into(), json!(128));
    rope.insert(key.into(), value);
    with_config("rope_parameters", Json::Object(rope))
}

#[test]
fn rope_scaling_is_checked_number_by_number() {
    assert_eq!(outcome(&yarn_config("beta_fast", json!(32)), Form::Checkpoint), Ok(()));
    let mut wrong =
        vec![("factor", Json::Null), ("factor", json!("4")), ("original_max_position_embeddings", json!(0))];
    wrong.push(("original_max_position_embeddings", json!(u64::MAX)));
    for found in [0.0, -4.0, 0.5] {
        wrong.push(("factor", json!(found)));
    }
    for found in [0.0, -1.0] {
        wrong.extend(["beta_slow", "beta_fast", "attention_factor"].map(|key| (key, json!(found))));
    }
    wrong.push(("beta_fast", json!(0.5)));
    for (key, found) in wrong {
        let what = format!("{key} = {found}");
        assert_refused(&yarn_config(key, found), Form::Checkpoint, &[key, "expected"], &what);
    }
    for kind in ["linear", "dynamic", "longrope", "llama3", ""] {
        let tiny = yarn_config("rope_type", json!(kind));
        assert_refused(&tiny, Form::Checkpoint, &["rope_type", &format!("`{kind}`"), "`yarn`"], kind);
        refuse_metadata("rope.scaling.type", kind.into(), &["rope.scaling.type", &format!("`{kind}`"), "`yarn`"]);
    }
    for factor in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut tiny = with_metadata("rope.scaling.type", "yarn".into());
        set_metadata(&mut tiny, "qwen3.rope.scaling.factor", Value::F32(factor));
        assert_refused(&tiny, Form::Gguf, &["factor", "expected 1 or more"], "yarn");
    }
    for (key, found) in [("yarn_beta_fast", f32::NAN), ("yarn_beta_slow", 0.0), ("yarn_beta_slow", f32::NAN)] {
        let mut tiny = with_metadata("rope.scaling.type", "yarn".into());
        set_metadata(&mut tiny, "qwen3.rope.scaling.factor", Value::F32(4.0));
        set_metadata(&mut tiny, &format!("qwen3.rope.scaling.{key}"), Value::F32(found));
        assert_refused(&tiny, Form::Gguf, &["beta", "expected"], key);
    }
    let tiny = with_metadata("rope.scaling.type", "yarn".into());
    assert_refused(&tiny, Form::Gguf, &["qwen3.rope.scaling.factor", "found none"], "yarn without factor");
}

#[test]
fn layer_types_and_windows_must_fit() {
    refuse_config("layer_types", json!([]), &["0 entries", "expected 2"]);
    refuse_config("layer_types", json!(vec!["full_attention"; 3]), &["3 entries", "expected 2"]);
    refuse_config(
        "layer_types",
        json!(["full_attention", "half_attention"]),
        &["`half_attention`", "sliding_attention"],
    );
    refuse_config("layer_types", json!(["full_attention", 1]), &["a list of strings"]);
    let mut tiny = with_config("layer_types", json!(["full_attention", "sliding_attention"]));
    assert_refused(&tiny, Form::Checkpoint, &["sliding_window", "absent"], "a window of no width");
    tiny.config.insert("use_sliding_window".into(), json!(true));
    tiny.config.insert("sliding_window".into(), json!(0));
    assert_refused(&tiny, Form::Checkpoint, &["sliding_window", "1 or more"], "a window of 0");
    tiny.config.insert("sliding_window".into(), json!(8));
    assert_eq!(outcome(&tiny, Form::Checkpoint), Ok(()));
}
