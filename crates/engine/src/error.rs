//! What an engine refuses, and why it stops: facts with values.

use std::path::PathBuf;

use qwenkit_tensor::{AllocError, TokenId};

/// Why a model could not be opened or a request not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's file.
    #[error(transparent)]
    Model(#[from] qwenkit_models::Error),

    /// The model's file, below its weights.
    #[error(transparent)]
    Format(#[from] qwenkit_formats::Error),

    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] qwenkit_text::Error),

    /// The file names no tokenizer that can be read.
    #[error("{origin}: no tokenizer found; expected {expected}")]
    NoTokenizer {
        /// The file or folder.
        origin: String,
        /// What would have been read.
        expected: &'static str,
    },

    /// An answer from a model that has no words.
    #[error(
        "{origin} has no output head, expected a model that answers; embedding models turn texts into vectors (`embed`), \
         rerankers compare them (`rerank`), for answers take another model"
    )]
    Headless {
        /// The file or folder.
        origin: String,
    },

    /// A conversation for a model without a chat template.
    #[error("{origin} has no chat template, so it cannot hold a conversation; give it plain text (`--raw`)")]
    NoTemplate {
        /// The file or folder.
        origin: String,
    },

    /// No memory.
    #[error(transparent)]
    Alloc(#[from] AllocError),

    /// The machine has too little memory for the model.
    #[error(
        "{what} needs {needed_bytes} bytes of memory and {available_bytes} are available; close other programs, take a \
         smaller model or quantisation{hint}"
    )]
    Memory {
        /// What was to be held.
        what: &'static str,
        /// Its size.
        needed_bytes: u64,
        /// What the machine, or this process's limit, has left.
        available_bytes: u64,
        /// More that can be done, as the end of the sentence.
        hint: String,
    },

    /// A prompt with nothing in it.
    #[error("the prompt holds no tokens; give it some text")]
    PromptEmpty,

    /// The vocabulary lacks a token that this use of the model needs.
    #[error(
        "the model's vocabulary has no token {token:?}, without which it can neither embed nor rerank\n\
         hint: use a Qwen3-Embedding or Qwen3-Reranker model, with its own tokenizer"
    )]
    TokenMissing {
        /// The token.
        token: String,
    },

    /// A prompt that the context cannot hold.
    #[error(
        "the prompt has {prompt_tokens} tokens and the context holds {context_tokens}, one of them for the answer; \
         shorten the prompt{hint}"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of the context in force.
        context_tokens: usize,
        /// How to have more, as the end of the sentence.
        hint: String,
    },

    /// Images for an engine without a tower.
    #[error("the model was opened to read text only, found an image; open it with its vision tower")]
    Blind,

    /// A vision model's folder without its processor's numbers.
    #[error(
        "`{}` has no preprocessor_config.json, which says how images become patches\nhint: fetch it into the same folder, or name \
         such a file with --processor", path.display()
    )]
    NoProcessor {
        /// The folder.
        path: PathBuf,
    },

    /// A processor's numbers that are missing or out of range.
    #[error("{}: {source}", path.display())]
    Processor {
        /// The file that they stand in.
        path: PathBuf,
        /// What is wrong.
        source: qwenkit_media::Error,
    },

    /// An image or film that does not become patches.
    #[error(transparent)]
    Image(#[from] qwenkit_media::Error),

    /// A request that began and could not be finished, by no fault of its own.
    #[error("the answer was given up: {reason}")]
    GivenUp {
        /// What happened.
        reason: String,
    },

    /// Placeholders of images that do not fit the images.
    #[error("the prompt has {found} placeholder tokens of images, expected {expected}")]
    Placeholders {
        /// How many were found.
        found: usize,
        /// What would have been right.
        expected: String,
    },

    /// A token id that the model does not have.
    #[error("token id {found} is not in the model's vocabulary of {vocab}")]
    TokenUnknown {
        /// The id.
        found: TokenId,
        /// The model's ids are below this.
        vocab: usize,
    },

    /// A sampling setting outside its range.
    #[error("{setting} is {found}, expected {expected}")]
    Sampling {
        /// The setting.
        setting: &'static str,
        /// Its value.
        found: f32,
        /// Its range.
        expected: &'static str,
    },

    /// More requests than may wait.
    #[error(
        "the queue has no room for {asked} more: {waiting} requests wait already and {most} may; try again in a while, or with fewer at once"
    )]
    QueueFull {
        /// How many came together.
        asked: usize,
        /// How many wait.
        waiting: usize,
        /// The limit.
        most: usize,
    },

    /// A folder for kept beginnings of prompts that is no use.
    #[error(
        "`{}` cannot keep beginnings of prompts: {reason}\nhint: name a folder that this user may write to (--prefix-cache), or do without",
        folder.display()
    )]
    PrefixCache {
        /// The folder.
        folder: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },

    /// The engine's thread could not be started.
    #[error("cannot start the engine's thread: {reason}")]
    Thread {
        /// The system's words.
        reason: std::io::Error,
    },

    /// The engine's thread has ended, after a fault or at shutdown.
    #[error("the engine has stopped; start the program again and report what it printed before")]
    Stopped,
}
