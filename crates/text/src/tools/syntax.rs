//! How a model was taught to write calls, and the grammar that makes it write them so.
//!
//! Contract: what the grammar allows, [`crate::ToolReader`] reads as calls of the declared tools whose arguments fulfil
//! their schemas; parameters come in the order of their declaration.

use serde_json::{Value, json};

use super::declared::Tool;
use crate::{ChatTemplate, grammar::compact};

/// One of the two ways in which Qwen models write calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallSyntax {
    /// An object with `name` and `arguments` (Qwen2.5, Qwen3).
    Hermes,
    /// `<function=...>` with a `<parameter=...>` for each argument (Qwen3-Coder, Qwen3.5).
    Xml,
}

impl CallSyntax {
    /// What a template teaches; nothing where it knows no tools.
    pub fn of_template(template: &ChatTemplate) -> Option<CallSyntax> {
        let source = template.source();
        match () {
            () if !source.contains("tools") => None,
            () if source.contains("<function=") => Some(CallSyntax::Xml),
            () if source.contains("<tool_call>") => Some(CallSyntax::Hermes),
            () => None,
        }
    }
}

/// Calls that an answer must consist of.
#[derive(Clone, Debug, PartialEq)]
pub struct CallForm {
    /// How they are written.
    pub syntax: CallSyntax,
    /// The tools that may be called.
    pub tools: Vec<Tool>,
    /// Whether there may be more than one call.
    pub many: bool,
    /// Instead of calls, the answer may also be JSON that fulfils this schema.
    pub or_json: Option<Value>,
}

impl CallForm {
    /// The grammar in Lark's notation; `tag` names a control token in it.
    pub(crate) fn lark(&self, tag: &dyn Fn(&str) -> String) -> String {
        let (open, close) = (tag("<tool_call>"), tag("</tool_call>"));
        let more = if self.many { r#" ("\n" call)*"# } else { "" };
        let names: Vec<String> = (0..self.tools.len()).map(|i| format!("tool{i}")).collect();
        let start = match &self.or_json {
            Some(schema) => format!("start: calls | json\njson: %json {}\n", compact(schema.clone())),
            None => "start: calls\n".to_owned(),
        };
        let mut rules = format!(
            "{start}calls: call{more}\ncall: {open} \"\\n\" body \"\\n\" {close}\nbody: {}\n",
            names.join(" | ")
        );
        for (i, tool) in self.tools.iter().enumerate() {
            rules.push_str(&match self.syntax {
                CallSyntax::Hermes => hermes(i, tool),
                CallSyntax::Xml => xml(i, tool),
            });
        }
        rules
    }
}

fn hermes(i: usize, tool: &Tool) -> String {
    let head = quoted(&format!("{{\"name\": {}, \"arguments\": ", json!(tool.name)));
    format!("tool{i}: {head} arguments{i} \"}}\"\narguments{i}: %json {}\n", compact(arguments_schema(tool)))
}

fn xml(i: usize, tool: &Tool) -> String {
    let schema = arguments_schema(tool);
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let mut body = format!("tool{i}: {}", quoted(&format!("<function={}>\n", tool.name)));
    let mut rules = String::new();
    for (k, (key, value)) in schema.get("properties").and_then(Value::as_object).into_iter().flatten().enumerate() {
        let optional = if required.contains(&key.as_str()) { "" } else { "?" };
        body.push_str(&format!(" p{i}_{k}{optional}"));
        let head = quoted(&format!("<parameter={key}>\n"));
        rules.push_str(&format!("p{i}_{k}: {head} v{i}_{k}\n"));
        rules.push_str(&xml_value(&format!("v{i}_{k}"), &schema, value));
    }
    format!("{body} \"</function>\"\n{rules}")
}

const PARAMETER_END: &str = r#""\n</parameter>\n""#;

/// A rule for an argument's text: strings stand as they are, all else as JSON.
fn xml_value(rule: &str, root: &Value, schema: &Value) -> String {
    let texts =
        schema.get("enum").and_then(Value::as_array).map(|list| list.iter().filter_map(Value::as_str).collect());
    match (schema.get("type").and_then(Value::as_str), texts) {
        (Some("string") | None, Some::<Vec<&str>>(texts)) if !texts.is_empty() => {
            let texts: Vec<String> = texts.into_iter().map(quoted).collect();
            format!("{rule}: ({}) {PARAMETER_END}\n", texts.join(" | "))
        }
        (Some("string"), _) => format!("{rule}[suffix={PARAMETER_END}]: /(?s:.*)/\n"),
        _ => {
            let mut schema = schema.clone();
            // What the argument's schema refers to stands beside it.
            if let (Value::Object(map), Some(root)) = (&mut schema, root.as_object()) {
                for key in ["$defs", "definitions"] {
                    if let Some(definitions) = root.get(key) {
                        map.insert(key.to_owned(), definitions.clone());
                    }
                }
            }
            format!("{rule}: {rule}j {PARAMETER_END}\n{rule}j: %json {}\n", compact(schema))
        }
    }
}

/// A tool's schema; declared parameters are all there are, unless the schema says otherwise.
fn arguments_schema(tool: &Tool) -> Value {
    let mut schema = tool.parameters.clone();
    if let Value::Object(map) = &mut schema {
        map.entry("type").or_insert(json!("object"));
        if map.contains_key("properties") && !map.contains_key("patternProperties") {
            map.entry("additionalProperties").or_insert(json!(false));
        }
    }
    schema
}

/// A text in Lark's notation.
fn quoted(text: &str) -> String {
    json!(text).to_string()
}
