//! A JSON object read strictly: every field is taken by name and type, and what nobody took is refused by name.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// An object on its way to being a request. A field that is `null` counts as absent, as clients send them.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where the object stands in the request; empty for the request itself.
    path: String,
    /// Names that were asked for, to suggest one for a mistyped name.
    known: Vec<&'static str>,
}

impl Fields {
    /// The object that is a request's body.
    pub(crate) fn of_body(body: &[u8]) -> Result<Fields, ApiError> {
        let value = serde_json::from_slice(body)
            .map_err(|error| ApiError::invalid("", format!("the request's body is no JSON: {error}")))?;
        Fields::new(value, "")
    }

    /// The object at `path`.
    pub(crate) fn new(value: Value, path: impl Into<String>) -> Result<Fields, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { map, path, known: Vec::new() }),
            other if path.is_empty() => {
                Err(ApiError::invalid("", format!("the request is {}, expected an object", describe(&other))))
            }
            other => Err(wrong(&path, &other, "an object")),
        }
    }

    /// The path of a field.
    pub(crate) fn at(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A field of any type.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A field that is read elsewhere.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    /// The first of several names of the same field.
    ///
    /// # Errors
    /// When two of them are there: which one counts?
    pub(crate) fn take_one(&mut self, names: &[&'static str]) -> Result<Option<(String, Value)>, ApiError> {
        self.take_one_that(names, |_| true)
    }

    /// As `take_one`, of those that say something: what is empty stands for nothing.
    ///
    /// # Errors
    /// As `take_one`.
    pub(crate) fn take_said(&mut self, names: &[&'static str]) -> Result<Option<(String, Value)>, ApiError> {
        self.take_one_that(names, |value| *value != "" && value.as_object().is_none_or(|object| !object.is_empty()))
    }

    fn take_one_that(
        &mut self,
        names: &[&'static str],
        counts: impl Fn(&Value) -> bool,
    ) -> Result<Option<(String, Value)>, ApiError> {
        let mut found: Option<(String, Value)> = None;
        for name in names {
            let Some(value) = self.take(name).filter(&counts) else { continue };
            if let Some((first, _)) = &found {
                let message = format!("`{first}` and `{name}` say the same; give one of them");
                return Err(ApiError::invalid(self.at(name), message));
            }
            found = Some((self.at(name), value));
        }
        Ok(found)
    }

    pub(crate) fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.at(name), &other, "a string")),
        }
    }

    pub(crate) fn bool(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.at(name), &other, "true or false")),
        }
    }

    pub(crate) fn number(&mut self, name: &'static str) -> Result<Option<f32>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number as f32)),
                None => Err(wrong(&self.at(name), &value, "a number")),
            },
        }
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn integer(&mut self, name: &'static str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let value = self.take(name);
        value.map(|value| integer(&self.at(name), &value, least, most)).transpose()
    }

    pub(crate) fn list(&mut self, name: &'static str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.at(name), &other, "a list")),
        }
    }

    pub(crate) fn object(&mut self, name: &'static str) -> Result<Option<Fields>, ApiError> {
        let path = self.at(name);
        self.take(name).map(|value| Fields::new(value, path)).transpose()
    }

    /// A field that must be there.
    pub(crate) fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, ApiError> {
        value.ok_or_else(|| ApiError::invalid(self.at(name), format!("`{}` is missing", self.at(name))))
    }

    /// Refuses parameters that exist elsewhere and not here, unless they say nothing.
    pub(crate) fn unsupported(&mut self, name: &'static str, harmless: &[Value], why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !harmless.contains(&value) => {
                Err(ApiError::invalid(self.at(name), format!("`{}` is not supported: {why}", self.at(name)))
                    .with_code("unsupported_parameter"))
            }
            _ => Ok(()),
        }
    }

    /// The end: whatever nobody took is unknown.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let Some((name, _)) = self.map.iter().find(|(_, value)| !value.is_null()) else { return Ok(()) };
        let near = self.known.iter().map(|k| (strsim::damerau_levenshtein(k, name), k)).min();
        let hint = match near {
            Some((distance, nearest)) if distance <= 1 + name.len() / 4 => format!("; did you mean `{nearest}`?"),
            _ => String::new(),
        };
        let shown: String = name.chars().take(80).collect();
        let at = self.at(&shown);
        Err(ApiError::invalid(at.clone(), format!("`{at}` is no parameter that this server knows{hint}"))
            .with_code("unknown_parameter"))
    }
}

/// A whole number from `least` to `most`.
pub(crate) fn integer(path: &str, value: &Value, least: i64, most: i64) -> Result<i64, ApiError> {
    // Some clients send whole numbers as 5.0.
    let whole =
        value.as_i64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 1e15).map(|n| n as i64));
    whole.filter(|n| (least..=most).contains(n)).ok_or_else(|| {
        let range = match (least, most) {
            (least, i64::MAX) => format!("a whole number of {least} or more"),
            (least, most) => format!("a whole number from {least} to {most}"),
        };
        wrong(path, value, &range)
    })
}

/// The value at `path` is not what was expected.
pub(crate) fn wrong(path: &str, found: &Value, expected: &str) -> ApiError {
    ApiError::invalid(path, format!("`{path}` is {}, expected {expected}", describe(found)))
}

/// A value in an error message.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
        Value::String(text) => format!("a string of {} characters", text.chars().count()),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
