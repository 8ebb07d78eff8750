//! Text models: layers of attention or linear attention, with dense blocks or experts.

use std::error::Error;

use qwenkit_formats::gguf::{Array, Metadata, TensorSpec, Value};
use qwenkit_tensor::DType;

use super::{Contents, metadata_of};

/// A published model's layers.
pub(super) struct Shape {
    /// `general.architecture`; also the prefix of its keys.
    architecture: &'static str,
    /// A tiny checkpoint of this architecture, whose file the metadata come from.
    fixture: &'static str,
    vocab: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// F of a dense layer, or of one expert.
    ffn: usize,
    /// Experts, and those of a token; none where layers are dense.
    experts: Option<(usize, usize)>,
    linear: Option<Linear>,
    /// Rotary pairs of time, height and width, where images have places.
    sections: Option<[i32; 3]>,
    /// Whether q, k and v have biases, and heads no norms.
    has_bias: bool,
    /// Whether the output head is the embedding.
    tied: bool,
}

/// Key heads, value heads and their size, and whether layer `i` is linear.
type Linear = (usize, usize, usize, fn(usize) -> bool);

pub(super) fn shape(name: &str) -> Option<Shape> {
    let moe = Shape {
        architecture: "qwen3moe",
        fixture: "qwen3-moe",
        vocab: 151_936,
        width: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        ffn: 768,
        experts: Some((128, 8)),
        linear: None,
        sections: None,
        has_bias: false,
        tied: false,
    };
    let seeing = Shape {
        architecture: "qwen2vl",
        fixture: "qwen2.5-vl",
        vocab: 151_936,
        width: 2048,
        heads: 16,
        kv_heads: 2,
        head_dim: 128,
        ffn: 11_008,
        experts: None,
        linear: None,
        sections: Some([16, 24, 24]),
        has_bias: true,
        tied: false,
    };
    let hybrid = |is_linear| Shape {
        architecture: "qwen35",
        fixture: "qwen3.5",
        vocab: 248_320,
        width: 2560,
        heads: 16,
        kv_heads: 4,
        head_dim: 256,
        ffn: 9216,
        experts: None,
        linear: Some((16, 32, 128, is_linear)),
        sections: Some([11, 11, 10]),
        has_bias: false,
        tied: false,
    };
    let dense = |width, heads, ffn| Shape {
        architecture: "qwen3",
        fixture: "qwen3",
        vocab: 151_936,
        width,
        heads,
        kv_heads: 8,
        head_dim: 128,
        ffn,
        experts: None,
        linear: None,
        sections: None,
        has_bias: false,
        tied: true,
    };
    match name {
        "qwen3-0.6b" => Some(dense(1024, 16, 3072)),
        "qwen3-1.7b" => Some(dense(2048, 16, 6144)),
        "qwen3-4b" => Some(dense(2560, 32, 9728)),
        "qwen3-30b-a3b" => Some(moe),
        "qwen2.5-vl-3b" => Some(seeing),
        "qwen3.5-4b" => Some(hybrid(|i| !(i + 1).is_multiple_of(4))),
        "qwen3.5-4b-linear" => Some(hybrid(|_| true)),
        "qwen3.5-4b-full" => Some(hybrid(|_| false)),
        _ => None,
    }
}

impl Shape {
    /// A file of so many layers, with another vocabulary if one is given.
    pub(super) fn contents(
        mut self,
        dtype: DType,
        layers: usize,
        vocab: Option<usize>,
    ) -> Result<Contents, Box<dyn Error>> {
        self.vocab = vocab.unwrap_or(self.vocab);
        let mut metadata = metadata_of(self.fixture, "model.gguf")?;
        self.describe(layers, &mut metadata);
        Ok(Contents { metadata, tensors: self.tensors(dtype, layers) })
    }

    fn describe(&self, layers: usize, metadata: &mut Metadata) {
        metadata.set("general.name", "random weights");
        let mut set = |key: &str, n: usize| metadata.set(&format!("{}.{key}", self.architecture), Value::U32(n as u32));
        set("block_count", layers);
        set("context_length", 40_960);
        set("embedding_length", self.width);
        set("attention.head_count", self.heads);
        set("attention.head_count_kv", self.kv_heads);
        set("attention.key_length", self.head_dim);
        set("attention.value_length", self.head_dim);
        set("feed_forward_length", self.ffn);
        if let Some([time, height, width]) = self.sections {
            let key = format!("{}.rope.dimension_sections", self.architecture);
            metadata.set(&key, Value::Array(Array::I32(vec![time, height, width, 0])));
        }
        let mut set = |key: &str, n: usize| metadata.set(&format!("{}.{key}", self.architecture), Value::U32(n as u32));
        if let Some((all, each)) = self.experts {
            set("expert_count", all);
            set("expert_used_count", each);
            set("expert_feed_forward_length", self.ffn);
        }
        if let Some((key_heads, value_heads, dim, is_linear)) = self.linear {
            set("rope.dimension_count", self.head_dim / 4);
            set("ssm.state_size", dim);
            set("ssm.group_count", key_heads);
            set("ssm.time_step_rank", value_heads);
            set("ssm.inner_size", value_heads * dim);
            let linear: Vec<bool> = (0..layers).map(is_linear).collect();
            metadata
                .set(&format!("{}.attention.recurrent_layers", self.architecture), Value::Array(Array::Bool(linear)));
        }
    }

    fn tensors(&self, dtype: DType, layers: usize) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        let mut put =
            |name: String, dtype, shape: &[usize]| specs.push(TensorSpec { name, dtype, shape: shape.to_vec() });
        let (width, q, kv) = (self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        put("token_embd.weight".into(), dtype, &[self.vocab, width]);
        if !self.tied {
            put("output.weight".into(), dtype, &[self.vocab, width]);
        }
        put("output_norm.weight".into(), DType::F32, &[width]);
        for i in 0..layers {
            let mut put = |name: &str, dtype, shape: &[usize]| put(format!("blk.{i}.{name}"), dtype, shape);
            put("attn_norm.weight", DType::F32, &[width]);
            match self.linear {
                Some((key_heads, value_heads, dim, is_linear)) if is_linear(i) => {
                    let channels = (2 * key_heads + value_heads) * dim;
                    put("attn_qkv.weight", dtype, &[channels, width]);
                    put("attn_gate.weight", dtype, &[value_heads * dim, width]);
                    put("ssm_alpha.weight", dtype, &[value_heads, width]);
                    put("ssm_beta.weight", dtype, &[value_heads, width]);
                    put("ssm_conv1d.weight", DType::F32, &[channels, 4]);
                    put("ssm_a", DType::F32, &[value_heads]);
                    put("ssm_dt.bias", DType::F32, &[value_heads]);
                    put("ssm_norm.weight", DType::F32, &[dim]);
                    put("ssm_out.weight", dtype, &[width, value_heads * dim]);
                }
                linear => {
                    // Hybrid models have a gate for each query.
                    put("attn_q.weight", dtype, &[if linear.is_some() { 2 * q } else { q }, width]);
                    put("attn_k.weight", dtype, &[kv, width]);
                    put("attn_v.weight", dtype, &[kv, width]);
                    put("attn_output.weight", dtype, &[width, q]);
                    if self.has_bias {
                        put("attn_q.bias", DType::F32, &[q]);
                        put("attn_k.bias", DType::F32, &[kv]);
                        put("attn_v.bias", DType::F32, &[kv]);
                    } else {
                        put("attn_q_norm.weight", DType::F32, &[self.head_dim]);
                        put("attn_k_norm.weight", DType::F32, &[self.head_dim]);
                    }
                }
            }
            let post_norm = if self.linear.is_some() { "post_attention_norm.weight" } else { "ffn_norm.weight" };
            put(post_norm, DType::F32, &[width]);
            let (gate, down) = match self.experts {
                Some((experts, _)) => (vec![experts, self.ffn, width], vec![experts, width, self.ffn]),
                None => (vec![self.ffn, width], vec![width, self.ffn]),
            };
            let end = if self.experts.is_some() { "_exps.weight" } else { ".weight" };
            put(&format!("ffn_gate{end}"), dtype, &gate);
            put(&format!("ffn_up{end}"), dtype, &gate);
            put(&format!("ffn_down{end}"), dtype, &down);
            if let Some((experts, _)) = self.experts {
                put("ffn_gate_inp.weight", DType::F32, &[experts, width]);
            }
        }
        specs
    }
}
