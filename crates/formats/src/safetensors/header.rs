//! The JSON header of a safetensors file, read entry by entry.
//!
//! The library's own type for whole headers buffers every JSON number in a general value first, 49 times the header's
//! size at worst; here each entry goes straight into the library's type for one tensor. The library then checks the
//! whole as it does its own. Names that stand twice are refused: JSON readers disagree about which one counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use ::safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

/// No tensor of any framework has more axes.
const MAX_AXES: usize = 64;

/// Remarks and tensors, in the order of the text.
#[derive(Debug, Default)]
struct Entries {
    remarks: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Entries::default();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                entries.remarks = map.next_value::<Option<_>>()?.unwrap_or_default();
                continue;
            }
            let info: TensorInfo =
                map.next_value().map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
            entries.tensors.push((name, info));
        }
        Ok(entries)
    }
}

/// The checked header in `json`, or what is wrong with it.
pub(super) fn parse(json: &[u8]) -> Result<(BTreeMap<String, String>, Metadata), String> {
    let Entries { remarks, mut tensors } = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let mut names = HashSet::with_capacity(tensors.len());
    for (name, info) in &tensors {
        if !names.insert(name.as_str()) {
            return Err(format!("tensor `{name}`: found twice, expected once"));
        }
        check(name, info)?;
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None::<HashMap<String, String>>, tensors).map_err(|e| e.to_string())?;
    Ok((remarks, metadata))
}

/// That shape and bytes agree; the library checks it too, but does not say for which tensor.
fn check(name: &str, info: &TensorInfo) -> Result<(), String> {
    let (start, end) = info.data_offsets;
    if info.shape.len() > MAX_AXES {
        return Err(format!("tensor `{name}`: found {} axes, expected at most {MAX_AXES}", info.shape.len()));
    }
    let elements = info.shape.iter().try_fold(1_u128, |product, &axis| product.checked_mul(axis as u128));
    let expected = elements.and_then(|n| n.checked_mul(info.dtype.bitsize() as u128)).map(|bits| bits.div_ceil(8));
    match (end.checked_sub(start), expected) {
        (Some(found), Some(expected)) if found as u128 == expected => Ok(()),
        (Some(found), Some(expected)) => Err(format!(
            "tensor `{name}`: found {found} bytes, expected {expected} for shape {:?} of {:?}",
            info.shape, info.dtype
        )),
        (Some(_), None) => Err(format!("tensor `{name}`: found shape {:?}, expected one that fits", info.shape)),
        (None, _) => Err(format!("tensor `{name}`: found bytes {start} to {end}, expected the end after the start")),
    }
}
