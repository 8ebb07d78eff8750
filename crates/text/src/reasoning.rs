//! Takes a model's thoughts apart from its answer while the text arrives.
//!
//! Contract: the parts joined are the same for any cut of the text into pieces; no tag and no empty thought ever reaches
//! the answer; newlines next to the tags belong to the tags. A thought that never ends stays a thought, unless a tool call
//! stands in it: that call is handed over apart.
//!
//! Not here: what the calls say ([`crate::ToolReader`]), how thinking is switched ([`crate::ThinkingWish`]).

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";
const CALL: &str = "<tool_call>";

/// How a prompt leaves the thought of the answer it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The prompt has no thought; the model may open one.
    Unopened,
    /// The prompt ends inside a thought.
    Open,
    /// The prompt holds a finished thought, most often an empty one.
    Closed,
}

impl Opening {
    /// What the end of a rendered prompt says. Only what follows the last header of a turn counts.
    pub fn of_prompt(prompt: &str) -> Opening {
        let turn = prompt.rfind("<|im_start|>").and_then(|at| prompt.get(at..)).unwrap_or(prompt);
        match (turn.rfind(OPEN), turn.rfind(CLOSE)) {
            (Some(open), Some(close)) if open > close => Opening::Open,
            (Some(_), None) => Opening::Open,
            (_, Some(_)) => Opening::Closed,
            (None, None) => Opening::Unopened,
        }
    }
}

/// A part of what a model wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Of its thoughts.
    Reasoning(String),
    /// Of its answer.
    Content(String),
    /// A tool call and all after it, found in a thought that never ended.
    CallInThought(String),
}

/// Splits one answer. Push its pieces, then finish.
#[derive(Clone, Debug)]
pub struct ReasoningSplitter {
    place: Place,
    finds_calls: bool,
    /// Text that waits for what follows it.
    held: String,
    /// Bytes of `held` that were searched without a result.
    searched: usize,
    /// Whether a thought has ended already.
    has_thought: bool,
    /// Whether the thought at hand, and any thought, has words yet.
    has_reasoning: bool,
    has_reasoned: bool,
    fences: Fences,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Thought,
    /// In a thought, behind what begins a call.
    Call,
    /// In the answer, where white space and tags are still dropped.
    BeforeContent,
    Content,
}

/// Whether text stands in a block of code, and its last character.
#[derive(Clone, Copy, Debug, Default)]
struct Fences {
    is_open: bool,
    ticks: usize,
    last: Option<char>,
}

impl Fences {
    fn read(&mut self, text: &str) {
        for character in text.chars() {
            self.ticks = if character == '`' { self.ticks + 1 } else { 0 };
            if self.ticks == 3 {
                self.is_open = !self.is_open;
            }
            self.last = Some(character);
        }
    }

    /// Whether a tag here is quoted rather than meant.
    fn quotes(self) -> bool {
        self.is_open || matches!(self.last, Some('`' | '"' | '\''))
    }
}

impl ReasoningSplitter {
    /// A splitter at the start of an answer. `finds_calls` where tools were declared.
    pub fn new(opening: Opening, finds_calls: bool) -> ReasoningSplitter {
        ReasoningSplitter {
            place: if opening == Opening::Open { Place::Thought } else { Place::BeforeContent },
            finds_calls,
            held: String::new(),
            searched: 0,
            has_thought: opening == Opening::Closed,
            has_reasoning: false,
            has_reasoned: false,
            fences: Fences::default(),
        }
    }

    /// Whether the text so far ends inside a thought.
    pub fn is_thinking(&self) -> bool {
        matches!(self.place, Place::Thought | Place::Call)
    }

    /// Takes the next piece of text and adds what is certain to `parts`.
    pub fn push(&mut self, piece: &str, parts: &mut Vec<Part>) {
        for part in short_pieces(piece) {
            self.held.push_str(part);
            while self.step(false, parts) {}
        }
    }

    /// The text is over: everything held goes where it belongs.
    pub fn finish(mut self, parts: &mut Vec<Part>) {
        while self.step(true, parts) {}
        let held = std::mem::take(&mut self.held);
        match self.place {
            Place::Thought => self.think(held.trim_end(), parts),
            Place::Call => parts.push(Part::CallInThought(held)),
            Place::BeforeContent => {}
            Place::Content => self.answer(&held, parts),
        }
    }

    /// One step; false where more text is needed.
    fn step(&mut self, is_over: bool, parts: &mut Vec<Part>) -> bool {
        match self.place {
            Place::Thought => self.step_thought(is_over, parts),
            Place::Call => self.step_call(parts),
            Place::BeforeContent => self.step_before(is_over),
            Place::Content => self.step_content(is_over, parts),
        }
    }

    fn step_thought(&mut self, is_over: bool, parts: &mut Vec<Part>) -> bool {
        if !self.has_reasoning {
            // White space and a tag that the model repeats.
            let kept = self.held.trim_start().len();
            self.held.drain(..self.held.len() - kept);
            if self.held.starts_with(OPEN) {
                self.held.drain(..OPEN.len());
                return true;
            }
            if !is_over && OPEN.starts_with(self.held.as_str()) {
                return false;
            }
        }
        let Some(at) = self.held.find('<') else {
            self.release_thought(self.held.len(), parts);
            return false;
        };
        let tail = self.held.get(at..).unwrap_or_default();
        if tail.starts_with(CLOSE) {
            let thought = self.held.get(..at).unwrap_or_default().trim_end().to_owned();
            self.think(&thought, parts);
            self.held.drain(..at + CLOSE.len());
            self.end_thought();
            return true;
        }
        match if self.finds_calls { begins_call(tail) } else { Match::No } {
            Match::Yes => {
                let thought = self.held.get(..at).unwrap_or_default().trim_end().to_owned();
                self.think(&thought, parts);
                self.held.drain(..at);
                self.place = Place::Call;
                self.searched = 0;
                return true;
            }
            Match::NeedsMore if !is_over => {
                self.release_thought(at, parts);
                return false;
            }
            Match::NeedsMore | Match::No => {}
        }
        if !is_over && CLOSE.starts_with(tail) {
            self.release_thought(at, parts);
            return false;
        }
        self.release_thought(at + 1, parts);
        true
    }

    /// Gives out the first `until` bytes of a thought but for white space at their end.
    fn release_thought(&mut self, until: usize, parts: &mut Vec<Part>) {
        let thought = self.held.get(..until).unwrap_or_default().trim_end().to_owned();
        self.held.drain(..thought.len());
        self.think(&thought, parts);
    }

    fn think(&mut self, text: &str, parts: &mut Vec<Part>) {
        if !text.is_empty() {
            // A second thought begins on a line of its own.
            let apart = if self.has_reasoned && !self.has_reasoning { "\n" } else { "" };
            (self.has_reasoning, self.has_reasoned) = (true, true);
            parts.push(Part::Reasoning(format!("{apart}{text}")));
        }
    }

    fn end_thought(&mut self) {
        self.has_thought = true;
        self.has_reasoning = false;
        self.place = Place::BeforeContent;
    }

    /// A call in a thought is a draft when the thought ends after it, and meant when it never does.
    fn step_call(&mut self, parts: &mut Vec<Part>) -> bool {
        let from = floor(&self.held, self.searched.saturating_sub(CLOSE.len()));
        let Some(found) = self.held.get(from..).and_then(|tail| tail.find(CLOSE)) else {
            self.searched = self.held.len();
            return false;
        };
        let draft = self.held.get(..from + found).unwrap_or_default().trim_end().to_owned();
        self.held.drain(..from + found + CLOSE.len());
        let apart = if self.has_reasoning { "\n" } else { "" };
        self.think(&format!("{apart}{draft}"), parts);
        self.end_thought();
        true
    }

    fn step_before(&mut self, is_over: bool) -> bool {
        let rest = self.held.trim_start();
        if rest.starts_with(OPEN) {
            let kept = rest.len() - OPEN.len();
            self.held.drain(..self.held.len() - kept);
            self.place = Place::Thought;
            return true;
        }
        // The end of a thought that the prompt has ended already, or that never began.
        if rest.starts_with(CLOSE) {
            let kept = rest.len() - CLOSE.len();
            self.held.drain(..self.held.len() - kept);
            self.has_thought = true;
            return true;
        }
        if rest.is_empty() || (!is_over && (OPEN.starts_with(rest) || CLOSE.starts_with(rest))) {
            return false;
        }
        if self.has_thought {
            let kept = self.held.trim_start_matches(['\n', '\r']).len();
            self.held.drain(..self.held.len() - kept);
        }
        self.place = Place::Content;
        true
    }

    fn step_content(&mut self, is_over: bool, parts: &mut Vec<Part>) -> bool {
        // One thought to an answer: whoever writes of the tag after it means the word.
        if self.has_thought {
            let held = std::mem::take(&mut self.held);
            self.answer(&held, parts);
            return false;
        }
        let until = self.held.find('<').unwrap_or(self.held.len());
        let before: String = self.held.drain(..until).collect();
        self.answer(&before, parts);
        if self.held.is_empty() {
            return false;
        }
        if self.held.starts_with(OPEN) && !self.fences.quotes() {
            self.held.drain(..OPEN.len());
            self.place = Place::Thought;
            return true;
        }
        if !is_over && OPEN.starts_with(self.held.as_str()) {
            return false;
        }
        self.held.drain(..1);
        self.answer("<", parts);
        true
    }

    fn answer(&mut self, text: &str, parts: &mut Vec<Part>) {
        if !text.is_empty() {
            self.fences.read(text);
            parts.push(Part::Content(text.to_owned()));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Yes,
    No,
    NeedsMore,
}

/// Whether the text begins a tool call: the tag, and behind it the start of either form.
fn begins_call(text: &str) -> Match {
    let Some(body) = text.strip_prefix(CALL) else {
        return if CALL.starts_with(text) { Match::NeedsMore } else { Match::No };
    };
    let body = body.trim_start();
    match () {
        () if body.starts_with('{') || body.starts_with("<function=") => Match::Yes,
        () if "<function=".starts_with(body) => Match::NeedsMore,
        () => Match::No,
    }
}

/// A text in pieces of a few kilobytes: what a reader moves for each tag stays small however long the text is.
pub(crate) fn short_pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, tail) = rest.split_at(floor(rest, 4096));
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The nearest start of a character at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}
