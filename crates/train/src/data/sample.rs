//! Records as tokens, each of which is given or learnt.

use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatInput, ChatTemplate, SpecialTokens, Tokenizer, Turn, TurnEncoder};
use serde_json::Value;

use super::hash::Hash;
use super::{Chat, Problem, Record};

/// Tokens and which of them are learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The line it came from, from 1.
    pub line: usize,
    /// The tokens.
    pub tokens: Vec<TokenId>,
    /// As many flags: whether the model has to foretell this token. That of the first token means nothing, as nothing comes
    /// before it.
    pub trained: Vec<bool>,
    /// Tokens that were cut off at the end.
    pub cut_tokens: usize,
    /// A number for its record, the same for all samples of a record and for equal records.
    pub record: u64,
}

/// A better and a worse answer to the same prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The better one; its trained tokens are the answer's.
    pub chosen: Sample,
    /// The worse one.
    pub rejected: Sample,
}

/// A text and its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// The line it came from, from 1.
    pub line: usize,
    /// The tokens of the text without white space around it, and the first of the model's stop tokens, whose state stands for
    /// the text.
    pub tokens: Vec<TokenId>,
    /// The label's position in [`super::Data::labels`].
    pub label: usize,
    /// Tokens that were cut off at the end.
    pub cut_tokens: usize,
    /// A number for its text, the same for equal texts.
    pub record: u64,
}

/// What becomes of samples longer than the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TooLong {
    /// They are faults.
    #[default]
    Refuse,
    /// Their end is cut off, and told; plain texts go on in a further sample.
    Cut,
    /// They are left out, and told.
    LeaveOut,
}

/// Which answers of a conversation are learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answers {
    /// Each of them.
    #[default]
    All,
    /// The last one alone.
    Last,
}

/// How records become tokens.
#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    /// The longest sample.
    pub context_tokens: usize,
    /// What becomes of longer ones.
    pub too_long: TooLong,
    /// Which answers are learnt.
    pub answers: Answers,
    /// Whether a prompt and its completion are plain text, rather than a question and an answer of a conversation.
    pub is_raw: bool,
    /// Whether `<|im_end|>` and its like become control tokens where plain texts spell them.
    pub parses_control_tokens: bool,
}

/// The text side of the model that is tuned.
#[derive(Clone, Copy)]
pub struct TextSide<'a> {
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<&'a ChatTemplate>,
    /// The tokens at which it stops.
    pub stop_tokens: &'a [TokenId],
}

/// What is worth saying about the way from records to samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodingRemarks {
    /// Samples that were cut.
    pub cut: usize,
    /// Plain texts that go on in a further sample.
    pub pieced: usize,
    /// Records that were left out as too long.
    pub left_out: usize,
    /// Conversations that gave more than one sample, because the template prints earlier answers differently from how it asks
    /// for them.
    pub split: usize,
    /// Answers whose thoughts the template does not print.
    pub lost_thoughts: usize,
    /// Answers without a thought by a template that opens one in every prompt; learnt behind a closed one.
    pub reopened: usize,
    /// Answers with nothing in them but the end token.
    pub empty_answers: usize,
    /// Plain texts that spell a control token.
    pub spelt: usize,
}

/// Turns records into samples.
pub struct Encoder<'a> {
    text: TextSide<'a>,
    turns: Option<TurnEncoder<'a>>,
    encoding: Encoding,
    end_of_text: Option<TokenId>,
    remarks: EncodingRemarks,
}

impl<'a> Encoder<'a> {
    /// For one model.
    pub fn new(text: TextSide<'a>, encoding: Encoding) -> Encoder<'a> {
        let turns = text.template.map(|template| TurnEncoder::new(template, text.tokenizer));
        let end_of_text = text.tokenizer.token_id("<|endoftext|>");
        Encoder { text, turns, encoding, end_of_text, remarks: EncodingRemarks::default() }
    }

    /// What was noted until now.
    pub fn remarks(&self) -> EncodingRemarks {
        self.remarks
    }

    /// The samples of a conversation, a completion or a text; none where it is left out.
    ///
    /// # Errors
    /// When it cannot be learnt from.
    pub fn samples(&mut self, line: usize, record: &Record) -> Result<Vec<Sample>, Problem> {
        let mut samples = match record {
            Record::Chat(chat) => self.chat(line, chat)?,
            Record::Completion { prompt, completion } if self.encoding.is_raw => {
                vec![self.raw(line, prompt, completion)?]
            }
            Record::Completion { prompt, completion } => self.chat(line, &Chat::of_turn(prompt, completion))?,
            Record::Text(text) => return self.text(line, text),
            Record::Preference { .. } | Record::Label { .. } => return Ok(Vec::new()),
        };
        for sample in &samples {
            check_trained(sample)?;
        }
        if !self.fit(&mut samples)? {
            samples.clear();
        }
        note_record(&mut samples);
        Ok(samples)
    }

    /// The two samples of a preference; none where it is left out.
    ///
    /// # Errors
    /// When it cannot be learnt from.
    pub fn pair(&mut self, line: usize, chosen: &Chat, rejected: &Chat) -> Result<Option<Pair>, Problem> {
        let mut samples = Vec::with_capacity(2);
        for chat in [chosen, rejected] {
            let mut turns = self.chat(line, chat)?;
            let Some(sample) = turns.pop() else { return Err(Problem::NothingTrained) };
            if !turns.is_empty() {
                return Err(Problem::AnswerInPieces);
            }
            check_trained(&sample)?;
            samples.push(sample);
        }
        if !self.fit(&mut samples)? {
            return Ok(None);
        }
        if samples.first().map(|sample| &sample.tokens) == samples.last().map(|sample| &sample.tokens) {
            return Err(Problem::SameAnswers);
        }
        note_record(&mut samples);
        let rejected = samples.pop().ok_or(Problem::NothingTrained)?;
        Ok(samples.pop().map(|chosen| Pair { chosen, rejected }))
    }

    /// The tokens of a text that has a label, and how many were cut off; `None` where it is left out.
    ///
    /// # Errors
    /// When it is too long.
    pub fn labelled(&mut self, text: &str) -> Result<Option<(Vec<TokenId>, usize)>, Problem> {
        let mut tokens = self.plain(text.trim())?;
        let limit = self.encoding.context_tokens;
        let room = limit.saturating_sub(1).max(1);
        let cut = tokens.len().saturating_sub(room);
        if cut > 0 {
            match self.encoding.too_long {
                TooLong::Refuse => {
                    // With the token that ends it.
                    return Err(Problem::TooLong { found: tokens.len() + 1, limit_tokens: limit });
                }
                TooLong::LeaveOut => {
                    self.remarks.left_out += 1;
                    return Ok(None);
                }
                TooLong::Cut => {
                    self.remarks.cut += 1;
                    tokens.truncate(room);
                }
            }
        }
        tokens.extend(self.text.stop_tokens.first());
        Ok(Some((tokens, cut)))
    }

    /// One sample for all turns that stand in the last one's prompt as they were asked for and answered, and one for each
    /// other.
    fn chat(&mut self, line: usize, chat: &Chat) -> Result<Vec<Sample>, Problem> {
        let encoder = self.turns.as_ref().ok_or(Problem::NoTemplate)?;
        let mut answers: Vec<usize> =
            chat.trained.iter().enumerate().filter(|(_, trained)| **trained).map(|(index, _)| index).collect();
        if let (Answers::Last, Some(&last)) = (self.encoding.answers, answers.last()) {
            answers = vec![last];
        }
        let input = ChatInput {
            messages: Value::Array(chat.messages.clone()),
            tools: chat.tools.clone(),
            kwargs: chat.kwargs.clone(),
            ..ChatInput::default()
        };
        let turns = encoder.turns(&input, &answers).map_err(Problem::Text)?;
        let mut samples: Vec<Sample> = Vec::new();
        for turn in turns.into_iter().rev() {
            self.note(&turn)?;
            let Turn { mut prompt, answer, .. } = turn;
            let (given, all) = (prompt.len(), prompt.len() + answer.len());
            prompt.extend(answer);
            match samples.last_mut().filter(|later| later.tokens.starts_with(&prompt)) {
                Some(later) => later.trained.iter_mut().take(all).skip(given).for_each(|trained| *trained = true),
                None => {
                    let trained = (0..all).map(|at| at >= given).collect();
                    samples.push(Sample { line, tokens: prompt, trained, cut_tokens: 0, record: 0 });
                }
            }
        }
        self.remarks.split += usize::from(samples.len() > 1);
        samples.reverse();
        Ok(samples)
    }

    fn note(&mut self, turn: &Turn) -> Result<(), Problem> {
        let end = turn.answer.last().copied().ok_or(Problem::NothingTrained)?;
        if !self.text.stop_tokens.contains(&end) {
            return Err(Problem::EndToken { found: self.text.tokenizer.decode(&[end], true) });
        }
        self.remarks.lost_thoughts += usize::from(!turn.prints_thoughts);
        self.remarks.reopened += usize::from(turn.is_reopened);
        self.remarks.empty_answers += usize::from(turn.answer.len() == 1);
        Ok(())
    }

    /// Plain text behind plain text, cut into tokens at the border, as it is when a model goes on with a prompt.
    fn raw(&mut self, line: usize, prompt: &str, completion: &str) -> Result<Sample, Problem> {
        let mut tokens = self.plain(prompt)?;
        let given = tokens.len();
        tokens.extend(self.plain(completion)?);
        self.end_text(&mut tokens);
        let trained = (0..tokens.len()).map(|at| at >= given).collect();
        Ok(Sample { line, tokens, trained, cut_tokens: 0, record: 0 })
    }

    /// A text that is learnt whole. One that is too long goes on in further samples where it may be cut.
    fn text(&mut self, line: usize, text: &str) -> Result<Vec<Sample>, Problem> {
        let mut tokens = self.plain(text)?;
        if tokens.is_empty() {
            return Err(Problem::NothingTrained);
        }
        self.end_text(&mut tokens);
        let limit = self.encoding.context_tokens;
        if tokens.len() > limit {
            match self.encoding.too_long {
                TooLong::Refuse => return Err(Problem::TooLong { found: tokens.len(), limit_tokens: limit }),
                TooLong::LeaveOut => {
                    self.remarks.left_out += 1;
                    return Ok(Vec::new());
                }
                TooLong::Cut => self.remarks.pieced += 1,
            }
        }
        // A further sample begins with the last token of the one before, so that every token but the first is foretold once.
        let (mut samples, mut start) = (Vec::new(), 0);
        while start + 1 < tokens.len() {
            let piece = tokens.iter().skip(start).take(limit.max(2)).copied().collect::<Vec<_>>();
            let trained = (0..piece.len()).map(|at| at > 0 || start == 0).collect();
            start += piece.len() - 1;
            samples.push(Sample { line, tokens: piece, trained, cut_tokens: 0, record: 0 });
        }
        note_record(&mut samples);
        if samples.is_empty() { Err(Problem::NothingTrained) } else { Ok(samples) }
    }

    fn plain(&mut self, text: &str) -> Result<Vec<TokenId>, Problem> {
        let tokenizer = self.text.tokenizer;
        let spells = tokenizer.special_tokens().any(|(token, _)| text.contains(token));
        self.remarks.spelt += usize::from(spells);
        let special = match self.encoding.parses_control_tokens {
            true => SpecialTokens::Parse,
            false => SpecialTokens::AsText,
        };
        tokenizer.encode(text, special).map_err(Problem::Text)
    }

    /// Ends a text, unless it spells its own end.
    fn end_text(&self, tokens: &mut Vec<TokenId>) {
        let ends = tokens.last().is_some_and(|last| self.text.stop_tokens.contains(last));
        if !ends {
            tokens.extend(self.end_of_text);
        }
    }

    /// Brings samples below the context's length, all or none of them; false where they are left out.
    fn fit(&mut self, samples: &mut [Sample]) -> Result<bool, Problem> {
        let limit = self.encoding.context_tokens;
        let Some(longest) = samples.iter().map(|sample| sample.tokens.len()).max().filter(|&longest| longest > limit)
        else {
            return Ok(true);
        };
        match self.encoding.too_long {
            TooLong::Refuse => return Err(Problem::TooLong { found: longest, limit_tokens: limit }),
            TooLong::LeaveOut => {
                self.remarks.left_out += 1;
                return Ok(false);
            }
            TooLong::Cut => {}
        }
        for sample in samples.iter_mut().filter(|sample| sample.tokens.len() > limit) {
            sample.cut_tokens = sample.tokens.len() - limit;
            sample.tokens.truncate(limit);
            sample.trained.truncate(limit);
            if !sample.trained.iter().skip(1).any(|&trained| trained) {
                return Err(Problem::CutAway { limit_tokens: limit });
            }
            self.remarks.cut += 1;
        }
        Ok(true)
    }
}

/// Something has to be given and something learnt.
fn check_trained(sample: &Sample) -> Result<(), Problem> {
    match sample.trained.iter().filter(|trained| **trained).count() {
        0 => Err(Problem::NothingTrained),
        all if all == sample.tokens.len() => Err(Problem::EverythingTrained),
        _ => Ok(()),
    }
}

/// Gives the samples of a record its number.
fn note_record(samples: &mut [Sample]) {
    let mut hash = Hash::new();
    for sample in samples.iter() {
        sample.tokens.iter().for_each(|token| hash.add(u64::from(token.0)));
        hash.add(u64::MAX);
    }
    let record = hash.finish();
    samples.iter_mut().for_each(|sample| sample.record = record);
}

/// The number of a text's tokens.
pub(crate) fn record_of(tokens: &[TokenId]) -> u64 {
    let mut hash = Hash::new();
    tokens.iter().for_each(|token| hash.add(u64::from(token.0)));
    hash.finish()
}
