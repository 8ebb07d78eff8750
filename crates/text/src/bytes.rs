//! The byte alphabet of byte-level BPE: every byte has one printable character that stands for it.
//!
//! Printable Latin-1 bytes stand for themselves; the other 68 take the characters from U+0100 on, in byte order. This is
//! GPT-2's table, which all Qwen vocabularies are written in.

/// Bytes that stand for themselves.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The bytes that do not stand for themselves, in order: the character U+0100 + i means `SHIFTED[i]`.
const SHIFTED: [u8; 68] = {
    let mut shifted = [0; 68];
    let mut used = 0;
    let mut byte = 0;
    while byte < 256 {
        if !is_plain(byte as u8) {
            shifted[used] = byte as u8;
            used += 1;
        }
        byte += 1;
    }
    shifted
};

/// The byte that a character of the alphabet stands for; `None` for characters outside of it.
pub(crate) fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => is_plain(byte).then_some(byte),
        Err(_) => SHIFTED.get(usize::try_from(code - 0x100).ok()?).copied(),
    }
}

/// The character that stands for a byte.
pub(crate) fn char_of(byte: u8) -> char {
    if is_plain(byte) {
        return char::from(byte);
    }
    let index = SHIFTED.iter().position(|&b| b == byte).unwrap_or(0);
    char::from_u32(0x100 + index as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Appends the bytes a vocabulary entry stands for. An entry with a character outside the alphabet is meant as the text
/// it shows, as in Hugging Face's decoder.
pub(crate) fn push_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back_from_its_character() {
        for byte in 0..=255u8 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        let distinct: std::collections::HashSet<char> = (0..=255).map(char_of).collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn known_characters() {
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(char_of(0), '\u{100}');
        assert_eq!(char_of(0xAD), '\u{143}');
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('中'), None);
    }

    #[test]
    fn entries_outside_the_alphabet_are_text() {
        let mut out = b"x".to_vec();
        push_bytes("a b", &mut out);
        push_bytes("é", &mut out);
        assert_eq!(out, b"xa b\xE9");
    }
}
