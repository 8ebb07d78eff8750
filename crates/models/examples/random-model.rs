//! Writes a GGUF file of random weights in the layer shapes of a published model, to measure speed with: what a token reads
//! and computes is the model's, what it says is noise.
//!
//! Values have about the spread of trained weights, so that nothing overflows and routers choose evenly. The tokenizer is
//! that of the tiny checkpoints; vectors and routers are F32. Not for tests of answers.

use std::{env, error::Error, path::Path, process::ExitCode};

use half::f16;
use qwenkit_formats::{
    Gguf,
    gguf::{Array, Metadata, TensorSpec, Value, Writer},
};
use qwenkit_tensor::DType;

const USAGE: &str = "\
usage: cargo run --release -p qwenkit-models --example random-model -- SHAPE TYPE LAYERS OUT [VOCAB]

SHAPE  qwen3-30b-a3b     attention and 128 experts, 8 for each token
       qwen3.5-4b        three layers of linear attention to one of attention
       qwen3.5-4b-linear all layers linear attention
       qwen3.5-4b-full   all layers attention
TYPE   Q4_K, Q6_K, Q8_0, BF16 or F32";

/// Spread of the weights.
const SPREAD: f32 = 0.02;

/// A published model's layers.
struct Shape {
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
}

/// Key heads, value heads and their size, and whether layer `i` is linear.
type Linear = (usize, usize, usize, fn(usize) -> bool);

fn shape(name: &str) -> Option<Shape> {
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
    };
    match name {
        "qwen3-30b-a3b" => Some(moe),
        "qwen3.5-4b" => Some(hybrid(|i| !(i + 1).is_multiple_of(4))),
        "qwen3.5-4b-linear" => Some(hybrid(|_| true)),
        "qwen3.5-4b-full" => Some(hybrid(|_| false)),
        _ => None,
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let parsed = match arguments[..] {
        [name, dtype, layers, out] => Some((name, dtype, layers, out, None)),
        [name, dtype, layers, out, vocab] => Some((name, dtype, layers, out, vocab.parse().ok())),
        _ => None,
    };
    let parsed = parsed.and_then(|(name, dtype, layers, out, vocab)| {
        let dtype = DType::ALL.into_iter().find(|d| d.to_string() == dtype)?;
        let shape = shape(name)?;
        let vocab = if arguments.len() == 5 { vocab? } else { shape.vocab };
        Some((Shape { vocab, ..shape }, dtype, layers.parse().ok()?, out))
    });
    let Some((shape, dtype, layers, out)) = parsed else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match write(&shape, dtype, layers, Path::new(out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{out}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(shape: &Shape, dtype: DType, layers: usize, out: &Path) -> Result<(), Box<dyn Error>> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(shape.fixture);
    let mut metadata = Gguf::open(&fixture.join("model.gguf"))?.metadata().clone();
    shape.describe(layers, &mut metadata);
    let specs = shape.tensors(dtype, layers);
    let mut writer = Writer::create(out, &metadata, &specs)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for spec in &specs {
        let values: usize = spec.shape.iter().product();
        let (block, bytes) = (spec.dtype.block_len(), spec.dtype.block_bytes());
        // A row's blocks, some rows at a time.
        let mut left = values / block;
        let mut buffer = Vec::new();
        while left > 0 {
            let count = left.min(1 << 14);
            buffer.resize(count * bytes, 0);
            buffer.chunks_exact_mut(bytes).try_for_each(|b| random.fill(spec, b))?;
            writer.write(&spec.name, &buffer)?;
            left -= count;
        }
    }
    writer.finish()?;
    Ok(())
}

impl Shape {
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
        put("output.weight".into(), dtype, &[self.vocab, width]);
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
                    put("attn_q_norm.weight", DType::F32, &[self.head_dim]);
                    put("attn_k_norm.weight", DType::F32, &[self.head_dim]);
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

/// A generator of bits (xorshift64*). Source: Vigna 2016.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A value of mean 0 and deviation `SPREAD`; norms are around 1, rates of fading below 0.
    fn value(&mut self, name: &str) -> f32 {
        let even = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let value = even * SPREAD * 3f32.sqrt();
        match name {
            _ if name.contains("norm") => 1.0 + value,
            _ if name.ends_with("ssm_a") => -0.05 + value,
            // Wide enough that tokens differ in where they go.
            _ if name.contains("gate_inp") => value * 10.0,
            _ => value,
        }
    }

    /// One block of the tensor's type: random quants under scales that give the spread.
    fn fill(&mut self, spec: &TensorSpec, block: &mut [u8]) -> Result<(), String> {
        match spec.dtype {
            DType::F32 => block.copy_from_slice(&self.value(&spec.name).to_le_bytes()),
            DType::BF16 => block.copy_from_slice(&half::bf16::from_f32(self.value(&spec.name)).to_le_bytes()),
            dtype => {
                for bytes in block.chunks_mut(8) {
                    bytes.copy_from_slice(&self.next().to_le_bytes()[..bytes.len()]);
                }
                // Deviations of the quants times those of the scales within the block.
                let (at, scales): (usize, &[f32]) = match dtype {
                    DType::Q8_0 => (0, &[SPREAD / 74.0]),
                    // Sub-scales and quants are even over 0..64 and 0..16; the minimum takes the mean away.
                    DType::Q4_K => (0, &[SPREAD / 250.0, 7.5 * SPREAD / 250.0]),
                    DType::Q6_K => (208, &[SPREAD / 1_370.0]),
                    other => return Err(format!("random blocks of {other} are not made here")),
                };
                for (i, scale) in scales.iter().enumerate() {
                    block[at + 2 * i..][..2].copy_from_slice(&f16::from_f32(*scale).to_le_bytes());
                }
            }
        }
        Ok(())
    }
}
