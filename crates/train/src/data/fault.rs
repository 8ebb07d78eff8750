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
