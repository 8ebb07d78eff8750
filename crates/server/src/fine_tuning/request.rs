//! A request for a job, read strictly.

use serde_json::{Map, Value, json};

use crate::{
    error::ApiError,
    fields::{Fields, wrong},
};

/// Characters of a suffix, as OpenAI has it.
const SUFFIX_MAX: usize = 64;
/// Times that data can be gone through.
const EPOCHS_MAX: i64 = 1000;
/// Samples of a step.
const BATCH_MAX: i64 = 4096;

/// What is asked for.
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) validation_file: Option<String>,
    pub(super) suffix: Option<String>,
    pub(super) seed: u64,
    pub(super) method: Method,
    /// As given, `auto` where nothing is.
    pub(super) hyperparameters: Map<String, Value>,
    pub(super) metadata: Value,
}

/// How a model learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// To answer as the data does.
    Supervised,
    /// To prefer the better of two answers.
    Dpo,
}

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Method::Supervised => "supervised",
            Method::Dpo => "dpo",
        }
    }
}

/// Reads a request.
pub(super) fn read(body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let model = fields.string("model")?;
    let model = fields.required("model", model)?;
    let training_file = fields.string("training_file")?;
    let training_file = fields.required("training_file", training_file)?;
    let validation_file = fields.string("validation_file")?;
    let suffix = suffix(&mut fields)?;
    let seed = fields.integer("seed", 0, i64::from(u32::MAX))?.unwrap_or(0).unsigned_abs();
    let metadata = fields.take("metadata").unwrap_or_default();
    if !metadata.is_null() && !metadata.is_object() {
        return Err(wrong("metadata", &metadata, "an object"));
    }
    fields.unsupported("integrations", &[json!([])], "nothing leaves this machine")?;
    let older = fields.object("hyperparameters")?;
    let (method, hyperparameters) = match (fields.object("method")?, older) {
        (Some(_), Some(_)) => {
            let message = "`method` and `hyperparameters` say the same; give one of them";
            return Err(ApiError::invalid("hyperparameters", message));
        }
        (Some(method), None) => read_method(method)?,
        (None, older) => (Method::Supervised, hyperparameters(older, Method::Supervised)?),
    };
    fields.finish()?;
    Ok(Asked { model, training_file, validation_file, suffix, seed, method, hyperparameters, metadata })
}

fn suffix(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(suffix) = fields.string("suffix")? else { return Ok(None) };
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if suffix.is_empty() || suffix.chars().count() > SUFFIX_MAX || !suffix.chars().all(fits) {
        let expected = format!("1 to {SUFFIX_MAX} letters, digits, `-`, `_` or `.`");
        return Err(wrong("suffix", &json!(suffix), &expected));
    }
    Ok(Some(suffix))
}

fn read_method(mut fields: Fields) -> Result<(Method, Map<String, Value>), ApiError> {
    let kind = fields.string("type")?;
    let kind = fields.required("type", kind)?;
    let method = match kind.as_str() {
        "supervised" => Method::Supervised,
        "dpo" => Method::Dpo,
        "reinforcement" => {
            let message = "`method.type` reinforcement is not supported: supervised and dpo are";
            return Err(ApiError::invalid("method.type", message).with_code("unsupported_parameter"));
        }
        _ => return Err(wrong(&fields.at("type"), &json!(kind), "supervised or dpo")),
    };
    for name in ["supervised", "dpo", "reinforcement"] {
        if name != method.name() && fields.peek(name).is_some_and(|value| !value.is_null()) {
            let at = fields.at(name);
            return Err(ApiError::invalid(&at, format!("`{at}` is there, and `method.type` is {}", method.name())));
        }
    }
    let inner = match fields.object(method.name())? {
        None => None,
        Some(mut inner) => {
            let found = inner.object("hyperparameters")?;
            inner.finish()?;
            found
        }
    };
    for name in ["supervised", "dpo", "reinforcement"] {
        fields.take(name);
    }
    fields.finish()?;
    Ok((method, hyperparameters(inner, method)?))
}

fn hyperparameters(fields: Option<Fields>, method: Method) -> Result<Map<String, Value>, ApiError> {
    let mut fields = match fields {
        Some(fields) => fields,
        None => Fields::new(json!({}), "hyperparameters")?,
    };
    let mut found = Map::new();
    for (name, most) in [("n_epochs", EPOCHS_MAX), ("batch_size", BATCH_MAX)] {
        let is_auto = fields.peek(name).is_some_and(|value| value == "auto");
        let value = if is_auto { fields.take(name) } else { fields.integer(name, 1, most)?.map(Value::from) };
        found.insert(name.to_owned(), value.unwrap_or_else(|| json!("auto")));
    }
    let positive: &[(&'static str, f64)] = match method {
        Method::Supervised => &[("learning_rate_multiplier", 1000.0)],
        Method::Dpo => &[("learning_rate_multiplier", 1000.0), ("beta", 10.0)],
    };
    for (name, most) in positive {
        let value = fields.take(name).unwrap_or_else(|| json!("auto"));
        let fits = value.as_f64().is_some_and(|number| number > 0.0 && number <= *most);
        if value != "auto" && !fits {
            return Err(wrong(&fields.at(name), &value, &format!("auto, or a number above 0 and at most {most}")));
        }
        found.insert((*name).to_owned(), value);
    }
    fields.finish()?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(more: Value) -> Result<Asked, ApiError> {
        let mut body = json!({"model": "m", "training_file": "f"});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        read(body.to_string().as_bytes())
    }

    #[test]
    fn both_forms_of_hyperparameters_are_read() {
        let given = json!({"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5});
        for more in [
            json!({"hyperparameters": given}),
            json!({"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}),
        ] {
            let asked = of(more).unwrap();
            assert_eq!((Value::Object(asked.hyperparameters), asked.method), (given.clone(), Method::Supervised));
        }
        let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
        for more in [json!({}), json!({"method": {"type": "supervised"}}), json!({"seed": null, "integrations": []})] {
            assert_eq!(Value::Object(of(more).unwrap().hyperparameters), auto);
        }
        let asked = of(json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}})).unwrap();
        assert_eq!((asked.method, &asked.hyperparameters["beta"]), (Method::Dpo, &json!(0.2)));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let hyper = |inner: Value| json!({"hyperparameters": inner});
        for (more, param) in [
            (json!({"training_file": null}), "training_file"),
            (json!({"model": 5}), "model"),
            (json!({"suffix": "a b"}), "suffix"),
            (json!({"suffix": "x".repeat(65)}), "suffix"),
            (json!({"seed": -1}), "seed"),
            (json!({"metadata": []}), "metadata"),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
            (json!({"n_epochs": 3}), "n_epochs"),
            (hyper(json!({"n_epochs": 0})), "hyperparameters.n_epochs"),
            (hyper(json!({"n_epochs": "many"})), "hyperparameters.n_epochs"),
            (hyper(json!({"batch_size": 1.5})), "hyperparameters.batch_size"),
            (hyper(json!({"learning_rate_multiplier": 0})), "hyperparameters.learning_rate_multiplier"),
            (hyper(json!({"beta": 0.1})), "hyperparameters.beta"),
            (json!({"hyperparameters": {}, "method": {"type": "dpo"}}), "hyperparameters"),
            (json!({"method": {}}), "method.type"),
            (json!({"method": {"type": "reinforcement"}}), "method.type"),
            (json!({"method": {"type": "magic"}}), "method.type"),
            (json!({"method": {"type": "dpo", "supervised": {}}}), "method.supervised"),
            (json!({"method": {"type": "dpo", "colour": 1}}), "method.colour"),
            (json!({"method": {"type": "dpo", "dpo": {"colour": 1}}}), "method.dpo.colour"),
            (
                json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "x"}}}}),
                "method.dpo.hyperparameters.beta",
            ),
        ] {
            let error = of(more.clone()).err().unwrap_or_else(|| panic!("{more} was taken"));
            assert_eq!(error.param.as_deref(), Some(param), "{more}: {}", error.message);
        }
    }
}
