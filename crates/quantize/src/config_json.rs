//! A plan as config.json, for models that come from GGUF files: the keys that transformers needs to build the model.

use qwenkit_formats::Gguf;
use qwenkit_models::{Ffn, Mixer, Plan};
use qwenkit_tensor::DType;
use serde_json::{Map, Value, json};

use crate::{Error, metadata::unsayable, tokenizer_json::Texts};

/// (plan's architecture, `architectures`, `model_type`) of models without vision.
const CLASSES: [(&str, &str, &str); 7] = [
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2_moe"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe"),
    ("qwen3_next", "Qwen3NextForCausalLM", "qwen3_next"),
    ("qwen3_5", "Qwen3_5ForCausalLM", "qwen3_5_text"),
    ("qwen3_5_moe", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
];

/// What PyTorch calls a type.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// config.json of the model in `gguf`.
pub(crate) fn of_plan(plan: &Plan, gguf: &Gguf, texts: &Texts, dtype: DType) -> Result<Value, Error> {
    let Some((_, class, model_type)) = CLASSES.iter().find(|(architecture, ..)| *architecture == plan.architecture)
    else {
        let known = CLASSES.map(|(architecture, ..)| architecture).join(", ");
        let expected = format!("one of {known}; models with vision are exported from their own folders");
        return Err(unsayable(gguf.path(), "the architecture", plan.architecture, &expected));
    };
    let mut c = Map::new();
    let mut set = |key: &str, value: Value| {
        c.insert(key.into(), value);
    };
    set("architectures", json!([class]));
    set("model_type", json!(model_type));
    set("dtype", json!(dtype_name(dtype)));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(plan.width));
    set("vocab_size", json!(plan.vocab));
    set("num_hidden_layers", json!(plan.layers.len()));
    if plan.mtp_in_gguf().is_some() {
        set("mtp_num_hidden_layers", json!(1));
    }
    set("max_position_embeddings", json!(plan.context_tokens));
    set("rms_norm_eps", number(plan.rms_norm_eps));
    set("tie_word_embeddings", json!(plan.tied));
    set("initializer_range", json!(0.02));
    set("use_cache", json!(true));
    set("attention_dropout", json!(0.0));
    for (key, id) in [("bos_token_id", texts.bos), ("eos_token_id", texts.eos), ("pad_token_id", texts.pad)] {
        set(key, json!(id));
    }
    for (key, value) in attention(plan).into_iter().chain(experts(plan)).chain(linear(plan)).chain(rope(plan)) {
        set(key, value);
    }
    // A mixture's config has the width of dense layers too, whether it has any or not.
    let key = format!("{}.feed_forward_length", gguf.metadata().require_string("general.architecture")?);
    let dense = plan.layers.iter().find_map(|l| if let Ffn::Dense { width } = l.ffn { Some(width) } else { None });
    if let Some(width) = dense.or(gguf.metadata().usize(&key)?) {
        set("intermediate_size", json!(width));
    }
    Ok(Value::Object(c))
}

/// An f32 as its shortest decimal number.
fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

type Keys = Vec<(&'static str, Value)>;

fn attention(plan: &Plan) -> Keys {
    let mut keys = Keys::new();
    let is_hybrid = plan.layers.iter().any(|layer| matches!(layer.mixer, Mixer::DeltaNet(_)));
    let mut windows = Vec::new();
    let kinds: Vec<&str> = plan
        .layers
        .iter()
        .map(|layer| match &layer.mixer {
            Mixer::DeltaNet(_) => "linear_attention",
            Mixer::Attention(a) if a.window.is_some() => {
                windows.extend(a.window);
                "sliding_attention"
            }
            Mixer::Attention(_) => "full_attention",
        })
        .collect();
    let first = plan.layers.iter().find_map(|l| if let Mixer::Attention(a) = &l.mixer { Some(a) } else { None });
    if let Some(a) = first {
        keys.push(("num_attention_heads", json!(a.heads)));
        keys.push(("num_key_value_heads", json!(a.kv_heads)));
        if a.qk_norm || a.head_dim * a.heads != plan.width {
            keys.push(("head_dim", json!(a.head_dim)));
        }
        if a.qk_norm {
            keys.push(("attention_bias", json!(false)));
        }
        if plan.architecture == "qwen2_moe" {
            keys.push(("qkv_bias", json!(a.qkv_bias)));
        }
    }
    if is_hybrid || !windows.is_empty() {
        keys.push(("layer_types", json!(kinds)));
    }
    if !is_hybrid {
        keys.push(("use_sliding_window", json!(!windows.is_empty())));
        keys.push(("sliding_window", json!(windows.first())));
        let full = kinds.iter().take_while(|kind| **kind == "full_attention").count();
        keys.push(("max_window_layers", json!(full)));
    }
    keys
}

fn experts(plan: &Plan) -> Keys {
    let is_dense = |layer: &qwenkit_models::LayerPlan| matches!(layer.ffn, Ffn::Dense { .. });
    let moe = plan.layers.iter().find_map(|l| if let Ffn::Moe(moe) = l.ffn { Some(moe) } else { None });
    let Some(moe) = moe else { return Keys::new() };
    let dense: Vec<usize> = (0..plan.layers.len()).filter(|&i| is_dense(&plan.layers[i])).collect();
    let mut keys = vec![
        ("num_experts", json!(moe.router.experts)),
        ("num_experts_per_tok", json!(moe.router.experts_per_token)),
        ("moe_intermediate_size", json!(moe.width)),
        ("norm_topk_prob", json!(moe.router.norm_topk)),
        ("decoder_sparse_step", json!(1)),
        ("mlp_only_layers", json!(dense)),
        ("output_router_logits", json!(false)),
        ("router_aux_loss_coef", json!(0.001)),
    ];
    if let Some(shared) = moe.shared_width {
        keys.push(("shared_expert_intermediate_size", json!(shared)));
    }
    keys
}

fn linear(plan: &Plan) -> Keys {
    let delta = plan.layers.iter().find_map(|l| if let Mixer::DeltaNet(d) = l.mixer { Some(d) } else { None });
    let Some(delta) = delta else { return Keys::new() };
    vec![
        ("linear_conv_kernel_dim", json!(delta.conv_width)),
        ("linear_key_head_dim", json!(delta.shape.key_dim)),
        ("linear_value_head_dim", json!(delta.shape.value_dim)),
        ("linear_num_key_heads", json!(delta.shape.key_heads)),
        ("linear_num_value_heads", json!(delta.shape.value_heads)),
    ]
}

fn rope(plan: &Plan) -> Keys {
    let rope = &plan.rope;
    let head_dim =
        plan.layers.iter().find_map(|l| if let Mixer::Attention(a) = &l.mixer { Some(a.head_dim) } else { None });
    let share = head_dim.filter(|dim| *dim != rope.dims).map(|dim| rope.dims as f64 / dim as f64);
    let mut parameters = Map::new();
    parameters.insert("rope_theta".into(), json!(rope.theta));
    parameters.insert("rope_type".into(), json!(if rope.yarn.is_some() { "yarn" } else { "default" }));
    if let Some(share) = share {
        parameters.insert("partial_rotary_factor".into(), json!(share));
    }
    if let Some(sections) = rope.sections {
        parameters.insert("mrope_section".into(), json!(sections.pairs));
        parameters.insert("mrope_interleaved".into(), json!(sections.interleaved));
    }
    let mut keys = vec![("rope_theta", json!(rope.theta))];
    if let Some(yarn) = &rope.yarn {
        parameters.insert("factor".into(), json!(yarn.factor));
        parameters.insert("original_max_position_embeddings".into(), json!(yarn.original_tokens));
        parameters.insert("beta_fast".into(), json!(yarn.beta_fast));
        parameters.insert("beta_slow".into(), json!(yarn.beta_slow));
    }
    keys.push(("rope_parameters", Value::Object(parameters)));
    keys
}

/// generation_config.json: the tokens that end an answer, and what the makers recommend.
pub(crate) fn generation(gguf: &Gguf, texts: &Texts) -> Result<Value, Error> {
    let meta = gguf.metadata();
    let mut g = Map::new();
    for (key, id) in [("bos_token_id", texts.bos), ("eos_token_id", texts.eos), ("pad_token_id", texts.pad)] {
        if let Some(id) = id {
            g.insert(key.into(), json!(id));
        }
    }
    for (key, own) in
        [("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p"), ("repetition_penalty", "penalty_repeat")]
    {
        if let Some(value) = meta.f32(&format!("general.sampling.{own}"))? {
            g.insert(key.into(), number(value));
            g.insert("do_sample".into(), json!(true));
        }
    }
    if let Some(k) = meta.usize("general.sampling.top_k")? {
        g.insert("top_k".into(), json!(k));
    }
    Ok(Value::Object(g))
}
