//! The form that a request asks of its answer: OpenAI's `response_format`, and what other engines call it.

use qwenkit_text::Form;
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    fields::{Fields, wrong},
};

/// Takes the form out of a request, which may name one only.
pub(crate) fn take(fields: &mut Fields) -> Result<Option<(Form, &'static str)>, ApiError> {
    let mut found: Vec<(Form, &'static str)> = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        found.extend(response_format(format)?.map(|form| (form, "response_format")));
    }
    for name in ["guided_json", "guided_regex", "guided_choice", "guided_grammar"] {
        let at = fields.at(name);
        if let Some(value) = fields.take(name) {
            found.push((constraint(name.trim_start_matches("guided_"), &at, value)?, name));
        }
    }
    if let Some(mut outputs) = fields.object("structured_outputs")? {
        for name in ["json", "json_object", "regex", "choice", "grammar"] {
            let at = outputs.at(name);
            match outputs.take(name) {
                None | Some(Value::Bool(false)) => {}
                Some(value) => found.push((constraint(name, &at, value)?, "structured_outputs")),
            }
        }
        outputs.finish()?;
    }
    match found.get(1) {
        Some((_, second)) => {
            let message = format!("`{}` and `{second}` both ask for a form; give one of them", found[0].1);
            Err(ApiError::invalid(*second, message))
        }
        None => Ok(found.pop()),
    }
}

/// OpenAI's object: `text`, `json_object`, `json_schema`. The responses interface has the schema one level higher.
pub(crate) fn response_format(mut format: Fields) -> Result<Option<Form>, ApiError> {
    let kind = format.string("type")?;
    let form = match format.required("type", kind)?.as_str() {
        "text" => None,
        "json_object" => Some(Form::AnyJson),
        "json_schema" => {
            let schema = match format.object("json_schema")? {
                Some(mut inner) => {
                    let schema = schema(&mut inner)?;
                    inner.finish()?;
                    schema
                }
                None => schema(&mut format)?,
            };
            Some(Form::Json(schema))
        }
        kind => return Err(wrong(&format.at("type"), &json!(kind), "text, json_object or json_schema")),
    };
    format.finish()?;
    Ok(form)
}

fn schema(fields: &mut Fields) -> Result<Value, ApiError> {
    fields.string("name")?;
    fields.string("description")?;
    // The schema is kept to the letter either way.
    fields.bool("strict")?;
    let at = fields.at("schema");
    let schema = fields.take("schema");
    match fields.required("schema", schema)? {
        schema @ Value::Object(_) => Ok(schema),
        other => Err(wrong(&at, &other, "a JSON schema, an object")),
    }
}

fn constraint(kind: &str, at: &str, value: Value) -> Result<Form, ApiError> {
    match (kind, value) {
        ("json_object", Value::Bool(true)) => Ok(Form::AnyJson),
        ("json", schema @ Value::Object(_)) => Ok(Form::Json(schema)),
        ("json", Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema @ Value::Object(_)) => Ok(Form::Json(schema)),
            Ok(other) => Err(wrong(at, &other, "a JSON schema, an object")),
            Err(error) => Err(ApiError::invalid(at, format!("`{at}` is no JSON schema: {error}"))),
        },
        ("regex", Value::String(regex)) => Ok(Form::Regex(regex)),
        ("grammar", Value::String(grammar)) => Ok(Form::Lark(grammar)),
        ("choice", Value::Array(list)) => {
            let text = |(i, value): (usize, Value)| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong(&format!("{at}[{i}]"), &other, "a string")),
            };
            Ok(Form::Choice(list.into_iter().enumerate().map(text).collect::<Result<_, _>>()?))
        }
        (kind, other) => {
            let expected = match kind {
                "json" => "a JSON schema",
                "choice" => "a list of texts",
                "json_object" => "true or false",
                _ => "a string",
            };
            Err(wrong(at, &other, expected))
        }
    }
}
