//! Checkpoints in several safetensors files: reads `model.safetensors.index.json`, opens the shards it names, and holds
//! the one against the other.
//!
//! Every tensor of the index must be in its shard, and every tensor of a shard in the index. Shards lie in the index's
//! own folder: a name that leads elsewhere is refused.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use super::parse;
use crate::data_file::DataFile;
use crate::tensor_table::TensorTable;
use crate::{Config, Error, TensorInfo};

/// Opens the tensors of a checkpoint folder's weights: `path` is a safetensors file, or an index of them.
pub(crate) fn open_shards(path: &Path) -> Result<TensorTable, Error> {
    if path.extension().is_none_or(|e| e != "json") {
        let file = DataFile::open(path)?;
        let (_, tensors) = parse(&file, 0)?;
        return TensorTable::new(vec![file], tensors);
    }
    let places = placements(path)?;
    let mut shards: Vec<&str> = places.values().map(String::as_str).collect();
    shards.sort_unstable();
    shards.dedup();
    let absent: Vec<&str> = shards.iter().copied().filter(|s| !path.with_file_name(s).is_file()).collect();
    if let Some(first) = absent.first() {
        return Err(Error::ShardMissing {
            path: path.to_path_buf(),
            shard: (*first).to_owned(),
            missing: absent.len(),
            count: shards.len(),
        });
    }
    let (mut files, mut tensors) = (Vec::new(), Vec::new());
    for (part, shard) in shards.iter().enumerate() {
        let file = DataFile::open(&path.with_file_name(shard))?;
        tensors.extend(parse(&file, part)?.1);
        files.push(file);
    }
    let extra: Vec<&TensorInfo> =
        tensors.iter().filter(|t| places.get(&t.name).map(String::as_str) != shards.get(t.part).copied()).collect();
    if let Some(first) = extra.first() {
        return Err(Error::IndexTensorExtra {
            path: path.to_path_buf(),
            tensor: first.name.clone(),
            shard: shards.get(first.part).copied().unwrap_or_default().to_owned(),
            count: extra.len(),
        });
    }
    let table = TensorTable::new(files, tensors)?;
    let mut missing = places.iter().filter(|(name, _)| table.tensor(name).is_none());
    if let Some((tensor, shard)) = missing.next() {
        let (tensor, shard) = (tensor.clone(), shard.clone());
        let count = 1 + missing.count();
        return Err(Error::IndexTensorMissing { path: path.to_path_buf(), tensor, shard, count });
    }
    Ok(table)
}

/// Tensor name -> shard name, as the index says.
fn placements(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let index = Config::open(path)?;
    let map = index.require_object("weight_map")?;
    let entries = map.value().as_object().into_iter().flatten();
    let mut places = BTreeMap::new();
    for (tensor, shard) in entries {
        let Some(shard) = shard.as_str() else {
            return Err(map.wrong(tensor, shard.to_string(), "the name of a file"));
        };
        let mut components = Path::new(shard).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
        if !plain {
            let (shard, tensor) = (shard.to_owned(), tensor.clone());
            return Err(Error::ShardName { path: path.to_path_buf(), shard, tensor });
        }
        places.insert(tensor.clone(), shard.to_owned());
    }
    Ok(places)
}
