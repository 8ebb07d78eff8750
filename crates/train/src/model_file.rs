//! The weights of a model that was trained whole, as a checkpoint folder has them: written, and read back.

use std::path::Path;

use qwenkit_formats::{ModelFiles, ShardWriter, gguf::TensorSpec};
use qwenkit_models::Whole;

use crate::error::Error;

/// What hubs keep in one file.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Numbers that are written at once.
const PIECE: usize = 1 << 20;

/// Writes the numbers of a model into the folder `dir`, which holds its config.json already, in the model's type; they are read back
/// and are the same.
///
/// # Errors
/// When writing fails, or something else is read.
pub fn write_model(whole: &Whole, values: &[f32], dir: &Path) -> Result<(), Error> {
    let spec = |tensor: &qwenkit_models::WholeTensor| TensorSpec {
        name: tensor.name.clone(),
        dtype: whole.dtype(),
        shape: tensor.shape.clone(),
    };
    let specs: Vec<TensorSpec> = whole.tensors().iter().map(spec).collect();
    let mut writer = ShardWriter::create(dir, &specs, SHARD_BYTES)?;
    for tensor in whole.tensors() {
        for piece in values[tensor.range.clone()].chunks(PIECE) {
            writer.write(&tensor.name, &whole.stored(piece))?;
        }
    }
    writer.finish()?;
    let files = ModelFiles::open(dir)?;
    for tensor in whole.tensors() {
        let found = files.tensor(&tensor.name).filter(|info| info.dtype == whole.dtype() && info.shape == tensor.shape);
        let differs = || Error::ReadBack { path: dir.to_owned(), tensor: tensor.name.clone() };
        let info = found.ok_or_else(differs)?;
        let mut start = 0;
        for piece in values[tensor.range.clone()].chunks(PIECE) {
            let expected = whole.stored(piece);
            let mut bytes = vec![0; expected.len()];
            files.read(info, start, &mut bytes)?;
            if bytes != expected {
                return Err(differs());
            }
            start += bytes.len();
        }
    }
    Ok(())
}
