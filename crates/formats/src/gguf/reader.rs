//! Reads a GGUF header forwards in large pieces, never past the end of the file and never more than it has room for.
//!
//! The length of a header is not written anywhere, so pieces are fetched as they are needed. Every length is held
//! against the bytes left before anything is allocated for it.

use std::fmt;

use crate::Error;
use crate::data_file::DataFile;

/// 1 MiB: a real header of 6 MB takes six reads, and a small file's header is read in one.
const PIECE_BYTES: u64 = 1 << 20;

/// What is being read, for messages; formatted only when something is wrong.
#[derive(Clone, Copy)]
pub(super) enum Thing<'a> {
    Preamble,
    Key(u64),
    Value(&'a str),
    TensorName(u64),
    Tensor(&'a str),
}

impl fmt::Display for Thing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Thing::Preamble => write!(f, "the GGUF header"),
            Thing::Key(i) => write!(f, "the name of metadata key {i}"),
            Thing::Value(key) => write!(f, "key `{key}`"),
            Thing::TensorName(i) => write!(f, "the name of tensor {i}"),
            Thing::Tensor(name) => write!(f, "the entry of tensor `{name}`"),
        }
    }
}

pub(super) struct Reader<'a> {
    file: &'a DataFile,
    piece: Vec<u8>,
    /// The next byte to give out, within `piece`.
    at: usize,
    /// Where `piece` begins in the file.
    piece_start: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a DataFile) -> Self {
        Self { file, piece: Vec::new(), at: 0, piece_start: 0 }
    }

    pub(super) fn file(&self) -> &'a DataFile {
        self.file
    }

    /// Where the next byte stands in the file.
    pub(super) fn position(&self) -> u64 {
        self.piece_start + self.at as u64
    }

    /// Bytes from here to the end of the file.
    pub(super) fn left(&self) -> u64 {
        self.file.len().saturating_sub(self.position())
    }

    /// Fetches the piece that begins here.
    fn refill(&mut self) -> Result<(), Error> {
        self.piece_start = self.position();
        self.at = 0;
        self.piece.clear();
        let wanted = PIECE_BYTES.min(self.file.len().saturating_sub(self.piece_start));
        self.piece.resize(wanted as usize, 0);
        self.file.read_at(self.piece_start, &mut self.piece, || "the GGUF header".into())
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, thing: Thing) -> Result<[u8; N], Error> {
        let in_piece = self.piece.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let bytes = match in_piece {
            Some(bytes) => *bytes,
            None => {
                self.check(N as u64, thing)?;
                self.refill()?;
                let first = self.piece.first_chunk::<N>();
                *first.ok_or_else(|| self.file.truncated(self.piece_start, N as u64, thing.to_string()))?
            }
        };
        self.at += N;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, thing: Thing) -> Result<u32, Error> {
        self.array(thing).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, thing: Thing) -> Result<u64, Error> {
        self.array(thing).map(u64::from_le_bytes)
    }

    /// An error unless `n` more bytes follow.
    fn check(&self, n: u64, thing: Thing) -> Result<(), Error> {
        if n > self.left() {
            return Err(self.file.truncated(self.position(), n, thing.to_string()));
        }
        Ok(())
    }

    /// A count of elements of at least `min_bytes` each, which the rest of the file can hold.
    pub(super) fn count(&self, found: u64, min_bytes: u64, thing: Thing, what: &str) -> Result<usize, Error> {
        let limit = self.left() / min_bytes;
        match usize::try_from(found) {
            Ok(count) if found <= limit => Ok(count),
            _ => Err(self.too_many(found, limit, thing, what, "the rest of the file has room for no more")),
        }
    }

    /// As `count`, and at most `max`, beyond which only a hostile file would go.
    pub(super) fn count_up_to(
        &self,
        max: u64,
        found: u64,
        min_bytes: u64,
        thing: Thing,
        what: &str,
    ) -> Result<usize, Error> {
        let count = self.count(found, min_bytes, thing, what)?;
        if found > max {
            return Err(self.too_many(found, max, thing, what, "no real model has as many"));
        }
        Ok(count)
    }

    fn too_many(&self, found: u64, limit: u64, thing: Thing, what: &str, reason: &'static str) -> Error {
        let (path, thing) = (self.file.path().to_path_buf(), format!("{what} of {thing}"));
        Error::Count { path, thing, found, limit, reason }
    }

    /// Appends the next `n` bytes to `out`. The caller has checked nothing; no more is reserved than the file holds.
    pub(super) fn append(&mut self, n: u64, out: &mut Vec<u8>, thing: Thing) -> Result<(), Error> {
        self.check(n, thing)?;
        let mut left = n as usize;
        // What stands in the piece already, then whatever the file still has to give.
        while left > 0 {
            let rest = self.piece.get(self.at..).unwrap_or_default();
            if rest.is_empty() {
                self.refill()?;
                continue;
            }
            let taken = rest.get(..left).unwrap_or(rest);
            out.extend_from_slice(taken);
            self.at += taken.len();
            left -= taken.len();
        }
        Ok(())
    }

    /// A string: its length in eight bytes, then its text.
    pub(super) fn string(&mut self, thing: Thing) -> Result<String, Error> {
        let len = self.u64(thing)?;
        let len = self.count(len, 1, thing, "length")?;
        let mut bytes = Vec::with_capacity(len);
        self.append(len as u64, &mut bytes, thing)?;
        String::from_utf8(bytes)
            .map_err(|_| Error::NotUtf8 { path: self.file.path().to_path_buf(), thing: thing.to_string() })
    }
}
