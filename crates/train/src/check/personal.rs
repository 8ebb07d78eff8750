//! Personal data and secrets in texts: what looks like an e-mail address, a phone number, a bank account, a card, an internet address or a
//! key to some service.
//!
//! Contract: numbers with a checksum are found only where it is right; reserved and private addresses are nobody's. This finds what has a form;
//! names and street addresses have none, so nothing found does not mean that nothing is there.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use serde::Serialize;

/// A kind of personal data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An e-mail address.
    Email,
    /// A phone number.
    Phone,
    /// An international bank account number with a right checksum.
    Iban,
    /// The number of a payment card with a right checksum.
    Card,
    /// A public internet address.
    InternetAddress,
    /// A key, a token or a private key of some service.
    Secret,
}

impl Kind {
    /// The kind in words, for so many.
    pub fn name(self, count: usize) -> &'static str {
        let is_one = count == 1;
        match self {
            Kind::Email if is_one => "e-mail address",
            Kind::Email => "e-mail addresses",
            Kind::Phone if is_one => "phone number",
            Kind::Phone => "phone numbers",
            Kind::Iban if is_one => "bank account (IBAN)",
            Kind::Iban => "bank accounts (IBAN)",
            Kind::Card if is_one => "card number",
            Kind::Card => "card numbers",
            Kind::InternetAddress if is_one => "internet address",
            Kind::InternetAddress => "internet addresses",
            Kind::Secret if is_one => "key or secret",
            Kind::Secret => "keys or secrets",
        }
    }
}

/// Beginnings of keys, and the characters that have to follow.
const SECRETS: [(&str, usize); 10] = [
    ("AKIA", 16),
    ("ghp_", 36),
    ("github_pat_", 22),
    ("glpat-", 20),
    ("hf_", 34),
    ("sk-ant-", 32),
    ("sk-proj-", 32),
    ("sk_live_", 24),
    ("xoxb-", 24),
    ("-----BEGIN ", 0),
];

/// What a text holds, by position; nothing is found twice at one place.
pub fn find(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found: Vec<(Kind, Range<usize>)> = Vec::new();
    let finders = [secrets, emails, ibans, internet_addresses, numbers];
    for finder in finders {
        for (kind, range) in finder(text) {
            let overlaps = |(_, other): &(Kind, Range<usize>)| other.start < range.end && range.start < other.end;
            if !found.iter().any(overlaps) {
                found.push((kind, range));
            }
        }
    }
    found.sort_by_key(|(_, range)| range.start);
    found
}

/// The end of the characters from `at` on that fit.
fn run(text: &str, at: usize, fits: impl Fn(char) -> bool) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    at + rest.find(|c| !fits(c)).unwrap_or(rest.len())
}

fn before(text: &str, at: usize) -> Option<char> {
    text.get(..at)?.chars().next_back()
}

fn after(text: &str, at: usize) -> Option<char> {
    text.get(at..)?.chars().next()
}

fn is_word(character: Option<char>) -> bool {
    character.is_some_and(char::is_alphanumeric)
}

fn secrets(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found = Vec::new();
    for (start, least) in SECRETS {
        for (at, _) in text.match_indices(start) {
            let end = run(text, at + start.len(), |c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
            let is_key = match least {
                0 => text
                    .get(at..)
                    .is_some_and(|rest| rest.lines().next().is_some_and(|l| l.contains("PRIVATE KEY-----"))),
                _ => !is_word(before(text, at)) && end - at - start.len() >= least,
            };
            if is_key {
                found.push((Kind::Secret, at..end));
            }
        }
    }
    found
}

fn emails(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices('@') {
        let is_local = |c: char| c.is_ascii_alphanumeric() || ".!#$%&'*+/=?^_`{|}~-".contains(c);
        let local = text.get(..at).unwrap_or_default();
        let name = local.rsplit(|c: char| !is_local(c)).next().unwrap_or_default();
        // Quotes and signs in front of an address are none of it.
        let start = at - name.trim_start_matches(['\'', '`', '{', '|', '/', '=', '.']).len();
        let end = run(text, at + 1, |c| c.is_ascii_alphanumeric() || c == '.' || c == '-');
        let domain = text.get(at + 1..end).unwrap_or_default().trim_end_matches(['.', '-']);
        let end = at + 1 + domain.len();
        let lower = domain.to_ascii_lowercase();
        let Some((rest, top)) = lower.rsplit_once('.') else { continue };
        let is_reserved = ["example", "test", "invalid", "localhost"].contains(&top)
            || rest == "example"
            || rest.ends_with(".example");
        let is_domain =
            top.len() >= 2 && top.bytes().all(|b| b.is_ascii_alphabetic()) && !rest.is_empty() && !rest.contains("..");
        if start < at && is_domain && !is_reserved && !rest.starts_with(['.', '-']) {
            found.push((Kind::Email, start..end));
        }
    }
    found
}

fn ibans(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found = Vec::new();
    let bytes = text.as_bytes();
    for at in 0..bytes.len() {
        let begins = matches!(bytes.get(at..at + 4), Some([a, b, c, d])
            if a.is_ascii_uppercase() && b.is_ascii_uppercase() && c.is_ascii_digit() && d.is_ascii_digit());
        if !begins || is_word(before(text, at)) {
            continue;
        }
        // Groups of four with a space between, or no spaces.
        let (mut symbols, mut end, mut whole) = (String::new(), at, None);
        while let Some(&byte) = bytes.get(end) {
            match byte {
                b'0'..=b'9' | b'A'..=b'Z' => symbols.push(char::from(byte)),
                b' ' if symbols.len().is_multiple_of(4)
                    && bytes.get(end + 1).is_some_and(u8::is_ascii_alphanumeric) => {}
                _ => break,
            }
            end += 1;
            if symbols.len() >= 15 && is_iban(&symbols) && !is_word(after(text, end)) {
                whole = Some(end);
            }
            if symbols.len() == 34 {
                break;
            }
        }
        found.extend(whole.map(|end| (Kind::Iban, at..end)));
    }
    found
}

/// ISO 13616: the first four symbols at the end, letters as 10 to 35, the number leaves 1 when divided by 97.
fn is_iban(symbols: &str) -> bool {
    let (start, rest) = symbols.split_at_checked(4).unwrap_or_default();
    let left = rest.chars().chain(start.chars()).fold(0_u32, |left, symbol| match symbol.to_digit(36) {
        Some(value @ 10..) => (left * 100 + value) % 97,
        Some(value) => (left * 10 + value) % 97,
        None => 0,
    });
    left == 1
}

fn internet_addresses(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 0;
    let is_part = |c: char| c.is_ascii_hexdigit() || c == '.' || c == ':';
    while let Some(start) = text.get(at..).and_then(|rest| rest.find(is_part)).map(|offset| at + offset) {
        let end = run(text, start, is_part);
        at = end;
        if is_word(before(text, start)) || is_word(after(text, end)) {
            continue;
        }
        let shown = text.get(start..end).unwrap_or_default().trim_end_matches(['.', ':']);
        let is_version = text.get(..start).is_some_and(|head| head.trim_end().to_lowercase().ends_with("version"));
        // A port behind the address.
        let alone = shown.split_once(':').map_or(shown, |(address, _)| address);
        if let Ok(address) = alone.parse::<Ipv4Addr>() {
            if is_public(address) && !is_version {
                found.push((Kind::InternetAddress, start..start + alone.len()));
            }
        } else if let Ok(address) = shown.parse::<Ipv6Addr>() {
            let [first, second, ..] = address.segments();
            let is_documentation = first == 0x2001 && second == 0xDB8;
            if (0x2000..0x4000).contains(&first) && !is_documentation {
                found.push((Kind::InternetAddress, start..start + shown.len()));
            }
        }
    }
    found
}

fn is_public(address: Ipv4Addr) -> bool {
    let [first, second, ..] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_documentation()
        || address.is_multicast()
        || first == 0
        || first >= 240
        || (first == 100 && (64..128).contains(&second)))
}

/// Cards and phone numbers: digits with separators between them.
fn numbers(text: &str) -> Vec<(Kind, Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = text
        .get(at..)
        .and_then(|r| r.find(|c: char| c.is_ascii_digit() || c == '+' || c == '('))
        .map(|offset| at + offset)
    {
        let end = run(text, start + 1, |c| c.is_ascii_digit() || " -./()".contains(c));
        let shown = text.get(start..end).unwrap_or_default();
        let shown = shown.trim_end_matches(|c: char| !c.is_ascii_digit());
        let end = start + shown.len().max(1);
        at = end;
        if is_word(before(text, start))
            || is_word(after(text, end))
            || matches!(before(text, start), Some('.' | '-' | '_' | '$' | '€' | '£'))
        {
            continue;
        }
        let digits: String = shown.chars().filter(char::is_ascii_digit).collect();
        if is_card(shown, &digits) {
            found.push((Kind::Card, start..end));
        } else if is_phone(shown, &digits) {
            found.push((Kind::Phone, start..end));
        }
    }
    found
}

fn is_card(shown: &str, digits: &str) -> bool {
    let is_plain = shown.chars().all(|c| c.is_ascii_digit() || c == ' ' || c == '-');
    // Mastercard's newer numbers begin with 2221 to 2720; the others with 3 (American Express, JCB, Diners), 4, 5 and 6.
    let begins = digits
        .get(..4)
        .and_then(|start| start.parse().ok())
        .is_some_and(|start: u32| (2221..=2720).contains(&start) || (3000..7000).contains(&start));
    let first = digits.chars().next();
    let varies = digits.chars().any(|digit| Some(digit) != first);
    is_plain && begins && varies && (13..=19).contains(&digits.len()) && is_luhn(digits)
}

/// Luhn's checksum (ISO 7812): every second digit from the right doubled, the digits' sum a multiple of ten.
fn is_luhn(digits: &str) -> bool {
    let sum: u32 = digits
        .bytes()
        .rev()
        .enumerate()
        .map(|(at, digit)| {
            let value = u32::from(digit.wrapping_sub(b'0')) * if !at.is_multiple_of(2) { 2 } else { 1 };
            value / 10 + value % 10
        })
        .sum();
    sum.is_multiple_of(10)
}

fn is_phone(shown: &str, digits: &str) -> bool {
    let groups: Vec<&str> = shown.split(|c: char| !c.is_ascii_digit()).filter(|group| !group.is_empty()).collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let has_year = groups.iter().any(|group| group.len() == 4 && (group.starts_with("19") || group.starts_with("20")));
    if shown.starts_with('+') {
        return (8..=15).contains(&digits.len()) && groups.first().is_some_and(|group| !group.starts_with('0'));
    }
    // The North American form, with or without its country code.
    let american = match lengths.as_slice() {
        [3, 3, 4] => groups.first(),
        [1, 3, 3, 4] if digits.starts_with('1') => groups.get(1),
        _ => None,
    };
    if american.is_some_and(|area| area.starts_with(|c| ('2'..='9').contains(&c))) && !shown.contains('/') {
        return true;
    }
    // A trunk code: a zero, an area, the number.
    let separators = shown.chars().filter(|c| !c.is_ascii_digit());
    let is_plain = separators.clone().all(|c| " -/()".contains(c)) && separators.filter(|&c| c == '/').count() <= 1;
    let area = groups.first().is_some_and(|group| group.starts_with('0') && (3..=6).contains(&group.len()));
    is_plain && area && groups.len() >= 2 && (9..=12).contains(&digits.len()) && !has_year
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<(Kind, &str)> {
        find(text).into_iter().map(|(kind, range)| (kind, text.get(range).expect("on characters"))).collect()
    }

    #[test]
    fn what_has_the_form_of_personal_data_is_found_with_its_place() {
        for (text, kind, shown) in [
            ("Mail to 'jo.doe+x@mail.shop.de'.", Kind::Email, "jo.doe+x@mail.shop.de"),
            ("ünïcode→a@b.co…", Kind::Email, "a@b.co"),
            ("Call +49 (30) 1234-5678 today", Kind::Phone, "+49 (30) 1234-5678"),
            ("Call (415) 555-2671!", Kind::Phone, "(415) 555-2671"),
            ("tel 1-415-555-2671", Kind::Phone, "1-415-555-2671"),
            ("tel 030 / 123 45 67 8", Kind::Phone, "030 / 123 45 67 8"),
            ("IBAN DE89 3704 0044 0532 0130 00, thanks", Kind::Iban, "DE89 3704 0044 0532 0130 00"),
            ("GB82WEST12345698765432", Kind::Iban, "GB82WEST12345698765432"),
            ("card 4111 1111 1111 1111.", Kind::Card, "4111 1111 1111 1111"),
            ("5500-0000-0000-0004", Kind::Card, "5500-0000-0000-0004"),
            ("from 8.8.8.8:53", Kind::InternetAddress, "8.8.8.8"),
            ("at 2a00:1450:4001:830::200e.", Kind::InternetAddress, "2a00:1450:4001:830::200e"),
            ("key AKIAABCDEFGHIJKLMNOP", Kind::Secret, "AKIAABCDEFGHIJKLMNOP"),
        ] {
            assert_eq!(kinds(text), [(kind, shown)], "{text}");
        }
        let key = "-----BEGIN RSA PRIVATE KEY-----\nMIIE";
        assert_eq!(find(key).first().map(|found| found.0), Some(Kind::Secret));
    }

    #[test]
    fn what_only_looks_like_it_is_left_alone() {
        for text in [
            "someone@example.com and a@b and @user and x@.de",
            "on 01-02-2023 10, 2023-01-02, 12/05/2020 and 1.000.000",
            "card 4111 1111 1111 1112",
            "IBAN DE89 3704 0044 0532 0130 01",
            "at 10.0.0.1, 127.0.0.1, 192.168.1.1, 192.0.2.7, version 1.2.3.4 and 300.1.1.1",
            "std::vec::Vec, fe80::1, 12:30:45, 2001:db8::1",
            "x+12345678 and 1234567890 and 3.14159265358979",
            "0000 0000 0000 0000",
            "order 123-456-78",
            "",
        ] {
            assert_eq!(kinds(text), [], "{text}");
        }
    }

    #[test]
    fn several_of_a_text_come_in_order_and_any_text_is_read() {
        let found = kinds("a@b.de, +4930123456, b@c.de");
        assert_eq!(found.iter().map(|found| found.0).collect::<Vec<_>>(), [Kind::Email, Kind::Phone, Kind::Email]);
        for text in ["@", "+", "(", "é@é.éé", "DE8", "AB12", "+()", "((((((1", "::::", "....", "12€34@x.yz"] {
            find(text);
        }
    }
}
