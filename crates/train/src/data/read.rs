//! From a file of JSON lines or a table to records.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::fields::{Fields, kind, wrong};
use super::form::{Form, LabelKeys};
use super::lines::{Line, Lines};
use super::messages::{messages, tools};
use super::table::Table;
use super::{Chat, Faults, Problem, Record};

/// What is not wrong with data, but worth saying.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remarks {
    /// Keys that nothing reads, with the number of times they were met; `[]` stands for any index.
    pub unread: BTreeMap<String, usize>,
    /// Lines with nothing in them.
    pub blank_lines: usize,
    /// Conversations that go on after their last answer; what follows it is not used.
    pub unanswered: usize,
}

impl Remarks {
    /// Kinds of keys that are kept apart; the keys of hostile data are counted together.
    const KEYS_MAX: usize = 100;

    pub(crate) fn note_unread(&mut self, path: &str) {
        let mut shown = String::with_capacity(path.len());
        let mut in_index = false;
        for character in path.chars() {
            in_index &= character != ']';
            if !in_index {
                shown.push(character);
            }
            in_index |= character == '[';
        }
        if self.unread.len() >= Self::KEYS_MAX && !self.unread.contains_key(&shown) {
            shown = "others".to_owned();
        }
        *self.unread.entry(shown).or_default() += 1;
    }
}

/// A file that was read.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name.
    pub file: String,
    /// Its bytes.
    pub bytes: u64,
    /// Their SHA-256, in hexadecimal.
    pub sha256: String,
    /// The form of its samples.
    pub form: Form,
    /// What is worth saying about it.
    pub remarks: Remarks,
}

/// Reads a file and hands each record, with the number of its line, to `visit`: rows of a table for names that end in `.csv`
/// or `.tsv` (or `.parquet`, with that feature), else JSON lines. The form is that of the first line, and the same on all lines.
///
/// # Errors
/// All faults of the file, up to a bound.
pub fn read_file(
    path: &Path,
    labels: &LabelKeys,
    mut visit: impl FnMut(usize, Record) -> Result<(), Problem>,
) -> Result<Source, Faults> {
    let mut faults = Faults::new(path.display().to_string());
    let mut reader = Reader { labels, form: None, remarks: Remarks::default() };
    let mut take = |line: usize, record: Result<Option<Record>, Problem>| match record {
        Ok(None) => Ok(false),
        Ok(Some(record)) => {
            if let Err(problem) = visit(line, record) {
                faults.add(line, problem);
            }
            Ok(true)
        }
        // One fault for the whole file, not one for each of its lines.
        Err(problem @ (Problem::OtherFile { .. } | Problem::UnknownColumns { .. })) => Err(problem),
        Err(problem) => {
            faults.add(line, problem);
            Ok(true)
        }
    };
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_lowercase();
    let read = Hashed::open(path).map_err(Problem::Unreadable).and_then(|mut file| {
        match extension.as_str() {
            "csv" => reader.rows(BufReader::new(&mut file), None, &mut take)?,
            #[cfg(feature = "parquet")]
            "parquet" => {
                io::copy(&mut file, &mut io::sink()).map_err(Problem::Unreadable)?;
                reader.parquet(path, &mut take)?;
            }
            "tsv" => reader.rows(BufReader::new(&mut file), Some('\t'), &mut take)?,
            _ => reader.lines(BufReader::new(&mut file), &mut take)?,
        }
        Ok(file.finish())
    });
    match read {
        Err(problem) => faults.add(0, problem),
        Ok((bytes, sha256)) => {
            if let (true, Some(form)) = (faults.is_empty(), reader.form) {
                let file = path.display().to_string();
                return Ok(Source { file, bytes, sha256, form, remarks: reader.remarks });
            }
        }
    }
    Err(faults)
}

/// A file whose bytes are hashed as they are read.
struct Hashed {
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Hashed {
    fn open(path: &Path) -> io::Result<Hashed> {
        Ok(Hashed { file: File::open(path)?, hash: Sha256::new(), bytes: 0 })
    }

    fn finish(self) -> (u64, String) {
        (self.bytes, crate::record::hex(self.hash))
    }
}

impl Read for Hashed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(bytes)?;
        self.hash.update(bytes.get(..count).unwrap_or_default());
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Takes a line's record, or what is wrong with the line, and says whether there was one.
type Take<'a> = dyn FnMut(usize, Result<Option<Record>, Problem>) -> Result<bool, Problem> + 'a;

struct Reader<'a> {
    labels: &'a LabelKeys,
    form: Option<Form>,
    remarks: Remarks,
}

impl Reader<'_> {
    fn lines(&mut self, input: impl BufRead, take: &mut Take<'_>) -> Result<(), Problem> {
        let mut lines = Lines::new(input);
        let mut has_any = false;
        while let Some(line) = lines.next()? {
            has_any |= take(line.number, self.record_of_line(line))?;
        }
        if has_any { Ok(()) } else { Err(Problem::Empty) }
    }

    fn rows(&mut self, input: impl BufRead, separator: Option<char>, take: &mut Take<'_>) -> Result<(), Problem> {
        let mut table = Table::open(input, separator)?;
        let mut blank = 0;
        let mut has_any = false;
        let header = table.header().iter().map(|name| (name.clone(), Value::Null)).collect();
        if Form::of(&header, self.labels).is_none() {
            let columns = table.header().iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(Problem::UnknownColumns { columns });
        }
        self.form = Form::of(&header, self.labels);
        while let Some(row) = table.next(&mut blank)? {
            // Empty cells are missing, whatever form the row then seems to have.
            let record = row.object.and_then(|object| self.record(object, self.form));
            has_any |= take(row.line, record.map(Some))?;
        }
        self.remarks.blank_lines = blank;
        if has_any { Ok(()) } else { Err(Problem::Empty) }
    }

    #[cfg(feature = "parquet")]
    fn parquet(&mut self, path: &Path, take: &mut Take<'_>) -> Result<(), Problem> {
        let mut has_any = false;
        super::parquet_rows::visit_rows(path, &mut |number, object| {
            // As in a table, what is missing in a row does not give it another form.
            let form = self.form.or_else(|| Form::of(&object, self.labels));
            has_any |= take(number, self.record(object, form).map(Some))?;
            Ok(())
        })?;
        if has_any { Ok(()) } else { Err(Problem::Empty) }
    }

    /// The record of a line; `None` for a blank one.
    fn record_of_line(&mut self, line: Line<'_>) -> Result<Option<Record>, Problem> {
        let text = line.text?;
        if text.trim().is_empty() {
            self.remarks.blank_lines += 1;
            return Ok(None);
        }
        let object = object(text, line.number, line.is_ended)?;
        let form = Form::of(&object, self.labels);
        self.record(object, form).map(Some)
    }

    fn record(&mut self, object: Map<String, Value>, form: Option<Form>) -> Result<Record, Problem> {
        let keys = || object.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let form = match (self.form, form) {
            (None, None) => return Err(Problem::UnknownForm { keys: keys() }),
            (Some(form), found) if found != Some(form) => {
                let found =
                    found.map_or_else(|| format!("of no known form (keys {})", keys()), |f| f.name().to_owned());
                return Err(Problem::OtherForm { found, expected: form.name() });
            }
            (_, Some(form)) => form,
            (Some(form), None) => form,
        };
        self.form = Some(form);
        let mut fields = Fields::of_line(object);
        let record = self.read(form, &mut fields)?;
        fields.finish(&mut self.remarks);
        Ok(record)
    }

    fn read(&mut self, form: Form, fields: &mut Fields) -> Result<Record, Problem> {
        match form {
            Form::Messages => {
                let list = fields.need("messages", "a list of messages")?;
                let mut chat = opened(fields)?;
                chat.push_all(messages(list, "messages", &mut self.remarks)?);
                self.checked(chat).map(Record::Chat)
            }
            Form::Conversations => {
                let list = shared(fields.need("conversations", "a list of messages")?)?;
                let mut chat = opened(fields)?;
                if let Some(system) = fields.string("system")? {
                    let system = serde_json::json!({ "role": "system", "content": system });
                    chat.push_all(vec![(system, false)]);
                }
                chat.push_all(messages(list, "conversations", &mut self.remarks)?);
                self.checked(chat).map(Record::Chat)
            }
            Form::Completion => self.completion(fields),
            Form::Instruction => {
                let mut chat = Chat::of_turn(&instruction(fields)?, &fields.need_string("output")?);
                if let Some(system) = fields.string("system")? {
                    chat.messages.insert(0, serde_json::json!({ "role": "system", "content": system }));
                    chat.trained.insert(0, false);
                }
                Ok(Record::Chat(chat))
            }
            Form::Preference => self.preference(fields, "chosen", "rejected"),
            Form::PreferredOutput => self.preference(fields, "preferred_output", "non_preferred_output"),
            Form::Label => self.label(fields),
            Form::Text => fields.need_string("text").map(Record::Text),
        }
    }

    /// Both as texts, or both as messages.
    fn completion(&mut self, fields: &mut Fields) -> Result<Record, Problem> {
        let prompt = fields.need("prompt", "a string or a list of messages")?;
        let completion = fields.need("completion", "a string or a list of messages")?;
        if let (Value::String(prompt), Value::String(completion)) = (&prompt, &completion) {
            let (prompt, completion) = (prompt.clone(), completion.clone());
            return Ok(Record::Completion { prompt, completion });
        }
        let mut chat = opened(fields)?;
        let given = turn(prompt, "prompt", "user", &mut self.remarks)?;
        chat.push_all(given.into_iter().map(|(message, _)| (message, false)).collect());
        chat.push_all(turn(completion, "completion", "assistant", &mut self.remarks)?);
        self.checked(chat).map(Record::Chat)
    }

    fn preference(&mut self, fields: &mut Fields, better: &str, worse: &str) -> Result<Record, Problem> {
        let expected = "an answer: a string or a list of messages";
        let (chosen, rejected) = (fields.need(better, expected)?, fields.need(worse, expected)?);
        let mut given = opened(fields)?;
        let mut prompt = None;
        for key in ["prompt", "question", "input"] {
            if prompt.is_none() {
                prompt = fields.take(key).map(|value| (key, value));
            }
        }
        if let Some(system) = fields.string("system")?.filter(|system| !system.is_empty()) {
            given.push_all(vec![(serde_json::json!({ "role": "system", "content": system }), false)]);
        }
        match prompt {
            // OpenAI's form: the conversation with its tools.
            Some((key, Value::Object(input))) => {
                let mut input = Fields::new(Value::Object(input), key.to_owned(), "an object with `messages`")?;
                let list = input.need("messages", "a list of messages")?;
                if given.tools.is_none() {
                    given.tools = tools(input.take("tools"))?;
                }
                input.take("parallel_tool_calls");
                let list = messages(list, &input.at("messages"), &mut self.remarks)?;
                given.push_all(list.into_iter().map(|(message, _)| (message, false)).collect());
                input.finish(&mut self.remarks);
            }
            Some((key, value)) => {
                let list = turn(value, key, "user", &mut self.remarks)?;
                given.push_all(list.into_iter().map(|(message, _)| (message, false)).collect());
            }
            None if chosen.is_string() || rejected.is_string() => return Err(Problem::NoPrompt),
            None => {}
        }
        let has_prompt = given.messages.iter().any(|message| message["role"] != "system");
        let chosen = turn(chosen, better, "assistant", &mut self.remarks)?;
        let rejected = turn(rejected, worse, "assistant", &mut self.remarks)?;
        if chosen == rejected {
            return Err(Problem::SameAnswers);
        }
        // Whole conversations share their beginning; what differs is what is compared.
        let shared = chosen.iter().zip(&rejected).take_while(|(one, other)| one.0 == other.0).count();
        if !has_prompt && shared == 0 {
            return Err(Problem::NoPrompt);
        }
        let mut whole = |answer: Vec<(Value, bool)>| {
            let mut chat = given.clone();
            let answer = answer.into_iter().enumerate();
            chat.push_all(answer.map(|(index, (message, trained))| (message, trained && index >= shared)).collect());
            self.checked(chat)
        };
        Ok(Record::Preference { chosen: whole(chosen)?, rejected: whole(rejected)? })
    }

    fn label(&mut self, fields: &mut Fields) -> Result<Record, Problem> {
        let (text_key, label_key) = fields.label_keys(self.labels)?;
        let text = fields.need_string(&text_key)?;
        let at = fields.at(&label_key);
        let label = match fields.need(&label_key, "a label: a string, a whole number, true or false")? {
            Value::String(label) => label.trim().to_owned(),
            Value::Bool(label) => label.to_string(),
            Value::Number(number) if number.is_i64() || number.is_u64() => number.to_string(),
            other => return Err(wrong(&at, &other, "a label: a string, a whole number, true or false")),
        };
        if label.is_empty() {
            return Err(Problem::Missing { path: at, expected: "a label with at least one character" });
        }
        if text.trim().is_empty() {
            return Err(Problem::Missing { path: text_key, expected: "a text with at least one character" });
        }
        Ok(Record::Label { text, label })
    }

    /// A conversation that has something to learn from. What follows its last answer is cut off and noted.
    fn checked(&mut self, mut chat: Chat) -> Result<Chat, Problem> {
        let Some(last) = chat.trained.iter().rposition(|&trained| trained) else {
            return Err(Problem::NoAnswer);
        };
        if last + 1 < chat.messages.len() {
            self.remarks.unanswered += 1;
            chat.messages.truncate(last + 1);
            chat.trained.truncate(last + 1);
        }
        Ok(chat)
    }
}

/// A conversation without messages yet: its tools and variables.
fn opened(fields: &mut Fields) -> Result<Chat, Problem> {
    let tools = tools(fields.take("tools"))?;
    let at = fields.at("chat_template_kwargs");
    let kwargs = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(other) => return Err(wrong(&at, &other, "an object")),
    };
    fields.take("parallel_tool_calls");
    Ok(Chat { tools, kwargs, ..Chat::default() })
}

/// A text as one message of this role, or a list of messages.
fn turn(value: Value, path: &str, role: &str, remarks: &mut Remarks) -> Result<Vec<(Value, bool)>, Problem> {
    match value {
        Value::String(content) => {
            Ok(vec![(serde_json::json!({ "role": role, "content": content }), role == "assistant")])
        }
        // One message without a list around it.
        object @ Value::Object(_) => messages(Value::Array(vec![object]), path, remarks),
        list => messages(list, path, remarks),
    }
}

/// Alpaca's question: the instruction, and below it what it is about.
fn instruction(fields: &mut Fields) -> Result<String, Problem> {
    let instruction = fields.need_string("instruction")?;
    Ok(match fields.string("input")?.filter(|input| !input.trim().is_empty()) {
        Some(input) => format!("{instruction}\n\n{input}"),
        None => instruction,
    })
}

/// ShareGPT's messages with OpenAI's keys.
fn shared(list: Value) -> Result<Value, Problem> {
    let Value::Array(list) = list else { return Err(wrong("conversations", &list, "a list of messages")) };
    let message = |(index, message): (usize, Value)| {
        // Newer files of that name hold OpenAI's messages.
        if message.get("role").is_some() {
            return Ok(message);
        }
        let path = format!("conversations[{index}]");
        let mut fields = Fields::new(message, path, "an object with `from` and `value`")?;
        let at = fields.at("from");
        let from = fields.need_string("from")?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "assistant" | "model" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            _ => return Err(Problem::Role { path: at, found: from }),
        };
        let content = fields.need("value", "the message's text")?;
        let mut message = Map::new();
        message.insert("role".to_owned(), role.into());
        message.insert("content".to_owned(), content);
        if let Some(weight) = fields.take("weight") {
            message.insert("weight".to_owned(), weight);
        }
        Ok(Value::Object(message))
    };
    Ok(Value::Array(list.into_iter().enumerate().map(message).collect::<Result<_, _>>()?))
}

fn object(text: &str, number: usize, is_ended: bool) -> Result<Map<String, Value>, Problem> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Problem::NotObject { found: kind(&other) }),
        Err(_) if number == 1 && text.trim_start().starts_with('[') => Err(Problem::OtherFile {
            found: "one list of JSON",
            hint: "write one sample a line: `jq -c '.[]' in.json > out.jsonl`",
        }),
        Err(error) if number == 1 && error.is_eof() && is_ended => Err(Problem::OtherFile {
            found: "JSON over several lines",
            hint: "write one sample a line: `jq -c . in.json > out.jsonl`",
        }),
        Err(error) => {
            let problem = error.to_string();
            // There is one line, so the parser's own number says nothing.
            let problem = problem.rsplit_once(" at line ").map_or(problem.as_str(), |(text, _)| text).to_owned();
            Err(Problem::NotJson { byte: error.column(), problem, is_cut: error.is_eof() && !is_ended })
        }
    }
}
