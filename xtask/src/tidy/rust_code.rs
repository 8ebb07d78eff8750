//! A Rust source with everything blanked that is not code: comments, and the contents of string and char literals.
//!
//! Bytes blanked become spaces and line breaks stay, so line numbers and lengths hold. It knows just enough of the
//! language to tell where literals and comments end; source that does not compile gets some answer, never a panic.

/// `source` with comments and the contents of literals replaced by spaces.
pub(super) fn blanked(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let starts_word = at == 0 || !is_word(bytes[at - 1]);
        let blank_len = if rest.starts_with(b"//") {
            rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment_len(rest)
        } else if let Some(len) = raw_string_len(rest).filter(|_| starts_word) {
            len
        } else if rest[0] == b'"' || (rest[0] == b'\'' && is_char_literal(rest)) {
            quoted_len(rest)
        } else {
            code.push(rest[0]);
            at += 1;
            continue;
        };
        code.extend(rest[..blank_len].iter().map(|byte| if *byte == b'\n' { b'\n' } else { b' ' }));
        at += blank_len;
    }
    // Only whole literals and comments were replaced, so what is left is still UTF-8.
    String::from_utf8_lossy(&code).into_owned()
}

/// Whether `byte` may stand inside an identifier.
fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric() || !byte.is_ascii()
}

/// Where `word` stands as a whole word in `code`: byte offsets.
pub(super) fn word_offsets<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        let after = bytes.get(at + word.len());
        !before.is_some_and(|byte| is_word(*byte)) && !after.is_some_and(|byte| is_word(*byte))
    })
}

/// The line, counted from 1, on which byte `offset` of `text` stands.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count()
}

/// Length of the block comment at the start of `rest`; block comments nest.
fn block_comment_len(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length of the raw string (`r"..."`, `br#"..."#`, `cr"..."`) at the start of `rest`, if one stands there.
fn raw_string_len(rest: &[u8]) -> Option<usize> {
    let prefix_len = [&b"r"[..], b"br", b"cr"].into_iter().find(|prefix| rest.starts_with(prefix))?.len();
    let hash_count = rest[prefix_len..].iter().take_while(|byte| **byte == b'#').count();
    let open_len = prefix_len + hash_count + 1;
    if rest.get(open_len - 1) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hash_count, b'#');
    let content = &rest[open_len..];
    let content_len = content.windows(close.len()).position(|window| window == close);
    Some(content_len.map_or(rest.len(), |len| open_len + len + close.len()))
}

/// Length of the literal at the start of `rest`, closed by the same quote it opens with.
fn quoted_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == rest[0] => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Whether the quote at the start of `rest` opens a char literal rather than a lifetime or a label.
fn is_char_literal(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        // One character, however many bytes it takes, and the closing quote.
        Some(first) => {
            let char_len = if first.is_ascii() { 1 } else { first.leading_ones() as usize };
            rest.get(1 + char_len) == Some(&b'\'')
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_go_and_the_code_around_them_stays() {
        for (before, blank, after) in [
            ("a ", "// unsafe", "\nb"),
            ("a ", "/* x /* y */ z */", " b"),
            ("a ", "/* open\nend", ""),
            ("f(", "\"un\\\"safe\"", ", 1)"),
            ("f(", "\"two\nlines // and no comment\"", ", 1)"),
            ("f(", "\"open", ""),
            ("f(", "\"\\", ""),
            ("f(", "r#\"a\"b\"#", ", 1)"),
            ("f(", "br\"\\\"", ", 1)"),
            ("f(", "r#\"open", ""),
            ("for", "\"\\\"\"", ""),
            ("let c = ", "'\"'", "; d"),
            ("let c = ", "'\\''", "; d"),
            ("let c = ", "'é'", "; d"),
            ("fn f<'a>(x: &'a str)", "", ""),
            ("'outer: loop {}", "", ""),
            ("r#mod(", "\"x\"", ")"),
        ] {
            let source = format!("{before}{blank}{after}");
            let spaces: String = blank.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect();
            assert_eq!(blanked(&source), format!("{before}{spaces}{after}"), "source: {source}");
        }
    }

    #[test]
    fn words_are_whole() {
        let code = "unsafe_code unsafe {} not_unsafe (unsafe)";
        assert_eq!(word_offsets(code, "unsafe").collect::<Vec<_>>(), [12, 34]);
    }

    #[test]
    fn lines_count_from_one() {
        assert_eq!([line_of("a\nb\nc", 0), line_of("a\nb\nc", 2), line_of("a\nb\nc", 4)], [1, 2, 3]);
    }
}
