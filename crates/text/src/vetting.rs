//! What a template must not be, judged from its text before it is compiled.
//!
//! The engine's budget stops loops; it does not stop expressions so long that compiling them recurses too deep, nor
//! values that contain themselves, which take forever to print. Only namespaces can be changed after they were made, so
//! a namespace that is never handed around as a value cannot end up inside itself: `namespace(...)` may only stand at
//! `{% set name = namespace(...) %}`, and `name` only before a dot. Running templates is not here.

use std::collections::HashSet;

/// Longest template; the longest of Qwen's is 8 KB.
const SOURCE_MAX_BYTES: usize = 256 << 10;
/// Most words and signs in one tag, strings counted as one each.
const TAG_MAX_WORDS: usize = 2000;

/// A fault and the byte where it stands.
pub(crate) struct Fault {
    pub(crate) at: usize,
    pub(crate) problem: String,
}

/// A word or sign of a tag.
#[derive(Clone, Copy)]
struct Word<'a> {
    at: usize,
    text: &'a str,
}

/// Refuses templates that could not be run safely.
pub(crate) fn check(source: &str) -> Result<(), Fault> {
    if source.len() > SOURCE_MAX_BYTES {
        let problem = format!("the template has {} bytes; at most {SOURCE_MAX_BYTES} are accepted", source.len());
        return Err(Fault { at: 0, problem });
    }
    let tags = tags(source);
    if let Some(first) = tags.iter().find(|tag| tag.len() > TAG_MAX_WORDS).and_then(|tag| tag.first()) {
        let problem = format!("a tag with more than {TAG_MAX_WORDS} words and signs");
        return Err(Fault { at: first.at, problem });
    }
    let names: HashSet<&str> = tags.iter().filter_map(|tag| namespace_set(tag)).collect();
    for tag in &tags {
        let set = namespace_set(tag).is_some();
        for (index, word) in tag.iter().enumerate() {
            let next = tag.get(index + 1).map_or("", |next| next.text);
            let previous = index.checked_sub(1).and_then(|index| tag.get(index)).map_or("", |word| word.text);
            let is_definition = set && (index == 1 || index == 3);
            let is_attribute = previous == "." || next == "=" && index > 1;
            let is_handed_around = word.text == "namespace" || names.contains(word.text) && next != ".";
            if is_handed_around && !is_definition && !is_attribute {
                let problem = format!(
                    "`{}` is used as a value; a namespace can only be made by `set name = namespace(...)` and used as \
                     `name.attribute`",
                    word.text
                );
                return Err(Fault { at: word.at, problem });
            }
        }
    }
    Ok(())
}

/// The name of a tag `set NAME = namespace(`.
fn namespace_set<'a>(tag: &[Word<'a>]) -> Option<&'a str> {
    match tag {
        [set, name, equals, namespace, open, ..]
            if set.text == "set" && equals.text == "=" && namespace.text == "namespace" && open.text == "(" =>
        {
            Some(name.text)
        }
        _ => None,
    }
}

/// The words of every `{{ }}` and `{% %}`. Text inside of raw blocks is taken for tags as well, which only makes the
/// check stricter.
fn tags(source: &str) -> Vec<Vec<Word<'_>>> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(found) = source.get(at..).and_then(|rest| rest.find('{')) {
        at += found + 1;
        match source.as_bytes().get(at) {
            Some(b'#') => at += source.get(at..).and_then(|rest| rest.find("#}")).map_or(source.len(), |end| end + 2),
            Some(b'{') => tags.push(words(source, &mut at, "}}")),
            Some(b'%') => tags.push(words(source, &mut at, "%}")),
            _ => {}
        }
    }
    tags
}

/// The words up to the end of a tag; `at` moves from its second character to behind it.
fn words<'a>(source: &'a str, at: &mut usize, close: &str) -> Vec<Word<'a>> {
    let mut words = Vec::new();
    let mut nesting = 0_usize;
    *at += 1;
    if let Some(b'-' | b'+') = source.as_bytes().get(*at) {
        *at += 1;
    }
    while let Some(rest) = source.get(*at..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with(close) && (nesting == 0 || close == "%}") {
            *at += close.len();
            break;
        }
        let first = rest.chars().next().unwrap_or_default();
        let is_word = |character: char| character == '_' || character.is_alphanumeric();
        let length = match first {
            '"' | '\'' => string_length(rest, first),
            _ if is_word(first) => rest.find(|character| !is_word(character)).unwrap_or(rest.len()),
            '=' if rest.starts_with("==") => 2,
            _ => first.len_utf8(),
        };
        match first {
            '{' => nesting += 1,
            '}' => nesting = nesting.saturating_sub(1),
            _ => {}
        }
        if !first.is_whitespace() {
            words.push(Word { at: *at, text: rest.get(..length).unwrap_or_default() });
        }
        *at += length;
    }
    words
}

/// The length of the string literal that `rest` starts with.
fn string_length(rest: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        if character == quote && !is_escaped {
            return at + 1;
        }
        is_escaped = character == '\\' && !is_escaped;
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn ordinary_use_of_namespaces_passes() {
        for source in [
            "{%- set ns = namespace(a=1, b=x|length - 1) %}{% if ns.a and not ns.b %}{% set ns.a = ns.a + 1 %}{% endif %}",
            "{{ 'ns' ~ {'ns': 1} }} ns {# ns #} {{ x.ns }}",
            "{% set ns = namespace(ns=1) %}{{ '}}' ~ ns.ns }}",
        ] {
            assert!(check(source).is_ok(), "{source}");
        }
    }

    #[test]
    fn namespaces_as_values_are_refused() {
        for source in [
            "{% set ns = namespace(a=1) %}{% set ns.a = ns %}",
            "{% set ns = namespace(a=1) %}{% set ns.a = [ns] %}",
            "{% set ns = namespace(a=1) %}{% for y in [ns] %}{% set ns.a = y %}{% endfor %}",
            "{% set ns = namespace(a=1) %}{{ f(ns) }}",
            "{% set make = namespace %}",
            "{% for y in [namespace(a=1)] %}{% set y.a = y %}{% endfor %}",
            "{% set ns = namespace(a=1) if t else 1 %}{{ {'a': 1}['a'] ~ ns }}",
        ] {
            assert!(check(source).is_err(), "{source}");
        }
    }
}
