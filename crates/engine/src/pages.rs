//! Pages of the key/value cache as a tree of beginnings, shared by all sequences.
//!
//! A full page holds the state of 64 tokens behind those of its parent, so its path from the root is the text it stands for;
//! whoever begins with that text uses the page, at the same time as others, and nobody writes to it again. The page that a
//! sequence is still writing is its own. What nobody uses stays until its memory is wanted, the longest unused first; a
//! sequence's unfilled last page stays too, to be copied by who goes on from there. Where layers keep a recurrent state, a
//! page of the tree may have a checkpoint, a slot with the state after the page's last token: without one, its keys and
//! values alone are worth nothing.

use std::collections::{HashMap, VecDeque};

use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_tensor::TokenId;
use sha2::{Digest as _, Sha256};

/// What the tree compares: a token of text is itself, a vector of an image something made of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(u64);

impl Key {
    /// Of a token of text.
    pub(crate) fn of_token(id: TokenId) -> Key {
        Key(u64::from(id.0))
    }

    /// The same under an adapter, whose keys and values are others; 0 stands for none.
    pub(crate) fn under(self, adapter: u32) -> Key {
        match self.0 >> 63 {
            0 => Key(self.0 | (u64::from(adapter & 0x7fff_ffff) << 32)),
            _ => Key(self.0 ^ (u64::from(adapter).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1)),
        }
    }

    /// Of a vector of an image, by a hash of both; never a token's.
    pub(crate) fn of_vector(hash: u64) -> Key {
        Key(hash | 1 << 63)
    }

    /// Whether it is a token of text, under no adapter: the same in every process.
    fn is_plain(self) -> bool {
        self.0 >> 32 == 0
    }
}

/// Stands for a text from its beginning on, in this process and in others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TextHash(pub(crate) [u8; 32]);

impl TextHash {
    /// Of the text that goes on from `before` with `tokens`.
    pub(crate) fn of(before: Option<TextHash>, tokens: &[Key]) -> TextHash {
        let mut hasher = Sha256::new();
        before.iter().for_each(|before| hasher.update(before.0));
        tokens.iter().for_each(|key| hasher.update(key.0.to_le_bytes()));
        TextHash(hasher.finalize().into())
    }
}

/// All pages of an engine, and its checkpoints.
pub(crate) struct PagePool {
    pages: Vec<Page>,
    /// Pages that hold nothing.
    free: Vec<u32>,
    /// Pages of the tree that no sequence uses.
    idle: usize,
    /// The tree, by parent.
    children: HashMap<Parent, Vec<u32>>,
    /// Slots that hold no checkpoint.
    free_slots: Vec<usize>,
    /// Counts uses.
    clock: u64,
    /// Texts of whole pages that were given up lately, the last one last; so that somebody can be told.
    forgotten: VecDeque<TextHash>,
}

/// Pages given up that are remembered: a few times as many as a large cache has, 32 bytes each.
const FORGOTTEN_MAX: usize = 1 << 14;

/// What a page goes on from; `None` is the beginning of a text.
pub(crate) type Parent = Option<u32>;

#[derive(Default)]
struct Page {
    /// Sequences that run with it.
    users: usize,
    /// Its place in the tree, once it is there.
    node: Option<Node>,
}

struct Node {
    parent: Parent,
    /// As many as a page holds, or fewer in a leaf that nobody uses.
    tokens: Vec<Key>,
    checkpoint: Option<usize>,
    last_used: u64,
    /// The text from the root to its last token.
    text: TextHash,
    /// Whether that is nothing but text.
    is_plain: bool,
    /// Pages before it.
    depth: u32,
}

/// A page whose content is the same in every process that runs the same model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlainPage {
    /// The text up to its end.
    pub(crate) text: TextHash,
    /// Pages before it.
    pub(crate) depth: u32,
}

/// How the tree goes on with a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// With a page that holds its next 64 tokens.
    Whole(u32),
    /// With a page that begins with so many of its next tokens.
    Part(u32, usize),
    /// Not at all.
    Nothing,
}

impl PagePool {
    /// So many pages, and these slots for checkpoints.
    pub(crate) fn new(pages: usize, checkpoint_slots: Vec<usize>) -> PagePool {
        PagePool {
            pages: (0..pages).map(|_| Page::default()).collect(),
            free: (0..pages as u32).rev().collect(),
            idle: 0,
            children: HashMap::new(),
            free_slots: checkpoint_slots,
            clock: 0,
            forgotten: VecDeque::new(),
        }
    }

    /// Positions that all pages hold together.
    pub(crate) fn capacity_tokens(&self) -> usize {
        self.pages.len() * PAGE_TOKENS
    }

    /// Pages that can be had: free ones and those whose content can be given up.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Pages in all.
    pub(crate) fn total(&self) -> usize {
        self.pages.len()
    }

    /// Whether a page of the tree is there for the taking, and would be in use then.
    pub(crate) fn is_idle(&self, page: u32) -> bool {
        self.pages[page as usize].users == 0
    }

    /// How the tree goes on from `parent` with the text `rest`.
    pub(crate) fn next(&self, parent: Parent, rest: &[Key]) -> Next {
        let mut best = Next::Nothing;
        let mut longest = 0;
        for &page in self.children.get(&parent).into_iter().flatten() {
            let Some(node) = &self.pages[page as usize].node else { continue };
            let common = node.tokens.iter().zip(rest).take_while(|(a, b)| a == b).count();
            if common == PAGE_TOKENS {
                return Next::Whole(page);
            }
            if common > longest {
                (best, longest) = (Next::Part(page, common), common);
            }
        }
        best
    }

    /// The slot with the state after a page's last token.
    pub(crate) fn checkpoint(&self, page: u32) -> Option<usize> {
        self.pages[page as usize].node.as_ref().and_then(|node| node.checkpoint)
    }

    /// A page for new tokens; `None` if all are in use. The longest unused content is given up for it.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            self.forget_one();
        }
        let page = self.free.pop()?;
        self.pages[page as usize].users = 1;
        Some(page)
    }

    /// One more sequence uses a page.
    pub(crate) fn retain(&mut self, page: u32) {
        self.clock += 1;
        let entry = &mut self.pages[page as usize];
        self.idle -= usize::from(entry.users == 0);
        entry.users += 1;
        if let Some(node) = &mut entry.node {
            node.last_used = self.clock;
        }
    }

    /// One sequence less uses a page. A page outside the tree holds nothing for others, so it becomes free.
    pub(crate) fn release(&mut self, page: u32) {
        self.clock += 1;
        let entry = &mut self.pages[page as usize];
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        match &mut entry.node {
            Some(node) => {
                node.last_used = self.clock;
                self.idle += 1;
            }
            None => self.free.push(page),
        }
    }

    /// Puts a page that its sequence has filled into the tree, and returns the page to go on with: another one where the
    /// same text has been computed twice.
    pub(crate) fn share(&mut self, page: u32, parent: Parent, tokens: &[Key]) -> u32 {
        if let Next::Whole(same) = self.next(parent, tokens) {
            self.retain(same);
            self.release(page);
            return same;
        }
        self.insert(page, parent, tokens);
        page
    }

    /// Puts the unfilled last page of a sequence that ends into the tree, unless the tree holds its text already. The
    /// sequence still has to release it.
    pub(crate) fn share_tail(&mut self, page: u32, parent: Parent, tokens: &[Key]) {
        let known = match self.next(parent, tokens) {
            Next::Part(_, common) => common == tokens.len(),
            Next::Whole(_) => true,
            Next::Nothing => tokens.is_empty(),
        };
        if !known {
            self.insert(page, parent, tokens);
        }
    }

    fn insert(&mut self, page: u32, parent: Parent, tokens: &[Key]) {
        // Unfilled pages with a beginning of the same text are worth nothing any more.
        let siblings = self.children.get(&parent).cloned().unwrap_or_default();
        for sibling in siblings {
            let entry = &self.pages[sibling as usize];
            let shorter =
                entry.node.as_ref().is_some_and(|n| n.tokens.len() < tokens.len() && tokens.starts_with(&n.tokens));
            if shorter && entry.users == 0 {
                self.forget(sibling);
            }
        }
        self.children.entry(parent).or_default().push(page);
        let (last_used, text) = (self.clock, self.text(parent, tokens));
        let before = parent.and_then(|page| self.pages[page as usize].node.as_ref());
        let is_plain = tokens.iter().all(|key| key.is_plain()) && before.is_none_or(|node| node.is_plain);
        let depth = before.map_or(0, |node| node.depth + 1);
        let node = Node { parent, tokens: tokens.to_vec(), checkpoint: None, last_used, text, is_plain, depth };
        self.pages[page as usize].node = Some(node);
    }

    /// A slot to write a page's checkpoint to; `None` if it has one, or there are no slots at all. The checkpoint that was
    /// not used for longest is given up for it.
    pub(crate) fn add_checkpoint(&mut self, page: u32) -> Option<usize> {
        if self.checkpoint(page).is_some() {
            return None;
        }
        let slot = self.free_slots.pop().or_else(|| {
            let held = |p: &&mut Page| p.node.as_ref().is_some_and(|n| n.checkpoint.is_some());
            let age = |p: &&mut Page| (p.users > 0, p.node.as_ref().map(|n| n.last_used));
            self.pages.iter_mut().filter(held).min_by_key(age)?.node.as_mut()?.checkpoint.take()
        })?;
        self.pages[page as usize].node.as_mut()?.checkpoint = Some(slot);
        Some(slot)
    }

    /// Gives up a page's checkpoint.
    pub(crate) fn drop_checkpoint(&mut self, page: u32) {
        let node = self.pages[page as usize].node.as_mut();
        self.free_slots.extend(node.and_then(|n| n.checkpoint.take()));
    }

    /// Gives up the leaf that was not used for longest.
    fn forget_one(&mut self) {
        let leaf = |page: &u32| !self.children.contains_key(&Some(*page));
        let age = |page: &u32| self.pages[*page as usize].node.as_ref().map(|n| n.last_used);
        let idle = (0..self.pages.len() as u32).filter(|&p| self.is_idle(p) && age(&p).is_some());
        // A page in use keeps its ancestors in use, so what is idle always ends in an idle leaf.
        if let Some(page) = idle.filter(leaf).min_by_key(age) {
            self.forget(page);
        }
    }

    /// Takes an idle leaf out of the tree.
    fn forget(&mut self, page: u32) {
        self.drop_checkpoint(page);
        let Some(node) = self.pages[page as usize].node.take() else { return };
        if node.tokens.len() == PAGE_TOKENS {
            if self.forgotten.len() >= FORGOTTEN_MAX {
                self.forgotten.pop_front();
            }
            self.forgotten.push_back(node.text);
        }
        if let Some(siblings) = self.children.get_mut(&node.parent) {
            siblings.retain(|&p| p != page);
            if siblings.is_empty() {
                self.children.remove(&node.parent);
            }
        }
        self.idle -= 1;
        self.free.push(page);
    }

    /// Stands for the text that goes on from `parent` with `tokens`.
    fn text(&self, parent: Parent, tokens: &[Key]) -> TextHash {
        let before = parent.and_then(|page| self.pages[page as usize].node.as_ref()).map(|node| node.text);
        TextHash::of(before, tokens)
    }

    /// A whole page of the tree that holds nothing but text.
    pub(crate) fn plain(&self, page: u32) -> Option<PlainPage> {
        let node = self.pages[page as usize].node.as_ref()?;
        let is_whole = node.tokens.len() == PAGE_TOKENS;
        (is_whole && node.is_plain).then_some(PlainPage { text: node.text, depth: node.depth })
    }

    /// All such pages, those used last first.
    pub(crate) fn all_plain(&self) -> Vec<(u32, PlainPage)> {
        let mut found: Vec<(u32, PlainPage)> =
            (0..self.pages.len() as u32).filter_map(|page| Some((page, self.plain(page)?))).collect();
        let last_used = |page: u32| self.pages[page as usize].node.as_ref().map(|node| node.last_used);
        found.sort_by_key(|&(page, plain)| (std::cmp::Reverse(last_used(page)), plain.depth));
        found
    }

    /// The pages that would go on from `parent` with the text `rest`, as far as it is nothing but text and fills them.
    pub(crate) fn plain_ahead(&self, parent: Parent, rest: &[Key]) -> impl Iterator<Item = PlainPage> {
        let before = parent.and_then(|page| self.pages[page as usize].node.as_ref());
        let (mut text, mut depth) = (before.map(|node| node.text), before.map_or(0, |node| node.depth + 1));
        let is_plain = before.is_none_or(|node| node.is_plain);
        let pages = rest
            .chunks_exact(PAGE_TOKENS)
            .take_while(move |tokens| is_plain && tokens.iter().all(|key| key.is_plain()));
        pages.map(move |tokens| {
            let next = PlainPage { text: TextHash::of(text, tokens), depth };
            (text, depth) = (Some(next.text), depth + 1);
            next
        })
    }

    /// Whether a page that went on from `parent` as `rest` does was given up lately.
    pub(crate) fn was_forgotten(&self, parent: Parent, rest: &[Key]) -> bool {
        rest.get(..PAGE_TOKENS).is_some_and(|tokens| self.forgotten.contains(&self.text(parent, tokens)))
    }

    /// What must hold whenever no step is running: `in_use` lists the pages of every running sequence.
    #[cfg(test)]
    pub(crate) fn assert_sound(&self, in_use: &[&[u32]]) {
        let mut users = vec![0; self.pages.len()];
        in_use.iter().copied().flatten().for_each(|&p| users[p as usize] += 1);
        let mut free = vec![false; self.pages.len()];
        self.free.iter().for_each(|&p| assert!(!std::mem::replace(&mut free[p as usize], true), "free once"));
        let mut idle = 0;
        for (i, page) in self.pages.iter().enumerate() {
            assert_eq!(page.users, users[i], "page {i} counts its users");
            assert_eq!(free[i], page.users == 0 && page.node.is_none(), "page {i} is used, remembered or free");
            idle += usize::from(page.users == 0 && page.node.is_some());
            if let Some(node) = &page.node {
                assert!(self.children[&node.parent].contains(&(i as u32)));
                let parent = node.parent.map(|p| &self.pages[p as usize]);
                assert!(parent.is_none_or(|p| p.users >= page.users), "who uses a page uses what it goes on from");
                let whole = |n: &Node| n.tokens.len() == PAGE_TOKENS;
                assert!(parent.is_none_or(|p| p.node.as_ref().is_some_and(whole)), "pages go on from whole ones");
                assert!(whole(node) || page.users == 0, "an unfilled page in the tree is nobody's");
            }
        }
        assert_eq!(self.idle, idle);
        assert_eq!(
            self.children.values().map(Vec::len).sum::<usize>(),
            self.pages.iter().filter(|p| p.node.is_some()).count()
        );
    }

    /// Slots with or without a checkpoint.
    #[cfg(test)]
    pub(crate) fn checkpoint_slots(&self) -> Vec<usize> {
        let held = self.pages.iter().filter_map(|p| p.node.as_ref()?.checkpoint);
        let mut slots: Vec<usize> = self.free_slots.iter().copied().chain(held).collect();
        slots.sort_unstable();
        slots
    }
}
