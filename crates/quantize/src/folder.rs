//! Checkpoint folders: weights in shards, and what lies beside them - copied from another folder, or written anew from what a
//! GGUF file says.

use std::path::Path;

use qwenkit_formats::{Config, Gguf, ModelFiles, ShardWriter};
use qwenkit_tensor::DType;
use serde_json::{Value, json};

use crate::{
    Error, config_json,
    step::specs_in,
    tensors::Tensors,
    tokenizer_json,
    write::{Importance, Progress, encode},
};

/// What hubs keep in one file.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Files beside the weights that belong to a model; a larger one is none of them.
const COMPANION_BYTES: u64 = 64 << 20;

/// Writes the weights.
pub(crate) fn weights(
    tensors: &dyn Tensors,
    types: &[DType],
    threads: usize,
    dir: &Path,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let specs = specs_in(tensors, types);
    let mut writer = ShardWriter::create(dir, &specs, SHARD_BYTES)?;
    encode(tensors, types, &Importance::new(), threads, progress, &mut |tensor, bytes| {
        Ok(writer.write(&specs[tensor].name, bytes)?)
    })?;
    writer.finish()?;
    Ok(())
}

/// Puts everything but the weights of the model in `files` into the folder `to`. `dtype` is what the weights become.
///
/// # Errors
/// When the model says something that a folder has no words for, or a file cannot be read or written.
pub fn companions(files: &ModelFiles, dtype: DType, to: &Path) -> Result<(), Error> {
    match files {
        ModelFiles::Checkpoint(checkpoint) => copied(checkpoint.path(), dtype, to),
        ModelFiles::Gguf(gguf) => written(files, gguf, dtype, to),
    }
}

fn copied(from: &Path, dtype: DType, to: &Path) -> Result<(), Error> {
    let weights = |name: &str| {
        [".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json", ".onnx", "proof.json"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    for entry in std::fs::read_dir(from).map_err(Error::io("list", from))? {
        let path = entry.map_err(Error::io("list", from))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let size = std::fs::metadata(&path).map_err(Error::io("look at", &path))?;
        if !size.is_file() || size.len() > COMPANION_BYTES || name.starts_with('.') || weights(&name) {
            continue;
        }
        let target = to.join(&name);
        if name == "config.json" {
            let mut config = Config::open(&path)?.value().clone();
            set_dtype(&mut config, dtype);
            text(&target, &format!("{config:#}\n"))?;
        } else {
            std::fs::copy(&path, &target).map_err(Error::io("copy to", &target))?;
        }
    }
    Ok(())
}

/// Under whichever name the config has it: the newer one where it has none.
fn set_dtype(config: &mut Value, dtype: DType) {
    let Some(object) = config.as_object_mut() else { return };
    let key = if object.contains_key("torch_dtype") && !object.contains_key("dtype") { "torch_dtype" } else { "dtype" };
    object.insert(key.into(), json!(config_json::dtype_name(dtype)));
    if let Some(inner) = object.get_mut("text_config").and_then(Value::as_object_mut) {
        for key in ["dtype", "torch_dtype"] {
            if let Some(found) = inner.get_mut(key) {
                *found = json!(config_json::dtype_name(dtype));
            }
        }
    }
}

fn written(files: &ModelFiles, gguf: &Gguf, dtype: DType, to: &Path) -> Result<(), Error> {
    let plan = qwenkit_models::arch::plan(files)?;
    let tokenizer = tokenizer_json::Texts::of(files, gguf)?;
    let config = config_json::of_plan(&plan, gguf, &tokenizer, dtype)?;
    text(&to.join("config.json"), &format!("{config:#}\n"))?;
    text(&to.join("generation_config.json"), &format!("{:#}\n", config_json::generation(gguf, &tokenizer)?))?;
    // Without the spaces of the pretty form: a vocabulary has 150,000 entries.
    text(&to.join("tokenizer.json"), &tokenizer.json.to_string())?;
    text(&to.join("tokenizer_config.json"), &format!("{:#}\n", tokenizer.config))
}

fn text(path: &Path, contents: &str) -> Result<(), Error> {
    std::fs::write(path, contents).map_err(Error::io("write", path))
}
