//! The numbers of tensor types in GGUF files: those QwenKit reads, and the names of the others, for messages.
//!
//! The numbers are those of `enum ggml_type` in ggml.h; gaps are types that were removed.

use qwenkit_tensor::DType;

/// What QwenKit reads and writes, by number.
const SUPPORTED: [(u32, DType); 20] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (20, DType::IQ4_NL),
    (23, DType::IQ4_XS),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
];

/// Known to other tools only.
const UNSUPPORTED: [(u32, &str); 21] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

pub(super) fn from_id(id: u32) -> Option<DType> {
    SUPPORTED.iter().find(|(i, _)| *i == id).map(|(_, dtype)| *dtype)
}

pub(super) fn to_id(dtype: DType) -> Option<u32> {
    SUPPORTED.iter().find(|(_, d)| *d == dtype).map(|(id, _)| *id)
}

/// The name of a type that is not supported.
pub(super) fn unsupported_name(id: u32) -> String {
    let known = UNSUPPORTED.iter().find(|(i, _)| *i == id);
    known.map_or_else(|| format!("number {id} (unknown)"), |(_, name)| (*name).to_owned())
}

/// The supported types, for messages.
pub(super) fn supported_names() -> String {
    SUPPORTED.map(|(_, dtype)| dtype.name()).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_go_both_ways() {
        let mut ids: Vec<u32> = SUPPORTED.iter().map(|s| s.0).chain(UNSUPPORTED.iter().map(|u| u.0)).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..=40).collect::<Vec<u32>>());
        for (id, dtype) in SUPPORTED {
            assert_eq!((from_id(id), to_id(dtype)), (Some(dtype), Some(id)));
        }
        assert_eq!((from_id(16), unsupported_name(16)), (None, "IQ2_XXS".to_owned()));
        assert_eq!(unsupported_name(99), "number 99 (unknown)");
        assert_eq!(to_id(DType::F8_E4M3), None);
    }
}
