//! Checkpoint folders and the opening of a model by whatever path: which files are found, and which folders are refused.

mod encoder;

use encoder::*;
use qwenkit_formats::{Checkpoint, Error, ModelFiles};

/// A folder with the least that a checkpoint has.
fn checkpoint() -> Folder {
    let folder = Folder::new();
    folder.put("config.json", r#"{"model_type":"qwen3","vocab_size":384}"#);
    folder.put("model.safetensors", small_safetensors());
    folder
}

#[test]
fn the_least_checkpoint_opens_without_the_optional_files() {
    let folder = checkpoint();
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.config().require_usize("vocab_size").unwrap(), 384);
    assert!(model.generation_config().is_none() && model.tokenizer_config().is_none());
    assert!(model.tokenizer_json().is_none() && model.vocab_and_merges().is_none() && model.chat_template().is_none());
    assert_eq!(model.tensor("b").unwrap().shape, [2, 3]);
}

#[test]
fn the_optional_files_are_found() {
    let folder = checkpoint();
    folder.put("generation_config.json", r#"{"eos_token_id":[1,2]}"#);
    folder.put("tokenizer_config.json", r#"{"bos_token":null}"#);
    let vocab = folder.put("vocab.json", "{}");
    assert!(Checkpoint::open(folder.path()).unwrap().vocab_and_merges().is_none());
    let merges = folder.put("merges.txt", "");
    let tokenizer = folder.put("tokenizer.json", "{}");
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.generation_config().unwrap().usizes("eos_token_id").unwrap(), Some(vec![1, 2]));
    assert!(model.tokenizer_config().unwrap().get("bos_token").is_none());
    assert_eq!((model.tokenizer_json(), model.vocab_and_merges()), (Some(tokenizer), Some((vocab, merges))));
}

#[test]
fn the_chat_template_is_taken_from_the_first_place_that_has_one() {
    let folder = checkpoint();
    let template = || Checkpoint::open(folder.path()).map(|c| c.chat_template().map(str::to_owned));
    folder.put("chat_template.json", r#"{"chat_template":"from json"}"#);
    assert_eq!(template().unwrap().unwrap(), "from json");
    folder.put("tokenizer_config.json", r#"{"chat_template":null}"#);
    assert_eq!(template().unwrap().unwrap(), "from json");
    let list = r#"{"chat_template":[{"name":"tool_use","template":"t"},{"name":"default","template":"from list"}]}"#;
    folder.put("tokenizer_config.json", list);
    assert_eq!(template().unwrap().unwrap(), "from list");
    folder.put("tokenizer_config.json", r#"{"chat_template":"from config"}"#);
    assert_eq!(template().unwrap().unwrap(), "from config");
    folder.put("chat_template.jinja", "from jinja\n");
    assert_eq!(template().unwrap().unwrap(), "from jinja\n");

    folder.put("chat_template.jinja", b"\xff");
    assert_error!(template().unwrap_err(), NotUtf8, "chat_template.jinja", "expected text");
    std::fs::File::create(folder.path().join("chat_template.jinja")).unwrap().set_len(5 << 20).unwrap();
    assert_error!(template().unwrap_err(), TooLarge, "chat_template.jinja", "5242880", "at most 4194304");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    folder.put("tokenizer_config.json", r#"{"chat_template":[{"name":"rag","template":"r"}]}"#);
    assert_error!(template().unwrap_err(), KeyType, "tokenizer_config.json", "`chat_template`", "\"default\"");
    folder.put("tokenizer_config.json", r#"{"chat_template":7}"#);
    assert_error!(template().unwrap_err(), KeyType, "the number 7", "a string");
}

#[test]
fn a_broken_optional_file_is_an_error() {
    let folder = checkpoint();
    folder.put("generation_config.json", "{");
    assert_error!(Checkpoint::open(folder.path()).unwrap_err(), Json, "generation_config.json", "EOF");
}

#[test]
fn a_config_of_absurd_size_is_not_read() {
    let folder = checkpoint();
    std::fs::File::create(folder.path().join("config.json")).unwrap().set_len(1 << 40).unwrap();
    assert_error!(Checkpoint::open(folder.path()).unwrap_err(), TooLarge, "config.json", "1099511627776");
}

#[test]
fn any_path_of_a_model_opens_it() {
    let folder = checkpoint();
    folder.put("model.gguf", small_gguf().bytes());
    for path in [folder.path().to_path_buf(), folder.path().join("config.json")] {
        let model = ModelFiles::open(&path).unwrap();
        assert!(matches!(model, ModelFiles::Checkpoint(_)));
        assert_eq!((model.path(), model.tensors().len()), (folder.path(), 2));
        assert_eq!(model.size_bytes(), small_safetensors().len() as u64);
        let mut bytes = [0; 2];
        model.read(model.tensor("a").unwrap(), 3, &mut bytes).unwrap();
        assert_eq!(bytes, [27, 28]);
    }
    let gguf = folder.path().join("model.gguf");
    let model = ModelFiles::open(&gguf).unwrap();
    assert_eq!((model.path(), model.tensors().len()), (gguf.as_path(), 3));
}

#[test]
fn a_folder_with_one_gguf_model_opens_it() {
    let folder = Folder::new();
    folder.put("mmproj-f16.gguf", small_gguf().bytes());
    assert_error!(ModelFiles::open(folder.path()).unwrap_err(), NoModel, "mmproj-f16.gguf");
    let one = folder.put("b.gguf", small_gguf().bytes());
    folder.put("config.json", "{}");
    assert_eq!(ModelFiles::open(folder.path()).unwrap().path(), one);
    folder.put("a.gguf", small_gguf().bytes());
    let error = ModelFiles::open(folder.path()).unwrap_err();
    assert_error!(error, SeveralModels, "several models: a.gguf, b.gguf", "name the file");
}

#[test]
fn a_folder_without_a_model_says_what_it_holds_instead() {
    let refused = |names: &[&str]| -> Error {
        let folder = Folder::new();
        for name in names {
            folder.put(name, "{}");
        }
        ModelFiles::open(folder.path()).unwrap_err()
    };
    assert_error!(refused(&[]), NoModel, "an empty folder", "qwenkit pull");
    let pickle = refused(&["config.json", "pytorch_model.bin"]);
    assert_error!(pickle, NoModel, "Python pickle (pytorch_model.bin)", "convert the model to safetensors");
    let adapter = refused(&["adapter_config.json", "adapter_model.safetensors"]);
    assert_error!(adapter, NoModel, "it is an adapter", "base model");
    let shard = refused(&["config.json", "model-00001-of-00002.safetensors"]);
    assert_error!(shard, NoModel, "model.safetensors.index.json", "fetch the index");
    assert_error!(refused(&["model.safetensors"]), NoModel, "without config.json");
    assert_error!(refused(&["config.json"]), NoModel, "config.json without weights");
    assert_error!(refused(&["a", "b", "c", "d", "e", "f"]), NoModel, "6 other entries (a, b, c, d, e)");
}

#[test]
fn a_path_to_nothing_or_to_something_else() {
    let folder = checkpoint();
    let missing = ModelFiles::open(&folder.path().join("config.jsn")).unwrap_err();
    assert_error!(missing, NotFound, "config.jsn", "spelling");
    let tokenizer = folder.put("tokenizer.json", "{}");
    assert_error!(ModelFiles::open(&tokenizer).unwrap_err(), WrongKind, "a JSON file", "checkpoint folder");
}
