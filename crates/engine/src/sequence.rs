//! One request on its way through the scheduler: its tokens, how many of them are computed, and the pages that hold them.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_models::{Adapter, Outputs};
use qwenkit_tensor::{SeqId, TokenId};

use crate::{
    drafter::{Chances, Drafter},
    guide::{Guide, Verdict},
    pages::{Key, Parent},
    request::{Event, Finish, Goal, Limits, Missed, Priority, Request, TokenLogprobs},
    sampler::{self, Sampler},
    trail::Trail,
    vision::{View, VisionInfo},
};

/// Who hears a request's events, and when each happened; `false` when nobody listens any more.
pub type Listener = Box<dyn FnMut(Instant, Event) -> bool + Send>;

pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) priority: Priority,
    /// Prompt and answer.
    pub(crate) tokens: Vec<TokenId>,
    /// What the tree of pages takes the tokens for.
    pub(crate) keys: Vec<Key>,
    /// What is added to the model's matrices for it.
    pub(crate) adapter: Option<Arc<Adapter>>,
    /// The prompt's images, if it has any.
    pub(crate) view: Option<View>,
    pub(crate) prompt_tokens: usize,
    pub(crate) goal: Goal,
    /// Tokens whose state is in the pages.
    pub(crate) computed: usize,
    pub(crate) pages: Vec<u32>,
    /// So many of the first pages are in the tree.
    pub(crate) shared_pages: usize,
    /// Pages before this one hold what files have of them, though the state to go on from them may not be read yet.
    pub(crate) fetched_pages: usize,
    /// Its own while it runs; 0 where the runner has no recurrent state.
    pub(crate) slot: usize,
    /// Positions at which a step has to end, because a checkpoint is wanted there.
    pub(crate) cuts: Vec<usize>,
    /// The page with the latest checkpoint of the answer; the next one takes its place.
    pub(crate) answer_checkpoint: Option<u32>,
    pub(crate) prompt_logprobs: Option<usize>,
    /// Guesses what it says next, where guesses are wanted.
    drafter: Option<Box<Drafter>>,
    /// Tokens guessed to follow those it has, which the step at hand computes with its last one.
    pub(crate) draft: Vec<TokenId>,
    /// What the model's block that guesses has not seen yet.
    pub(crate) trail: Trail,
    pub(crate) finish: Option<Finish>,
    /// Why it could not be finished, if it could not.
    pub(crate) failure: Option<String>,
    max_tokens: usize,
    min_tokens: usize,
    cached_tokens: usize,
    /// What the cache did not have of its prompt.
    missed: Option<Missed>,
    /// Tokens of the prompt that were told of; a sequence that starts again after giving way says nothing twice.
    told_tokens: usize,
    /// Tokens of the prompt, from the second on, whose log-probabilities were told.
    scored_tokens: usize,
    /// Has given its pages to others, and started again.
    gave_way: bool,
    stop_tokens: Vec<TokenId>,
    logprobs: Option<usize>,
    sampler: Sampler,
    guide: Option<Box<dyn Guide>>,
    forced: VecDeque<TokenId>,
    listener: Listener,
}

impl Sequence {
    /// A request that was checked. Its answer is cut to what all pages together hold.
    pub(crate) fn new(
        id: SeqId,
        request: Request,
        limits: Limits,
        vision: Option<&VisionInfo>,
        listener: Listener,
    ) -> Sequence {
        let prompt_tokens = request.prompt.len();
        let room = (limits.capacity_tokens + 1).saturating_sub(prompt_tokens);
        let max_tokens = match request.goal {
            Goal::Answer => request.max_tokens.min(room),
            // As an answer of one token, it needs no page beyond the prompt's.
            Goal::Hidden | Goal::Logits(_) => 1,
        };
        let mut keys: Vec<Key> = request.prompt.iter().map(|&id| Key::of_token(id)).collect();
        let placed = Some(request.visuals).filter(|placed| !placed.is_empty());
        let view = vision.zip(placed).map(|(vision, placed)| View::new(vision, prompt_tokens, placed));
        if let Some(view) = &view {
            view.mark(&mut keys);
        }
        let under = request.adapter.as_ref().map_or(0, |adapter| adapter.id());
        keys.iter_mut().for_each(|key| *key = key.under(under));
        Sequence {
            id,
            priority: request.priority,
            keys,
            adapter: request.adapter,
            view,
            sampler: Sampler::new(request.sampling, &request.prompt),
            tokens: request.prompt,
            prompt_tokens,
            goal: request.goal,
            computed: 0,
            pages: Vec::new(),
            shared_pages: 0,
            fetched_pages: 0,
            slot: 0,
            cuts: Vec::new(),
            answer_checkpoint: None,
            prompt_logprobs: request.prompt_logprobs,
            drafter: None,
            draft: Vec::new(),
            trail: Trail::default(),
            finish: None,
            failure: None,
            max_tokens,
            min_tokens: request.min_tokens,
            cached_tokens: 0,
            missed: None,
            told_tokens: 0,
            scored_tokens: 0,
            gave_way: false,
            stop_tokens: request.stop_tokens,
            logprobs: request.logprobs,
            guide: request.guide,
            forced: VecDeque::new(),
            listener,
        }
    }

    /// Whether nothing has to be computed for it.
    pub(crate) fn wants_nothing(&self) -> bool {
        self.max_tokens == 0 && self.prompt_logprobs.is_none()
    }

    /// Tokens that are not computed yet.
    pub(crate) fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether its next step gives a token for one row.
    pub(crate) fn is_generating(&self) -> bool {
        self.left() == 1
    }

    /// Tokens that can be computed before an image's vectors are missed, of `wanted`.
    pub(crate) fn seen_ahead(&self, wanted: usize) -> usize {
        self.view.as_ref().map_or(wanted, |view| view.seen_ahead(self.computed, wanted))
    }

    /// Order of service: by priority, then by arrival.
    pub(crate) fn rank(&self) -> (std::cmp::Reverse<Priority>, SeqId) {
        (std::cmp::Reverse(self.priority), self.id)
    }

    /// Tokens that may come from the tree: all but the last, whose logits are wanted; none if the prompt's logits are.
    pub(crate) fn sharable_tokens(&self) -> usize {
        if self.prompt_logprobs.is_some() { 0 } else { self.tokens.len() - 1 }
    }

    /// What the page `index` goes on from.
    pub(crate) fn parent(&self, index: usize) -> Parent {
        index.checked_sub(1).map(|i| self.pages[i])
    }

    /// Notes that the tree held its tokens up to `computed`.
    pub(crate) fn found(&mut self, computed: usize) {
        // Its own work found again is no find.
        if !self.gave_way {
            self.cached_tokens += computed - self.computed;
        }
        self.computed = computed;
    }

    /// Notes what the tree did not hold of its prompt; of a sequence that gave way, the first time counts.
    pub(crate) fn missed(&mut self, missed: Option<Missed>) {
        if !self.gave_way {
            self.missed = missed;
        }
    }

    /// Tokens of the answer so far.
    fn said(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens of the prompt that were found computed.
    pub(crate) fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// What is wanted of its next `rows` rows.
    pub(crate) fn outputs(&self, rows: usize) -> Outputs {
        let last = rows == self.left();
        match self.goal {
            _ if !self.draft.is_empty() => Outputs::All,
            _ if self.prompt_logprobs.is_some() && self.scored_tokens + 1 < self.prompt_tokens => Outputs::All,
            _ if !last => Outputs::None,
            Goal::Hidden => Outputs::Hidden,
            Goal::Answer | Goal::Logits(_) => Outputs::Last,
        }
    }

    /// What its next rows' choices are made of, where a few of their logits are enough: how many of the largest, and the tokens
    /// whose logits are lowered before they are compared.
    pub(crate) fn few(&self, rows: usize) -> Option<(usize, Vec<u32>)> {
        let chooses = self.goal == Goal::Answer && (self.outputs(rows) == Outputs::Last || !self.draft.is_empty());
        if !chooses || self.guide.is_some() || self.logprobs.is_some() || self.said() < self.min_tokens {
            return None;
        }
        let count = self.sampler.few()?;
        // Behind a guess, that guess was said.
        let said = self.draft.iter().copied().filter(|_| self.sampler.lowered().next().is_some());
        Some((count, self.sampler.lowered().chain(said).map(|id| id.0).collect()))
    }

    /// Ends it before its time, for a reason that is nobody's wish.
    pub(crate) fn give_up(&mut self, reason: String) {
        if self.finish.is_none() {
            self.finish = Some(Finish::Cancelled);
            self.failure = Some(reason);
        }
    }

    pub(crate) fn tell(&mut self, event: Event) {
        if !(self.listener)(Instant::now(), event) {
            self.finish.get_or_insert(Finish::Cancelled);
        }
    }

    /// Notes that `rows` more tokens are computed, and tells of progress through the prompt.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.computed += rows;
        if let Some(view) = &mut self.view {
            view.forget_before(self.computed);
        }
        let done_tokens = self.computed.min(self.prompt_tokens);
        if done_tokens > self.told_tokens {
            self.told_tokens = done_tokens;
            let (total_tokens, cached_tokens, missed) = (self.prompt_tokens, self.cached_tokens, self.missed);
            self.tell(Event::Prefill { done_tokens, total_tokens, cached_tokens, missed });
        }
    }

    /// Tells the log-probabilities of the prompt's tokens behind the rows whose logits are given: (rows, V), of which the
    /// first `real_tokens` of each row count. The rows begin at position `first`.
    pub(crate) fn score_prompt(&mut self, first: usize, logits: &[f32], vocab: usize, real_tokens: usize) {
        let Some(count) = self.prompt_logprobs else { return };
        let next = self.tokens[..self.prompt_tokens].iter().skip(first + 1);
        let rows = logits.chunks_exact(vocab).map(|row| &row[..real_tokens]);
        // After giving way, the first ones come again.
        let new = next.zip(rows).skip(self.scored_tokens.saturating_sub(first));
        let scored: Vec<TokenLogprobs> = new.map(|(&id, row)| sampler::logprobs(row, id, count)).collect();
        if !scored.is_empty() {
            self.scored_tokens += scored.len();
            self.tell(Event::Prompt(scored));
        }
    }

    /// Hands a sequence that wants no answer what it wants, which ends it.
    pub(crate) fn deliver(&mut self, values: Vec<f32>) {
        self.tell(Event::Values(values));
        self.finish.get_or_insert(Finish::Stop);
    }

    /// Adds the next token, `logits` being those of the last one over real tokens. Returns whether there is one more.
    pub(crate) fn choose(&mut self, logits: &mut [f32]) -> bool {
        if self.max_tokens == 0 {
            self.finish.get_or_insert(Finish::Length);
            return false;
        }
        // Log-probabilities are the model's own, so they are taken before guide and penalties change the logits.
        let own = self.logprobs.map(|count| (count, logits.to_vec()));
        let id = match self.forced.pop_front() {
            Some(id) => id,
            None => {
                if let Some(guide) = &mut self.guide {
                    guide.mask(logits);
                }
                if self.said() < self.min_tokens {
                    for id in &self.stop_tokens {
                        logits.get_mut(id.index()).into_iter().for_each(|logit| *logit = f32::NEG_INFINITY);
                    }
                }
                let is_bound = self.guide.is_some() || self.said() < self.min_tokens;
                if is_bound && logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
                    self.finish.get_or_insert(Finish::Stop);
                    return false;
                }
                self.sampler.choose(logits)
            }
        };
        self.tokens.push(id);
        let under = self.adapter.as_ref().map_or(0, |adapter| adapter.id());
        self.keys.push(Key::of_token(id).under(under));
        let logprobs = own.map(|(count, logits)| sampler::logprobs(&logits, id, count));
        self.tell(Event::Token { id, logprobs });
        match self.guide.as_mut().map_or(Verdict::Continue, |guide| guide.accept(id)) {
            Verdict::Continue => {}
            Verdict::Force(ids) => self.forced.extend(ids),
            Verdict::EndThought(why, ids) => {
                self.forced.extend(ids);
                self.tell(Event::ThoughtEnded(why));
            }
            Verdict::Stop => drop(self.finish.get_or_insert(Finish::Stop)),
        }
        if self.stop_tokens.contains(&id) {
            self.finish.get_or_insert(Finish::Stop);
        } else if self.said() >= self.max_tokens {
            self.finish.get_or_insert(Finish::Length);
        }
        true
    }

    /// Guesses up to `most` tokens, none of which would be one too many. Returns the chances of these, or of what the model's
    /// block would guess where it can be asked, at so many times the cost, and that is better.
    pub(crate) fn guess(&mut self, most: usize, looks_up: bool, block_cost: Option<f64>) -> Chances {
        let answers = self.goal == Goal::Answer && self.is_generating() && self.outputs(1) == Outputs::Last;
        let left = self.max_tokens.saturating_sub(self.tokens.len() - self.prompt_tokens);
        if !answers || left < 2 {
            return Chances::default();
        }
        let (drafter, most) = (self.drafter.get_or_insert_default(), most.min(left - 1));
        drafter.guess(if looks_up { &self.tokens[..] } else { &[] }, &self.forced, most);
        // The block has seen all that is computed, and the token that is not.
        let is_seen = self.trail.positions().end == self.tokens.len();
        drafter.chances(block_cost.filter(|_| is_seen), most)
    }

    /// Takes in the next guess of the model's block.
    pub(crate) fn add_guess(&mut self, id: TokenId) {
        if let Some(drafter) = &mut self.drafter {
            drafter.add(id);
        }
    }

    /// Whether the model's block may guess for it: an answer to text, of more than a token.
    pub(crate) fn has_trail(&self) -> bool {
        self.goal == Goal::Answer && self.max_tokens > 1 && self.view.is_none() && self.finish.is_none()
    }

    /// Has the step at hand compute the first `count` guesses.
    pub(crate) fn draft(&mut self, count: usize) {
        let guesses = self.drafter.as_mut().map_or(&[][..], |drafter| drafter.guesses());
        self.draft.extend(guesses.iter().take(count).map(|guess| guess.id));
    }

    /// Adds the next tokens: `logits`, (rows, V), are those of the last token and of the draft behind it, and the draft's are
    /// counted as computed while they are what is said. Returns how many tokens there are more, and how many were guessed.
    pub(crate) fn choose_along(&mut self, logits: &mut [f32], vocab: usize, real_tokens: usize) -> (usize, usize) {
        self.draft.clear();
        let mut drafter = self.drafter.take();
        let guesses = drafter.as_ref().map_or(&[][..], |drafter| drafter.guesses());
        let (mut generated, mut right, mut wrong) = (0, 0, false);
        for (i, logits) in logits.chunks_exact_mut(vocab).enumerate() {
            self.computed += usize::from(i > 0);
            if !self.choose(&mut logits[..real_tokens]) {
                break;
            }
            generated += 1;
            if let Some(guess) = guesses.get(i) {
                wrong = self.tokens.last() != Some(&guess.id);
                right += usize::from(!wrong);
            }
            if wrong || self.finish.is_some() {
                break;
            }
        }
        if let Some(drafter) = &mut drafter {
            drafter.judge(right, wrong);
        }
        self.drafter = drafter;
        (generated, right)
    }

    /// Starts again from nothing; pages and slot are another's.
    pub(crate) fn start_again(&mut self) {
        self.gave_way = true;
        self.shared_pages = 0;
        self.fetched_pages = 0;
        self.computed = 0;
        self.cuts.clear();
        self.answer_checkpoint = None;
    }

    /// The next position, behind what is computed, where a step has to end.
    pub(crate) fn next_cut(&self) -> Option<usize> {
        self.cuts.iter().copied().filter(|&at| at > self.computed).min()
    }

    /// The last position of the prompt where a page ends and something is left to compute.
    pub(crate) fn last_page_end(&self) -> usize {
        (self.tokens.len() - 1) / PAGE_TOKENS * PAGE_TOKENS
    }
}
