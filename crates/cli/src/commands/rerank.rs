//! `qwenkit rerank`: how well documents fit a query.

use clap::Args;
use qwenkit_engine::{Reading, Session};
use serde_json::{Map, Value, json};

use crate::opening::{self, SessionArgs};
use crate::{jsonl, locate, terminal};

/// Lines whose documents are read together.
const TOGETHER: usize = 16;
/// What says how much of a document was not read.
const LEFT_OUT: &str = "document_tokens_left_out";

/// Arguments of `rerank`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit rerank --model ./reranker.gguf --query \"capital of France\" \"Paris is the capital.\" \"Cats sleep.\"
  qwenkit rerank --model ./reranker.gguf --jsonl < pairs.jsonl > scores.jsonl

With --jsonl a line {\"query\": ..., \"documents\": [...]} gives the same line with \"results\", the best first, each with \"index\" and
\"relevance_score\" (0 to 1), and {\"query\": ..., \"document\": ...} gives \"score\". \"instruction\" and \"top_n\" may stand in a line.

Of a document that the context does not hold the end is left out, and \"document_tokens_left_out\" says how much.")]
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
        return jsonl::answer_together(TOGETHER, |lines| {
            answer(&session, lines.into_iter().map(|(_, object)| object).collect(), instruction)
        });
    }
    let query = args.query.as_deref().unwrap_or_default();
    let asked =
        Asked::new(&session, instruction, query, &args.documents).map_err(|problem| anyhow::anyhow!(problem))?;
    let values = session.read(asked.readings)?;
    let scores: Vec<f32> = values.iter().map(|values| session.relevance_score(values)).collect();
    for i in order(&scores) {
        terminal::print_line(&format!("{:.4}  {}", scores[i], args.documents[i]))?;
        if asked.left_out[i] > 0 {
            terminal::note(&format!(
                "note: of document {} the last {} tokens were not read, as the context holds no more; raise --ctx, or split it",
                i + 1,
                asked.left_out[i]
            ));
        }
    }
    Ok(())
}

/// What a line asks for.
struct Asked {
    /// One for each document.
    readings: Vec<Reading>,
    /// Tokens at each document's end that the context does not hold.
    left_out: Vec<usize>,
    /// How many of the best are told; of a single `document` its score alone.
    top: Option<usize>,
}

impl Asked {
    fn new(
        session: &Session,
        instruction: Option<&str>,
        query: &str,
        documents: &[impl AsRef<str>],
    ) -> Result<Asked, String> {
        let (mut readings, mut left_out) = (Vec::new(), Vec::new());
        for document in documents {
            let (reading, tokens) =
                session.relevance_of_start(instruction, query, document.as_ref()).map_err(|error| error.to_string())?;
            readings.push(reading);
            left_out.push(tokens);
        }
        Ok(Asked { readings, left_out, top: None })
    }

    fn of_line(session: &Session, line: &Map<String, Value>, instruction: Option<&str>) -> Result<Asked, String> {
        let text = |name: &str| match line.get(name) {
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            None | Some(Value::Null) => Ok(None),
            Some(_) => Err(format!("`{name}` is no string")),
        };
        let query = text("query")?.ok_or("found no string `query`, expected {\"query\": ..., \"documents\": [...]}")?;
        let instruction = text("instruction")?.or(instruction);
        if let Some(document) = text("document")? {
            return Asked::new(session, instruction, query, &[document]);
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
        Ok(Asked { top: Some(top), ..Asked::new(session, instruction, query, &texts)? })
    }

    /// The line with what the scores say of it.
    fn told(&self, mut line: Map<String, Value>, scores: &[f32]) -> Value {
        let Some(top) = self.top else {
            line.insert("score".to_owned(), json!(scores[0]));
            if self.left_out[0] > 0 {
                line.insert(LEFT_OUT.to_owned(), json!(self.left_out[0]));
            }
            return Value::Object(line);
        };
        let result = |i: usize| {
            let mut result = json!({ "index": i, "relevance_score": scores[i] });
            if self.left_out[i] > 0 {
                result[LEFT_OUT] = json!(self.left_out[i]);
            }
            result
        };
        let results: Vec<Value> = order(scores).into_iter().take(top).map(result).collect();
        line.insert("results".to_owned(), Value::Array(results));
        Value::Object(line)
    }
}

/// The lines with their scores; the documents of all of them are read together.
fn answer(session: &Session, lines: Vec<Map<String, Value>>, instruction: Option<&str>) -> Vec<Result<Value, String>> {
    let asked: Vec<_> = lines.iter().map(|line| Asked::of_line(session, line, instruction)).collect();
    let readings = asked.iter().flatten().flat_map(|asked| asked.readings.iter().cloned()).collect();
    let mut values = match session.read(readings) {
        Ok(values) => values.into_iter(),
        Err(error) => return lines.iter().map(|_| Err(error.to_string())).collect(),
    };
    let mut told = |(line, asked): (Map<String, Value>, Result<Asked, String>)| {
        let asked = asked?;
        let own = values.by_ref().take(asked.readings.len());
        let scores: Vec<f32> = own.map(|values| session.relevance_score(&values)).collect();
        Ok(asked.told(line, &scores))
    };
    lines.into_iter().zip(asked).map(&mut told).collect()
}

/// The best first.
fn order(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}
