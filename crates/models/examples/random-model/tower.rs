//! The vision tower of Qwen2.5-VL-3B.

use std::error::Error;

use qwenkit_formats::gguf::{TensorSpec, Value};
use qwenkit_tensor::DType;

use super::{Contents, metadata_of};

const WIDTH: usize = 1280;
const HEADS: usize = 16;
const FFN: usize = 3420;
const PATCH: usize = 14;
/// Of every so many blocks one sees the whole image, the others their windows.
const WINDOW_PATTERN: usize = 8;
/// D of the text model.
const OUT: usize = 2048;

/// A mmproj file of a tower of so many blocks.
pub(super) fn contents(dtype: DType, layers: usize) -> Result<Contents, Box<dyn Error>> {
    if !matches!(dtype, DType::BF16 | DType::F32) {
        return Err(format!("a tower of {dtype} is not made here: found {dtype}, expected BF16 or F32").into());
    }
    let mut metadata = metadata_of("qwen2.5-vl", "mmproj.gguf")?;
    let numbers = [
        ("projection_dim", OUT),
        ("patch_size", PATCH),
        ("embedding_length", WIDTH),
        ("feed_forward_length", FFN),
        ("block_count", layers),
        ("attention.head_count", HEADS),
        ("n_wa_pattern", WINDOW_PATTERN),
    ];
    for (key, n) in numbers {
        metadata.set(&format!("clip.vision.{key}"), Value::U32(n as u32));
    }
    let mut tensors = Vec::new();
    let mut put =
        |name: String, dtype, shape: &[usize]| tensors.push(TensorSpec { name, dtype, shape: shape.to_vec() });
    for frame in ["", ".1"] {
        put(format!("v.patch_embd.weight{frame}"), dtype, &[WIDTH, 3, PATCH, PATCH]);
    }
    for i in 0..layers {
        for norm in ["ln1", "ln2"] {
            put(format!("v.blk.{i}.{norm}.weight"), DType::F32, &[WIDTH]);
        }
        let matrices = [
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_out", WIDTH, WIDTH),
            ("ffn_gate", FFN, WIDTH),
            ("ffn_up", FFN, WIDTH),
            ("ffn_down", WIDTH, FFN),
        ];
        for (name, rows, cols) in matrices {
            put(format!("v.blk.{i}.{name}.weight"), dtype, &[rows, cols]);
            put(format!("v.blk.{i}.{name}.bias"), DType::F32, &[rows]);
        }
    }
    put("v.post_ln.weight".into(), DType::F32, &[WIDTH]);
    for (name, rows) in [("mm.0", 4 * WIDTH), ("mm.2", OUT)] {
        put(format!("{name}.weight"), dtype, &[rows, 4 * WIDTH]);
        put(format!("{name}.bias"), DType::F32, &[rows]);
    }
    Ok(Contents { metadata, tensors })
}
