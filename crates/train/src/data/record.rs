//! What a line of data says, whatever form it was written in.

use serde_json::{Map, Value};

/// A conversation, checked, in the form that chat templates read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// The messages: objects with `role` and `content`, a text, and what else templates read.
    pub messages: Vec<Value>,
    /// Which of them are learnt from; only messages of the assistant ever are.
    pub trained: Vec<bool>,
    /// The tools on offer, in the form templates print.
    pub tools: Option<Value>,
    /// Further variables for the template.
    pub kwargs: Map<String, Value>,
}

/// What a line of data says.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation to learn the answers of.
    Chat(Chat),
    /// A prompt and how it goes on. Whether both are put into the chat template is decided later.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// A text that is learnt from its first to its last word.
    Text(String),
    /// Two answers to one prompt, one of them better.
    Preference {
        /// The conversation with the better answer.
        chosen: Chat,
        /// The same beginning with the worse one.
        rejected: Chat,
    },
    /// A text and what it is.
    Label {
        /// The text.
        text: String,
        /// Its label.
        label: String,
    },
}

impl Chat {
    /// One question and its answer, which is learnt.
    pub fn of_turn(question: &str, answer: &str) -> Chat {
        let message = |role: &str, content: &str| serde_json::json!({ "role": role, "content": content });
        Chat {
            messages: vec![message("user", question), message("assistant", answer)],
            trained: vec![false, true],
            ..Chat::default()
        }
    }

    /// Adds messages, learnt from or not.
    pub(crate) fn push_all(&mut self, messages: Vec<(Value, bool)>) {
        for (message, is_trained) in messages {
            self.messages.push(message);
            self.trained.push(is_trained);
        }
    }
}
