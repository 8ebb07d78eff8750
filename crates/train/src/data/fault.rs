//! What is wrong with data: where, what was found, what was expected, what to do.

use std::fmt;

use thiserror::Error;

/// One thing that is wrong.
#[derive(Debug)]
pub struct Fault {
    /// The line of the file, from 1; 0 where the whole file is meant.
    pub line: usize,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a line or a file. A hint stands on a line of its own.
#[derive(Debug, Error)]
pub enum Problem {
    /// The operating system's words.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// No line with anything in it.
    #[error("the file is empty; expected one sample a line")]
    Empty,
    /// A file of another kind altogether.
    #[error("the file is {found}; expected text in UTF-8, one sample a line\nhint: {hint}")]
    OtherFile {
        /// Its kind.
        found: &'static str,
        /// How to turn it into what is expected.
        hint: &'static str,
    },
    /// A Parquet file that cannot be read.
    #[error(
        "the Parquet file cannot be read: {problem}\n\
         hint: fetch it again; of compressed files those with Snappy are read, as hubs write them"
    )]
    Parquet {
        /// The library's words.
        problem: String,
    },
    /// Bytes that are no text.
    #[error(
        "found the byte 0x{found:02X} at byte {byte}, expected UTF-8\n\
         hint: convert the file, for instance with `iconv -f WINDOWS-1252 -t UTF-8`"
    )]
    NotUtf8 {
        /// Position in the line, from 1.
        byte: usize,
        /// What stands there.
        found: u8,
    },
    /// More than a line may have.
    #[error("the line is longer than {limit_bytes} bytes\nhint: give one sample a line, and cut long documents")]
    LineTooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// Not JSON, or cut off.
    #[error("not valid JSON at byte {byte}: {problem}{}", if *is_cut { "\nhint: the file seems to be cut off here" } else { "" })]
    NotJson {
        /// Position in the line, from 1.
        byte: usize,
        /// The parser's words.
        problem: String,
        /// Whether the line ends before its value does, at the end of the file.
        is_cut: bool,
    },
    /// A JSON value that is no object.
    #[error("found {found}, expected a JSON object such as {{\"messages\": [...]}}")]
    NotObject {
        /// Its kind.
        found: &'static str,
    },
    /// Keys that belong to no form of data.
    #[error("found the keys {keys}, expected one of these forms:\n{}", super::form::SHOWN)]
    UnknownForm {
        /// The keys of the line.
        keys: String,
    },
    /// A table whose columns belong to no form of data.
    #[error(
        "found the columns {columns}, expected `text` and `label` or their like\n\
         hint: name them, with --text-column and --label-column"
    )]
    UnknownColumns {
        /// The header's names.
        columns: String,
    },
    /// A header that names two columns alike.
    #[error("two columns are named `{name}`; expected a name of its own for each")]
    ColumnTwice {
        /// The name.
        name: String,
    },
    /// A row that does not go with the header.
    #[error("found {found} cells, expected {expected}, as in the header\nhint: put cells with a separator in quotes")]
    Cells {
        /// Cells of the row.
        found: usize,
        /// Columns of the header.
        expected: usize,
    },
    /// Text where a cell has ended.
    #[error("text stands behind the closing quote of cell {cell}\nhint: double the quotes inside of a quoted cell")]
    BehindQuote {
        /// From 1.
        cell: usize,
    },
    /// A quote without its other.
    #[error("a quote is opened here and never closed\nhint: double the quotes inside of a quoted cell")]
    OpenQuote,
    /// A form that differs from that of the lines before.
    #[error(
        "this line is {found}, and the file's first line is {expected}\nhint: put each form into a file of its own"
    )]
    OtherForm {
        /// The form of this line.
        found: String,
        /// That of the file.
        expected: &'static str,
    },
    /// Something that has to be there.
    #[error("`{path}` is missing, expected {expected}")]
    Missing {
        /// Where.
        path: String,
        /// What should stand there.
        expected: &'static str,
    },
    /// A value of the wrong kind.
    #[error("`{path}`: found {found}, expected {expected}")]
    Wrong {
        /// Where.
        path: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A role that nobody knows.
    #[error("`{path}`: the role `{found}` is unknown; expected system, developer, user, assistant or tool")]
    Role {
        /// Where.
        path: String,
        /// The role.
        found: String,
    },
    /// An older way to write calls.
    #[error(
        "`{path}` is the older form of a call\n\
         hint: write \"tool_calls\": [{{\"type\": \"function\", \"function\": {{\"name\": ..., \"arguments\": ...}}}}]"
    )]
    OldCall {
        /// Where.
        path: String,
    },
    /// Tools that are not declared as the interface asks for.
    #[error("{problem}")]
    Tools {
        /// Where and what.
        problem: String,
    },
    /// More tokens than the context has.
    #[error(
        "the sample has {found} tokens, and the context {limit_tokens}\n\
         hint: shorten it, raise --context where the model allows it, or choose --too-long cut or leave-out"
    )]
    TooLong {
        /// Its tokens.
        found: usize,
        /// The context.
        limit_tokens: usize,
    },
    /// A sample of whose answer the cut leaves nothing.
    #[error(
        "cut to the {limit_tokens} tokens of the context, the sample keeps nothing of its answer\n\
         hint: shorten what comes before the answer, or leave such samples out with --too-long leave-out"
    )]
    CutAway {
        /// The context.
        limit_tokens: usize,
    },
    /// No token to learn.
    #[error("no token of the sample is learnt from")]
    NothingTrained,
    /// Nothing that is given.
    #[error(
        "all tokens of the sample are learnt from, none is given\n\
         hint: a text to learn whole is written {{\"text\": ...}}"
    )]
    EverythingTrained,
    /// An answer that ends with a token at which the model does not stop.
    #[error(
        "the template ends answers with `{found}`, at which this model does not stop\n\
         hint: use the chat template that was published with the model"
    )]
    EndToken {
        /// The token.
        found: String,
    },
    /// A conversation for a model without a template.
    #[error(
        "the model has no chat template, so conversations cannot be learnt from\n\
         hint: tune the instruct model, or give texts: {{\"text\": ...}}, or {{\"prompt\": ..., \"completion\": ...}} with --raw"
    )]
    NoTemplate,
    /// What template or tokenizer say.
    #[error("{0}")]
    Text(qwenkit_text::Error),
    /// A preference whose answers are more than one sequence.
    #[error(
        "an answer has several messages, which the model's template prints differently from how it asks for them\n\
         hint: give pairs that differ in one message of the assistant"
    )]
    AnswerInPieces,
    /// A label of which there is no second sample.
    #[error(
        "the label `{label}` occurs only here; expected at least two samples of each label\n\
         hint: add samples, or mend its spelling{}", near.as_ref().map(|near| format!(" (there is `{near}`)")).unwrap_or_default()
    )]
    LabelOnce {
        /// The label.
        label: String,
        /// Another label with nearly the same name.
        near: Option<String>,
    },
    /// A label that the model does not have.
    #[error(
        "the label `{label}` is none of the model's{}",
        near.as_ref().map(|near| format!("\nhint: is `{near}` meant?")).unwrap_or_default()
    )]
    UnknownLabel {
        /// The label.
        label: String,
        /// One of the model's with nearly the same name.
        near: Option<String>,
    },
    /// Nothing to tell apart.
    #[error("all samples have the label `{label}`; expected at least two labels")]
    OneLabel {
        /// The label.
        label: String,
    },
    /// A conversation with nothing to learn from.
    #[error("the conversation has no message of the assistant to learn from")]
    NoAnswer,
    /// Two answers that are the same.
    #[error("the chosen and the rejected answer are equal; there is nothing to prefer")]
    SameAnswers,
    /// Preference pairs whose prompt cannot be told.
    #[error(
        "`chosen` and `rejected` are texts, and there is no `prompt`\n\
         hint: give the prompt apart, or both answers as lists of messages"
    )]
    NoPrompt,
}

/// Everything that is wrong with one file: the first faults in full, the others counted.
#[derive(Debug)]
pub struct Faults {
    file: String,
    shown: Vec<Fault>,
    total: usize,
}

impl Faults {
    /// Faults that are kept in full.
    const SHOWN_MAX: usize = 20;

    /// No faults yet. `file` is its name, for messages.
    pub fn new(file: impl Into<String>) -> Faults {
        Faults { file: file.into(), shown: Vec::new(), total: 0 }
    }

    /// One more.
    pub fn add(&mut self, line: usize, problem: Problem) {
        self.total += 1;
        if self.shown.len() < Self::SHOWN_MAX {
            self.shown.push(Fault { line, problem });
        }
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The number of all faults.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The first faults, at most twenty.
    pub fn shown(&self) -> &[Fault] {
        &self.shown
    }

    /// `Err` with these faults if there are any.
    ///
    /// # Errors
    /// When there is a fault.
    pub fn into_result(self) -> Result<(), Faults> {
        if self.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file;
        match self.total {
            0 => return write!(f, "{file}: no faults"),
            1 => {}
            total => writeln!(f, "{file}: {total} faults")?,
        }
        for (index, Fault { line, problem }) in self.shown.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match line {
                0 => write!(f, "{file}: {problem}")?,
                line => write!(f, "{file}, line {line}: {problem}")?,
            }
        }
        match self.total - self.shown.len() {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl std::error::Error for Faults {}
