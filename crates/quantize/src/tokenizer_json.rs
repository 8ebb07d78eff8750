//! A GGUF file's tokenizer as Hugging Face's files: tokenizer.json and tokenizer_config.json.

use qwenkit_formats::{Gguf, ModelFiles};
use qwenkit_text::{SPLIT_QWEN2, SPLIT_QWEN35};
use serde_json::{Map, Value, json};

use crate::{Error, metadata::unsayable};

/// Both files, and the tokens with a role.
pub(crate) struct Texts {
    pub(crate) json: Value,
    pub(crate) config: Value,
    pub(crate) eos: Option<u32>,
    pub(crate) bos: Option<u32>,
    pub(crate) pad: Option<u32>,
}

impl Texts {
    /// Those of `gguf`, which is what `files` are.
    pub(crate) fn of(files: &ModelFiles, gguf: &Gguf) -> Result<Texts, Error> {
        let meta = gguf.metadata();
        // What cannot be read as a tokenizer is refused with its reason there.
        qwenkit_engine::text_of(files)?;
        let tokens = meta.require_strings("tokenizer.ggml.tokens")?;
        let kinds = meta.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![1; tokens.len()]);
        let split = match meta.string("tokenizer.ggml.pre")? {
            Some("qwen35") => SPLIT_QWEN35,
            None | Some("qwen2") => SPLIT_QWEN2,
            Some(other) => return Err(unsayable(gguf.path(), "tokenizer.ggml.pre", other, "qwen2 or qwen35")),
        };
        let (mut vocab, mut added, mut decoder) = (Map::new(), Vec::new(), Map::new());
        for (id, (token, kind)) in tokens.iter().zip(&kinds).enumerate() {
            match kind {
                3 | 4 => {
                    let mut entry = json!({
                        "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                        "special": *kind == 3,
                    });
                    decoder.insert(id.to_string(), entry.clone());
                    entry["id"] = json!(id);
                    added.push(entry);
                }
                5 => {}
                _ => {
                    vocab.insert(token.to_owned(), json!(id));
                }
            }
        }
        let pair = |merge: &str| merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
        let merges: Vec<Value> = meta
            .require_strings("tokenizer.ggml.merges")?
            .iter()
            .filter_map(pair)
            // Hugging Face's library refuses merges without a result; llama.cpp never applies them.
            .filter(|(left, right)| {
                [left, right, &format!("{left}{right}")].iter().all(|t| vocab.contains_key(t.as_str()))
            })
            .map(|(left, right)| json!([left, right]))
            .collect();
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
                bytes,
            ]},
            "post_processor": bytes,
            "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        });
        let role = |key: &str| -> Result<Option<u32>, Error> {
            Ok(meta.u64(&format!("tokenizer.ggml.{key}"))?.and_then(|id| u32::try_from(id).ok()))
        };
        let (eos, bos, pad) = (role("eos_token_id")?, role("bos_token_id")?, role("padding_token_id")?);
        let name = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).map(str::to_owned);
        let mut config = json!({
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": false,
            "add_bos_token": meta.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            "added_tokens_decoder": decoder,
            "bos_token": null,
            "eos_token": name(eos),
            "pad_token": name(pad),
            "unk_token": null,
            "clean_up_tokenization_spaces": false,
            "split_special_tokens": false,
        });
        if let Some(template) = meta.string("tokenizer.chat_template")? {
            config["chat_template"] = json!(template);
        }
        Ok(Texts { json, config, eos, bos, pad })
    }
}
