//! `qwenkit classify`: the label of a text, with probabilities, from a model and the classifier that was tuned for it.

use std::path::PathBuf;

use anyhow::{anyhow, ensure};
use clap::Args;
use qwenkit_engine::text_of;
use qwenkit_formats::Adapter as AdapterFile;
use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, LoadEvent, Model, arch};
use qwenkit_tensor::TokenId;
use qwenkit_train::data::{Encoder, TextSide};
use qwenkit_train::{ClassifierRecord, Example, Goal, Learner, calibrate};
use serde_json::{Map, Value, json};

use crate::args::ComputeArgs;
use crate::{jsonl, locate, opening, terminal};

/// Texts that are read together.
const TOGETHER: usize = 64;
/// Tokens of them that are computed at once.
const PIECE_TOKENS: usize = 1024;

/// Arguments of `classify`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit classify --adapter my-classifier \"Where is my card?\" \"I lost my PIN\"
  qwenkit classify --model qwen2.5-coder:0.5b --adapter my-classifier --jsonl < texts.jsonl > labels.jsonl

Each text gives a line: its label and how probable that is. With --jsonl each line {\"text\": ...} gives the same line with \"label\",
\"probability\" and \"top\", the most probable labels. The adapter is a folder that `qwenkit tune --task classify` wrote.")]
pub(crate) struct ClassifyArgs {
    /// A short name, a hub id, a .gguf file or a checkpoint folder [default: the model that the classifier was tuned from]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The classifier
    #[arg(long, value_name = "FOLDER")]
    adapter: PathBuf,
    /// The texts
    #[arg(value_name = "TEXT", conflicts_with = "jsonl", required_unless_present = "jsonl")]
    texts: Vec<String>,
    /// JSON lines in, JSON lines out
    #[arg(long)]
    jsonl: bool,
    /// Labels of `top`
    #[arg(long, value_name = "N", default_value_t = 3, requires = "jsonl", conflicts_with = "texts", value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Runs the command.
///
/// # Errors
/// When the adapter is no classifier of the model, or a line could not be used.
pub(crate) fn run(args: &ClassifyArgs, offline: bool) -> anyhow::Result<()> {
    let (record, file) = (ClassifierRecord::read(&args.adapter)?, AdapterFile::open(&args.adapter)?);
    let located = locate::locate(args.model.as_deref().or(record.base.as_deref()), offline)?;
    let (text, plan) = (text_of(&located.files)?, arch::plan(&located.files)?);
    let adapter = Adapter::of_file(&plan, &file)?;
    let found = adapter.score().map_or(0, |score| score.labels);
    ensure!(
        found == record.labels.len(),
        "`{}` scores {found} labels, and its record names {}\nhint: its files are not of the same run",
        args.adapter.display(),
        record.labels.len()
    );
    let compute = Compute::new(args.compute.threads(), opening::isa()?);
    let mut bar = opening::loading_bar();
    let progress = &mut |event: LoadEvent| bar.update(event.done_bytes, event.total_bytes);
    let model = Model::load(&located.files, &compute, progress)?;
    bar.clear();
    let learner = Learner::new(&model, &compute, adapter, true);
    let side = TextSide { tokenizer: &text.tokenizer, template: None, stop_tokens: &text.stop_tokens };
    let encoding = record.reading.encoding(plan.context_tokens);
    let mut classifier = Classifier { learner, encoder: Encoder::new(side, encoding), record };
    let top = usize::from(args.top);
    if args.jsonl {
        return jsonl::answer_together(TOGETHER, |lines| {
            let texts = lines.iter().map(|(_, line)| line.get("text").and_then(Value::as_str));
            let texts: Vec<_> =
                texts.map(|text| text.ok_or("found no string `text`, expected {\"text\": \"...\"}")).collect();
            let found = classifier.classify(&texts);
            lines.into_iter().zip(found).map(|((_, line), found)| Ok(told(line, &found?, top))).collect()
        });
    }
    for texts in args.texts.chunks(TOGETHER) {
        let texts: Vec<_> = texts.iter().map(|text| Ok(text.as_str())).collect();
        for found in classifier.classify(&texts) {
            let found = found.map_err(|problem| anyhow!(problem))?;
            if let Some((label, probability)) = found.first() {
                terminal::print_foreign(&format!("{label}\t{probability:.4}\n"))?;
            }
        }
    }
    Ok(())
}

/// The line with its labels.
fn told(mut line: Map<String, Value>, found: &[(String, f64)], top: usize) -> Value {
    if let Some((label, probability)) = found.first() {
        line.insert("label".to_owned(), json!(label));
        line.insert("probability".to_owned(), json!(probability));
    }
    let of = |(label, probability): &(String, f64)| json!({ "label": label, "probability": probability });
    line.insert("top".to_owned(), found.iter().take(top).map(of).collect());
    Value::Object(line)
}

struct Classifier<'a> {
    learner: Learner<'a>,
    encoder: Encoder<'a>,
    record: ClassifierRecord,
}

impl Classifier<'_> {
    /// For each text all labels with their probabilities, the most probable first.
    fn classify(&mut self, texts: &[Result<&str, &'static str>]) -> Vec<Result<Vec<(String, f64)>, String>> {
        let examples: Vec<Result<Example, String>> =
            texts.iter().map(|text| self.example((*text).map_err(str::to_owned)?)).collect();
        let good: Vec<&Example> = examples.iter().filter_map(|example| example.as_ref().ok()).collect();
        let mut scores = Vec::new();
        let computed = self.learner.evaluate(&good, PIECE_TOKENS, &mut |_, _, of| scores.push(of.to_vec()));
        let mut scores = scores.into_iter();
        let found = |example: Result<Example, String>| {
            let problem = || computed.as_ref().err().map_or("it got no scores".to_owned(), ToString::to_string);
            example.and_then(|_| scores.next().ok_or_else(problem)).map(|scores| self.record_of(&scores))
        };
        examples.into_iter().map(found).collect()
    }

    /// What the model reads of a text, the same as when it was tuned.
    fn example(&mut self, text: &str) -> Result<Example, String> {
        let (ids, _) = self.encoder.labelled(text).map_err(|problem| problem.to_string())?.ok_or("it is left out")?;
        if ids.last() != Some(&TokenId(self.record.end_token)) {
            return Err("texts end with another token than when the classifier was tuned".to_owned());
        }
        // No label is learnt; the number only has to be one.
        Ok(Example { ids, goal: Goal::Label(0) })
    }

    fn record_of(&self, scores: &[f32]) -> Vec<(String, f64)> {
        let shares = calibrate::probabilities(scores, self.record.temperature);
        let mut found: Vec<_> = self.record.labels.iter().cloned().zip(shares).collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found
    }
}
