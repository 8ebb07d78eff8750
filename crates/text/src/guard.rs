//! Keeps text from becoming control tokens on its way through a chat template.
//!
//! A sentinel, a character that occurs neither in the input nor in the template, is put into every string of the input at
//! places where a control token could come about. The template carries it along; in its output, control tokens with a
//! sentinel inside do not match, and the sentinel is dropped from the text between those that do.
//!
//! Where it is put: Qwen spells every control token `<|name|>`, and nothing else that templates look for contains a bar,
//! so a sentinel after every bar breaks such tokens however a template cuts, trims and joins its input. Control tokens of
//! another spelling are broken where they occur whole, and where a string ends with the start of one or starts with its
//! end. Strings without these stay as they are, so that the template's own tests and trimming see what they always saw.

use std::collections::HashSet;

use qwenkit_tensor::TokenId;
use serde_json::{Map, Value};

use crate::{Error, SpecialTokens, Tokenizer};

/// Variables that hold control tokens on purpose.
const CONTROL_VARIABLES: [&str; 5] = ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token"];

/// Knows the control tokens and the sentinel of one conversation.
pub(crate) struct Guard {
    sentinel: char,
    /// Control tokens, the longest first.
    special: Vec<(String, TokenId)>,
    /// Whether any control token has a bar that is not its last character.
    has_barred: bool,
}

/// A part of a rendered prompt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Special(TokenId),
    /// Text, sentinels included.
    Text(&'a str),
}

fn is_barred(token: &str) -> bool {
    token.char_indices().any(|(at, character)| character == '|' && at + 1 < token.len())
}

impl Guard {
    pub(crate) fn new(tokenizer: &Tokenizer, template: &str, input: &Map<String, Value>) -> Result<Guard, Error> {
        let mut special: Vec<(String, TokenId)> =
            tokenizer.special_tokens().map(|(token, id)| (token.to_owned(), id)).collect();
        special.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        let mut used = HashSet::new();
        note_rare(template, &mut used);
        special.iter().for_each(|(token, _)| note_rare(token, &mut used));
        for (name, value) in input {
            note_rare(name, &mut used);
            note_rare_in(value, &mut used);
        }
        let sentinel = candidates().find(|candidate| !used.contains(candidate)).ok_or(Error::ChatInput {
            what: "the characters of the conversation",
            found: "every private-use character there is".to_owned(),
            expected: "at least one unused",
        })?;
        let has_barred = special.iter().any(|(token, _)| is_barred(token));
        Ok(Guard { sentinel, special, has_barred })
    }

    /// Marks every string of the input, keys included.
    pub(crate) fn mark_all(&self, input: &mut Map<String, Value>) {
        for (name, value) in input.iter_mut() {
            if !CONTROL_VARIABLES.contains(&name.as_str()) {
                self.mark_value(value);
            }
        }
    }

    fn mark_value(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.mark(text) {
                    *text = marked;
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|value| self.mark_value(value)),
            Value::Object(map) => {
                map.values_mut().for_each(|value| self.mark_value(value));
                if map.keys().any(|key| self.mark(key).is_some()) {
                    let marked =
                        std::mem::take(map).into_iter().map(|(key, value)| (self.mark(&key).unwrap_or(key), value));
                    *map = marked.collect();
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// The string with its sentinels, or `None` where it needs none.
    fn mark(&self, text: &str) -> Option<String> {
        let breaks = self.breaks(text);
        if breaks.is_empty() {
            return None;
        }
        let mut marked = String::with_capacity(text.len() + breaks.len() * 4);
        let mut from = 0;
        for at in breaks {
            marked.push_str(text.get(from..at).unwrap_or_default());
            marked.push(self.sentinel);
            from = at;
        }
        marked.push_str(text.get(from..).unwrap_or_default());
        Some(marked)
    }

    /// Where sentinels go, as ascending byte offsets.
    fn breaks(&self, text: &str) -> Vec<usize> {
        let mut breaks = Vec::new();
        if self.has_barred {
            breaks.extend(text.match_indices('|').map(|(at, _)| at + 1));
        }
        for (token, _) in self.special.iter().filter(|(token, _)| !is_barred(token)) {
            let first = token.chars().next().map_or(0, char::len_utf8);
            let last = token.chars().next_back().map_or(0, char::len_utf8);
            let mut from = 0;
            while let Some(found) = text.get(from..).and_then(|rest| rest.find(token.as_str())) {
                breaks.push(from + found + first);
                from += found + first;
            }
            // Ordinary words start with the same letters as some token might; only punctuation is worth a break.
            let inner = || token.char_indices().map(|(at, _)| at).skip(1);
            if token.starts_with(|c: char| c.is_ascii_punctuation()) {
                let starts = inner().filter_map(|at| token.get(..at)).filter(|start| text.ends_with(start));
                breaks.extend(starts.map(|start| text.len() - start.len() + first));
            }
            if token.ends_with(|c: char| c.is_ascii_punctuation()) {
                let ends = inner().filter_map(|at| token.get(at..)).filter(|end| text.starts_with(end));
                breaks.extend(ends.map(|end| end.len() - last));
            }
        }
        breaks.sort_unstable();
        breaks.dedup();
        breaks
    }

    /// Control tokens and the text between them. Of several tokens at one place the longest counts.
    pub(crate) fn split<'a>(&self, prompt: &'a str) -> Vec<Piece<'a>> {
        let first_bytes: HashSet<u8> = self.special.iter().filter_map(|(token, _)| token.bytes().next()).collect();
        let mut pieces = Vec::new();
        let (mut from, mut at) = (0, 0);
        while let Some(&byte) = prompt.as_bytes().get(at) {
            let here = || prompt.as_bytes().get(at..).unwrap_or_default();
            let found = match first_bytes.contains(&byte) {
                true => self.special.iter().find(|(token, _)| here().starts_with(token.as_bytes())),
                false => None,
            };
            let Some((token, id)) = found else {
                at += 1;
                continue;
            };
            if let Some(text) = prompt.get(from..at).filter(|text| !text.is_empty()) {
                pieces.push(Piece::Text(text));
            }
            pieces.push(Piece::Special(*id));
            at += token.len();
            from = at;
        }
        if let Some(text) = prompt.get(from..).filter(|text| !text.is_empty()) {
            pieces.push(Piece::Text(text));
        }
        pieces
    }

    /// The ids of a prompt, whose control tokens are those without a sentinel inside.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<TokenId>, Error> {
        let mut ids = Vec::with_capacity(prompt.len() / 3);
        for piece in self.split(prompt) {
            match piece {
                Piece::Special(id) => ids.push(id),
                Piece::Text(text) => ids.extend(tokenizer.encode(&self.unmark(text), SpecialTokens::AsText)?),
            }
        }
        Ok(ids)
    }

    /// The text without its sentinels.
    pub(crate) fn unmark<'a>(&self, text: &'a str) -> std::borrow::Cow<'a, str> {
        match text.contains(self.sentinel) {
            true => text.replace(self.sentinel, "").into(),
            false => text.into(),
        }
    }
}

/// Characters a sentinel is chosen from: noncharacters, then those without a meaning of their own.
fn candidates() -> impl Iterator<Item = char> {
    ('\u{FDD0}'..='\u{FDEF}').chain('\u{F0000}'..='\u{10FFFF}')
}

fn note_rare(text: &str, used: &mut HashSet<char>) {
    used.extend(text.chars().filter(|&character| matches!(character, '\u{FDD0}'..='\u{FDEF}' | '\u{F0000}'..)));
}

fn note_rare_in(value: &Value, used: &mut HashSet<char>) {
    match value {
        Value::String(text) => note_rare(text, used),
        Value::Array(list) => list.iter().for_each(|value| note_rare_in(value, used)),
        Value::Object(map) => {
            for (key, value) in map {
                note_rare(key, used);
                note_rare_in(value, used);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
