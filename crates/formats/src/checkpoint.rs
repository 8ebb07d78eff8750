//! A Hugging Face checkpoint folder: its configs, its tokenizer files, its chat template, its tensors.
//!
//! Only finds, reads and checks files; it does not know what a model needs of them. Files that are optional in such
//! folders are `None` when absent, and an error when present and broken.

use std::path::{Path, PathBuf};

use crate::data_file::read_whole;
use crate::safetensors::open_shards;
use crate::tensor_table::TensorTable;
use crate::{Config, Error, TensorInfo};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Real templates are below 20 KB.
const MAX_TEMPLATE_BYTES: u64 = 4 << 20;

/// An open checkpoint folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    generation_config: Option<Config>,
    tokenizer_config: Option<Config>,
    chat_template: Option<String>,
    table: TensorTable,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors`, whole or in shards with their index.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let config = match Config::open(&dir.join(CONFIG)) {
            Err(Error::NotFound { .. }) => return Err(no_model(dir)),
            other => other?,
        };
        let weights = weights_path(dir).ok_or_else(|| no_model(dir))?;
        let tokenizer_config = optional_config(dir, "tokenizer_config.json")?;
        Ok(Self {
            chat_template: chat_template(dir, tokenizer_config.as_ref())?,
            generation_config: optional_config(dir, "generation_config.json")?,
            tokenizer_config,
            config,
            table: open_shards(&weights)?,
            dir: dir.to_path_buf(),
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `generation_config.json`.
    pub fn generation_config(&self) -> Option<&Config> {
        self.generation_config.as_ref()
    }

    /// `tokenizer_config.json`.
    pub fn tokenizer_config(&self) -> Option<&Config> {
        self.tokenizer_config.as_ref()
    }

    /// Where `tokenizer.json` stands.
    pub fn tokenizer_json(&self) -> Option<PathBuf> {
        self.file("tokenizer.json")
    }

    /// Where `vocab.json` and `merges.txt` stand: the older form of a tokenizer, for folders without tokenizer.json.
    pub fn vocab_and_merges(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.file("vocab.json")?, self.file("merges.txt")?))
    }

    /// The chat template: `chat_template.jinja`, else `chat_template` of tokenizer_config.json (of a list, the entry
    /// named "default"), else that of chat_template.json.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// All tensors, shard after shard, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.table.tensors()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.table.tensor(name)
    }

    /// Reads bytes `start_byte .. start_byte + out.len()` of a tensor.
    pub fn read(&self, tensor: &TensorInfo, start_byte: usize, out: &mut [u8]) -> Result<(), Error> {
        self.table.read(tensor, start_byte, out)
    }

    /// Paths of the weight files, in order.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.table.parts()
    }

    /// The size of all weight files together.
    pub fn size_bytes(&self) -> u64 {
        self.table.size_bytes()
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.dir.join(name)).filter(|path| path.is_file())
    }
}

/// The weights of a folder: the single file wins over the index, as in transformers.
pub(crate) fn weights_path(dir: &Path) -> Option<PathBuf> {
    [SINGLE, INDEX].iter().map(|name| dir.join(name)).find(|path| path.exists())
}

fn optional_config(dir: &Path, name: &str) -> Result<Option<Config>, Error> {
    match Config::open(&dir.join(name)) {
        Err(Error::NotFound { .. }) => Ok(None),
        other => other.map(Some),
    }
}

fn chat_template(dir: &Path, tokenizer_config: Option<&Config>) -> Result<Option<String>, Error> {
    let path = dir.join("chat_template.jinja");
    match read_whole(&path, "a chat template", MAX_TEMPLATE_BYTES) {
        Ok(bytes) => {
            let not_text = |_| Error::NotUtf8 { path, thing: "the chat template".into() };
            return String::from_utf8(bytes).map(Some).map_err(not_text);
        }
        Err(Error::NotFound { .. }) => {}
        Err(other) => return Err(other),
    }
    if let Some(template) = tokenizer_config.map(template_of).transpose()?.flatten() {
        return Ok(Some(template));
    }
    Ok(optional_config(dir, "chat_template.json")?.as_ref().map(template_of).transpose()?.flatten())
}

/// `chat_template` of a config: a string, or a list of named ones.
fn template_of(config: &Config) -> Result<Option<String>, Error> {
    const KEY: &str = "chat_template";
    let Some(entries) = config.get(KEY).and_then(|v| v.as_array()) else {
        return Ok(config.string(KEY)?.map(str::to_owned));
    };
    let default = entries.iter().find(|e| e.get("name").and_then(|n| n.as_str()) == Some("default"));
    match default.and_then(|e| e.get("template")).and_then(|t| t.as_str()) {
        Some(template) => Ok(Some(template.to_owned())),
        None => {
            let found = format!("a list of {} templates without it", entries.len());
            Err(config.wrong(KEY, found, "a template named \"default\""))
        }
    }
}

/// What a folder that holds no checkpoint holds instead.
pub(crate) fn no_model(dir: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let has = |test: &dyn Fn(&str) -> bool| names.iter().find(|n| test(n)).cloned();
    let report = |found: String, hint: &str| Error::NoModel { path: dir.to_path_buf(), found, hint: hint.to_owned() };
    if names.is_empty() {
        return report("an empty folder".into(), "fetch a model with `qwenkit pull`");
    }
    if let Some(name) = has(&|n| n == "adapter_config.json") {
        return report(
            format!("{name}, so it is an adapter"),
            "name the base model as the model, and this folder as its adapter",
        );
    }
    if let Some(name) = has(&|n| n.starts_with("model-") && n.ends_with(".safetensors")) {
        return report(format!("the shard {name} without {INDEX}"), "fetch the index into the same folder");
    }
    if let Some(name) = has(&|n| n == SINGLE || n == INDEX) {
        return report(format!("{name} without {CONFIG}"), "fetch config.json and the tokenizer into the same folder");
    }
    let pickle = |n: &str| [".bin", ".pt", ".pth"].iter().any(|e| n.ends_with(e));
    if let Some(name) = has(&pickle) {
        return report(
            format!("weights as a Python pickle ({name})"),
            "pickles can run code when opened and are not read; fetch or convert the model to safetensors or GGUF",
        );
    }
    if let Some(name) = has(&|n| n == CONFIG) {
        return report(format!("{name} without weights"), "fetch the model's safetensors files into the same folder");
    }
    let shown = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    report(format!("{} other entries ({shown})", names.len()), "name the folder or file of a model")
}
