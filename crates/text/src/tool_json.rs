//! A tool call written as a JSON object, read while it comes: where its name stands, where its arguments begin and end.

/// What is known of an object whose text may not be all there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// The text of the value of `name`, quotes included.
    pub(crate) name: Option<(usize, usize)>,
    /// Where the value of `arguments` begins, and where it ends if it has.
    pub(crate) arguments: Option<(usize, Option<usize>)>,
    /// Where the object ends, if it has.
    pub(crate) end: Option<usize>,
    /// It is no object, and will not become one.
    pub(crate) broken: bool,
}

/// Looks at `text`, whose first character is the object's brace.
pub(crate) fn scan(text: &str) -> Scanned {
    let bytes = text.as_bytes();
    let mut found = Scanned::default();
    let mut at = 1;
    loop {
        at = skip_space(bytes, at);
        match bytes.get(at) {
            None => return found,
            Some(b'}') => {
                found.end = Some(at + 1);
                return found;
            }
            Some(b',') => at += 1,
            Some(b'"') => {
                let Some(key_end) = value_end(bytes, at) else { return found };
                let key = &text[at + 1..key_end - 1];
                at = skip_space(bytes, key_end);
                match bytes.get(at) {
                    None => return found,
                    Some(b':') => at = skip_space(bytes, at + 1),
                    Some(_) => return Scanned { broken: true, ..found },
                }
                if at == bytes.len() {
                    return found;
                }
                let end = value_end(bytes, at);
                match (key, end) {
                    ("name", Some(end)) => found.name = Some((at, end)),
                    ("arguments" | "parameters", end) => found.arguments = Some((at, end)),
                    _ => {}
                }
                let Some(end) = end else { return found };
                at = end;
            }
            Some(_) => return Scanned { broken: true, ..found },
        }
    }
}

fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

/// Where the value that begins at `at` ends: behind its last byte.
fn value_end(bytes: &[u8], at: usize) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for (i, &byte) in bytes.iter().enumerate().skip(at) {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    in_string = false;
                    if depth == 0 {
                        return Some(i + 1);
                    }
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            // The end of what is around a number or a word.
            b'}' | b']' if depth == 0 => return Some(i),
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(i + 1);
                }
            }
            b',' if depth == 0 => return Some(i),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_arguments_are_found_as_they_come() {
        let text = r#"{"name": "f", "arguments": {"a": "}\"{", "b": [1, {"c": 2}]}, "x": 1}"#;
        let whole = scan(text);
        let part = |(from, to): (usize, usize)| &text[from..to];
        assert_eq!(part(whole.name.unwrap()), "\"f\"");
        let (from, to) = whole.arguments.unwrap();
        assert_eq!(part((from, to.unwrap())), r#"{"a": "}\"{", "b": [1, {"c": 2}]}"#);
        assert_eq!(whole.end, Some(text.len()));
        for cut in 1..text.len() {
            let some = scan(&text[..cut]);
            assert!(!some.broken && some.end.is_none(), "{cut}");
            assert!(some.name.is_none() || some.name == whole.name);
            assert!(some.arguments.is_none_or(|(start, end)| start == from && (end.is_none() || end == to)));
        }
        assert!(scan("{name: 1}").broken);
        assert!(scan(r#"{"name" "f"}"#).broken);
        assert_eq!(scan("{}").end, Some(2));
    }
}
