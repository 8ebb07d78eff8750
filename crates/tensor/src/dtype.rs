//! Element types of stored tensors, plain and block-quantised, with their sizes in bytes.
//!
//! A quantised type stores `block_len` consecutive elements of a row in `block_bytes` bytes; a plain type is a block of
//! one. Only sizes and names stand here: what the bits mean is `qwenkit-kernels`' business.

use std::fmt;

/// How the elements of a stored tensor are encoded. Quantised names are those of the GGUF format.
#[allow(non_camel_case_types, missing_docs)] // the formats' own names: they are searched for, and say all
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    F8_E4M3,
    F8_E5M2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

impl DType {
    /// Every type, in declaration order.
    pub const ALL: [DType; 27] = {
        use DType::*;
        [
            F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U64, U32, U16, U8, Bool, Q4_0, Q4_1, Q5_0, Q5_1,
            Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
        ]
    };

    /// The type's name as files and tools spell it.
    pub fn name(self) -> &'static str {
        use DType::*;
        match self {
            F64 => "F64",
            F32 => "F32",
            F16 => "F16",
            BF16 => "BF16",
            F8_E4M3 => "F8_E4M3",
            F8_E5M2 => "F8_E5M2",
            I64 => "I64",
            I32 => "I32",
            I16 => "I16",
            I8 => "I8",
            U64 => "U64",
            U32 => "U32",
            U16 => "U16",
            U8 => "U8",
            Bool => "BOOL",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2_K => "Q2_K",
            Q3_K => "Q3_K",
            Q4_K => "Q4_K",
            Q5_K => "Q5_K",
            Q6_K => "Q6_K",
            IQ4_NL => "IQ4_NL",
            IQ4_XS => "IQ4_XS",
        }
    }

    /// Elements in one block: 1 for plain types, 32 or 256 for quantised ones.
    pub const fn block_len(self) -> usize {
        use DType::*;
        match self {
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_XS => 256,
            _ => 1,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        use DType::*;
        match self {
            F64 | I64 | U64 => 8,
            F32 | I32 | U32 => 4,
            F16 | BF16 | I16 | U16 => 2,
            F8_E4M3 | F8_E5M2 | I8 | U8 | Bool => 1,
            Q4_0 | IQ4_NL => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
            IQ4_XS => 136,
        }
    }

    /// Whether elements share scales in blocks.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of a row of `elements`; `None` if it is no whole number of blocks, or the size does not fit.
    pub fn row_bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor of `shape` (outermost axis first, rows along the last); `None` if a row is no whole number of
    /// blocks, or the size does not fit.
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (row, outer) = shape.split_last().map_or((1, &[][..]), |(row, outer)| (*row, outer));
        outer.iter().try_fold(self.row_bytes(row)?, |bytes, &n| bytes.checked_mul(n))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_all_is_complete() {
        let mut names: Vec<_> = DType::ALL.iter().map(|t| t.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DType::ALL.len());
        assert_eq!(DType::ALL.last(), Some(&DType::IQ4_XS));
        assert_eq!(DType::IQ4_XS as usize + 1, DType::ALL.len());
    }

    #[test]
    fn sizes_refuse_broken_rows_and_overflow() {
        assert_eq!(DType::Q4_K.tensor_bytes(&[3, 512]), Some(3 * 2 * 144));
        assert_eq!(DType::Q4_K.tensor_bytes(&[3, 100]), None);
        assert_eq!(DType::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(DType::F32.tensor_bytes(&[usize::MAX, 4]), None);
    }
}
