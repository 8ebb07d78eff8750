//! Texts as vectors, and how well documents fit a query: one prompt each, no answer.
//!
//! Contract: the vector of a text is the last position's state behind the final norm, at the end token that embedding
//! models were trained with, of length 1 (Qwen3-Embedding). A document's score is the share of `yes` against `no` as the
//! next word (Qwen3-Reranker).

use std::sync::{Arc, mpsc::channel};

use qwenkit_models::Adapter;
use qwenkit_tensor::TokenId;
use qwenkit_text::{SpecialTokens, Tokenizer};

use crate::{
    engine::Canceller,
    error::Error,
    request::{Event, Goal, Priority, Request},
    sequence::Listener,
    session::Session,
};

/// The token at which embedding models have read the whole text.
const END: &str = "<|endoftext|>";
/// What a reranker judges by where the caller says nothing.
const INSTRUCTION: &str = "Given a web search query, retrieve relevant passages that answer the query";
const RERANK_HEAD: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the \
     Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";
const RERANK_TAIL: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// A prompt that is read for numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Its tokens.
    pub ids: Vec<TokenId>,
    /// The numbers.
    pub goal: Goal,
}

/// What a text, or a list of ids, shall be read as.
#[derive(Clone, Debug)]
pub enum Input {
    /// Text, none of which is a control token.
    Text(String),
    /// Tokens as they are.
    Ids(Vec<TokenId>),
}

impl Session {
    /// The reading whose values are a text's vector.
    ///
    /// # Errors
    /// When the text is empty or longer than the context, or the model has no end token for texts.
    pub fn embedding(&self, input: &Input) -> Result<Reading, Error> {
        let end = special(self.tokenizer(), END)?;
        let mut ids = match input {
            Input::Text(text) => self.tokenizer().encode(text, SpecialTokens::AsText)?,
            Input::Ids(ids) => ids.clone(),
        };
        if ids.is_empty() {
            return Err(Error::PromptEmpty);
        }
        if ids.last() != Some(&end) {
            ids.push(end);
        }
        self.check_reading(ids.len())?;
        Ok(Reading { ids, goal: Goal::Hidden })
    }

    /// The reading whose values `relevance_score` turns into how well a document fits a query.
    ///
    /// # Errors
    /// When it is longer than the context, or the model has no output head or not the words for it.
    pub fn relevance(&self, instruction: Option<&str>, query: &str, document: &str) -> Result<Reading, Error> {
        let reading = self.pair(instruction, query, document)?.whole();
        self.check_reading(reading.ids.len())?;
        Ok(reading)
    }

    /// As `relevance`, but a document that is longer than the context is read up to where the context ends: the reading, and how many of
    /// the document's tokens it leaves out. What asks for the judgement stays whole, as in Qwen3-Reranker's own code.
    ///
    /// # Errors
    /// As `relevance`, and when the query alone is longer than the context.
    pub fn relevance_of_start(
        &self,
        instruction: Option<&str>,
        query: &str,
        document: &str,
    ) -> Result<(Reading, usize), Error> {
        let mut pair = self.pair(instruction, query, document)?;
        let room = self.info().context_tokens.saturating_sub(pair.head.len() + pair.tail.len());
        let left_out = pair.middle.len().saturating_sub(room);
        if left_out > 0 && self.pair(instruction, query, "")?.middle.len() < room {
            pair.middle.truncate(room);
        }
        let reading = pair.whole();
        self.check_reading(reading.ids.len())?;
        Ok((reading, left_out))
    }

    /// The prompt that a reranker judges.
    fn pair(&self, instruction: Option<&str>, query: &str, document: &str) -> Result<Pair, Error> {
        let tokenizer = self.tokenizer();
        let goal = match self.judge() {
            Some(_) => Goal::Hidden,
            None => {
                self.check_head()?;
                Goal::Logits(vec![special(tokenizer, "yes")?, special(tokenizer, "no")?])
            }
        };
        let instruction = instruction.unwrap_or(INSTRUCTION);
        let pair = format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}");
        Ok(Pair {
            head: tokenizer.encode(RERANK_HEAD, SpecialTokens::Parse)?,
            middle: tokenizer.encode(&pair, SpecialTokens::AsText)?,
            tail: tokenizer.encode(RERANK_TAIL, SpecialTokens::Parse)?,
            goal,
        })
    }

    /// The share of yes, 0 to 1, from the values of a reading for relevance.
    pub fn relevance_score(&self, values: &[f32]) -> f32 {
        let Some(rows) = self.judge() else { return share_of_yes(values) };
        let product =
            |row: &[f32]| row.iter().zip(values).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
        share_of_yes(&rows.chunks_exact(values.len().max(1)).map(product).collect::<Vec<_>>())
    }

    /// Refuses a reading that the context does not hold; it needs no room for an answer.
    fn check_reading(&self, tokens: usize) -> Result<(), Error> {
        self.check_length(tokens.saturating_sub(1))
    }

    /// Reads a prompt, under an adapter if there is one; its numbers come as `Event::Values`.
    ///
    /// # Errors
    /// When too many requests wait.
    pub fn start_reading(
        &self,
        reading: Reading,
        adapter: Option<Arc<Adapter>>,
        priority: Priority,
        listener: Listener,
    ) -> Result<Canceller, Error> {
        let Reading { ids, goal } = reading;
        self.submit(Request { prompt: ids, goal, priority, adapter, ..Request::default() }, listener)
    }

    /// Reads prompts and waits for their numbers, in their order.
    ///
    /// # Errors
    /// As `start_reading`, and when the engine stops.
    pub fn read(&self, readings: Vec<Reading>) -> Result<Vec<Vec<f32>>, Error> {
        let (sender, events) = channel();
        let mut found = vec![Vec::new(); readings.len()];
        for (i, reading) in readings.into_iter().enumerate() {
            let sender = sender.clone();
            let listener = Box::new(move |_, event| sender.send((i, event)).is_ok());
            self.start_reading(reading, None, Priority::Normal, listener)?;
        }
        let mut left = found.len();
        while left > 0 {
            match events.recv().map_err(|_| Error::Stopped)? {
                (i, Event::Values(values)) => found[i] = values,
                (_, Event::Finished(_)) => left -= 1,
                (_, Event::GivenUp(reason)) => return Err(Error::GivenUp { reason }),
                _ => {}
            }
        }
        Ok(found)
    }
}

/// A reranker's prompt in parts: the document's tokens are the last of the middle.
struct Pair {
    head: Vec<TokenId>,
    middle: Vec<TokenId>,
    tail: Vec<TokenId>,
    goal: Goal,
}

impl Pair {
    fn whole(self) -> Reading {
        Reading { ids: [self.head, self.middle, self.tail].concat(), goal: self.goal }
    }
}

fn special(tokenizer: &Tokenizer, token: &str) -> Result<TokenId, Error> {
    tokenizer.token_id(token).ok_or_else(|| Error::TokenMissing { token: token.to_owned() })
}

/// A query as embedding models read it: behind the task that it is for. Documents stand alone.
pub fn query_text(task: &str, query: &str) -> String {
    format!("Instruct: {task}\nQuery:{query}")
}

/// A state, (D), as a vector of length 1, of its first `dimensions` if fewer are wanted (matryoshka embeddings).
pub fn unit_vector(state: &[f32], dimensions: Option<usize>) -> Vec<f32> {
    let kept = &state[..dimensions.unwrap_or(state.len()).min(state.len())];
    let length = kept.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    kept.iter().map(|&x| (f64::from(x) * scale) as f32).collect()
}

/// The share of yes, from the logits of yes and no; 0 to 1.
fn share_of_yes(logits: &[f32]) -> f32 {
    match logits {
        [yes, no] => (1.0 / (1.0 + f64::from(no - yes).exp())) as f32,
        _ => 0.0,
    }
}
