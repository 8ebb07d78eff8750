//! Split models: how parts are named and numbered, and opening all of them from any one.
//!
//! The convention is that of llama.cpp's `gguf-split`: names end in `-00001-of-00003.gguf`; each part carries
//! `split.no` (from 0), `split.count` and `split.tensors.count`; the first carries all other metadata.

use std::path::{Path, PathBuf};

use super::header::{self, Header};
use super::metadata::Metadata;
use crate::Error;
use crate::data_file::DataFile;

pub(super) const KEY_NUMBER: &str = "split.no";
pub(super) const KEY_COUNT: &str = "split.count";
pub(super) const KEY_TENSORS: &str = "split.tensors.count";

/// `split.no` and `split.count` are 16-bit numbers.
pub(super) const MAX_PARTS: u64 = u16::MAX as u64;

/// Which part of how many a file says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// From 0.
    pub(super) number: u64,
    pub(super) count: u64,
}

/// What the metadata say about splitting; `None` for a model in one file.
pub(super) fn membership(metadata: &Metadata) -> Result<Option<Member>, Error> {
    let count = metadata.u64(KEY_COUNT)?.unwrap_or(0);
    if count < 2 {
        return Ok(None);
    }
    let number = metadata.require_u64(KEY_NUMBER)?;
    let mismatch = |key, found: u64, expected: String| Error::SplitMismatch {
        path: metadata.path().to_path_buf(),
        key,
        found: found.to_string(),
        expected,
    };
    if count > MAX_PARTS {
        return Err(mismatch(KEY_COUNT, count, format!("at most {MAX_PARTS}")));
    }
    if number >= count {
        return Err(mismatch(KEY_NUMBER, number, format!("less than `{KEY_COUNT}`, which is {count}")));
    }
    Ok(Some(Member { number, count }))
}

/// The ending of the name of part `number` (from 0).
fn suffix(number: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}

/// The path of part `number` (from 0) of the model whose unsplit name would be `path` without its extension.
pub(super) fn part_path(stem: &Path, number: u64, count: u64) -> PathBuf {
    let mut name = stem.file_name().unwrap_or_default().to_os_string();
    name.push(suffix(number, count));
    stem.with_file_name(name)
}

/// `model-00002-of-00003.gguf` -> (`model`, 3): the stem and the number of parts that a file name states.
pub(crate) fn split_name(name: &str) -> Option<(&str, u64)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(count) || !digits(number) {
        return None;
    }
    let (number, count): (u64, u64) = (number.parse().ok()?, count.parse().ok()?);
    (1..=count).contains(&number).then_some((stem, count))
}

/// Opens the parts beside `opened`, which is one of them, and checks that they belong together.
pub(super) fn open_all(
    opened: DataFile,
    header: Header,
    member: Member,
) -> Result<(Vec<DataFile>, Vec<Header>), Error> {
    let Member { number: opened_number, count } = member;
    let path = opened.path().to_path_buf();
    let expected = suffix(opened_number, count);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some(stem) = name.strip_suffix(&expected) else {
        return Err(Error::SplitName { path, number: opened_number + 1, count, expected });
    };
    let stem = path.with_file_name(stem);
    let mut opened = Some((opened, header));
    let (mut files, mut headers) = (Vec::new(), Vec::new());
    for number in 0..count {
        let (file, header) = match opened.take_if(|_| number == opened_number) {
            Some(part) => part,
            None => open_part(&stem, number, count)?,
        };
        files.push(file);
        headers.push(header);
    }
    check_tensor_count(&headers)?;
    Ok((files, headers))
}

fn open_part(stem: &Path, number: u64, count: u64) -> Result<(DataFile, Header), Error> {
    let path = part_path(stem, number, count);
    let file = match DataFile::open(&path) {
        Err(Error::NotFound { .. }) => return Err(Error::SplitMissing { path, number: number + 1, count }),
        other => other?,
    };
    let header = header::parse(&file)?;
    let mismatch = |key, found: Option<u64>, expected: u64| {
        let found = found.map_or("none".to_owned(), |n| n.to_string());
        Error::SplitMismatch { path: path.clone(), key, found, expected: expected.to_string() }
    };
    for (key, expected) in [(KEY_COUNT, count), (KEY_NUMBER, number)] {
        let found = header.metadata.u64(key)?;
        if found != Some(expected) {
            return Err(mismatch(key, found, expected));
        }
    }
    Ok((file, header))
}

/// The parts together must hold as many tensors as the first one promises.
fn check_tensor_count(headers: &[Header]) -> Result<(), Error> {
    let Some(first) = headers.first() else { return Ok(()) };
    let Some(promised) = first.metadata.u64(KEY_TENSORS)? else { return Ok(()) };
    let held: usize = headers.iter().map(|h| h.tensors.len()).sum();
    if promised != held as u64 {
        return Err(Error::SplitMismatch {
            path: first.metadata.path().to_path_buf(),
            key: KEY_TENSORS,
            found: promised.to_string(),
            expected: format!("{held}, the number of tensors in all parts"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_names_go_both_ways() {
        assert_eq!(part_path(Path::new("a/m.v1"), 1, 3), Path::new("a/m.v1-00002-of-00003.gguf"));
        assert_eq!(split_name("m.v1-00002-of-00003.gguf"), Some(("m.v1", 3)));
        for other in ["m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-2-of-3.gguf", "m-00001-of-00003"] {
            assert_eq!(split_name(other), None, "{other}");
        }
    }
}
