//! How data is read: the arguments that checking and tuning share.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qwenkit_engine::ModelText;
use qwenkit_train::data::{Answers, Encoding, LabelKeys, Loading, TextSide, TooLong};

/// How data is read.
#[derive(Args)]
#[command(next_help_heading = "The data")]
pub(crate) struct DataArgs {
    /// The column or key that holds the texts of labels [default: text, sentence, question or query]
    #[arg(long, value_name = "NAME")]
    text_column: Option<String>,
    /// The column or key that holds the labels [default: label, category, intent or class]
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
    /// Tokens of the longest sample [default: the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(8..))]
    context: Option<u32>,
    /// What becomes of samples that are longer
    #[arg(long, value_enum, default_value_t = TooLongArg::Refuse)]
    too_long: TooLongArg,
    /// Which answers of a conversation are learnt
    #[arg(long, value_enum, default_value_t = AnswersArg::All)]
    answers: AnswersArg,
    /// Take prompts and completions as plain text instead of a question and an answer in the model's chat template
    #[arg(long)]
    raw: bool,
    /// Turn what spells a control token in plain texts, such as <|im_end|>, into that token
    #[arg(long)]
    control_tokens: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TooLongArg {
    /// They are errors
    Refuse,
    /// Their end is cut off; plain texts go on in a further sample
    Cut,
    /// They are left out
    LeaveOut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AnswersArg {
    /// Each of them
    All,
    /// The last one alone
    Last,
}

impl DataArgs {
    /// What is to be loaded of these files, for a model with so long a context.
    pub(super) fn loading(&self, files: Vec<PathBuf>, context_tokens: usize) -> Loading {
        let encoding = Encoding {
            context_tokens: self.context.map_or(context_tokens, |tokens| tokens as usize),
            too_long: match self.too_long {
                TooLongArg::Refuse => TooLong::Refuse,
                TooLongArg::Cut => TooLong::Cut,
                TooLongArg::LeaveOut => TooLong::LeaveOut,
            },
            answers: match self.answers {
                AnswersArg::All => Answers::All,
                AnswersArg::Last => Answers::Last,
            },
            is_raw: self.raw,
            parses_control_tokens: self.control_tokens,
        };
        let labels = LabelKeys { text: self.text_column.clone(), label: self.label_column.clone() };
        Loading { files, labels, encoding, known_labels: None }
    }
}

/// The text side of a model, for its data.
pub(super) fn text_side(text: &ModelText) -> TextSide<'_> {
    TextSide { tokenizer: &text.tokenizer, template: text.template.as_ref(), stop_tokens: &text.stop_tokens }
}
