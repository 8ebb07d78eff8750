//! Tiny checkpoints with random weights, some of them changed, and asks whose answers are known beforehand.

use std::{
    fs,
    path::{Path, PathBuf},
};

use qwenkit_engine::{Answer, Ask, Options, Piece, Prompt, Sampling, Session, Speculate, Summary, TextPiece};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Isa;
use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatInput, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The recorded checkpoint `name`.
pub(crate) fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(name)
}

/// A copy of the checkpoint `name` that may be changed.
pub(crate) fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        fs::copy(checkpoint(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Changes one JSON file of a copy.
pub(crate) fn edit(folder: &TempDir, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.path().join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

pub(crate) fn options(context_tokens: Option<usize>) -> Options {
    Options {
        threads: 1,
        isa: Isa::detect().unwrap(),
        context_tokens,
        max_waiting: 64,
        speculate: Speculate::Auto,
        prefix_cache: None,
    }
}

pub(crate) fn open(path: &Path, context_tokens: Option<usize>) -> Session {
    let files = ModelFiles::open(path).unwrap();
    Session::open(&files, &options(context_tokens), &mut |_| {}).unwrap()
}

/// The qwen2 checkpoint with its own context.
pub(crate) fn qwen2() -> Session {
    open(&checkpoint("qwen2"), None)
}

/// A conversation of (role, content).
pub(crate) fn chat(messages: &[(&str, &str)]) -> Prompt {
    let messages = messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    let messages = Value::Array(messages);
    Prompt::Chat(Box::new(ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() }))
}

/// A greedy ask of at most `max_tokens` that goes on past the model's own end.
pub(crate) fn greedy(prompt: Prompt, max_tokens: usize) -> Ask {
    Ask {
        prompt,
        sampling: Sampling::greedy(),
        max_tokens: Some(max_tokens),
        ignore_stop_tokens: true,
        ..Ask::default()
    }
}

/// A sampling that answers exactly `ids`, all different, and then whatever the model says: each has a bias above those
/// after it, and what was said is pushed below everything.
pub(crate) fn script(ids: &[TokenId]) -> Sampling {
    let bias = |i: usize| 10_000.0 - 100.0 * i as f32;
    Sampling {
        presence_penalty: 20_000.0,
        logit_bias: ids.iter().enumerate().map(|(i, id)| (*id, bias(i))).collect(),
        ..Sampling::greedy()
    }
}

/// The single-byte tokens of `text`, whose bytes must all differ.
pub(crate) fn byte_tokens(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let all = (0..tokenizer.vocab_size() as u32).map(TokenId).filter(|id| !tokenizer.is_special(*id));
    let single: Vec<(TokenId, u8)> = all
        .filter_map(|id| match tokenizer.token_bytes(id) {
            Some([byte]) => Some((id, *byte)),
            _ => None,
        })
        .collect();
    let id = |byte: u8| single.iter().find(|(_, b)| *b == byte).map(|(id, _)| *id).unwrap();
    let ids: Vec<TokenId> = text.bytes().map(id).collect();
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "a script says each token once: {text}");
    }
    ids
}

/// A whole answer: its pieces of text and its summary.
pub(crate) struct Told {
    pub(crate) pieces: Vec<TextPiece>,
    pub(crate) summary: Summary,
}

/// Reads an answer to its end, holding it to what every answer must be.
pub(crate) fn read(answer: Answer) -> Told {
    let (mut pieces, mut summary) = (Vec::new(), None);
    for piece in answer {
        assert!(summary.is_none(), "nothing comes after the summary");
        match piece.unwrap() {
            Piece::Prefill { done_tokens, total_tokens, .. } => assert!(done_tokens <= total_tokens),
            Piece::Prompt(_) => panic!("no prompt is to be scored"),
            Piece::Text(piece) => pieces.push(piece),
            Piece::Done(done) => summary = Some(done),
        }
    }
    let summary = summary.unwrap();
    let text: String = pieces.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(text, summary.text, "the pieces together are the answer");
    let ids: Vec<TokenId> = pieces.iter().flat_map(|p| p.ids.iter().copied()).collect();
    assert_eq!(ids, summary.ids, "the pieces' tokens together are the answer's");
    Told { pieces, summary }
}

pub(crate) fn tell(session: &Session, ask: Ask) -> Told {
    read(session.ask(ask).unwrap())
}
