//! One value of GGUF metadata, and the numbers by which the format tells value types apart.

use super::array::{Array, Strings};

/// A metadata value.
#[allow(missing_docs)] // the format's own type names
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

impl Value {
    /// The integer in any integer type; `None` for another type.
    pub(super) fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => x.into(),
            _ => return None,
        })
    }

    /// What stands here, for messages: the type, and the value itself where it is short.
    pub fn describe(&self) -> String {
        match self {
            Value::Array(array) => format!("an array of {} {}", array.len(), array.element_type_name()),
            Value::String(text) if text.chars().count() > 40 => format!("a string of {} bytes", text.len()),
            Value::String(text) => format!("the string {text:?}"),
            Value::Bool(x) => format!("the bool {x}"),
            Value::F32(x) => format!("the f32 {x}"),
            Value::F64(x) => format!("the f64 {x}"),
            Value::U8(_) | Value::U16(_) | Value::U32(_) | Value::U64(_) => {
                format!("the unsigned integer {}", self.integer().unwrap_or_default())
            }
            Value::I8(_) | Value::I16(_) | Value::I32(_) | Value::I64(_) => {
                format!("the signed integer {}", self.integer().unwrap_or_default())
            }
        }
    }
}

macro_rules! value_from {
    ($($variant:ident: $type:ty),*) => {
        $(impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Value::$variant(value)
            }
        })*
    };
}
value_from!(U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, F32: f32, U64: u64, I64: i64, F64: f64,
    Bool: bool, String: String, Array: Array);

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.to_owned())
    }
}

impl From<Strings> for Value {
    fn from(value: Strings) -> Self {
        Value::Array(Array::String(value))
    }
}

/// The numbers of value types in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// In the order of their numbers, 0 to 12.
    const ALL: [ValueType; 13] = {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
    };

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    pub(super) fn id(self) -> u32 {
        self as u32
    }

    /// The fewest bytes that an element takes: a string at least its length, an array its type and length.
    pub(super) fn min_bytes(self) -> u64 {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | String => 8,
            Array => 12,
        }
    }

    pub(super) fn of(value: &Value) -> Self {
        match value {
            Value::U8(_) => Self::U8,
            Value::I8(_) => Self::I8,
            Value::U16(_) => Self::U16,
            Value::I16(_) => Self::I16,
            Value::U32(_) => Self::U32,
            Value::I32(_) => Self::I32,
            Value::F32(_) => Self::F32,
            Value::U64(_) => Self::U64,
            Value::I64(_) => Self::I64,
            Value::F64(_) => Self::F64,
            Value::Bool(_) => Self::Bool,
            Value::String(_) => Self::String,
            Value::Array(_) => Self::Array,
        }
    }

    pub(super) fn of_elements(array: &Array) -> Self {
        match array {
            Array::U8(_) => Self::U8,
            Array::I8(_) => Self::I8,
            Array::U16(_) => Self::U16,
            Array::I16(_) => Self::I16,
            Array::U32(_) => Self::U32,
            Array::I32(_) => Self::I32,
            Array::F32(_) => Self::F32,
            Array::U64(_) => Self::U64,
            Array::I64(_) => Self::I64,
            Array::F64(_) => Self::F64,
            Array::Bool(_) => Self::Bool,
            Array::String(_) => Self::String,
            Array::Array(_) => Self::Array,
        }
    }
}
