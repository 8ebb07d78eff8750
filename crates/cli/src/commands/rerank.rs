//! `qwenkit rerank`: how well documents fit a query.

use clap::Args;
use qwenkit_engine::Session;
use serde_json::{Map, Value, json};

use crate::opening::{self, SessionArgs};
use crate::{jsonl, locate, terminal};

/// Arguments of `rerank`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit rerank --model ./reranker.gguf --query \"capital of France\" \"Paris is the capital.\" \"Cats sleep.\"
  qwenkit rerank --model ./reranker.gguf --jsonl < pairs.jsonl > scores.jsonl

With --jsonl a line {\"query\": ..., \"documents\": [...]} gives the same line with \"results\", the best first, each with \"index\" and
\"relevance_score\" (0 to 1), and {\"query\": ..., \"document\": ...} gives \"score\". \"instruction\" and \"top_n\" may stand in a line.")]
pub(crate) struct RerankArgs {
    /// A short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// What is looked for
    #[arg(long, conflicts_with = "jsonl", required_unless_present = "jsonl")]
    query: Option<String>,
    /// The documents
    #[arg(conflicts_with = "jsonl", required_unless_present = "jsonl")]
    documents: Vec<String>,
    /// JSON lines in, JSON lines out
    #[arg(long)]
    jsonl: bool,
    /// What a document has to do for a query, for lines that do not say
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    #[command(flatten)]
    session: SessionArgs,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot judge, or a line could not be used.
pub(crate) fn run(args: &RerankArgs, offline: bool) -> anyhow::Result<()> {
    let located = locate::locate(Some(&args.model), offline)?;
    let session = opening::open(&located.files, &args.session)?;
    // A model that cannot judge says so before the first line.
    session.relevance(None, "x", "x")?;
    let instruction = args.instruction.as_deref();
    if args.jsonl {
        return jsonl::answer_lines(|_, line| answer(&session, line, instruction));
    }
    let query = args.query.as_deref().unwrap_or_default();
    let documents: Vec<&str> = args.documents.iter().map(String::as_str).collect();
    let scores = scores(&session, instruction, query, &documents).map_err(|problem| anyhow::anyhow!(problem))?;
    for i in order(&scores) {
        terminal::print_line(&format!("{:.4}  {}", scores[i], documents[i]))?;
    }
    Ok(())
}

fn answer(session: &Session, mut line: Map<String, Value>, instruction: Option<&str>) -> Result<Value, String> {
    let text = |name: &str| match line.get(name) {
        Some(Value::String(text)) => Ok(Some(text.clone())),
        None | Some(Value::Null) => Ok(None),
        Some(_) => Err(format!("`{name}` is no string")),
    };
    let query = text("query")?.ok_or("found no string `query`, expected {\"query\": ..., \"documents\": [...]}")?;
    let own = text("instruction")?;
    let instruction = own.as_deref().or(instruction);
    if let Some(document) = text("document")? {
        let scores = scores(session, instruction, &query, &[&document])?;
        line.insert("score".to_owned(), json!(scores[0]));
        return Ok(Value::Object(line));
    }
    let documents = match line.get("documents") {
        Some(Value::Array(list)) if !list.is_empty() => list,
        _ => return Err("found no `documents`, expected a list of strings, or one `document`".to_owned()),
    };
    let texts: Option<Vec<&str>> = documents.iter().map(Value::as_str).collect();
    let texts = texts.ok_or("`documents` has an entry that is no string")?;
    let top = match line.get("top_n") {
        None | Some(Value::Null) => usize::MAX,
        Some(value) => value.as_u64().filter(|&n| n > 0).ok_or("`top_n` is no whole number above 0")? as usize,
    };
    let scores = scores(session, instruction, &query, &texts)?;
    let result = |i: usize| json!({ "index": i, "relevance_score": scores[i] });
    let results: Vec<Value> = order(&scores).into_iter().take(top).map(result).collect();
    line.insert("results".to_owned(), Value::Array(results));
    Ok(Value::Object(line))
}

fn scores(session: &Session, instruction: Option<&str>, query: &str, documents: &[&str]) -> Result<Vec<f32>, String> {
    let reading = |document: &&str| session.relevance(instruction, query, document).map_err(|error| error.to_string());
    let readings: Vec<_> = documents.iter().map(reading).collect::<Result<_, _>>()?;
    let values = session.read(readings).map_err(|error| error.to_string())?;
    Ok(values.iter().map(|values| session.relevance_score(values)).collect())
}

/// The best first.
fn order(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}
