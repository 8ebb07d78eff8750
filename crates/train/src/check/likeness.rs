//! Texts that are nearly the same, found without comparing each with each.
//!
//! How: a text's runs of five characters (case, signs and spaces aside) make a set; 64 hash functions each keep the least of its
//! members (Broder 1997: the share of functions that agree estimates the share of members that two sets have in common). Texts that agree in
//! four functions in a row, at one of sixteen places, are compared in all 64.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::data::hash::{Hash, mixed};

/// Hash functions.
const FUNCTIONS: usize = 64;
/// Functions that have to agree in a row.
const ROW: usize = 4;
/// Characters of a member.
const MEMBER_CHARS: usize = 5;
/// Members of a text that are looked at; what two long texts share shows in their first fifty pages.
const MEMBERS_MAX: usize = 100_000;

/// The text seen earlier that a text is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Like {
    /// Its number.
    pub(crate) earlier: usize,
    /// The share of the functions that agree: 1 for texts with the same members.
    pub(crate) likeness: f32,
}

/// Texts seen so far.
pub(crate) struct Texts {
    least: f32,
    signatures: Vec<[u16; FUNCTIONS]>,
    /// The first text that had a row of values at a place. Later ones like it are like it too, as a rule, and a table of all would outgrow
    /// the texts.
    rows: HashMap<u64, u32>,
}

impl Texts {
    /// Texts are alike whose likeness is at least `least`.
    pub(crate) fn new(least: f32) -> Texts {
        Texts { least, signatures: Vec::new(), rows: HashMap::new() }
    }

    /// Adds a text, the next number, and says which earlier one it is most like.
    pub(crate) fn add(&mut self, text: &str) -> Option<Like> {
        let signature = signature(text);
        let number = self.signatures.len();
        self.signatures.push(signature.unwrap_or([0; FUNCTIONS]));
        let signature = signature?;
        let mut best: Option<Like> = None;
        for (place, row) in signature.chunks(ROW).enumerate() {
            let mut key = Hash::new();
            key.add(place as u64);
            row.iter().for_each(|&value| key.add(u64::from(value)));
            let earlier = match self.rows.entry(key.finish()) {
                Entry::Occupied(first) => *first.get() as usize,
                Entry::Vacant(vacant) => {
                    vacant.insert(u32::try_from(number).unwrap_or(u32::MAX));
                    continue;
                }
            };
            let Some(other) = self.signatures.get(earlier) else { continue };
            let agreeing = signature.iter().zip(other).filter(|(one, other)| one == other).count();
            let likeness = agreeing as f32 / FUNCTIONS as f32;
            if likeness >= self.least && best.is_none_or(|best| likeness > best.likeness) {
                best = Some(Like { earlier, likeness });
            }
        }
        best
    }
}

/// The least value of each function; nothing for a text with fewer than three members.
fn signature(text: &str) -> Option<[u16; FUNCTIONS]> {
    let plain: Vec<char> =
        text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).take(MEMBERS_MAX).collect();
    if plain.len() < MEMBER_CHARS + 2 {
        return None;
    }
    let mut least = [u64::MAX; FUNCTIONS];
    for member in plain.windows(MEMBER_CHARS) {
        let hash = member.iter().fold(Hash::new(), |mut hash, &character| {
            hash.add(u64::from(u32::from(character)));
            hash
        });
        let mut value = hash.finish();
        for least in &mut least {
            // A function is the one before, mixed once more.
            value = mixed(value);
            *least = value.min(*least);
        }
    }
    // Two of 65,536 values agree by chance once in as many pairs.
    Some(least.map(|value| (mixed(value) >> 48) as u16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_differ_in_little_are_alike_and_others_are_not() {
        let mut texts = Texts::new(0.7);
        let first = "I am still waiting for my new card, it has been more than two weeks since I ordered it from you";
        assert_eq!(texts.add(first), None);
        assert_eq!(texts.add("Why was I charged a fee for withdrawing money abroad yesterday evening?"), None);
        let near = texts.add(&first.to_uppercase().replace("TWO", "three")).expect("like the first");
        assert!(near.earlier == 0 && near.likeness > 0.7, "{near:?}");
        let same = texts.add(&first.replace(", ", " - ")).expect("the same letters");
        assert!(same.likeness == 1.0, "{same:?}");
        assert_eq!(texts.add("ok"), None);
        assert_eq!(texts.add("ok"), None);
        assert_eq!(texts.add(""), None);
    }

    #[test]
    fn likeness_is_about_the_share_of_common_members() {
        let word = |at: usize| format!("{:08x}", mixed(at as u64) as u32);
        let text = |from: usize, to: usize| (from..to).map(word).collect::<Vec<_>>().join(" ");
        let mut texts = Texts::new(0.5);
        texts.add(&text(0, 900));
        // 800 of 1,000 words in common.
        let like = texts.add(&text(100, 1000)).expect("alike");
        assert!((0.65..0.95).contains(&like.likeness), "{like:?}");
        assert_eq!(texts.add(&text(2000, 3000)), None);
    }
}
