//! `qwenkit embed`: texts as vectors.

use clap::Args;
use qwenkit_engine::{Input, Session, unit_vector};
use serde_json::{Map, Value, json};

use crate::failure::usage;
use crate::opening::{self, SessionArgs};
use crate::{jsonl, locate, terminal};

/// Texts that are read together.
const TOGETHER: usize = 64;

/// Arguments of `embed`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit embed --model Qwen/Qwen3-Embedding-0.6B-GGUF \"a text\" \"another\"
  qwenkit embed --model ./embedding.gguf --jsonl < texts.jsonl > vectors.jsonl

With --jsonl each line {\"text\": ...} gives the same line with \"embedding\" and \"tokens\" in place of the text. A query comes behind its
task: {\"text\": ..., \"instruction\": \"Given a question, find passages that answer it\"}; documents have none.")]
pub(crate) struct EmbedArgs {
    /// A short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The texts, each of which gives a line with its vector
    #[arg(conflicts_with = "jsonl", required_unless_present = "jsonl")]
    texts: Vec<String>,
    /// JSON lines in, JSON lines out
    #[arg(long)]
    jsonl: bool,
    /// The task that queries come behind, for lines that name none
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Keep the first N dimensions alone (32 or more)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(32..))]
    dimensions: Option<u32>,
    #[command(flatten)]
    session: SessionArgs,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot embed, or a line could not be used.
pub(crate) fn run(args: &EmbedArgs, offline: bool) -> anyhow::Result<()> {
    let located = locate::locate(Some(&args.model), offline)?;
    let session = opening::open(&located.files, &args.session)?;
    // A model that cannot embed says so before the first line.
    session.embedding(&Input::Text("x".to_owned()))?;
    let (width, dimensions) = (session.info().width, args.dimensions.map(|n| n as usize));
    if let Some(wanted) = dimensions.filter(|&wanted| wanted > width) {
        return Err(usage(format!("--dimensions is {wanted}, and the model's vectors have {width}")));
    }
    if args.jsonl {
        return jsonl::answer_together(TOGETHER, |lines| {
            let lines = lines.into_iter().map(|(_, object)| object).collect();
            answer(&session, lines, args.instruction.as_deref(), dimensions)
        });
    }
    for texts in args.texts.chunks(TOGETHER) {
        let lines = texts.iter().map(|text| Map::from_iter([("text".to_owned(), json!(text))])).collect();
        for found in answer(&session, lines, args.instruction.as_deref(), dimensions) {
            let found = found.map_err(|problem| anyhow::anyhow!(problem))?;
            terminal::print_line(&found["embedding"].to_string())?;
        }
    }
    Ok(())
}

/// The lines with their vectors.
fn answer(
    session: &Session,
    lines: Vec<Map<String, Value>>,
    instruction: Option<&str>,
    dimensions: Option<usize>,
) -> Vec<Result<Value, String>> {
    let made: Vec<_> = lines.iter().map(|line| text(line, instruction)).collect();
    let made = made.into_iter().map(|text| session.embedding(&Input::Text(text?)).map_err(|error| error.to_string()));
    let made: Vec<Result<_, String>> = made.collect();
    let good = made.iter().filter_map(|reading| reading.as_ref().ok().cloned()).collect();
    let mut states = match session.read(good) {
        Ok(states) => states.into_iter(),
        Err(error) => return lines.iter().map(|_| Err(error.to_string())).collect(),
    };
    let told = |(mut line, reading): (Map<String, Value>, Result<qwenkit_engine::Reading, String>)| {
        let tokens = reading?.ids.len();
        let state = states.next().unwrap_or_default();
        for name in ["text", "input", "instruction"] {
            line.shift_remove(name);
        }
        line.insert("embedding".to_owned(), json!(unit_vector(&state, dimensions)));
        line.insert("tokens".to_owned(), json!(tokens));
        Ok(Value::Object(line))
    };
    lines.into_iter().zip(made).map(told).collect()
}

/// What is to be read of a line.
fn text(line: &Map<String, Value>, instruction: Option<&str>) -> Result<String, String> {
    let text = line.get("text").or(line.get("input")).and_then(Value::as_str);
    let text = text.ok_or("found no string `text`, expected {\"text\": \"...\"}")?;
    let task = match line.get("instruction") {
        None | Some(Value::Null) => instruction,
        Some(Value::String(task)) => Some(task.as_str()),
        Some(_) => return Err("`instruction` is no string".to_owned()),
    };
    Ok(task.map_or_else(|| text.to_owned(), |task| qwenkit_engine::query_text(task, text)))
}
