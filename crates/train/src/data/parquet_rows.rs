//! Rows of a Parquet file as objects, each with its columns' names; behind the feature `parquet`.
//!
//! Contract: numbers of a column that a data set's own description calls labels become their names. The library reads the files of data sets; it is
//! no defence against files that are made to harm: one that makes it panic is told as broken, but it trusts the lengths that stand in a file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value, json};

use super::Problem;

/// Hands each row, with its number from 1, to `visit`. Columns without a value are left out of a row.
///
/// # Errors
/// When the file cannot be read, or `visit` fails.
pub(crate) fn visit_rows(
    path: &Path,
    visit: &mut dyn FnMut(usize, Map<String, Value>) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let file = File::open(path).map_err(Problem::Unreadable)?;
    let reader = guarded(|| SerializedFileReader::new(file).map_err(broken))?;
    let names = label_names(&reader);
    let mut rows = guarded(|| reader.get_row_iter(None).map_err(broken))?;
    let mut number = 0;
    while let Some(row) = guarded(|| rows.next().transpose().map_err(broken))? {
        number += 1;
        visit(number, object(row, &names))?;
    }
    Ok(())
}

fn broken(error: impl std::fmt::Display) -> Problem {
    Problem::Parquet { problem: error.to_string() }
}

/// What the library does, with its panics as errors.
fn guarded<T>(work: impl FnOnce() -> Result<T, Problem>) -> Result<T, Problem> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(broken("its parts contradict each other")))
}

/// The names of labels by column, as Hugging Face's data sets describe them in the file's metadata.
fn label_names(reader: &SerializedFileReader<File>) -> Map<String, Value> {
    let mut names = Map::new();
    let metadata = reader.metadata().file_metadata().key_value_metadata().into_iter().flatten();
    let described = metadata.filter(|entry| entry.key == "huggingface").find_map(|entry| entry.value.as_deref());
    let described: Value = described.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let features = described.pointer("/info/features").and_then(Value::as_object).into_iter().flatten();
    for (column, feature) in features.filter(|(_, feature)| feature["_type"] == "ClassLabel") {
        names.insert(column.clone(), feature["names"].clone());
    }
    names
}

fn object(row: Row, names: &Map<String, Value>) -> Map<String, Value> {
    let named = |column: &str, value: Value| {
        let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
        match (names.get(column), index) {
            (Some(names), Some(index)) => names.get(index).cloned().unwrap_or(value),
            _ => value,
        }
    };
    let columns = row.into_columns().into_iter().filter(|(_, field)| !matches!(field, Field::Null));
    columns.map(|(column, field)| (column.clone(), named(&column, value(&field)))).collect()
}

fn value(field: &Field) -> Value {
    let real = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => json!(value),
        Field::Byte(value) => json!(value),
        Field::Short(value) => json!(value),
        Field::Int(value) => json!(value),
        Field::Long(value) => json!(value),
        Field::UByte(value) => json!(value),
        Field::UShort(value) => json!(value),
        Field::UInt(value) => json!(value),
        Field::ULong(value) => json!(value),
        Field::Float(value) => real(f64::from(*value)),
        Field::Double(value) => real(*value),
        Field::Str(text) => json!(text),
        // Images and the like; whoever wants a text there is told of an object.
        Field::Bytes(bytes) => json!({ "bytes": bytes.len() }),
        Field::Group(row) => {
            let columns = row.get_column_iter().filter(|(_, field)| !matches!(field, Field::Null));
            Value::Object(columns.map(|(name, field)| (name.clone(), value(field))).collect())
        }
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| match field {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(name, field)| (key(name), value(field))).collect())
        }
        // Times and decimals.
        other => json!(other.to_string()),
    }
}
