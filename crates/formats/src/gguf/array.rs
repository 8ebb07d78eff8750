//! Arrays of GGUF metadata, each element type in its own vector; strings stand in one block of text.
//!
//! A vocabulary has 150,000 strings: one allocation each would cost more than all else in opening a model.

/// Strings, stored one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    /// Where each string ends in `text`.
    ends: Vec<usize>,
}

impl Strings {
    /// Takes `ends[i]`, the place in `bytes` where string `i` ends, in rising order, the last one at the end of `bytes`.
    /// Fails with the index of the first string that is not UTF-8.
    pub(super) fn from_parts(bytes: Vec<u8>, ends: Vec<usize>) -> Result<Self, usize> {
        match String::from_utf8(bytes) {
            // Valid as a whole does not mean valid in pieces: a cut within a character shows at the boundary.
            Ok(text) => match ends.iter().position(|&end| !text.is_char_boundary(end)) {
                None => Ok(Self { text, ends }),
                Some(index) => Err(index),
            },
            Err(error) => Err(ends.partition_point(|&end| end <= error.utf8_error().valid_up_to())),
        }
    }

    /// How many strings there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { *self.ends.get(index - 1)? };
        self.text.get(start..end)
    }

    /// All strings, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let string = self.text.get(start..end).unwrap_or_default();
            start = end;
            string
        })
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut all = Self::default();
        for string in strings {
            all.text.push_str(string.as_ref());
            all.ends.push(all.text.len());
        }
        all
    }
}

/// An array of GGUF metadata.
#[allow(missing_docs)] // the format's own type names
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Strings),
    Array(Vec<Array>),
}

impl Array {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' type, as GGUF tools spell it.
    pub fn element_type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
            Array::Bool(_) => "bool",
            Array::String(_) => "string",
            Array::Array(_) => "array",
        }
    }

    /// The integers of any integer array; `None` for another type. 128 bits hold every one of them.
    pub(super) fn integers(&self) -> Option<Box<dyn Iterator<Item = i128> + '_>> {
        Some(match self {
            Array::U8(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::I8(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::U16(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::I16(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::U32(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::I32(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::U64(v) => Box::new(v.iter().map(|&x| x.into())),
            Array::I64(v) => Box::new(v.iter().map(|&x| x.into())),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_keep_their_bounds() {
        let strings: Strings = ["", "ab", "", "ä"].into_iter().collect();
        assert_eq!(strings.iter().collect::<Vec<_>>(), ["", "ab", "", "ä"]);
        assert_eq!((strings.get(1), strings.get(3), strings.get(4)), (Some("ab"), Some("ä"), None));
        assert_eq!(Strings::from_parts(b"ab\xc3\xa4".to_vec(), vec![0, 2, 2, 4]), Ok(strings));
    }

    #[test]
    fn the_string_that_is_not_utf8_is_found() {
        assert_eq!(Strings::from_parts(b"ab\xffc".to_vec(), vec![1, 2, 4]), Err(2));
        assert_eq!(Strings::from_parts(b"ab\xff".to_vec(), vec![2, 2, 3]), Err(2));
        // A two-byte character torn between strings 1 and 2.
        assert_eq!(Strings::from_parts("aä".into(), vec![1, 2, 3]), Err(1));
    }
}
