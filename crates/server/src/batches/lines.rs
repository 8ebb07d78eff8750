//! The lines of a batch's input, checked before the first one runs.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::fields::describe;

/// Lines of a batch.
const LINES_MAX: usize = 50_000;
/// Errors that are told.
const ERRORS_MAX: usize = 20;

/// A request of a batch.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) custom_id: String,
    pub(super) body: Value,
}

/// Reads a batch's input.
///
/// # Errors
/// What is wrong with it, as the batch's `errors.data`.
pub(super) fn read(content: &[u8], endpoint: &str) -> Result<Vec<Line>, Vec<Value>> {
    let error = |line: Option<usize>, code: &str, message: String| json!({ "line": line, "code": code, "message": message, "param": null });
    let Ok(text) = std::str::from_utf8(content) else {
        return Err(vec![error(None, "invalid_json", "the file is not UTF-8 text".to_owned())]);
    };
    let (mut lines, mut errors, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for (i, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        if lines.len() + errors.len() >= LINES_MAX {
            return Err(vec![error(None, "too_many_lines", format!("more than {LINES_MAX} lines; split the file"))]);
        }
        match one(text, endpoint) {
            Ok(line) if !known.insert(line.custom_id.clone()) => {
                let message = format!("`custom_id` is {:?} a second time", line.custom_id);
                errors.push(error(Some(i + 1), "duplicate_custom_id", message));
            }
            Ok(line) => lines.push(line),
            Err((code, message)) => errors.push(error(Some(i + 1), code, message)),
        }
        if errors.len() >= ERRORS_MAX {
            break;
        }
    }
    if lines.is_empty() && errors.is_empty() {
        errors.push(error(None, "empty_file", "the file has no lines".to_owned()));
    }
    if errors.is_empty() { Ok(lines) } else { Err(errors) }
}

fn one(text: &str, endpoint: &str) -> Result<Line, (&'static str, String)> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| ("invalid_json_line", format!("no JSON: {error}")))?;
    let wrong = |name: &str, expected: &str| {
        let found = describe(value.get(name).unwrap_or(&Value::Null));
        ("invalid_request", format!("`{name}` is {found}, expected {expected}"))
    };
    let custom_id = value["custom_id"].as_str().ok_or_else(|| wrong("custom_id", "a string"))?.to_owned();
    if value["method"] != "POST" {
        return Err(wrong("method", "`POST`"));
    }
    if value["url"] != endpoint {
        return Err(wrong("url", &format!("{endpoint}, the batch's endpoint")));
    }
    let body = value.get("body").filter(|body| body.is_object()).ok_or_else(|| wrong("body", "an object"))?;
    if body["stream"] == true {
        return Err(("invalid_request", "`body.stream` is true; results of a batch are not streamed".to_owned()));
    }
    Ok(Line { custom_id, body: body.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_named_with_their_lines() {
        let good = r#"{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}"#;
        assert_eq!(read(format!("{good}\n\n").as_bytes(), "/v1/embeddings").unwrap().len(), 1);
        let bad = format!("{good}\nnonsense\n{good}\n{{}}\n{}", good.replace("POST", "GET").replace("\"a\"", "\"b\""));
        let errors = read(bad.as_bytes(), "/v1/embeddings").unwrap_err();
        let told: Vec<(u64, &str)> =
            errors.iter().map(|e| (e["line"].as_u64().unwrap(), e["code"].as_str().unwrap())).collect();
        let expected =
            [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_request"), (5, "invalid_request")];
        assert_eq!(told, expected);
        assert!(read(b"", "/v1/embeddings").is_err() && read(&[0xff], "/v1/embeddings").is_err());
        assert!(read(good.as_bytes(), "/v1/completions").is_err());
    }
}
