//! Small random models, written by the writers of `formats` as GGUF file and as checkpoint folder, to be spoiled piece by
//! piece.
//!
//! A `Tiny` is complete and valid; a test changes one thing and writes it. Values are the same on every machine.

use std::{collections::BTreeMap, path::Path};

use qwenkit_formats::{
    gguf::{Metadata, TensorSpec, Value, Writer},
    write_safetensors,
};
use qwenkit_tensor::DType;
use serde_json::{Map, json};

/// The numbers of a tiny model, named as in config.json.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) architecture: &'static str,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab_size: usize,
}

/// Small enough that a thousand of them load in seconds.
pub(crate) const SMALL: Shape = Shape {
    architecture: "qwen3",
    hidden_size: 32,
    intermediate_size: 48,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    vocab_size: 40,
};

/// A tensor under its names in both worlds.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) hugging_face: String,
    pub(crate) gguf: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A model: configuration in both worlds' words, and tensors.
#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) config: Map<String, serde_json::Value>,
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

/// Random numbers from a seed (xorshift64*).
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Between -1 and 1.
    pub(crate) fn next_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

impl Tiny {
    /// A model of `shape` with random f32 weights and an output head of its own.
    pub(crate) fn new(shape: &Shape) -> Tiny {
        let mut tiny = Tiny { config: config(shape), metadata: metadata(shape), tensors: Vec::new() };
        let mut noise = Noise::new(7);
        let (d, f) = (shape.hidden_size, shape.intermediate_size);
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let mut add = |hugging_face: String, gguf: String, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| match (shape.len(), gguf.ends_with("norm.weight")) {
                    (1, true) => 1.0 + 0.2 * noise.next_f32(),
                    (1, false) => 0.2 * noise.next_f32(),
                    _ => 0.1 * noise.next_f32(),
                })
                .collect();
            let (shape, bytes) = (shape.to_vec(), bytes_of(&values));
            tiny.tensors.push(Tensor { hugging_face, gguf, dtype: DType::F32, shape, bytes });
        };
        add("model.embed_tokens.weight".into(), "token_embd.weight".into(), &[shape.vocab_size, d]);
        for i in 0..shape.layers {
            let mut inner = |hugging_face: &str, gguf: &str, shape: &[usize]| {
                add(format!("model.layers.{i}.{hugging_face}"), format!("blk.{i}.{gguf}"), shape);
            };
            inner("input_layernorm.weight", "attn_norm.weight", &[d]);
            inner("self_attn.q_proj.weight", "attn_q.weight", &[q, d]);
            inner("self_attn.k_proj.weight", "attn_k.weight", &[kv, d]);
            inner("self_attn.v_proj.weight", "attn_v.weight", &[kv, d]);
            inner("self_attn.o_proj.weight", "attn_output.weight", &[d, q]);
            if shape.architecture == "qwen2" {
                inner("self_attn.q_proj.bias", "attn_q.bias", &[q]);
                inner("self_attn.k_proj.bias", "attn_k.bias", &[kv]);
                inner("self_attn.v_proj.bias", "attn_v.bias", &[kv]);
            } else {
                inner("self_attn.q_norm.weight", "attn_q_norm.weight", &[shape.head_dim]);
                inner("self_attn.k_norm.weight", "attn_k_norm.weight", &[shape.head_dim]);
            }
            inner("post_attention_layernorm.weight", "ffn_norm.weight", &[d]);
            inner("mlp.gate_proj.weight", "ffn_gate.weight", &[f, d]);
            inner("mlp.up_proj.weight", "ffn_up.weight", &[f, d]);
            inner("mlp.down_proj.weight", "ffn_down.weight", &[d, f]);
        }
        add("model.norm.weight".into(), "output_norm.weight".into(), &[d]);
        add("lm_head.weight".into(), "output.weight".into(), &[shape.vocab_size, d]);
        tiny
    }

    /// Writes the model as a GGUF file.
    pub(crate) fn write_gguf(&self, path: &Path) {
        let mut metadata = Metadata::new(path);
        for (key, value) in &self.metadata {
            metadata.set(key, value.clone());
        }
        let spec = |t: &Tensor| TensorSpec { name: t.gguf.clone(), dtype: t.dtype, shape: t.shape.clone() };
        let specs: Vec<_> = self.tensors.iter().map(spec).collect();
        let mut writer = Writer::create(path, &metadata, &specs).unwrap();
        for tensor in &self.tensors {
            writer.write(&tensor.gguf, &tensor.bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    /// Writes the model as config.json and model.safetensors in `dir`.
    pub(crate) fn write_checkpoint(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), serde_json::to_string(&self.config).unwrap()).unwrap();
        let parts = |t: &'_ Tensor| (t.hugging_face.clone(), t.dtype, t.shape.clone());
        let owned: Vec<_> = self.tensors.iter().map(parts).collect();
        let tensors: Vec<_> = owned
            .iter()
            .zip(&self.tensors)
            .map(|((name, dtype, shape), t)| (name.as_str(), *dtype, &shape[..], &t.bytes[..]))
            .collect();
        write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    }
}

fn config(shape: &Shape) -> Map<String, serde_json::Value> {
    let config = json!({
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": false,
    });
    match config {
        serde_json::Value::Object(map) => map,
        _ => unreachable!("written as an object above"),
    }
}

fn metadata(shape: &Shape) -> Vec<(String, Value)> {
    let arch = shape.architecture;
    let number = |key: &str, value: usize| (format!("{arch}.{key}"), Value::U32(value as u32));
    vec![
        ("general.architecture".into(), arch.into()),
        ("general.type".into(), "model".into()),
        number("block_count", shape.layers),
        number("context_length", 512),
        number("embedding_length", shape.hidden_size),
        number("feed_forward_length", shape.intermediate_size),
        number("attention.head_count", shape.heads),
        number("attention.head_count_kv", shape.kv_heads),
        number("attention.key_length", shape.head_dim),
        number("attention.value_length", shape.head_dim),
        (format!("{arch}.rope.freq_base"), Value::F32(10_000.0)),
        (format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
    ]
}
