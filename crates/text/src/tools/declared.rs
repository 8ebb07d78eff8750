//! Tools as a request declares them, and what their schemas say about values that a model wrote as plain text.
//!
//! Contract: [`ToolSet::from_request`] takes the forms of the OpenAI interfaces and of Anthropic's, and names the place of
//! every fault; reading a value never fails: what does not fit its schema stays a string.

use serde_json::{Map, Value, json};

use crate::Error;
use crate::chat::kind;

/// Deepest chain of references and alternatives that is followed in a schema.
const DEPTH_MAX: usize = 16;
/// Most alternatives that are looked at for one parameter.
const TYPES_MAX: usize = 64;

/// One tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments; an object without properties where none was given.
    pub parameters: Value,
    /// Whether calls must follow the schema to the letter.
    pub is_strict: bool,
    /// The declaration as templates print it.
    declaration: Value,
}

/// The tools of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ToolSet {
    tools: Vec<Tool>,
}

impl ToolSet {
    /// Reads a request's `tools`; `null` is none. Three forms of a tool are known: `{"type": "function", "function":
    /// {"name", "parameters"}}`, which templates get to see as it is, the flat `{"type": "function", "name",
    /// "parameters"}`, and `{"name", "input_schema"}`.
    ///
    /// # Errors
    /// [`Error::Request`] with the path of the fault.
    pub fn from_request(tools: &Value) -> Result<ToolSet, Error> {
        let list = match tools {
            Value::Null => return Ok(ToolSet::default()),
            Value::Array(list) => list,
            other => return Err(fault("tools", other, "an array of tools")),
        };
        let mut set = ToolSet::default();
        for (index, tool) in list.iter().enumerate() {
            let tool = Tool::from_request(&format!("tools[{index}]"), tool)?;
            if set.get(&tool.name).is_some() {
                let path = format!("tools[{index}]");
                let found = format!("a second tool named `{}`", tool.name);
                return Err(Error::Request { path, found, expected: "one tool for each name".to_owned() });
            }
            set.tools.push(tool);
        }
        Ok(set)
    }

    /// The tools in the order of the request.
    pub fn tools(&self) -> &[Tool] {
        &self.tools
    }

    /// The tool of this name.
    pub fn get(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    /// What [`crate::ChatInput::tools`] wants; nothing where there are no tools.
    pub fn for_template(&self) -> Option<Value> {
        let declarations = self.tools.iter().map(|tool| tool.declaration.clone());
        (!self.is_empty()).then(|| Value::Array(declarations.collect()))
    }

    /// Whether a parameter can be nothing but a string, so that its text is the value as it stands.
    pub(super) fn is_text(&self, tool: &str, key: &str) -> bool {
        let types = self.types_of(tool, key);
        types.is_empty() || types.iter().all(|kind| *kind == Kind::Text)
    }

    /// Whether the tool declares this parameter.
    pub(super) fn has_parameter(&self, tool: &str, key: &str) -> bool {
        let properties = self.get(tool).and_then(|tool| tool.parameters.get("properties"));
        properties.is_some_and(|properties| properties.get(key).is_some())
    }

    /// The value that a text stands for where the model writes arguments without quotes.
    pub(super) fn value_of(&self, tool: &str, key: &str, text: &str) -> Value {
        let types = self.types_of(tool, key);
        let is_allowed = |value: &Value| types.iter().any(|kind| kind.admits(value));
        let trimmed = text.trim();
        let literal = match trimmed {
            "True" | "TRUE" => "true",
            "False" | "FALSE" => "false",
            "None" => "null",
            other => other,
        };
        match serde_json::from_str::<Value>(literal) {
            Ok(value) if is_allowed(&value) => value,
            // An integer that was written as `3.0`.
            Ok(Value::Number(number)) if types.contains(&Kind::Integer) => match number.as_f64() {
                Some(value) if value.fract() == 0.0 && value.abs() < 9e15 => Value::from(value as i64),
                _ => Value::from(text),
            },
            Err(_) if types.contains(&Kind::Object) || types.contains(&Kind::Array) => {
                mended(trimmed).filter(is_allowed).unwrap_or_else(|| Value::from(text))
            }
            _ => Value::from(text),
        }
    }

    fn types_of(&self, tool: &str, key: &str) -> Vec<Kind> {
        let mut types = Vec::new();
        let Some(root) = self.get(tool).map(|tool| &tool.parameters) else { return types };
        if let Some(schema) = root.get("properties").and_then(|properties| properties.get(key)) {
            collect(root, schema, 0, &mut types);
        }
        types
    }
}

impl Tool {
    fn from_request(path: &str, tool: &Value) -> Result<Tool, Error> {
        let Value::Object(outer) = tool else {
            return Err(fault(path, tool, "an object with `type` and `function`"));
        };
        let (inner, place) = match outer.get("function") {
            Some(Value::Object(function)) => (function, format!("{path}.function")),
            Some(other) => return Err(fault(&format!("{path}.function"), other, "an object with `name`")),
            None => (outer, path.to_owned()),
        };
        match outer.get("type").filter(|kind| !kind.is_null()) {
            None => {}
            Some(Value::String(kind))
                if kind == "function" || (kind == "custom" && outer.contains_key("input_schema")) => {}
            Some(other) => return Err(fault(&format!("{path}.type"), other, "`function`")),
        }
        let name = match inner.get("name") {
            Some(Value::String(name)) if is_name(name) => name.clone(),
            other => {
                let expected = "a name of 1 to 128 letters, digits, `_`, `-`, `.`, `:` or `/`";
                return Err(fault(&format!("{place}.name"), other.unwrap_or(&Value::Null), expected));
            }
        };
        let key = if inner.contains_key("input_schema") { "input_schema" } else { "parameters" };
        let parameters = match inner.get(key) {
            None | Some(Value::Null) => json!({ "type": "object", "properties": {} }),
            Some(schema @ Value::Object(_)) => schema.clone(),
            Some(other) => return Err(fault(&format!("{place}.{key}"), other, "a JSON schema, an object")),
        };
        let is_strict = match inner.get("strict") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(is_strict)) => *is_strict,
            Some(other) => return Err(fault(&format!("{place}.strict"), other, "true or false")),
        };
        let declaration = match outer.contains_key("function") {
            true => tool.clone(),
            false => {
                let mut function = Map::new();
                function.insert("name".to_owned(), json!(name));
                if let Some(description) = inner.get("description") {
                    function.insert("description".to_owned(), description.clone());
                }
                function.insert("parameters".to_owned(), parameters.clone());
                json!({ "type": "function", "function": function })
            }
        };
        Ok(Tool { name, parameters, is_strict, declaration })
    }
}

/// What a schema lets a value be.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Text,
    Integer,
    Number,
    Boolean,
    Null,
    Object,
    Array,
    /// One value of an `enum` or `const`.
    Exactly(Value),
}

impl Kind {
    fn admits(&self, value: &Value) -> bool {
        match self {
            // A text that reads as a string with its quotes keeps them.
            Kind::Text => false,
            Kind::Integer => value.is_i64() || value.is_u64(),
            Kind::Number => value.is_number(),
            Kind::Boolean => value.is_boolean(),
            Kind::Null => value.is_null(),
            Kind::Object => value.is_object(),
            Kind::Array => value.is_array(),
            Kind::Exactly(other) => other == value && !value.is_string(),
        }
    }
}

/// Every kind that a schema allows. None where it says nothing of kinds.
fn collect(root: &Value, schema: &Value, depth: usize, types: &mut Vec<Kind>) {
    if depth > DEPTH_MAX || types.len() > TYPES_MAX {
        return;
    }
    let of_name = |name: &str| match name {
        "string" => Some(Kind::Text),
        "integer" => Some(Kind::Integer),
        "number" => Some(Kind::Number),
        "boolean" => Some(Kind::Boolean),
        "null" => Some(Kind::Null),
        "object" => Some(Kind::Object),
        "array" => Some(Kind::Array),
        _ => None,
    };
    let exactly = |value: &Value| if value.is_string() { Kind::Text } else { Kind::Exactly(value.clone()) };
    match schema.get("type") {
        Some(Value::String(name)) => types.extend(of_name(name)),
        Some(Value::Array(names)) => types.extend(names.iter().filter_map(Value::as_str).filter_map(of_name)),
        _ => {
            if let Some(Value::Array(values)) = schema.get("enum") {
                types.extend(values.iter().take(TYPES_MAX).map(exactly));
            }
            types.extend(schema.get("const").map(exactly));
            if schema.get("properties").is_some() {
                types.push(Kind::Object);
            }
            if schema.get("items").is_some() {
                types.push(Kind::Array);
            }
        }
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        let Some(Value::Array(choices)) = schema.get(key) else { continue };
        choices.iter().take(TYPES_MAX).for_each(|choice| collect(root, choice, depth + 1, types));
    }
    if let Some(Value::String(reference)) = schema.get("$ref")
        && let Some(target) = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer))
    {
        collect(root, target, depth + 1, types);
    }
}

/// A list or an object that needs mending before it reads as JSON.
fn mended(text: &str) -> Option<Value> {
    if !text.starts_with(['{', '[']) {
        return None;
    }
    let mut repair = super::repair::Repair::new();
    let mut rest = text.chars();
    for character in rest.by_ref() {
        if repair.feed(character) != super::repair::Fed::Taken {
            break;
        }
    }
    // More text behind the value means that the text is something else.
    if !rest.as_str().trim().is_empty() {
        return None;
    }
    repair.finish();
    serde_json::from_str(&repair.take()).ok()
}

fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
    (1..=128).contains(&name.len()) && name.bytes().all(is_allowed)
}

pub(crate) fn fault(path: &str, value: &Value, expected: &str) -> Error {
    let found = match value {
        Value::String(text) => format!("`{}`", text.chars().take(40).collect::<String>()),
        other => kind(other),
    };
    Error::Request { path: path.to_owned(), found, expected: expected.to_owned() }
}
