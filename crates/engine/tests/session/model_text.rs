//! What ends an answer and how it is sampled by default, from whichever files say it.

use qwenkit_engine::Sampling;
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::fixture::{checkpoint, copy, edit, open};

fn set(key: &'static str, value: Value) -> impl FnOnce(&mut Value) {
    move |config| {
        config[key] = value;
    }
}

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

#[test]
fn stop_tokens_are_the_union_of_all_files() {
    let folder = copy("qwen2");
    // Qwen's own two, `<|endoftext|>` and `<|im_end|>`, whatever is declared.
    assert_eq!(open(folder.path(), None).stop_tokens(), ids(&[1, 2]));
    edit(&folder, "config.json", set("eos_token_id", json!([2, 300])));
    edit(&folder, "generation_config.json", set("eos_token_id", json!(299)));
    edit(&folder, "tokenizer_config.json", set("eos_token", json!({"content": "<|reserved_278|>", "special": true})));
    assert_eq!(open(folder.path(), None).stop_tokens(), ids(&[1, 2, 278, 299, 300]));
    edit(&folder, "config.json", set("eos_token_id", Value::Null));
    edit(&folder, "generation_config.json", set("eos_token_id", json!([281, 282])));
    edit(&folder, "tokenizer_config.json", set("eos_token", json!("<|reserved_279|>")));
    assert_eq!(open(folder.path(), None).stop_tokens(), ids(&[1, 2, 279, 281, 282]));
    // A token that the tokenizer does not have, and files that say nothing.
    edit(&folder, "tokenizer_config.json", set("eos_token", json!("<|nobody|>")));
    std::fs::remove_file(folder.path().join("generation_config.json")).unwrap();
    assert_eq!(open(folder.path(), None).stop_tokens(), ids(&[1, 2]));
    // This file declares 2, and its vocabulary has `<|im_end|>` at 277 and no `<|endoftext|>`.
    assert_eq!(open(&checkpoint("qwen2").join("model.gguf"), None).stop_tokens(), ids(&[2, 277]));
}

#[test]
fn recommended_sampling_is_taken_from_the_files() {
    let folder = copy("qwen2");
    let qwen2 = open(folder.path(), None).defaults().clone();
    assert_eq!((qwen2.temperature, qwen2.top_p, qwen2.top_k), (0.7, 0.8, 20), "the family's, as the file says nothing");
    edit(&folder, "generation_config.json", |config| {
        config["do_sample"] = json!(true);
        config["temperature"] = json!(0.5);
        config["top_k"] = json!(7);
        config["top_p"] = json!(0.25);
    });
    let expected = Sampling { temperature: 0.5, top_k: 7, top_p: 0.25, ..Sampling::default() };
    assert_eq!(*open(folder.path(), None).defaults(), expected);
    edit(&folder, "generation_config.json", set("do_sample", json!(false)));
    assert_eq!(open(folder.path(), None).defaults().temperature, 0.0);
}
