//! Files that say of themselves that they are read otherwise than Qwen's models: with positions that see what follows, or
//! with another vector of a text than the last position's. They would load, and give vectors that mean nothing.

use qwenkit_formats::{Config, ModelFiles};

use super::{Architecture, wrong};
use crate::error::Error;

/// Where sentence-transformers says how states become one vector.
const POOLING: &str = "1_Pooling/config.json";
/// Its other ways. Several at once are laid side by side.
const OTHER_WAYS: [&str; 5] = [
    "pooling_mode_cls_token",
    "pooling_mode_mean_tokens",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
];
const SEES_AHEAD: &str =
    "true: each position sees those before it alone; models whose positions see what follows are not supported";

/// Refuses what such a file would be read as.
///
/// # Errors
/// With what the file says, and what would be right.
pub(super) fn check_reading(architecture: &Architecture, files: &ModelFiles) -> Result<(), Error> {
    match files {
        ModelFiles::Gguf(gguf) => {
            let (metadata, key) = (gguf.metadata(), |name: &str| format!("{}.{name}", architecture.gguf));
            if metadata.bool(&key("attention.causal"))? == Some(false) {
                return Err(wrong(gguf.path(), &key("attention.causal"), false, SEES_AHEAD));
            }
            let way = match metadata.usize(&key("pooling_type"))? {
                Some(1) => "1, the mean of all positions",
                Some(2) => "2, the first position",
                _ => return Ok(()),
            };
            Err(wrong(
                gguf.path(),
                &key("pooling_type"),
                way,
                "3, the last position, where Qwen's embedding models have read the whole text",
            ))
        }
        ModelFiles::Checkpoint(checkpoint) => {
            let config = checkpoint.config();
            if config.bool("is_causal")? == Some(false) {
                return Err(wrong(config.path(), "is_causal", false, SEES_AHEAD));
            }
            let path = checkpoint.path().join(POOLING);
            if !path.is_file() {
                return Ok(());
            }
            let pooling = Config::open(&path)?;
            for way in OTHER_WAYS {
                if pooling.bool(way)? == Some(true) {
                    let expected = "false, and `pooling_mode_lasttoken` true: Qwen's embedding models have read the whole text at the last position";
                    return Err(wrong(&path, way, true, expected));
                }
            }
            Ok(())
        }
    }
}
