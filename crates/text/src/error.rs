//! What can go wrong between text and tokens, as facts with values.
//!
//! Every message names the file it speaks of, what was found and what was expected; a hint stands on a line of its own.

use thiserror::Error;

/// An error of this crate.
#[derive(Debug, Error)]
pub enum Error {
    /// The tokenizer file is not JSON, or not JSON of the expected shape.
    #[error(
        "tokenizer `{origin}`: cannot be read as a tokenizer.json: {problem}\n\
             hint: fetch the file again; a pointer file or a cut download often looks like this"
    )]
    TokenizerJson {
        /// The file.
        origin: String,
        /// Where and what.
        problem: String,
    },
    /// The tokenizer asks for something that no Qwen tokenizer uses.
    #[error("tokenizer `{origin}`: {setting} is `{found}`; supported: {supported}")]
    Unsupported {
        /// The file.
        origin: String,
        /// The setting, as the file names it.
        setting: &'static str,
        /// Its value there.
        found: String,
        /// What would work.
        supported: &'static str,
    },
    /// The vocabulary has no token at all.
    #[error("tokenizer `{origin}`: the vocabulary is empty; expected one token for each of the 256 bytes at least")]
    EmptyVocabulary {
        /// The file.
        origin: String,
    },
    /// The same text or the same id occurs twice.
    #[error(
        "tokenizer `{origin}`: token `{token}` has id {first} and once more id {second}; expected one id per token"
    )]
    DuplicateToken {
        /// The file.
        origin: String,
        /// The text of the token.
        token: String,
        /// The id met first.
        first: u32,
        /// The id met later.
        second: u32,
    },
    /// Two tokens claim one id.
    #[error("tokenizer `{origin}`: id {id} belongs to `{first}` and to `{second}`; expected one token per id")]
    DuplicateId {
        /// The file.
        origin: String,
        /// The id.
        id: u32,
        /// The token met first.
        first: String,
        /// The token met later.
        second: String,
    },
    /// The token types do not go with the tokens.
    #[error("tokenizer `{origin}`: {tokens} tokens but {types} token types; expected as many types as tokens")]
    TokenTypes {
        /// The file.
        origin: String,
        /// Number of tokens.
        tokens: usize,
        /// Number of types.
        types: usize,
    },
    /// A token carries a type that does not exist.
    #[error("tokenizer `{origin}`: token {id} `{token}` has type {found}; expected 1 (normal) to 6 (byte)")]
    TokenType {
        /// The file.
        origin: String,
        /// The id of the token.
        id: usize,
        /// The text of the token.
        token: String,
        /// Its type.
        found: i32,
    },
    /// An id far beyond the number of tokens.
    #[error(
        "tokenizer `{origin}`: token `{token}` has id {id}, but there are only {tokens} tokens; \
             expected ids without large gaps"
    )]
    IdOutOfRange {
        /// The file.
        origin: String,
        /// The text of the token.
        token: String,
        /// Its id.
        id: u32,
        /// Number of tokens in the file.
        tokens: usize,
    },
    /// A merge that is not two tokens which join to a third.
    #[error("tokenizer `{origin}`: merge {index} is `{merge}`, {problem}")]
    Merge {
        /// The file.
        origin: String,
        /// The position in the list of merges, from 0.
        index: usize,
        /// The merge as it stands there.
        merge: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Text that cannot be turned into tokens.
    #[error("the text could not be tokenized: {problem}")]
    Encode {
        /// What the tokenizer said.
        problem: String,
    },
    /// The vocabulary lacks bytes of the text, so tokens would silently lose them.
    #[error(
        "the text contains the byte 0x{byte:02X}, for which tokenizer `{origin}` has no token\n\
             hint: the vocabulary is incomplete; fetch the model again"
    )]
    MissingByte {
        /// The file.
        origin: String,
        /// The byte.
        byte: u8,
    },
    /// The chat template is not a valid template.
    #[error("chat template of `{origin}`, line {line}, column {column}: {problem}")]
    TemplateSyntax {
        /// The file or model that the template came with.
        origin: String,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What the parser said.
        problem: String,
    },
    /// The chat template failed while it ran.
    #[error("chat template of `{origin}`, line {line}, column {column}: {problem}")]
    TemplateRun {
        /// The file or model that the template came with.
        origin: String,
        /// From 1; 0 where unknown.
        line: usize,
        /// From 1, in characters; 0 where unknown.
        column: usize,
        /// What happened.
        problem: String,
    },
    /// The chat template refused the conversation by `raise_exception`.
    #[error("the model's chat template refuses this conversation: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// The chat template used up its budget of work or memory.
    #[error(
        "chat template of `{origin}` ran too long: it used up its budget of {fuel} steps\n\
             hint: the template most likely loops without end; use the one published with the model"
    )]
    TemplateTooLong {
        /// The file or model that the template came with.
        origin: String,
        /// The budget in steps of the template engine.
        fuel: u64,
    },
    /// The chat template wrote more than a prompt can sensibly hold.
    #[error(
        "chat template of `{origin}` wrote more than {limit_bytes} bytes, the limit for this conversation\n\
             hint: the template repeats its input; use the one published with the model"
    )]
    TemplateOutput {
        /// The file or model that the template came with.
        origin: String,
        /// The limit in bytes.
        limit_bytes: usize,
    },
    /// The conversation has not the shape a template can work on.
    #[error("{what}: found {found}, expected {expected}")]
    ChatInput {
        /// Which part of the input.
        what: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A message of the assistant that cannot be learnt from as the template prints it.
    #[error("message {message} of the conversation cannot be learnt from: {problem}")]
    Turn {
        /// The message's position, from 0.
        message: usize,
        /// What is in the way.
        problem: String,
    },
    /// A part of a request that has not the shape its interface asks for.
    #[error("`{path}`: found {found}, expected {expected}")]
    Request {
        /// Where, as `tools[0].function.name`.
        path: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A form for answers that cannot be followed.
    #[error("the form asked of the answer cannot be followed: {reason}")]
    Grammar {
        /// What is wrong with it.
        reason: String,
    },
    /// Two switches of one request say opposite things about thinking.
    #[error("`{first}` and `{second}` contradict each other about thinking; leave one of them out")]
    ThinkingConflict {
        /// The first switch with its value.
        first: String,
        /// The second.
        second: String,
    },
    /// The model has no thoughts to switch on.
    #[error(
        "this model does not think, so `{switch}` cannot be followed\n\
             hint: leave the switch out, or choose a model that thinks"
    )]
    ThinkingUnknown {
        /// The switch with its value.
        switch: String,
    },
}
