//! Conversations cut into what a model is asked and what it answers, for tuning.
//!
//! Contract: [`Turn::prompt`] is, token for token, what the model gets to read when it is asked for that message, and
//! [`Turn::answer`] what it then has to write, its end token included. So a model is tuned on what it will see, and
//! nothing that the template itself puts into a prompt (headers, an empty thought) counts as an answer.
//!
//! How: the template renders the conversation before the message, with the opening of an answer, and the conversation up
//! to the message. What the second has beyond the first is the answer. Strings of the input carry the marks of
//! [`crate::guard`], so a message that spells `<|im_end|>` does not end an answer. The text is cut into tokens at the
//! border of prompt and answer, as it is when a model answers; no token crosses it.
//!
//! Not here: several turns in one sequence, what becomes of turns that the template prints differently later.

use qwenkit_tensor::TokenId;
use serde_json::{Map, Value, json};

use crate::chat::Prepared;
use crate::guard::{Guard, Piece};
use crate::{ChatInput, ChatTemplate, Error, Opening, ThinkingPlan, ThinkingSupport, ThinkingWish, Tokenizer};

/// One answer of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The position of its message.
    pub message: usize,
    /// What the model reads before it answers.
    pub prompt: Vec<TokenId>,
    /// What it answers. The last of these tokens ends the answer.
    pub answer: Vec<TokenId>,
    /// Whether the template prints the message's thoughts; true where it has none.
    pub prints_thoughts: bool,
    /// Whether the prompt is the template's own for an answer without thoughts, but the template prints such answers
    /// without the opening that it gives them.
    pub is_reopened: bool,
}

/// Cuts conversations into turns, with one model's template and tokenizer.
pub struct TurnEncoder<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    /// The ways to ask for an answer: as nobody asks, without and with thoughts.
    plans: Vec<ThinkingPlan>,
}

impl<'a> TurnEncoder<'a> {
    /// For conversations of this model.
    pub fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer) -> TurnEncoder<'a> {
        let support = ThinkingSupport::of_template(template);
        let wishes = [None, Some(false), Some(true)].map(|thinks| ThinkingWish { thinks, ..ThinkingWish::default() });
        // Of ways that come to the same prompt one is enough.
        let mut plans: Vec<ThinkingPlan> = Vec::new();
        let mut prompts: Vec<String> = Vec::new();
        for plan in wishes.iter().filter_map(|wish| support.plan(wish).ok()) {
            let messages = json!([{ "role": "user", "content": "Hi" }]);
            let kwargs = plan.kwargs.clone();
            let input = ChatInput { messages, add_generation_prompt: true, kwargs, ..ChatInput::default() };
            let prompt = template.render(&input).unwrap_or_default() + plan.suffix;
            if plans.is_empty() || !prompts.contains(&prompt) {
                plans.push(plan);
                prompts.push(prompt);
            }
        }
        TurnEncoder { template, tokenizer, plans }
    }

    /// The turns of a conversation at these messages, in ascending order. `input.messages` ends where it ends;
    /// `add_generation_prompt`, `suffix` and `answer_start` are not looked at.
    ///
    /// # Errors
    /// Those of [`crate::encode_chat`]; [`Error::Turn`] where the template prints a message in another way than it asks for it.
    pub fn turns(&self, input: &ChatInput, messages: &[usize]) -> Result<Vec<Turn>, Error> {
        let whole = Prepared::new(input)?;
        let guard = Guard::new(self.tokenizer, self.template.source(), whole.variables())?;
        let conversation = Conversation { encoder: self, guard, input };
        messages.iter().map(|&message| conversation.turn(message)).collect()
    }
}

struct Conversation<'a> {
    encoder: &'a TurnEncoder<'a>,
    guard: Guard,
    input: &'a ChatInput,
}

impl Conversation<'_> {
    fn turn(&self, message: usize) -> Result<Turn, Error> {
        let printed = self.render(message + 1, false, &Map::new())?;
        let mut prompts = Vec::with_capacity(self.encoder.plans.len());
        for plan in &self.encoder.plans {
            prompts.push(self.render(message, true, &plan.kwargs)? + plan.suffix);
        }
        // The longest prompt that the printed conversation begins with: an empty thought belongs to the prompt that closes it.
        let whole =
            prompts.iter().filter(|prompt| printed.starts_with(prompt.as_str())).max_by_key(|prompt| prompt.len());
        let (prompt, answer, is_reopened) = match whole {
            Some(prompt) => (prompt.as_str(), printed.get(prompt.len()..).unwrap_or_default(), false),
            None => {
                let before = self.render(message, false, &Map::new())?;
                let (prompt, answer) = reopened(&before, &prompts, &printed).ok_or_else(|| self.mismatch(message))?;
                (prompt, answer, true)
            }
        };
        let answer = self.until_end(answer).ok_or_else(|| self.endless(message, answer))?;
        Ok(Turn {
            message,
            prompt: self.encode(prompt)?,
            answer: self.encode(answer)?,
            prints_thoughts: self.prints_thoughts(message, answer),
            is_reopened,
        })
    }

    /// The first messages as the template prints them, strings of the input marked.
    fn render(&self, count: usize, add_generation_prompt: bool, kwargs: &Map<String, Value>) -> Result<String, Error> {
        let list = self.input.messages.as_array().and_then(|list| list.get(..count)).unwrap_or_default();
        let mut variables = self.input.kwargs.clone();
        variables.extend(kwargs.clone());
        let input = ChatInput {
            messages: Value::Array(list.to_vec()),
            tools: self.input.tools.clone(),
            add_generation_prompt,
            kwargs: variables,
            ..ChatInput::default()
        };
        let mut prepared = Prepared::new(&input)?;
        self.guard.mark_all(prepared.variables_mut());
        self.encoder.template.render_prepared(prepared)
    }

    /// The answer up to its last control token; nothing but white space may follow that.
    fn until_end<'a>(&self, answer: &'a str) -> Option<&'a str> {
        let rest = match self.guard.split(answer).last()? {
            Piece::Special(_) => "",
            Piece::Text(rest) => rest,
        };
        let end = answer.len() - rest.len();
        (end > 0 && rest.trim().is_empty()).then(|| answer.get(..end).unwrap_or_default())
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        self.guard.encode(self.encoder.tokenizer, text)
    }

    fn message(&self, message: usize) -> &Value {
        self.input.messages.get(message).unwrap_or(&Value::Null)
    }

    fn prints_thoughts(&self, message: usize, answer: &str) -> bool {
        match self.message(message).get("reasoning_content").and_then(Value::as_str).map(str::trim) {
            None | Some("") => true,
            Some(thought) => self.guard.unmark(answer).contains(thought),
        }
    }

    fn mismatch(&self, message: usize) -> Error {
        let problem = "the template prints it in another way than it asks for it".to_owned();
        Error::Turn { message, problem }
    }

    fn endless(&self, message: usize, answer: &str) -> Error {
        let rest = self.guard.unmark(answer);
        let end: String = rest.chars().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect();
        let problem = format!("the template ends it with `{}` and not with a control token", end.escape_debug());
        Error::Turn { message, problem }
    }
}

/// The prompt and the answer where the template prints an answer without the opening that it gives to prompts: QwQ's
/// prompts open a thought, and its answers of earlier turns have none. What the opening adds may be tags of thought alone,
/// open for an answer with a thought and closed for one without.
fn reopened<'a>(before: &str, prompts: &'a [String], printed: &'a str) -> Option<(&'a str, &'a str)> {
    let turn = printed.strip_prefix(before)?;
    let thinks = turn.contains("</think>");
    prompts.iter().find_map(|prompt| {
        let opening = prompt.strip_prefix(before)?;
        let fits = match Opening::of_prompt(prompt) {
            Opening::Open => thinks,
            Opening::Closed => !thinks,
            Opening::Unopened => false,
        };
        // Both may begin with the same letters of different tags, which belong to the answer.
        let borders = (1..=shared_bytes(opening, turn)).rev().filter(|&at| opening.is_char_boundary(at));
        let is_border = |at: usize| {
            let (header, added) = opening.split_at_checked(at).unwrap_or_default();
            let is_tags = added.replace("<think>", "").replace("</think>", "").trim().is_empty();
            is_tags && !header.trim().is_empty()
        };
        let border = borders.take_while(|_| fits).find(|&at| is_border(at))?;
        Some((prompt.as_str(), turn.get(border..)?))
    })
}

/// Bytes of whole characters that both begin with.
fn shared_bytes(one: &str, other: &str) -> usize {
    one.chars().zip(other.chars()).take_while(|(one, other)| one == other).map(|(one, _)| one.len_utf8()).sum()
}
