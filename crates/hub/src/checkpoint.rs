//! Whether a folder that some other tool filled holds a whole checkpoint.
//!
//! Contract: a checkpoint is whole if its config, and every weight file its index names, are there. Not here: folders of
//! the store, whose manifest says it all.

use std::fs;
use std::path::Path;

use serde_json::Value;

const INDEX: &str = "model.safetensors.index.json";

/// Whether `folder` holds config.json and all safetensors files; links into a cache count if their target exists.
pub(crate) fn is_whole(folder: &Path) -> bool {
    if !is_filled(&folder.join("config.json")) {
        return false;
    }
    let index = folder.join(INDEX);
    if !index.exists() {
        return is_filled(&folder.join("model.safetensors"));
    }
    let index: Option<Value> = fs::read(index).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let Some(map) = index.as_ref().and_then(|index| index["weight_map"].as_object()) else { return false };
    let mut shards: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    shards.sort_unstable();
    shards.dedup();
    !shards.is_empty() && shards.iter().all(|shard| !shard.contains(['/', '\\']) && is_filled(&folder.join(shard)))
}

/// Bytes of the files directly in `folder`, links followed.
pub(crate) fn size_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
        .filter(fs::Metadata::is_file)
        .map(|m| m.len())
        .sum()
}

fn is_filled(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() > 0)
}
