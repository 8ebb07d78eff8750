//! In which form a file gives its samples, told from the keys of its first line.

use serde_json::{Map, Value};

/// The forms, for messages.
pub(crate) const SHOWN: &str = "  \
{\"messages\": [{\"role\": \"user\", \"content\": ...}, {\"role\": \"assistant\", \"content\": ...}], \"tools\": [...]}
  {\"prompt\": ..., \"completion\": ...}
  {\"instruction\": ..., \"input\": ..., \"output\": ...}
  {\"prompt\": ..., \"chosen\": ..., \"rejected\": ...}
  {\"text\": ..., \"label\": ...}
  {\"text\": ...}";

/// A form of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `messages`, and `tools`: OpenAI's form of a conversation.
    Messages,
    /// `conversations` with `from` and `value`: ShareGPT's form.
    Conversations,
    /// `prompt` and `completion`.
    Completion,
    /// `instruction`, `input` and `output`: Alpaca's form.
    Instruction,
    /// `chosen` and `rejected`, with a `prompt` or as whole conversations.
    Preference,
    /// `input`, `preferred_output` and `non_preferred_output`: OpenAI's form of preferences.
    PreferredOutput,
    /// A text and its label.
    Label,
    /// `text` alone.
    Text,
}

/// What a model learns from data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Objective {
    /// To go on as the data does.
    Sft,
    /// To prefer one answer to another.
    Preference,
    /// To name a text's label.
    Label,
}

/// The keys that hold a text and its label, in files of that form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelKeys {
    /// The text's key, or `None` to look for `text`, `sentence`, `question` or `query`.
    pub text: Option<String>,
    /// The label's key, or `None` to look for `label`, `category`, `intent` or `class`.
    pub label: Option<String>,
}

impl LabelKeys {
    const TEXTS: [&str; 4] = ["text", "sentence", "question", "query"];
    const LABELS: [&str; 4] = ["label", "category", "intent", "class"];

    /// The keys to look at, found among `keys`.
    pub(crate) fn among<'a>(&self, keys: impl Iterator<Item = &'a str> + Clone) -> Option<(&'a str, &'a str)> {
        let find = |named: &Option<String>, usual: &[&str]| match named {
            Some(name) => keys.clone().find(|key| key == name),
            None => usual.iter().find_map(|usual| keys.clone().find(|key| key == usual)),
        };
        Some((find(&self.text, &Self::TEXTS)?, find(&self.label, &Self::LABELS)?))
    }

    /// The names that were given.
    pub(crate) fn named(&self) -> impl Iterator<Item = &str> {
        self.text.iter().chain(&self.label).map(String::as_str)
    }
}

impl Form {
    /// The form of a line, from its keys.
    pub(crate) fn of(object: &Map<String, Value>, labels: &LabelKeys) -> Option<Form> {
        let has = |key: &str| object.contains_key(key);
        let label = || labels.among(object.keys().map(String::as_str)).is_some();
        match () {
            // Somebody who names keys wants labels.
            () if labels.named().next().is_some() => label().then_some(Form::Label),
            () if has("chosen") && has("rejected") => Some(Form::Preference),
            () if has("preferred_output") && has("non_preferred_output") => Some(Form::PreferredOutput),
            () if has("messages") => Some(Form::Messages),
            () if has("conversations") => Some(Form::Conversations),
            () if has("prompt") && has("completion") => Some(Form::Completion),
            () if has("instruction") && has("output") => Some(Form::Instruction),
            () if label() => Some(Form::Label),
            () if has("text") => Some(Form::Text),
            () => None,
        }
    }

    /// The form in words.
    pub fn name(self) -> &'static str {
        match self {
            Form::Messages => "a conversation (`messages`)",
            Form::Conversations => "a conversation (`conversations`)",
            Form::Completion => "a prompt with its completion",
            Form::Instruction => "an instruction with its output",
            Form::Preference => "a preference (`chosen`, `rejected`)",
            Form::PreferredOutput => "a preference (`preferred_output`, `non_preferred_output`)",
            Form::Label => "a text with a label",
            Form::Text => "a plain text",
        }
    }

    /// What a model learns from data of this form.
    pub fn objective(self) -> Objective {
        match self {
            Form::Messages | Form::Conversations | Form::Completion | Form::Instruction | Form::Text => Objective::Sft,
            Form::Preference | Form::PreferredOutput => Objective::Preference,
            Form::Label => Objective::Label,
        }
    }
}
