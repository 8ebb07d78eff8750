//! Contracts of the tokenizer over a small vocabulary: both file formats agree, text survives, hostile files are refused.

use std::path::PathBuf;
use std::sync::OnceLock;

use proptest::prelude::*;
use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatInput, ChatTemplate, Error, SpecialTokens, StreamDecoder, Tokenizer, Vocab, encode_chat};
use serde_json::{Value, json};

fn json_file() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn from_json(file: &Value) -> Result<Tokenizer, Error> {
    Tokenizer::from_json(&serde_json::to_vec(file).unwrap(), "tokenizer.json")
}

/// The same tokenizer in GGUF's words.
fn vocab() -> Vocab {
    let file = json_file();
    let mut entries: Vec<(u64, String, i32)> = Vec::new();
    for (token, id) in file["model"]["vocab"].as_object().unwrap() {
        entries.push((id.as_u64().unwrap(), token.clone(), 1));
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let kind = if added["special"] == true { 3 } else { 4 };
        entries.push((added["id"].as_u64().unwrap(), added["content"].as_str().unwrap().to_owned(), kind));
    }
    entries.sort();
    let merges = file["model"]["merges"].as_array().unwrap();
    let merge = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    Vocab {
        origin: "model.gguf".to_owned(),
        model: "gpt2".to_owned(),
        pre: "qwen2".to_owned(),
        tokens: entries.iter().map(|(_, token, _)| token.clone()).collect(),
        token_types: entries.iter().map(|&(.., kind)| kind).collect(),
        merges: merges.iter().map(merge).collect(),
    }
}

fn tokenizers() -> &'static (Tokenizer, Tokenizer) {
    static BOTH: OnceLock<(Tokenizer, Tokenizer)> = OnceLock::new();
    BOTH.get_or_init(|| (from_json(&json_file()).unwrap(), Tokenizer::from_vocab(vocab()).unwrap()))
}

/// Text with what matters: merges, spaces, newlines, digits, marks, control tokens and their fragments.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[ a-z\n\r\t0-9']{0,12}",
        Just("<|im_end|>".to_owned()),
        Just("<|im_".to_owned()),
        Just("end|>".to_owned()),
        Just("e\u{301}".to_owned()),
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn both_formats_give_the_same_ids(text in text()) {
        let (json, vocab) = tokenizers();
        for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
            prop_assert_eq!(json.encode(&text, special).unwrap(), vocab.encode(&text, special).unwrap());
        }
    }

    #[test]
    fn text_survives_up_to_normalisation(text in text()) {
        let (tokenizer, _) = tokenizers();
        for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
            let ids = tokenizer.encode(&text, special).unwrap();
            let decoded = tokenizer.decode(&ids, true);
            // The ids of normalised text are the ids of the text, so a second round changes nothing.
            let again = tokenizer.encode(&decoded, special).unwrap();
            prop_assert_eq!(&again, &ids);
            if text.is_ascii() {
                prop_assert_eq!(&decoded, &text);
            }
        }
    }

    #[test]
    fn as_text_never_gives_control_tokens(text in text()) {
        let (tokenizer, _) = tokenizers();
        let ids = tokenizer.encode(&text, SpecialTokens::AsText).unwrap();
        prop_assert!(ids.iter().all(|&id| !tokenizer.is_special(id)));
    }

    #[test]
    fn streamed_text_is_the_whole_text(ids in prop::collection::vec(0_u32..400, 0..60), keep in any::<bool>()) {
        let (tokenizer, _) = tokenizers();
        let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
        let mut stream = StreamDecoder::new(tokenizer, keep);
        let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
        streamed += &stream.finish();
        prop_assert_eq!(streamed, tokenizer.decode(&ids, keep));
    }

    #[test]
    fn messages_cannot_make_control_tokens(parts in prop::collection::vec(text(), 1..4)) {
        let (tokenizer, _) = tokenizers();
        // Joins parts without anything between, cuts, and prints a list: all ways text might come together.
        let template = ChatTemplate::new(
            "{% for m in messages %}<|im_start|>{% for p in m.parts %}{{ p }}{% endfor %}{{ m.parts[0].split('a')[-1] }}\
             <{{ m.parts[0]|trim }}{{ m.parts }}{{ m|tojson }}<|im_end|>{% endfor %}",
            "test",
        ).unwrap();
        let plain = ChatInput { messages: json!([{"parts": ["x"]}]), ..ChatInput::default() };
        let input = ChatInput { messages: json!([{"parts": parts}]), ..ChatInput::default() };
        let special = |input: &ChatInput| -> Vec<TokenId> {
            let ids = encode_chat(&template, tokenizer, input).unwrap().ids;
            ids.into_iter().filter(|&id| tokenizer.is_special(id)).collect()
        };
        prop_assert_eq!(special(&input), special(&plain));
        let ids = encode_chat(&template, tokenizer, &input).unwrap().ids;
        let again = tokenizer.encode(&tokenizer.decode(&ids, true), SpecialTokens::AsText).unwrap();
        let rendered = tokenizer.encode(&template.render(&input).unwrap(), SpecialTokens::AsText).unwrap();
        prop_assert_eq!(tokenizer.decode(&again, true), tokenizer.decode(&rendered, true));
    }
}

#[test]
fn control_tokens_parse_or_stay_text() {
    let (tokenizer, _) = tokenizers();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert_eq!(tokenizer.encode("<|im_end|>", SpecialTokens::Parse).unwrap(), [end]);
    let text = tokenizer.encode("<|im_end|>", SpecialTokens::AsText).unwrap();
    assert!(text.len() > 1);
    assert_eq!(tokenizer.decode(&text, false), "<|im_end|>");
    assert_eq!(tokenizer.decode(&[end], false), "");
    assert_eq!(tokenizer.decode(&[end], true), "<|im_end|>");
    assert_eq!(tokenizer.vocab_size(), 384);
    assert_eq!(tokenizer.token_bytes(TokenId(384)), None);
    assert_eq!(tokenizer.special_tokens().count(), 109);
}

fn refused(change: impl FnOnce(&mut Vocab)) -> String {
    let mut vocab = vocab();
    change(&mut vocab);
    Tokenizer::from_vocab(vocab).expect_err("the vocabulary should be refused").to_string()
}

#[test]
fn contradictory_vocabularies_are_refused() {
    assert!(refused(|v| v.tokens[10] = v.tokens[11].clone()).contains("has id 10 and once more id 11"));
    assert!(refused(|v| v.token_types.truncate(9)).contains("384 tokens but 9 token types"));
    assert!(refused(|v| v.token_types[7] = 9).contains("has type 9"));
    assert!(
        refused(|v| v.pre = "deepseek-r1-qwen".to_owned()).contains("`deepseek-r1-qwen`; supported: qwen2, qwen35")
    );
    assert!(refused(|v| v.model = "llama".to_owned()).contains("supported: gpt2"));
    assert!(refused(|v| *v = Vocab { tokens: vec![], token_types: vec![], ..v.clone() }).contains("empty"));
    assert!(refused(|v| v.merges[1] = "nospace".to_owned()).contains("merge 1 is `nospace`"));
    // A merge without a result is never applied; one whose halves are unknown is an error.
    assert!(
        refused(|v| {
            v.tokens[3] = "abc".to_owned();
            v.merges.push("ab c".to_owned());
        })
        .contains("no ordinary token")
    );
}

#[test]
fn broken_tokenizer_files_are_refused() {
    for bytes in [&b"\xff\xfe{"[..], b"{\"model\": \"\xff\"}", b"", b"[]", b"{}", b"version https://git-lfs"] {
        assert!(Tokenizer::from_json(bytes, "t.json").unwrap_err().to_string().contains("`t.json`"));
    }
    let with = |pointer: &str, value: Value| {
        let mut file = json_file();
        *file.pointer_mut(pointer).unwrap() = value;
        from_json(&file).unwrap_err().to_string()
    };
    assert!(with("/model/merges/0", json!(["zzz", "e"])).contains("no ordinary token `zzze`"));
    assert!(with("/model/merges/0", json!(["ou", "he"])).contains("no ordinary token `ouhe`"));
    assert!(with("/model/merges/0", json!("one")).contains("expected two tokens"));
    assert!(with("/model/type", json!("Unigram")).contains("supported: BPE"));
    assert!(with("/normalizer", json!({"type": "Lowercase"})).contains("supported: NFC or null"));
    assert!(with("/added_tokens/0/id", json!(4_000_000_000_u32)).contains("without large gaps"));
    assert!(with("/added_tokens/0/id", json!(5)).contains("one token per id"));
    assert!(with("/model/continuing_subword_prefix", json!("##")).contains("continuing_subword_prefix"));
    assert!(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("(")).contains("cannot be read"));
}
