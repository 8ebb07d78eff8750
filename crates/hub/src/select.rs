//! Which files of a repository make the model that was asked for.
//!
//! Contract: a split GGUF is taken whole or not at all; where several files would do and none is preferred, the answer
//! is an error that lists them, never a guess. Not here: downloading.

use std::collections::BTreeMap;

use crate::Error;
use crate::listing::RemoteFile;
use crate::words::nearest;

/// The quantisation taken when none is named: the usual balance of size and quality.
const PREFERRED: &str = "Q4_K_M";

/// The files of a model.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    /// The file to open; `None`: the folder is a checkpoint.
    pub(crate) main: Option<String>,
    pub(crate) files: Vec<RemoteFile>,
}

/// Picks the files of `repository` for `wanted`, a file name, a quantisation, or nothing in particular.
///
/// # Errors
/// [`Error::FileNotFound`], [`Error::ChooseFile`], [`Error::NothingToPull`].
pub(crate) fn select(repository: &str, files: &[RemoteFile], wanted: Option<&str>) -> Result<Selection, Error> {
    let models = gguf_models(files);
    match wanted {
        Some(wanted) => named(repository, files, &models, wanted),
        None if is_checkpoint(files) => Ok(checkpoint(files)),
        None => preferred(repository, &models),
    }
}

/// GGUF models of a repository by their name without part number and extension; a split one has several files.
fn gguf_models(files: &[RemoteFile]) -> BTreeMap<String, Vec<RemoteFile>> {
    let mut whole = BTreeMap::new();
    let mut split: BTreeMap<(String, u32), Vec<(u32, RemoteFile)>> = BTreeMap::new();
    for file in files {
        let Some(stem) = gguf_stem(&file.path) else { continue };
        match split_part(stem) {
            Some((stem, part, parts)) => {
                split.entry((stem.to_owned(), parts)).or_default().push((part, file.clone()));
            }
            None => {
                whole.insert(stem.to_owned(), vec![file.clone()]);
            }
        }
    }
    for ((stem, parts), mut found) in split {
        found.sort_by_key(|(part, _)| *part);
        let complete = found.iter().map(|(part, _)| *part).eq(1..=parts);
        // One file is simpler to keep than its parts: where a repository has both, the parts are left.
        if complete {
            whole.entry(stem).or_insert_with(|| found.into_iter().map(|(_, file)| file).collect());
        }
    }
    whole
}

fn gguf_stem(path: &str) -> Option<&str> {
    let cut = path.len().checked_sub(".gguf".len())?;
    path.get(cut..)?.eq_ignore_ascii_case(".gguf").then(|| path.get(..cut)).flatten()
}

/// `X-00002-of-00003` as `(X, 2, 3)`.
fn split_part(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, parts) = stem.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok()).flatten();
    Some((stem, number(part)?, number(parts)?))
}

fn named(
    repository: &str,
    files: &[RemoteFile],
    models: &BTreeMap<String, Vec<RemoteFile>>,
    wanted: &str,
) -> Result<Selection, Error> {
    if let Some(stem) = gguf_stem(wanted) {
        let stem = split_part(stem).map_or(stem, |(stem, ..)| stem);
        let same = |key: &str| key.eq_ignore_ascii_case(stem) || file_name(key).eq_ignore_ascii_case(stem);
        if let Some((_, parts)) = models.iter().find(|(key, _)| same(key)) {
            return Ok(gguf(parts));
        }
    } else if let Some(file) = files.iter().find(|file| file.path == wanted) {
        return Ok(Selection { main: Some(file.path.clone()), files: vec![file.clone()] });
    } else {
        let fitting = with_quantisation(models, wanted);
        if !fitting.is_empty() {
            return only(repository, &fitting);
        }
    }
    let names = models.values().flat_map(|parts| parts.first()).map(|file| file.path.as_str());
    Err(Error::FileNotFound {
        repository: repository.to_owned(),
        wanted: wanted.to_owned(),
        nearest: nearest(wanted, names.chain(files.iter().map(|file| file.path.as_str()))),
    })
}

fn preferred(repository: &str, models: &BTreeMap<String, Vec<RemoteFile>>) -> Result<Selection, Error> {
    let models: BTreeMap<_, _> =
        models.iter().filter(|(key, _)| !is_projector(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    if models.is_empty() {
        return Err(Error::NothingToPull { repository: repository.to_owned() });
    }
    let fitting = with_quantisation(&models, PREFERRED);
    if fitting.len() == 1 { only(repository, &fitting) } else { only(repository, &models.values().collect::<Vec<_>>()) }
}

/// The models whose name ends in the quantisation, else those that have it as a word.
fn with_quantisation<'a>(models: &'a BTreeMap<String, Vec<RemoteFile>>, wanted: &str) -> Vec<&'a Vec<RemoteFile>> {
    let wanted = wanted.to_lowercase();
    let word_at = |key: &str, at: usize| {
        let before = key[..at].chars().next_back();
        let after = key[at + wanted.len()..].chars().next();
        let edge = |c: Option<char>| c.is_none_or(|c| matches!(c, '-' | '.' | '/'));
        edge(before) && edge(after)
    };
    models
        .iter()
        .filter(|(key, _)| !is_projector(key))
        .filter(|(key, _)| {
            let key = file_name(key).to_lowercase();
            key.match_indices(&wanted).any(|(at, _)| word_at(&key, at))
        })
        .map(|(_, parts)| parts)
        .collect()
}

fn only(repository: &str, models: &[&Vec<RemoteFile>]) -> Result<Selection, Error> {
    if let [parts] = models {
        return Ok(gguf(parts));
    }
    let size = |parts: &[RemoteFile]| parts.iter().map(|part| part.size_bytes).sum::<Option<u64>>();
    let files = models.iter().filter_map(|parts| Some((parts.first()?.path.clone(), size(parts)))).collect();
    Err(Error::ChooseFile { repository: repository.to_owned(), files })
}

fn gguf(parts: &[RemoteFile]) -> Selection {
    Selection { main: parts.first().map(|part| part.path.clone()), files: parts.to_vec() }
}

/// Vision towers for GGUF models come as extra files that are no models.
fn is_projector(key: &str) -> bool {
    file_name(key).to_lowercase().starts_with("mmproj")
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn is_checkpoint(files: &[RemoteFile]) -> bool {
    files.iter().any(|f| f.path == "config.json")
        && files.iter().any(|f| belongs_to_checkpoint(&f.path) && f.path.ends_with(".safetensors"))
}

fn checkpoint(files: &[RemoteFile]) -> Selection {
    let mut files: Vec<RemoteFile> = files.iter().filter(|file| belongs_to_checkpoint(&file.path)).cloned().collect();
    // Small files first: what is wrong with a repository shows before the gigabytes.
    files.sort_by_key(|file| (file.path.ends_with(".safetensors"), file.path.clone()));
    Selection { main: None, files }
}

/// Configuration, tokenizer, weights and the papers; pickles, ONNX and everything in subfolders are left.
fn belongs_to_checkpoint(path: &str) -> bool {
    const EXACT: [&str; 11] = [
        "config.json",
        "generation_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "model.safetensors.index.json",
        "LICENSE",
        "README.md",
    ];
    let tokenizer = path.starts_with("tokenizer") && path.ends_with(".json");
    let template = path.starts_with("chat_template");
    !path.contains('/') && (EXACT.contains(&path) || tokenizer || template || path.ends_with(".safetensors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<RemoteFile> {
        paths.iter().map(|p| RemoteFile { path: (*p).to_owned(), size_bytes: Some(10), sha256: None }).collect()
    }

    fn picked(paths: &[&str], wanted: Option<&str>) -> Result<Vec<String>, Error> {
        select("o/r", &files(paths), wanted).map(|s| s.files.into_iter().map(|f| f.path).collect())
    }

    #[test]
    fn the_preferred_quantisation_is_taken_and_projectors_are_not_models() {
        let all = ["x-Q8_0.gguf", "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "mmproj-x-Q4_K_M.gguf", "README.md"];
        assert_eq!(picked(&all, None).expect("one is preferred"), ["x-Q4_K_M.gguf"]);
        assert_eq!(picked(&["x-Q8_0.gguf", "mmproj-x.gguf"], None).expect("only one"), ["x-Q8_0.gguf"]);
    }

    #[test]
    fn no_preference_among_several_is_an_error_that_lists_them() {
        let error = picked(&["x-Q8_0.gguf", "x-Q5_0.gguf"], None).expect_err("two would do");
        assert!(error.to_string().contains("x-Q5_0.gguf (10 bytes)"), "{error}");
        let error = picked(&["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], Some("q4_k_m")).expect_err("two would do");
        assert!(matches!(error, Error::ChooseFile { .. }), "{error}");
    }

    #[test]
    fn a_quantisation_is_a_whole_word() {
        let all = ["x-Q4_K_M.gguf", "x-IQ4_K_M.gguf", "x.q4_k.gguf"];
        assert_eq!(picked(&all, Some("q4_k_m")).expect("one fits"), ["x-Q4_K_M.gguf"]);
        assert_eq!(picked(&all, Some("Q4_K")).expect("one fits"), ["x.q4_k.gguf"]);
        assert!(matches!(picked(&all, Some("Q4")), Err(Error::FileNotFound { .. })));
    }

    #[test]
    fn a_split_model_is_taken_whole_in_order_or_not_at_all() {
        let parts = ["q/x-q4_k_m-00002-of-00002.gguf", "q/x-q4_k_m-00001-of-00002.gguf"];
        let both = ["q/x-q4_k_m-00001-of-00002.gguf", "q/x-q4_k_m-00002-of-00002.gguf"];
        for wanted in [None, Some("Q4_K_M"), Some("x-q4_k_m.gguf"), Some(both[1])] {
            assert_eq!(picked(&parts, wanted).expect("both parts are there"), both, "{wanted:?}");
        }
        assert!(picked(&parts[..1], None).is_err(), "the first part is missing");
    }

    #[test]
    fn one_file_is_preferred_to_its_parts() {
        let all = ["x-q4_k_m-00001-of-00001.gguf", "x-q4_k_m.gguf"];
        assert_eq!(picked(&all, Some("x-q4_k_m.gguf")).expect("both are there"), ["x-q4_k_m.gguf"]);
    }

    #[test]
    fn a_checkpoint_needs_its_config_and_takes_no_pickles() {
        let all = [
            "model.safetensors",
            "config.json",
            "merges.txt",
            "chat_template.jinja",
            "x.bin",
            "a.pt",
            "onnx/config.json",
        ];
        let names = picked(&all, None).expect("a checkpoint");
        assert_eq!(names, ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors"]);
        assert!(matches!(picked(&["model.safetensors", "x.bin"], None), Err(Error::NothingToPull { .. })));
    }

    #[test]
    fn odd_names_are_no_split_parts() {
        for stem in ["x-of-00002", "x-1-of-2", "-of-", "x-00001-of-0000x", "é-of-é"] {
            assert_eq!(split_part(stem), None, "{stem}");
        }
        assert_eq!(gguf_stem("é.GGUF"), Some("é"));
        assert_eq!(gguf_stem("guf"), None);
    }
}
