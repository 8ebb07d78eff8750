//! The switches by which people ask for thought or for none, and what a model's template understands of them.
//!
//! Contract: every spelling that clients of OpenAI, Anthropic, Ollama and of other engines use comes to the same
//! [`ThinkingWish`]; switches that contradict each other are an error. What a template understands is found by rendering
//! it, not by the model's name.
//!
//! Not here: counting tokens of thought against a budget.

use serde_json::{Map, Value, json};

use crate::tools::declared::fault;
use crate::{ChatInput, ChatTemplate, Error, Opening};

/// Efforts from the least to the most, as templates and clients spell them.
const EFFORTS: [&str; 6] = ["minimal", "low", "medium", "high", "xhigh", "max"];

/// What somebody wants of a model's thoughts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThinkingWish {
    /// Whether to think; the model's own way where absent.
    pub thinks: Option<bool>,
    /// How much: one of `minimal`, `low`, `medium`, `high`, `xhigh`, `max`.
    pub effort: Option<String>,
    /// Tokens of thought at most.
    pub budget_tokens: Option<u64>,
    /// The switch that said so, with its value, for messages; empty where none did.
    pub switch: String,
}

impl ThinkingWish {
    /// Reads every switch of a request: `enable_thinking`, `chat_template_kwargs`, `think`, `thinking`, `thinking_budget`,
    /// `reasoning_effort`, `reasoning`, and `/think` or `/no_think` in the messages, which only count where no other
    /// switch is set.
    ///
    /// # Errors
    /// [`Error::Request`] for a value of the wrong kind, [`Error::ThinkingConflict`].
    pub fn of_request(request: &Map<String, Value>) -> Result<ThinkingWish, Error> {
        let mut wish = ThinkingWish::default();
        wish.read_group(request, "")?;
        if let Some(Value::Object(kwargs)) = request.get("chat_template_kwargs") {
            wish.read_group(kwargs, "chat_template_kwargs.")?;
        }
        if wish.thinks.is_none()
            && let Some(thinks) = soft_switch(request.get("messages"))
        {
            wish.thinks = Some(thinks);
            wish.switch = if thinks { "/think" } else { "/no_think" }.to_owned();
        }
        Ok(wish)
    }

    fn read_group(&mut self, group: &Map<String, Value>, prefix: &str) -> Result<(), Error> {
        for (name, value) in group.iter().filter(|(_, value)| !value.is_null()) {
            let path = format!("{prefix}{name}");
            match name.as_str() {
                "enable_thinking" => self.set(&path, value, Some(boolean(&path, value)?))?,
                "think" | "thinking" => self.read_think(&path, value)?,
                "reasoning_effort" => self.read_effort(&path, value)?,
                "reasoning" => self.read_reasoning(&path, value)?,
                "thinking_budget" => self.budget_tokens = Some(count(&path, value)?),
                _ => {}
            }
        }
        Ok(())
    }

    /// `true`, `"low"`, or Anthropic's object with `type` and `budget_tokens`.
    fn read_think(&mut self, path: &str, value: &Value) -> Result<(), Error> {
        let object = match value {
            Value::Bool(thinks) => return self.set(path, value, Some(*thinks)),
            Value::String(_) => return self.read_effort(path, value),
            Value::Object(object) => object,
            _ => return Err(fault(path, value, "true, false, an effort, or an object with `type`")),
        };
        let switch = format!("{path}.type");
        match object.get("type").and_then(Value::as_str) {
            Some("enabled") => self.set(&switch, &json!("enabled"), Some(true))?,
            Some("disabled") => self.set(&switch, &json!("disabled"), Some(false))?,
            Some("adaptive") => {}
            _ => {
                let found = object.get("type").unwrap_or(&Value::Null);
                return Err(fault(&switch, found, "`enabled`, `disabled` or `adaptive`"));
            }
        }
        // Thoughts are always told, and in full.
        let told = |name: &str, value: &Value| name == "display" && value == "summarized";
        let known = |name: &str, value: &Value| matches!(name, "type" | "budget_tokens") || told(name, value);
        if let Some((name, _)) = object.iter().find(|(name, value)| !value.is_null() && !known(name, value)) {
            return Err(unknown(path, name, "`type` and `budget_tokens`"));
        }
        if let Some(budget) = object.get("budget_tokens").filter(|budget| !budget.is_null()) {
            self.budget_tokens = Some(count(&format!("{path}.budget_tokens"), budget)?);
        }
        Ok(())
    }

    /// The `reasoning` object of the responses interface and of routers.
    fn read_reasoning(&mut self, path: &str, value: &Value) -> Result<(), Error> {
        let Value::Object(object) = value else {
            return Err(fault(path, value, "an object with `effort`"));
        };
        let switch = path;
        for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            let path = format!("{path}.{name}");
            match name.as_str() {
                "effort" => self.read_effort(&path, value)?,
                "enabled" => self.set(&path, value, Some(boolean(&path, value)?))?,
                "max_tokens" => self.budget_tokens = Some(count(&path, value)?),
                // How a summary shall be; thoughts come as they are, beside the answer.
                "summary" | "generate_summary" => {}
                "exclude" if value == false => {}
                _ => return Err(unknown(switch, name, "`effort`, `enabled` and `max_tokens`")),
            }
        }
        Ok(())
    }

    fn read_effort(&mut self, path: &str, value: &Value) -> Result<(), Error> {
        let expected = "`none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`";
        match value.as_str() {
            Some("none" | "off") => self.set(path, value, Some(false)),
            Some(effort) if EFFORTS.contains(&effort) => {
                self.set(path, value, Some(true))?;
                if self.effort.as_deref().is_some_and(|other| other != effort) {
                    let first = self.switch.clone();
                    return Err(Error::ThinkingConflict { first, second: format!("{path}: {value}") });
                }
                self.effort = Some(effort.to_owned());
                self.switch = format!("{path}: {value}");
                Ok(())
            }
            _ => Err(fault(path, value, expected)),
        }
    }

    fn set(&mut self, path: &str, value: &Value, thinks: Option<bool>) -> Result<(), Error> {
        let switch = format!("{path}: {value}");
        if self.thinks.is_some() && self.thinks != thinks {
            return Err(Error::ThinkingConflict { first: self.switch.clone(), second: switch });
        }
        self.thinks = thinks;
        if self.switch.is_empty() {
            self.switch = switch;
        }
        Ok(())
    }
}

/// A member of the switch at `path` that says something else than how to think.
fn unknown(path: &str, name: &str, expected: &str) -> Error {
    let shown: String = name.chars().take(80).collect();
    Error::Request {
        path: format!("{path}.{shown}"),
        found: "a member".to_owned(),
        expected: format!("only {expected}"),
    }
}

/// What a template knows of thinking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinkingSupport {
    /// Whether thoughts occur in the template at all.
    pub thinks: bool,
    /// How prompts end when nothing is asked.
    pub default: Opening,
    /// Whether `enable_thinking` is looked at.
    pub has_switch: bool,
    /// The values of `reasoning_effort` that it takes; empty where it does not look at them.
    pub efforts: Vec<&'static str>,
}

/// A wish in a template's words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ThinkingPlan {
    /// Variables for the template.
    pub kwargs: Map<String, Value>,
    /// Text to add to the prompt: it ends the thought of a model that always begins one.
    pub suffix: &'static str,
}

impl ThinkingSupport {
    /// Renders a small conversation in the ways that matter. A template that fails on it knows no thinking.
    pub fn of_template(template: &ChatTemplate) -> ThinkingSupport {
        let source = template.source();
        let render = |name: &str, value: Value| {
            let messages = json!([{ "role": "user", "content": "Hi" }]);
            let kwargs = [(name.to_owned(), value)].into_iter().filter(|(name, _)| !name.is_empty()).collect();
            template.render(&ChatInput { messages, add_generation_prompt: true, kwargs, ..ChatInput::default() })
        };
        let default = render("", Value::Null).map_or(Opening::Unopened, |prompt| Opening::of_prompt(&prompt));
        let efforts = match source.contains("reasoning_effort") {
            true => EFFORTS.into_iter().filter(|effort| render("reasoning_effort", json!(effort)).is_ok()).collect(),
            false => Vec::new(),
        };
        ThinkingSupport {
            thinks: source.contains("<think>"),
            default,
            has_switch: source.contains("enable_thinking"),
            efforts,
        }
    }

    /// What fulfils a wish here.
    ///
    /// # Errors
    /// [`Error::ThinkingUnknown`] when thoughts are asked of a model that has none. Asking it for none is no error.
    pub fn plan(&self, wish: &ThinkingWish) -> Result<ThinkingPlan, Error> {
        let mut plan = ThinkingPlan::default();
        // `/think` in a text is no more than text to a model that knows no such thing.
        let is_soft = wish.switch.starts_with('/');
        if !self.thinks && !self.has_switch {
            return match wish.thinks == Some(true) && !is_soft {
                true => Err(Error::ThinkingUnknown { switch: wish.switch.clone() }),
                false => Ok(plan),
            };
        }
        if let Some(thinks) = wish.thinks {
            if self.has_switch {
                plan.kwargs.insert("enable_thinking".to_owned(), json!(thinks));
            } else if !thinks && self.default == Opening::Open && !is_soft {
                plan.suffix = "\n</think>\n\n";
            }
        }
        if let Some(effort) = wish.effort.as_deref().and_then(|effort| self.nearest(effort)) {
            plan.kwargs.insert("reasoning_effort".to_owned(), json!(effort));
        }
        Ok(plan)
    }

    /// The effort itself, or else the next higher, or else the next lower one that the template takes.
    fn nearest(&self, effort: &str) -> Option<&'static str> {
        let rank = |effort: &str| EFFORTS.iter().position(|known| *known == effort);
        let wanted = rank(effort)?;
        let higher = self.efforts.iter().find(|effort| rank(effort) >= Some(wanted));
        higher.or(self.efforts.last()).copied()
    }
}

/// `/think` or `/no_think` as the first or last word of a message of the user or the system; the latest one counts, as
/// the Qwen3 models were taught.
fn soft_switch(messages: Option<&Value>) -> Option<bool> {
    let speaks = |message: &&Value| matches!(message.get("role").and_then(Value::as_str), Some("user" | "system"));
    messages?.as_array()?.iter().rev().filter(speaks).find_map(|message| {
        let text = match message.get("content")? {
            Value::Array(parts) => parts.iter().rev().find_map(|part| part.get("text")?.as_str())?,
            text => text.as_str()?,
        };
        let mut words = text.split_whitespace();
        let (first, last) = (words.next(), words.next_back());
        last.into_iter().chain(first).find_map(|word| match word {
            "/think" => Some(true),
            "/no_think" | "/nothink" => Some(false),
            _ => None,
        })
    })
}

fn boolean(path: &str, value: &Value) -> Result<bool, Error> {
    value.as_bool().ok_or_else(|| fault(path, value, "true or false"))
}

fn count(path: &str, value: &Value) -> Result<u64, Error> {
    value.as_u64().ok_or_else(|| fault(path, value, "a whole number of tokens"))
}
