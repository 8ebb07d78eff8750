//! Finds the tower's file that lies beside a GGUF model.

use std::path::{Path, PathBuf};

/// The mmproj file beside the GGUF model at `model`: of several the one whose type is nearest to what hubs call the standard,
/// then the first by name. `None` where there is none, or the folder cannot be listed.
pub fn mmproj_beside(model: &Path) -> Option<PathBuf> {
    let folder = model.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let found = names.filter(|name| is_mmproj(name) && Path::new(name) != model.file_name().unwrap_or_default());
    let best = found.min_by_key(|name| (type_rank(name), name.clone()))?;
    Some(folder.join(best))
}

fn is_mmproj(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    lower.ends_with(".gguf") && lower.contains("mmproj")
}

/// Half precision before full and quantised: it is what towers are trained in.
fn type_rank(name: &str) -> usize {
    let lower = name.to_ascii_lowercase();
    ["bf16", "f16", "f32"].iter().position(|kind| lower.contains(kind)).unwrap_or(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_type_is_taken_and_the_model_itself_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.gguf");
        let touch = |name: &str| std::fs::write(folder.path().join(name), b"").unwrap();
        touch("model.gguf");
        touch("mmproj.txt");
        assert_eq!(mmproj_beside(&model), None);
        touch("mmproj-q8_0.gguf");
        touch("Qwen-mmproj-F32.gguf");
        assert_eq!(mmproj_beside(&model), Some(folder.path().join("Qwen-mmproj-F32.gguf")));
        touch("mmproj-F16.gguf");
        assert_eq!(mmproj_beside(&model), Some(folder.path().join("mmproj-F16.gguf")));
        touch("mmproj-BF16.gguf");
        assert_eq!(mmproj_beside(&model), Some(folder.path().join("mmproj-BF16.gguf")));
        assert_eq!(mmproj_beside(&folder.path().join("none").join("model.gguf")), None);
    }
}
