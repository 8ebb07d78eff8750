//! JSON lines in, JSON lines out: one answer for every line, in order, whatever a line holds.
//!
//! Contract: a line that cannot be used gives `{"error": "line N: ..."}` in its place, the lines after it are still
//! done, and the command fails at the end. Lines are bounded, so no input can exhaust memory. Not here: what a line
//! means.

use std::io::{self, BufRead, BufWriter, Read, Write};

use serde_json::{Map, Value, json};

use crate::failure::Told;
use crate::terminal;

/// The longest line; far above any conversation.
const LINE_BYTES_MAX: u64 = 256 << 20;

/// Answers every line of stdin with `answer`, whose error text lacks the line's number.
pub(crate) fn answer_lines(
    mut answer: impl FnMut(usize, Map<String, Value>) -> Result<Value, String>,
) -> anyhow::Result<()> {
    answer_together(1, |objects| objects.into_iter().map(|(number, object)| answer(number, object)).collect())
}

/// The same with up to `most` lines at once: `answer` gives as many answers, in their order.
pub(crate) fn answer_together(
    most: usize,
    mut answer: impl FnMut(Vec<(usize, Map<String, Value>)>) -> Vec<Result<Value, String>>,
) -> anyhow::Result<()> {
    let mut input = io::stdin().lock();
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut line, mut number, mut bad_lines) = (Vec::new(), 0, 0);
    let mut has_more = true;
    while has_more {
        // What each line is: an object to answer, or what is wrong with it.
        let (mut objects, mut lines) = (Vec::new(), Vec::new());
        while lines.len() < most {
            has_more = read_line(&mut input, &mut line)?;
            if !has_more {
                break;
            }
            number += 1;
            lines.push((number, object(&line).map(|object| objects.push((number, object)))));
        }
        let mut answers = if objects.is_empty() { Vec::new() } else { answer(objects) }.into_iter();
        for (number, line) in lines {
            let found = line.and_then(|()| answers.next().unwrap_or_else(|| Err("it got no answer".to_owned())));
            let value = found.unwrap_or_else(|problem| {
                bad_lines += 1;
                json!({ "error": format!("line {number}: {problem}") })
            });
            writeln!(out, "{value}").map_err(terminal::stdout_error)?;
        }
    }
    out.flush().map_err(terminal::stdout_error)?;
    if bad_lines > 0 {
        terminal::note(&format!("{bad_lines} of {number} lines could not be used; their answers say why"));
        return Err(Told.into());
    }
    Ok(())
}

/// The next line without its end; false at the end of the input.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> anyhow::Result<bool> {
    line.clear();
    let failed = |error: io::Error| anyhow::anyhow!("cannot read stdin: {error}");
    input.take(LINE_BYTES_MAX).read_until(b'\n', line).map_err(failed)?;
    if line.len() as u64 == LINE_BYTES_MAX && line.last() != Some(&b'\n') {
        anyhow::bail!("a line of stdin is longer than {LINE_BYTES_MAX} bytes\nhint: give one JSON object a line");
    }
    let ended = line.is_empty();
    while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        line.pop();
    }
    Ok(!ended)
}

fn object(line: &[u8]) -> Result<Map<String, Value>, String> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Err("found nothing, expected a JSON object".to_owned());
    }
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("found another JSON value, expected an object".to_owned()),
        // There is one line, so the library's own line number says nothing.
        Err(error) => {
            let problem = error.to_string();
            let problem = problem.rsplit_once(" at line ").map_or(problem.as_str(), |(text, _)| text);
            Err(format!("not valid JSON at byte {}: {problem}", error.column()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_newlines_and_the_last_one_needs_none() {
        let mut input = &b"a\r\n\nb"[..];
        let mut line = Vec::new();
        let mut lines = Vec::new();
        while read_line(&mut input, &mut line).expect("readable") {
            lines.push(String::from_utf8(line.clone()).expect("text"));
        }
        assert_eq!(lines, ["a", "", "b"]);
    }

    #[test]
    fn what_is_no_object_is_named() {
        assert!(object(b"{\"text\": 1}").is_ok());
        assert_eq!(object(b" "), Err("found nothing, expected a JSON object".into()));
        assert_eq!(object(b"[]"), Err("found another JSON value, expected an object".into()));
        assert!(object(b"{\"a\": }").is_err_and(|e| e.starts_with("not valid JSON at byte 7: expected value")));
        assert!(object(b"{\"a\": \"\xff\"}").is_err());
    }
}
