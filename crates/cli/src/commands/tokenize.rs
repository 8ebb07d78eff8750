//! `qwenkit tokenize`: text to token ids, exactly as the model's own tokenizer does it. Weights are not read.

use clap::Args;
use qwenkit_engine::text_of;
use qwenkit_tensor::TokenId;
use qwenkit_text::SpecialTokens;
use serde_json::json;

use crate::failure::usage;
use crate::{jsonl, locate, prompt, terminal};

/// Arguments of `tokenize`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit tokenize --model qwen3:4b \"Hello world\"
  qwenkit tokenize --model ./model.gguf --jsonl < texts.jsonl > ids.jsonl

With --jsonl each line {\"text\": ...} gives a line {\"ids\": [...]}; a line that cannot be used gives {\"error\": ...}.
Control tokens that the text spells, such as <|im_end|>, become their ids.")]
pub(crate) struct TokenizeArgs {
    /// A short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The text; without it, stdin
    #[arg(conflicts_with = "jsonl")]
    text: Vec<String>,
    /// JSON lines in, JSON lines out
    #[arg(long)]
    jsonl: bool,
}

/// Runs the command.
pub(crate) fn run(args: &TokenizeArgs, offline: bool) -> anyhow::Result<()> {
    let located = locate::locate(Some(&args.model), offline)?;
    let tokenizer = text_of(&located.files)?.tokenizer;
    let ids = |text: &str| -> Result<Vec<u32>, qwenkit_text::Error> {
        Ok(tokenizer.encode(text, SpecialTokens::Parse)?.iter().map(|&TokenId(id)| id).collect())
    };
    if args.jsonl {
        return jsonl::answer_lines(|_, object| match object.get("text").and_then(|text| text.as_str()) {
            Some(text) => ids(text).map(|ids| json!({ "ids": ids })).map_err(|error| error.to_string()),
            None => Err("found no string `text`, expected {\"text\": \"...\"}".to_owned()),
        });
    }
    let given = Some(args.text.join(" ")).filter(|text| !text.is_empty());
    let text = match given {
        Some(text) => text,
        None => prompt::with_pipe(None)?.ok_or_else(|| usage("there is no text\nhint: name it, or pipe it in"))?,
    };
    let ids: Vec<String> = ids(&text)?.iter().map(u32::to_string).collect();
    terminal::print_line(&ids.join(","))
}
