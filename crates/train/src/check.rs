//! What somebody should know of data before a model learns from it.
//!
//! Contract: nothing is changed and nothing is left out of the counts; examples are shown up to a bound. Not here: faults, which end
//! reading (`data`), and how it all is printed.

mod likeness;
pub mod personal;

use std::collections::{BTreeMap, HashMap};

use qwenkit_text::Tokenizer;
use serde::Serialize;
use serde_json::Value;

use crate::data::hash::Hash;
use crate::data::{Data, Objective, Record, Samples};
use likeness::Texts;
use personal::Kind;

/// Examples of a kind that are kept.
const EXAMPLES_MAX: usize = 20;
/// Texts are near duplicates from this likeness on.
const NEAR: f32 = 0.8;

/// A line of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file's position among the files.
    pub file: usize,
    /// From 1.
    pub line: usize,
}

/// Personal data at some line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Personal {
    /// Where.
    pub place: Place,
    /// What.
    pub kind: Kind,
    /// Its beginning, the rest covered.
    pub shown: String,
}

/// A record that repeats an earlier one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Repeated {
    /// The later one.
    pub place: Place,
    /// The earlier one.
    pub earlier: Place,
    /// 1 for the same text; below, the share of what they have in common.
    pub likeness: f32,
}

/// What is noted of each record while data is read.
pub struct Survey {
    places: Vec<Place>,
    texts: Texts,
    exact: HashMap<u64, usize>,
    /// Texts of labels, to find those with two.
    labels: HashMap<u64, (usize, u64)>,
    duplicates: usize,
    near_duplicates: usize,
    contradictions: usize,
    repeated: Vec<Repeated>,
    near: Vec<Repeated>,
    contradicting: Vec<Repeated>,
    personal: BTreeMap<Kind, usize>,
    personal_lines: usize,
    personal_shown: Vec<Personal>,
}

impl Default for Survey {
    fn default() -> Survey {
        Survey {
            places: Vec::new(),
            texts: Texts::new(NEAR),
            exact: HashMap::new(),
            labels: HashMap::new(),
            duplicates: 0,
            near_duplicates: 0,
            contradictions: 0,
            repeated: Vec::new(),
            near: Vec::new(),
            contradicting: Vec::new(),
            personal: BTreeMap::new(),
            personal_lines: 0,
            personal_shown: Vec::new(),
        }
    }
}

impl Survey {
    /// Notes a record of the file at this position.
    pub fn note(&mut self, file: usize, line: usize, record: &Record) {
        let place = Place { file, line };
        let number = self.places.len();
        self.places.push(place);
        let (mut everything, mut words) = (Hash::new(), String::new());
        let mut found = Vec::new();
        visit_texts(record, &mut |text, is_system| {
            text.bytes().for_each(|byte| everything.add(u64::from(byte)));
            everything.add(u64::MAX);
            // The same instructions stand before every conversation of a set.
            if !is_system {
                words.push_str(text);
                words.push(' ');
            }
            found.extend(
                personal::find(text)
                    .into_iter()
                    .map(|(kind, range)| (kind, covered(text.get(range).unwrap_or_default()))),
            );
        });
        self.note_personal(place, found);
        if let Record::Label { text, label } = record {
            self.note_label(number, text, label);
        }
        let like = self.texts.add(&words);
        if let Some(&earlier) = self.exact.get(&everything.finish()) {
            self.duplicates += 1;
            let earlier = self.place(earlier);
            keep(&mut self.repeated, Repeated { place, earlier, likeness: 1.0 });
            return;
        }
        self.exact.insert(everything.finish(), number);
        if let Some(like) = like {
            self.near_duplicates += 1;
            let earlier = self.place(like.earlier);
            keep(&mut self.near, Repeated { place, earlier, likeness: like.likeness });
        }
    }

    fn place(&self, number: usize) -> Place {
        self.places.get(number).copied().unwrap_or(Place { file: 0, line: 0 })
    }

    fn note_personal(&mut self, place: Place, found: Vec<(Kind, String)>) {
        self.personal_lines += usize::from(!found.is_empty());
        for (kind, shown) in found {
            *self.personal.entry(kind).or_default() += 1;
            keep(&mut self.personal_shown, Personal { place, kind, shown });
        }
    }

    fn note_label(&mut self, number: usize, text: &str, label: &str) {
        let hash = |text: &str| {
            let mut hash = Hash::new();
            text.trim().bytes().for_each(|byte| hash.add(u64::from(byte)));
            hash.finish()
        };
        let (text, label) = (hash(text), hash(label));
        let &mut (earlier, first) = self.labels.entry(text).or_insert((number, label));
        if first != label {
            self.contradictions += 1;
            let repeated = Repeated { place: self.place(number), earlier: self.place(earlier), likeness: 1.0 };
            keep(&mut self.contradicting, repeated);
        }
    }
}

fn keep<T>(list: &mut Vec<T>, item: T) {
    if list.len() < EXAMPLES_MAX {
        list.push(item);
    }
}

/// A text's first characters, the others as dots.
fn covered(text: &str) -> String {
    let (shown, rest) = (text.chars().take(3), text.chars().skip(3));
    shown.chain(rest.take(12).map(|c| if c.is_alphanumeric() { '\u{2022}' } else { c })).collect()
}

/// Every text of a record that a model may learn or see, and whether it is an instruction of the system.
fn visit_texts(record: &Record, visit: &mut impl FnMut(&str, bool)) {
    match record {
        Record::Chat(chat) => visit_messages(&chat.messages, visit),
        Record::Completion { prompt, completion } => {
            visit(prompt, false);
            visit(completion, false);
        }
        Record::Text(text) => visit(text, false),
        Record::Preference { chosen, rejected } => {
            visit_messages(&chosen.messages, visit);
            let shared = chosen.messages.iter().zip(&rejected.messages).take_while(|(one, other)| one == other).count();
            visit_messages(rejected.messages.get(shared..).unwrap_or_default(), visit);
        }
        Record::Label { text, label } => {
            visit(text, false);
            visit(label, true);
        }
    }
}

fn visit_messages(messages: &[Value], visit: &mut impl FnMut(&str, bool)) {
    for message in messages {
        let is_system = message["role"] == "system";
        for key in ["content", "reasoning_content"] {
            if let Some(text) = message.get(key).and_then(Value::as_str) {
                visit(text, is_system);
            }
        }
        if let Some(calls) = message.get("tool_calls") {
            visit(&calls.to_string(), is_system);
        }
    }
}

/// How many samples have up to so many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// The longest sample of the bin.
    pub up_to_tokens: usize,
    /// Its samples.
    pub samples: usize,
}

/// Lengths of samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// All tokens.
    pub total_tokens: usize,
    /// Those that are learnt; for pairs those of both answers, for labels none.
    pub trained_tokens: usize,
    /// The shortest sample.
    pub min_tokens: usize,
    /// Half of the samples are not longer.
    pub median_tokens: usize,
    /// Nine tenths are not longer.
    pub p90_tokens: usize,
    /// The longest sample.
    pub max_tokens: usize,
    /// Samples by length, each bin twice as wide as the one before.
    pub histogram: Vec<Bin>,
}

/// A label and its samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LabelCount {
    /// The label.
    pub label: String,
    /// Its samples.
    pub samples: usize,
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What the data teaches: `sft`, `preference` or `label`.
    pub objective: &'static str,
    /// Records of the files.
    pub records: usize,
    /// Samples that came of them.
    pub samples: usize,
    /// Their lengths.
    pub lengths: Lengths,
    /// Records that repeat an earlier one to the letter.
    pub duplicates: usize,
    /// Records that are nearly like an earlier one.
    pub near_duplicates: usize,
    /// Texts that have another label elsewhere.
    pub contradictions: usize,
    /// Examples of the three.
    pub repeated: Vec<Repeated>,
    /// The same for near ones.
    pub near: Vec<Repeated>,
    /// The same for labels.
    pub contradicting: Vec<Repeated>,
    /// Personal data by kind.
    pub personal: BTreeMap<Kind, usize>,
    /// Lines with any of it.
    pub personal_lines: usize,
    /// Examples.
    pub personal_shown: Vec<Personal>,
    /// Labels, the most frequent first.
    pub labels: Vec<LabelCount>,
    /// What else is worth saying, as sentences.
    pub remarks: Vec<String>,
}

impl Check {
    /// What a survey and the samples say together.
    pub fn new(survey: Survey, data: &Data) -> Check {
        Check {
            objective: match data.samples.objective() {
                Objective::Sft => "sft",
                Objective::Preference => "preference",
                Objective::Label => "label",
            },
            records: survey.places.len(),
            samples: data.samples.len(),
            lengths: Lengths::of(&data.samples),
            duplicates: survey.duplicates,
            near_duplicates: survey.near_duplicates,
            contradictions: survey.contradictions,
            repeated: survey.repeated,
            near: survey.near,
            contradicting: survey.contradicting,
            personal: survey.personal,
            personal_lines: survey.personal_lines,
            personal_shown: survey.personal_shown,
            labels: count_labels(data),
            remarks: remarks(data),
        }
    }
}

impl Lengths {
    /// Those of samples.
    pub fn of(samples: &Samples) -> Lengths {
        let mut lengths = samples.lengths();
        lengths.sort_unstable();
        let at = |share: f64| {
            let index = (lengths.len() as f64 * share).ceil() as usize;
            lengths.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        let trained = |flags: &[bool]| flags.iter().filter(|trained| **trained).count();
        let trained_tokens = match samples {
            Samples::Sft(samples) => samples.iter().map(|sample| trained(&sample.trained)).sum(),
            Samples::Preference(pairs) => {
                pairs.iter().map(|pair| trained(&pair.chosen.trained) + trained(&pair.rejected.trained)).sum()
            }
            Samples::Label(_) => 0,
        };
        let mut histogram: Vec<Bin> = Vec::new();
        for &length in &lengths {
            let up_to_tokens = length.max(8).next_power_of_two();
            match histogram.last_mut().filter(|bin| bin.up_to_tokens == up_to_tokens) {
                Some(bin) => bin.samples += 1,
                None => histogram.push(Bin { up_to_tokens, samples: 1 }),
            }
        }
        Lengths {
            total_tokens: lengths.iter().sum(),
            trained_tokens,
            min_tokens: at(0.0),
            median_tokens: at(0.5),
            p90_tokens: at(0.9),
            max_tokens: at(1.0),
            histogram,
        }
    }
}

fn count_labels(data: &Data) -> Vec<LabelCount> {
    let Samples::Label(samples) = &data.samples else { return Vec::new() };
    let mut counts = vec![0; data.labels.len()];
    for sample in samples {
        if let Some(count) = counts.get_mut(sample.label) {
            *count += 1;
        }
    }
    let labels = data.labels.iter().zip(counts);
    let mut labels: Vec<LabelCount> =
        labels.map(|(label, samples)| LabelCount { label: label.clone(), samples }).collect();
    labels.sort_by_key(|count| std::cmp::Reverse(count.samples));
    labels
}

/// Sentences about what was read.
pub fn remarks(data: &Data) -> Vec<String> {
    let mut said = Vec::new();
    for source in &data.sources {
        let file = &source.file;
        let remarks = &source.remarks;
        if !remarks.unread.is_empty() {
            let keys: Vec<String> =
                remarks.unread.iter().map(|(key, count)| format!("`{key}` ({count} times)")).collect();
            said.push(format!("{file}: nothing reads the keys {}", keys.join(", ")));
        }
        if remarks.blank_lines > 0 {
            said.push(format!("{file}: blank lines: {}", remarks.blank_lines));
        }
        if remarks.unanswered > 0 {
            said.push(format!(
                "{file}: conversations that go on after their last answer: {}; what follows it is not used",
                remarks.unanswered
            ));
        }
    }
    let remarks = &data.remarks;
    let mut say = |count: usize, what: &str, more: &str| {
        if count > 0 {
            said.push(format!("{what}: {count}{more}"));
        }
    };
    say(remarks.cut, "samples cut to the length of the context", "");
    say(remarks.pieced, "plain texts longer than the context, which go on in further samples", "");
    say(remarks.left_out, "records left out, being longer than the context", "");
    say(
        remarks.split,
        "conversations that give more than one sample",
        "; the model's template prints earlier answers differently from how it asks for them, and every answer is learnt behind exactly what \
         the model will read (--answers last learns the last one alone)",
    );
    say(
        remarks.lost_thoughts,
        "answers with thoughts that the model's template does not print",
        "; these are not learnt",
    );
    say(
        remarks.reopened,
        "answers without a thought where the model's prompts open one",
        "; they are learnt behind a thought that is closed, as when it answers without thinking",
    );
    say(remarks.empty_answers, "empty answers, which teach to say nothing", "");
    say(
        remarks.spelt,
        "texts that spell control tokens such as <|im_end|>",
        "; with --control-tokens they become these, otherwise they are text",
    );
    said
}

/// A piece of a sample as text, and whether it is learnt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The text, control tokens included.
    pub text: String,
    /// Whether its tokens are learnt.
    pub trained: bool,
}

/// A sample in pieces, to look at.
pub fn shown(tokenizer: &Tokenizer, tokens: &[qwenkit_tensor::TokenId], trained: &[bool]) -> Vec<Shown> {
    let mut pieces = Vec::new();
    let mut from = 0;
    for to in 1..=tokens.len() {
        if to == tokens.len() || trained.get(to) != trained.get(from) {
            let text = tokenizer.decode(tokens.get(from..to).unwrap_or_default(), true);
            pieces.push(Shown { text, trained: trained.get(from).copied().unwrap_or(false) });
            from = to;
        }
    }
    pieces
}
