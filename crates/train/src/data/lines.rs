//! Lines of a text file that may be anything: bounded, with their numbers, checked to be UTF-8.
//!
//! Contract: a byte order mark is not part of the first line, nor a carriage return of any; a line that is too long is
//! passed over without being held in memory, and told.

use std::io::{self, BufRead, Read};

use super::Problem;

/// The longest line; far above any conversation.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Beginnings by which other kinds of files are known.
const OTHER_FILES: [(&[u8], &str, &str); 6] = [
    (b"\xFF\xFE", "text in UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xFE\xFF", "text in UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\x1F\x8B", "compressed with gzip", "unpack it with `gunzip`"),
    (b"\x28\xB5\x2F\xFD", "compressed with zstd", "unpack it with `unzstd`"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or export the sheet as CSV in UTF-8"),
    (
        b"PAR1",
        "a Parquet file",
        "name it *.parquet and build qwenkit with `--features parquet`, or write it as JSON lines, as DuckDB does: COPY (FROM 'in.parquet') TO 'out.jsonl'",
    ),
];

/// A reader of lines.
pub(crate) struct Lines<R> {
    input: R,
    number: usize,
    bytes: Vec<u8>,
    limit_bytes: usize,
}

/// A line as it was found.
pub(crate) struct Line<'a> {
    /// From 1.
    pub(crate) number: usize,
    /// The text without the line's end, or what is wrong with it.
    pub(crate) text: Result<&'a str, Problem>,
    /// Whether a line's end was there; without one the file ends here.
    pub(crate) is_ended: bool,
}

impl<R: BufRead> Lines<R> {
    /// Reads lines from `input`.
    pub(crate) fn new(input: R) -> Lines<R> {
        Lines { input, number: 0, bytes: Vec::new(), limit_bytes: LINE_BYTES_MAX }
    }

    #[cfg(test)]
    fn with_limit(input: R, limit_bytes: usize) -> Lines<R> {
        Lines { limit_bytes, ..Lines::new(input) }
    }

    /// The next line, `None` at the end.
    ///
    /// # Errors
    /// When the input cannot be read, or turns out on its first line to be no text.
    pub(crate) fn next(&mut self) -> Result<Option<Line<'_>>, Problem> {
        self.bytes.clear();
        let limit = self.limit_bytes as u64;
        let read = self.input.by_ref().take(limit + 1).read_until(b'\n', &mut self.bytes);
        if read.map_err(Problem::Unreadable)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let number = self.number;
        if number == 1 {
            self.check_kind()?;
        }
        let mut is_ended = self.bytes.last() == Some(&b'\n');
        if !is_ended && self.bytes.len() > self.limit_bytes {
            is_ended = skip_line(&mut self.input).map_err(Problem::Unreadable)?;
            let problem = Problem::LineTooLong { limit_bytes: self.limit_bytes };
            return Ok(Some(Line { number, text: Err(problem), is_ended }));
        }
        let mut line = self.bytes.as_slice();
        if number == 1 {
            line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line);
        }
        line = line.strip_suffix(b"\n").unwrap_or(line);
        line = line.strip_suffix(b"\r").unwrap_or(line);
        let text = std::str::from_utf8(line).map_err(|error| {
            let at = error.valid_up_to();
            Problem::NotUtf8 { byte: at + 1, found: line.get(at).copied().unwrap_or_default() }
        });
        Ok(Some(Line { number, text, is_ended }))
    }

    fn check_kind(&self) -> Result<(), Problem> {
        match OTHER_FILES.iter().find(|(start, ..)| self.bytes.starts_with(start)) {
            Some(&(_, found, hint)) => Err(Problem::OtherFile { found, hint }),
            None => Ok(()),
        }
    }
}

/// Reads past the next line's end without keeping anything; whether there was one.
fn skip_line(input: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let held = input.fill_buf()?;
        if held.is_empty() {
            return Ok(false);
        }
        let end = held.iter().position(|&byte| byte == b'\n');
        let used = end.map_or(held.len(), |at| at + 1);
        input.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(input: &[u8], limit_bytes: usize) -> Vec<(usize, String)> {
        let mut lines = Lines::with_limit(input, limit_bytes);
        let mut found = Vec::new();
        while let Some(line) = lines.next().expect("readable") {
            let text = line.text.map_or_else(|problem| format!("! {problem}"), str::to_owned);
            found.push((line.number, text));
        }
        found
    }

    #[test]
    fn marks_and_carriage_returns_are_no_part_of_a_line() {
        let found = all(b"\xEF\xBB\xBFa\r\n\r\nb\rc\n d", 100);
        let texts: Vec<_> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["a", "", "b\rc", " d"]);
        assert_eq!(found.last().map(|(number, _)| *number), Some(4));
    }

    #[test]
    fn a_line_that_is_too_long_is_told_and_the_next_one_is_whole() {
        let found = all(b"1234\n12345\n1234567890123456\nab", 4);
        assert_eq!(found[0].1, "1234");
        assert!(found[1].1.starts_with("! the line is longer than 4 bytes"));
        assert!(found[2].1.starts_with("! the line is longer than 4 bytes"));
        assert_eq!(found[3], (4, "ab".to_owned()));
    }

    #[test]
    fn bytes_that_are_no_text_are_named_with_their_place() {
        let found = all(b"ok\ncaf\xE9\n", 100);
        assert!(found[1].1.starts_with("! found the byte 0xE9 at byte 4"), "{}", found[1].1);
    }

    #[test]
    fn files_of_another_kind_end_at_once() {
        for start in [&b"\xFF\xFE{\0"[..], b"\x1F\x8B\x08", b"PK\x03\x04zip", b"PAR1\n"] {
            assert!(matches!(Lines::new(start).next(), Err(Problem::OtherFile { .. })));
        }
    }
}
