//! An answer as a row of blocks: interfaces that tell thoughts, text and calls one after the other open, fill and close
//! them.

use qwenkit_text::AnswerEvent;

use crate::told::{Call, Told};

/// A stretch of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Block {
    Thought(String),
    Text(String),
    Call(Call),
}

/// What becomes of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Opens(usize),
    Grows(usize, String),
    Closes(usize),
}

/// The blocks so far.
#[derive(Default)]
pub(crate) struct Blocks {
    blocks: Vec<Block>,
    is_open: bool,
}

impl Blocks {
    pub(crate) fn all(&self) -> &[Block] {
        &self.blocks
    }

    /// Takes in what an answer has told of itself.
    pub(crate) fn take_in(&mut self, told: &Told, event: AnswerEvent) -> Vec<Change> {
        match event {
            AnswerEvent::Reasoning(text) => self.grow(Block::Thought(String::new()), text),
            AnswerEvent::Content(text) => self.grow(Block::Text(String::new()), text),
            AnswerEvent::CallBegin { index, .. } => match told.calls.get(index) {
                Some(call) => self.open(Block::Call(Call { arguments: String::new(), ..call.clone() })),
                None => Vec::new(),
            },
            AnswerEvent::CallArguments { delta, .. } => match self.blocks.last_mut() {
                Some(Block::Call(call)) => {
                    call.arguments.push_str(&delta);
                    vec![Change::Grows(self.blocks.len() - 1, delta)]
                }
                _ => Vec::new(),
            },
            AnswerEvent::CallEnd { .. } => self.close(),
            AnswerEvent::Warning(_) => Vec::new(),
        }
    }

    /// The end of the answer, or of the block at hand.
    pub(crate) fn close(&mut self) -> Vec<Change> {
        match std::mem::take(&mut self.is_open) {
            true => vec![Change::Closes(self.blocks.len() - 1)],
            false => Vec::new(),
        }
    }

    fn open(&mut self, block: Block) -> Vec<Change> {
        let mut changes = self.close();
        changes.push(Change::Opens(self.blocks.len()));
        self.blocks.push(block);
        self.is_open = true;
        changes
    }

    fn grow(&mut self, kind: Block, delta: String) -> Vec<Change> {
        let is_same = self.is_open
            && self.blocks.last().is_some_and(|last| std::mem::discriminant(last) == std::mem::discriminant(&kind));
        let mut changes = if is_same { Vec::new() } else { self.open(kind) };
        if let Some(Block::Thought(text) | Block::Text(text)) = self.blocks.last_mut() {
            text.push_str(&delta);
            changes.push(Change::Grows(self.blocks.len() - 1, delta));
        }
        changes
    }
}
