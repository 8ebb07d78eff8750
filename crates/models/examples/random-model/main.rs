//! Writes a GGUF file of random weights in the shapes of a published model or tower, to measure speed with: what it reads and
//! computes is the model's, what it says is noise.
//!
//! Values have about the spread of trained weights, so that nothing overflows and routers choose evenly. The tokenizer is
//! that of the tiny checkpoints; vectors and routers are F32. Not for tests of answers.

mod text;
mod tower;

use std::{env, error::Error, path::Path, process::ExitCode};

use half::f16;
use qwenkit_formats::{
    Gguf,
    gguf::{Metadata, TensorSpec, Writer},
};
use qwenkit_tensor::DType;

const USAGE: &str = "\
usage: cargo run --release -p qwenkit-models --example random-model -- SHAPE TYPE LAYERS OUT [VOCAB]

SHAPE  qwen3-0.6b, qwen3-1.7b (28 layers each) and qwen3-4b (36)
       qwen3-30b-a3b     attention and 128 experts, 8 for each token
       qwen3.5-4b        three layers of linear attention to one of attention
       qwen3.5-4b-linear all layers linear attention
       qwen3.5-4b-full   all layers attention
       qwen2.5-vl-3b     the text part of it
       qwen2.5-vl-3b-tower  its vision tower, as a mmproj file; 32 layers in the published one
TYPE   Q4_K, Q6_K, Q8_0, BF16 or F32 (towers: BF16 or F32)";

/// Spread of the weights.
const SPREAD: f32 = 0.02;
/// What the names of norms have in them.
const NORMS: [&str; 4] = ["norm", ".ln1.", ".ln2.", "post_ln"];

/// What a file holds: its metadata, made from those of a tiny checkpoint's file, and its tensors.
struct Contents {
    metadata: Metadata,
    tensors: Vec<TensorSpec>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [name, dtype, layers, out, ref vocab @ ..] = arguments[..] else { return usage() };
    let dtype = DType::ALL.into_iter().find(|d| d.to_string() == dtype);
    let (Some(dtype), Ok(layers)) = (dtype, layers.parse()) else { return usage() };
    let vocab = match vocab {
        [] => None,
        [vocab] if vocab.parse::<usize>().is_ok() => vocab.parse().ok(),
        _ => return usage(),
    };
    let contents = match name {
        "qwen2.5-vl-3b-tower" => tower::contents(dtype, layers),
        _ => match text::shape(name) {
            Some(shape) => shape.contents(dtype, layers, vocab),
            None => return usage(),
        },
    };
    match contents.and_then(|contents| write(&contents, Path::new(out))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{out}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// The metadata of a file of the tiny checkpoint `name`.
fn metadata_of(name: &str, file: &str) -> Result<Metadata, Box<dyn Error>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    Ok(Gguf::open(&fixtures.join(name).join(file))?.metadata().clone())
}

fn write(contents: &Contents, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut writer = Writer::create(out, &contents.metadata, &contents.tensors)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for spec in &contents.tensors {
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
            _ if NORMS.iter().any(|norm| name.contains(norm)) => 1.0 + value,
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
