//! `qwenkit show`: what a model is, from its files alone; no weight is read.
//!
//! Contract: a model that this version cannot run is described as far as it goes, and the reason is part of it.

use std::collections::BTreeMap;

use clap::Args;
use qwenkit_engine::text_of;
use qwenkit_formats::ModelFiles;
use qwenkit_hub::{Store, StoredModel, bytes_in_words, resolve};
use qwenkit_models::{Plan, arch, mmproj_beside};
use serde_json::{Value, json};

use super::list::stored_json;
use crate::terminal;

/// Arguments of `show`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit show qwen3:4b
  qwenkit show ./model.gguf --json")]
pub(crate) struct ShowArgs {
    /// A short name, a hub id, a .gguf file or a checkpoint folder
    model: String,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// A fact, or why it cannot be told.
type Fact<T> = Result<T, String>;

struct Description {
    stored: StoredModel,
    /// Weights in bytes, by type.
    types: BTreeMap<&'static str, u64>,
    parameters: u64,
    plan: Fact<Plan>,
    sight: Sight,
    text: Fact<TextSide>,
}

/// Whether a model takes images.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    No,
    Yes,
    /// Its tower is a file that is not here.
    TowerMissing,
}

impl Sight {
    fn of(files: &ModelFiles, plan: &Fact<Plan>) -> Sight {
        match (plan.as_ref().is_ok_and(|plan| plan.sight.is_some()), files) {
            (false, _) => Sight::No,
            (true, ModelFiles::Gguf(gguf)) if mmproj_beside(gguf.path()).is_none() => Sight::TowerMissing,
            (true, _) => Sight::Yes,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Sight::No => "no",
            Sight::Yes => "yes",
            Sight::TowerMissing => "with its mmproj file, which does not lie beside it",
        }
    }
}

struct TextSide {
    tokens: usize,
    has_template: bool,
    stop_tokens: Vec<(u32, String)>,
}

/// Runs the command. It never fetches anything.
pub(crate) fn run(args: &ShowArgs) -> anyhow::Result<()> {
    let store = Store::open(None)?;
    let model = resolve(&args.model)?;
    let Some(stored) = store.find(&model) else {
        let (name, root) = (model.to_string(), store.root().to_path_buf());
        return Err(qwenkit_hub::Error::NotInStore { name, root }.into());
    };
    let files = ModelFiles::open(&stored.path)?;
    let description = describe(stored, &files);
    if args.json {
        return terminal::print_json(&description.to_json());
    }
    terminal::print(&description.to_table())
}

fn describe(stored: StoredModel, files: &ModelFiles) -> Description {
    let mut types = BTreeMap::new();
    let mut parameters = 0_u64;
    for tensor in files.tensors() {
        *types.entry(tensor.dtype.name()).or_insert(0) += tensor.len_bytes as u64;
        parameters += tensor.shape.iter().product::<usize>() as u64;
    }
    let text = text_of(files).map_err(|error| error.to_string()).map(|text| {
        let name = |id: u32| {
            let bytes = text.tokenizer.token_bytes(qwenkit_tensor::TokenId(id)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        TextSide {
            tokens: text.tokenizer.vocab_size(),
            has_template: text.template.is_some(),
            stop_tokens: text.stop_tokens.iter().map(|id| (id.0, name(id.0))).collect(),
        }
    });
    let plan = arch::plan(files).map_err(|error| error.to_string());
    let sight = Sight::of(files, &plan);
    Description { stored, types, parameters, plan, sight, text }
}

impl Description {
    fn to_table(&self) -> String {
        let stored = &self.stored;
        let types: Vec<_> =
            self.types.iter().map(|(name, bytes)| format!("{name} {}", bytes_in_words(*bytes))).collect();
        let mut rows = vec![
            ("name", stored.name.clone()),
            ("path", stored.path.display().to_string()),
            ("size", bytes_in_words(stored.size_bytes)),
            ("licence", stored.licence.clone().unwrap_or_else(|| "unknown".to_owned())),
            ("source", stored.source.clone()),
            ("parameters", self.parameters.to_string()),
            ("types", types.join(", ")),
        ];
        match &self.plan {
            Ok(plan) => rows.extend([
                ("architecture", plan.architecture.to_owned()),
                ("shape", format!("{} layers, width {}, vocabulary {}", plan.layers.len(), plan.width, plan.vocab)),
                ("context", format!("{} tokens", plan.context_tokens)),
                ("images", self.sight.words().to_owned()),
            ]),
            Err(problem) => rows.push(("cannot run", one_line(problem))),
        }
        match &self.text {
            Ok(text) => {
                let stops = text.stop_tokens.iter().map(|(id, name)| format!("{id} {name}").trim_end().to_owned());
                rows.extend([
                    ("tokens", text.tokens.to_string()),
                    ("template", if text.has_template { "yes" } else { "no" }.to_owned()),
                    ("stop tokens", stops.collect::<Vec<_>>().join(", ")),
                ]);
            }
            Err(problem) => rows.push(("no text", one_line(problem))),
        }
        let rows: Vec<_> = rows.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect();
        terminal::table(&rows)
    }

    fn to_json(&self) -> Value {
        let mut object = stored_json(&self.stored);
        object["parameters"] = self.parameters.into();
        object["type_bytes"] = json!(self.types);
        match &self.plan {
            Ok(plan) => {
                object["architecture"] = plan.architecture.into();
                object["layers"] = plan.layers.len().into();
                object["width"] = plan.width.into();
                object["vocab"] = plan.vocab.into();
                object["context_tokens"] = plan.context_tokens.into();
                object["images"] = (self.sight == Sight::Yes).into();
            }
            Err(problem) => object["cannot_run"] = problem.as_str().into(),
        }
        match &self.text {
            Ok(text) => {
                object["has_template"] = text.has_template.into();
                object["stop_tokens"] = text.stop_tokens.iter().map(|(id, _)| *id).collect();
            }
            Err(problem) => object["no_text"] = problem.as_str().into(),
        }
        object
    }
}

fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
