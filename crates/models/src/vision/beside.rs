//! Finds the tower's file that lies beside a GGUF model.

use std::path::{Path, PathBuf};

/// The mmproj file beside the GGUF model at `model`: of several the one that is called after it, as `quantize` calls them, or that
/// shares the most of its name; then the one whose type is nearest to what hubs call the standard, then the first by name. `None`
/// where there is none, or the folder cannot be listed.
pub fn mmproj_beside(model: &Path) -> Option<PathBuf> {
    let folder = model.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let found = names.filter(|name| is_mmproj(name) && Path::new(name) != model.file_name().unwrap_or_default());
    let own = own_name(&model.file_name().unwrap_or_default().to_string_lossy());
    let best =
        found.min_by_key(|name| (std::cmp::Reverse(shared(&own, &own_name(name))), type_rank(name), name.clone()))?;
    Some(folder.join(best))
}

fn is_mmproj(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    lower.ends_with(".gguf") && lower.contains("mmproj")
}

/// What of a file's name says which model it is of: without its ending, its type and the word that makes it a mmproj.
fn own_name(name: &str) -> Vec<String> {
    let lower = name.to_ascii_lowercase();
    let parts = lower.strip_suffix(".gguf").unwrap_or(&lower).split(['-', '.', ' ']);
    let is_type = |part: &str| {
        let digits = part.trim_start_matches("iq").trim_start_matches(['q', 'b', 'f']);
        part != digits && digits.starts_with(|c: char| c.is_ascii_digit()) && !part.ends_with('b')
    };
    parts.filter(|part| !part.is_empty() && *part != "mmproj" && !is_type(part)).map(str::to_owned).collect()
}

/// How many parts two names begin with in common.
fn shared(a: &[String], b: &[String]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
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

    #[test]
    fn of_two_models_in_a_folder_each_has_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a-3b-q8_0.gguf", "b-7b-Q4_K_M.gguf", "mmproj-a-3b-q8_0.gguf", "mmproj-b-7b-F16.gguf"] {
            std::fs::write(path(name), b"").unwrap();
        }
        assert_eq!(mmproj_beside(&path("a-3b-q8_0.gguf")), Some(path("mmproj-a-3b-q8_0.gguf")));
        assert_eq!(mmproj_beside(&path("b-7b-Q4_K_M.gguf")), Some(path("mmproj-b-7b-F16.gguf")));
        // Hubs put the word anywhere.
        std::fs::write(path("b-7b.mmproj-BF16.gguf"), b"").unwrap();
        assert_eq!(mmproj_beside(&path("b-7b-Q4_K_M.gguf")), Some(path("b-7b.mmproj-BF16.gguf")));
    }
}
