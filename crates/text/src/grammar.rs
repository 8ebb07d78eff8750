//! Answers held to a form: a JSON schema, a regular expression, a choice, a grammar, calls of given tools.
//!
//! Contract: the tokens that a [`Grammar`] allows are exactly those after which the form can still be fulfilled, and an
//! end token is allowed only where it is fulfilled. Forms come from strangers: compiling one and each step are bounded in
//! work and memory, and a form that is not understood in every part is refused rather than followed in half.
//!
//! The parser is `llguidance`. Not here: thoughts, after which a form begins, and when a form applies at all.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::{CallForm, Error, SpecialTokens, Tokenizer};

/// Bytes of a form.
const FORM_BYTES_MAX: usize = 256 << 10;
/// Texts of a choice.
const CHOICES_MAX: usize = 4096;

/// Tokens that vocabularies hold as text and that answers are taken apart by.
const TAGS: [&str; 4] = ["<think>", "</think>", "<tool_call>", "</tool_call>"];

/// What an answer may be.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// JSON that fulfils a schema.
    Json(Value),
    /// A JSON object.
    AnyJson,
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation, as llguidance documents it.
    Lark(String),
    /// Calls of tools and nothing else.
    Calls(CallForm),
}

/// Makes grammars over one tokenizer's vocabulary.
pub struct GrammarFactory {
    factory: ParserFactory,
    names: Vec<String>,
}

impl GrammarFactory {
    /// Over `tokenizer`, whose `end` token ends an answer. Takes a few tenths of a second for Qwen's vocabularies.
    ///
    /// # Errors
    /// When the vocabulary cannot be read as one.
    pub fn new(tokenizer: &Tokenizer, end: TokenId) -> Result<GrammarFactory, Error> {
        let mut words: Vec<Vec<u8>> = (0..tokenizer.vocab_size())
            .map(|id| tokenizer.token_bytes(TokenId(id as u32)).unwrap_or_default().to_vec())
            .collect();
        let mut names = Vec::new();
        let tags = TAGS.iter().filter_map(|tag| Some((*tag, tokenizer.token_id(tag)?)));
        for (name, id) in tokenizer.special_tokens().chain(tags) {
            // The mark keeps control tokens out of every text that a form allows.
            let marked = [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
            if let Some(word) = words.get_mut(id.0 as usize) {
                *word = marked;
                names.push(name.to_owned());
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end.0), &words);
        let env: TokEnv = Arc::new(Vocabulary { trie, tokenizer: tokenizer.clone() });
        let abilities = InferenceCapabilities { ff_tokens: true, ..InferenceCapabilities::default() };
        let factory = ParserFactory::new(&env, abilities, &SlicedBiasComputer::json_slices());
        let mut factory = factory.map_err(|error| Error::Grammar { reason: error.to_string() })?;
        factory.quiet();
        *factory.limits_mut() =
            ParserLimits { max_lexer_states: 50_000, verbose_errors: false, ..ParserLimits::default() };
        Ok(GrammarFactory { factory, names })
    }

    /// How a grammar in Lark's notation names a control token: by its name if the vocabulary has it, else by its letters.
    fn tag(&self, name: &str) -> String {
        match self.names.iter().any(|known| known == name) {
            true => name.to_owned(),
            false => json!(name).to_string(),
        }
    }

    /// A grammar for one answer of this form.
    ///
    /// # Errors
    /// [`Error::Grammar`] when the form is wrong, too large, or asks for what cannot be enforced.
    pub fn compile(&self, form: &Form) -> Result<Grammar, Error> {
        let refuse = |reason: String| Err(Error::Grammar { reason });
        let (bytes, grammar) = match form {
            Form::Json(schema) => {
                (schema.to_string().len(), TopLevelGrammar::from_json_schema(compact(schema.clone())))
            }
            Form::AnyJson => (0, TopLevelGrammar::from_json_schema(compact(json!({ "type": "object" })))),
            Form::Regex(regex) => (regex.len(), TopLevelGrammar::from_regex(regex)),
            Form::Choice(texts) if texts.is_empty() => return refuse("there is nothing to choose from".to_owned()),
            Form::Choice(texts) if texts.len() > CHOICES_MAX => {
                return refuse(format!("{} texts to choose from; {CHOICES_MAX} are the most", texts.len()));
            }
            Form::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
                let lark = format!("start: {}\n", texts.join(" | "));
                (lark.len(), TopLevelGrammar::from_lark(lark))
            }
            Form::Lark(lark) => (lark.len(), TopLevelGrammar::from_lark(lark.clone())),
            Form::Calls(form) => {
                let lark = form.lark(&|name| self.tag(name));
                (lark.len(), TopLevelGrammar::from_lark(lark))
            }
        };
        if bytes > FORM_BYTES_MAX {
            return refuse(format!("it has {bytes} bytes; {FORM_BYTES_MAX} are the most"));
        }
        // A library's slip on a stranger's form is that stranger's error alone.
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.factory.create_parser(grammar)));
        let parser = match made {
            Ok(Ok(parser)) => parser,
            Ok(Err(error)) => return refuse(first_line(&format!("{error:#}"))),
            Err(_) => return refuse("the grammar compiler gave up on it".to_owned()),
        };
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return refuse(first_line(&error));
        }
        match matcher.grammar_warnings().first() {
            Some(warning) => refuse(first_line(warning)),
            None => Ok(Grammar { matcher, end: self.factory.tok_env().tok_trie().eos_token() }),
        }
    }
}

/// JSON as models were taught it: one line, a blank behind colons and commas. Free white space lets a small model write
/// blanks without end.
pub(crate) fn compact(mut schema: Value) -> Value {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Value::Object(map) = &mut schema {
        let style = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        map.insert("x-guidance".to_owned(), style);
    }
    schema
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// A vocabulary in the parser's terms.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            match self.tokenizer.encode(text, SpecialTokens::AsText) {
                Ok(ids) => ids.into_iter().map(|id| id.0).collect(),
                Err(_) => self.trie.greedy_tokenize(text.as_bytes()),
            }
        })
    }
}

/// Follows one answer.
pub struct Grammar {
    matcher: Matcher,
    end: u32,
}

impl Clone for Grammar {
    fn clone(&self) -> Grammar {
        Grammar { matcher: self.matcher.deep_clone(), end: self.end }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// Sets the logits, (V), of tokens that cannot come next to minus infinity. Says whether the answer may end here;
    /// `ends` are the tokens that would end it.
    ///
    /// # Errors
    /// [`Error::Grammar`] when a step needs more work than is allowed; the answer cannot go on then.
    pub fn mask(&mut self, logits: &mut [f32], ends: &[TokenId]) -> Result<(), Error> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| failed(&error))?;
        let may_end = allowed.is_allowed(self.end);
        let kept: Vec<(usize, f32)> = match may_end {
            true => ends.iter().filter_map(|id| Some((id.0 as usize, *logits.get(id.0 as usize)?))).collect(),
            false => Vec::new(),
        };
        for (words, logits) in allowed.as_slice().iter().zip(logits.chunks_mut(32)) {
            match *words {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                bits => {
                    let barred = logits.iter_mut().enumerate().filter(|(i, _)| bits >> i & 1 == 0);
                    barred.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
        let covered = allowed.as_slice().len() * 32;
        logits.iter_mut().skip(covered).for_each(|logit| *logit = f32::NEG_INFINITY);
        kept.into_iter().for_each(|(id, logit)| logits[id] = logit);
        Ok(())
    }

    /// Hears of the token that came.
    ///
    /// # Errors
    /// [`Error::Grammar`] when it was not allowed.
    pub fn accept(&mut self, id: TokenId) -> Result<(), Error> {
        self.matcher.consume_token(id.0).map_err(|error| failed(&error))
    }

    /// The tokens that must come next, if there is but one way to go on.
    pub fn forced(&mut self) -> Vec<TokenId> {
        self.matcher.compute_ff_tokens().into_iter().map(TokenId).collect()
    }

    /// Whether the form is fulfilled and nothing can follow.
    pub fn is_over(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// Whether the answer may end here.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(true)
    }
}

fn failed(error: &impl std::fmt::Display) -> Error {
    Error::Grammar { reason: first_line(&error.to_string()) }
}
