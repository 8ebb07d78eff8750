//! The scheduler over a model made of arithmetic: its next token is a function of all tokens that its pages hold, so a
//! page given to two sequences, a lost token or a stale prefix changes the answer. Invariants hold after every step.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_models::{Batch, BatchSeq, Guesses, Outputs};
use qwenkit_tensor::{SeqId, TokenId};

use super::Scheduler;
use crate::{
    error::Error,
    guide::{Guide, Verdict},
    pace::BATCH_TOKENS,
    random::Random,
    request::{Event, Finish, Goal, Priority, Request},
    runner::{Runner, Slots},
    sampler::Sampling,
    speculate::Speculate,
    vision::{Digest, VisionInfo, Visual},
};

const VOCAB: usize = 40;
/// Rows of the embedding that are no tokens; their logits are the largest, so that choosing one would show.
const PADDING: usize = 8;

/// Keeps every token it is given in its page's slot, and answers with a hash of what the sequence's pages hold.
struct Mock {
    /// The next token's logits, by all before it.
    plan: Plan,
    pages: Vec<[Option<TokenId>; PAGE_TOKENS]>,
    /// What slots remember, of a mock with recurrent state.
    slots: Option<Vec<Vec<TokenId>>>,
    batches: Vec<usize>,
    /// Parts of which only the best logits were wanted.
    left_out: usize,
    leaves_out: bool,
    /// Of the last batch.
    hidden: Vec<f32>,
    /// What visuals it takes, and how often it was asked for each.
    vision: Option<VisionInfo>,
    /// What guesses, of a mock that has such a block.
    block: Option<block::Block>,
    looks: HashMap<Digest, usize>,
}

type Plan = fn(&[TokenId]) -> Vec<f32>;

/// The first value of an image that cannot be looked at.
const UNSEEABLE: f32 = 99.0;
/// Checkpoints of a mock with recurrent state.
const CHECKPOINTS: usize = 4;
/// Tokens of a mock's chunks: its recurrent state can be taken back within one.
const CHUNK: usize = 8;
/// D of the mock; its hidden states are the first of its logits.
const WIDTH: usize = 3;

impl Runner for Mock {
    fn vocab(&self) -> usize {
        VOCAB + PADDING
    }

    fn slots(&self) -> Option<Slots> {
        self.slots.as_ref().map(|slots| Slots { sequences: slots.len() - CHECKPOINTS, checkpoints: CHECKPOINTS })
    }

    fn can_take_back(&self, position: usize) -> usize {
        let in_slots = CHUNK - 1 - (position + 1) % CHUNK;
        if self.slots.is_some() { in_slots } else { usize::MAX }
    }

    fn states(&self) -> &[f32] {
        self.block.as_ref().map_or(&[][..], |block| block.states())
    }

    fn guess(&mut self, guesses: &Guesses<'_>, real_tokens: usize) -> (Vec<TokenId>, Vec<f32>) {
        assert_eq!(real_tokens, VOCAB);
        self.block.as_mut().expect("nobody asks a block that is not there").guess(guesses, &self.pages, self.plan)
    }

    fn vision(&self) -> Option<VisionInfo> {
        self.vision.clone()
    }

    fn look(&mut self, visual: &Visual) -> Result<Option<Arc<Vec<f32>>>, Error> {
        if visual.pixels().values.first() == Some(&UNSEEABLE) {
            return Err(Error::Blind);
        }
        // The third look has it.
        let looks = self.looks.entry(*visual.digest()).or_default();
        *looks += 1;
        let vectors = || Arc::new(visual.pixels().values.iter().flat_map(|&x| [x; WIDTH]).collect());
        Ok(looks.is_multiple_of(3).then(vectors))
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        self.pages[to as usize] = self.pages[from as usize];
    }

    fn copy_slot(&mut self, from: usize, to: usize) {
        if let Some(slots) = &mut self.slots {
            slots[to] = slots[from].clone();
        }
    }

    fn page(&self, page: u32) -> Vec<u8> {
        kept::bytes(self.pages[page as usize].iter().flatten())
    }

    fn put_page(&mut self, page: u32, bytes: &[u8]) -> bool {
        let tokens = kept::tokens(bytes);
        let fits = tokens.len() == PAGE_TOKENS;
        self.pages[page as usize].iter_mut().zip(tokens).for_each(|(place, token)| *place = Some(token));
        fits
    }

    fn slot(&self, slot: usize) -> Vec<u8> {
        kept::state_bytes(self.slots.as_ref().map_or(&[][..], |slots| &slots[slot]))
    }

    fn put_slot(&mut self, slot: usize, bytes: &[u8]) -> bool {
        self.slots.iter_mut().for_each(|slots| slots[slot] = kept::state_tokens(bytes));
        bytes.len() == kept::STATE_BYTES
    }

    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) {
        self.batches.push(batch.tokens.len());
        self.block.iter_mut().for_each(|block| block.hear(batch));
        logits.clear();
        self.hidden.clear();
        for seq in batch.seqs {
            if let Some(slots) = &mut self.slots {
                let remembered = &mut slots[seq.slot];
                if seq.first == 0 {
                    remembered.clear();
                }
                let taken_back =
                    remembered.len().checked_sub(seq.first).expect("recurrent state goes on without a gap");
                assert!(
                    seq.first >= remembered.len() / CHUNK * CHUNK,
                    "{taken_back} tokens taken back to {}",
                    seq.first
                );
                remembered.truncate(seq.first);
                remembered.extend((0..seq.rows.len()).map(|i| fed(batch, seq, i)));
            }
            for i in 0..seq.rows.len() {
                let at = seq.first + i;
                self.pages[seq.pages[at / PAGE_TOKENS] as usize][at % PAGE_TOKENS] = Some(fed(batch, seq, i));
            }
            let end = seq.first + seq.rows.len();
            let held = |at: usize| self.pages[seq.pages[at / PAGE_TOKENS] as usize][at % PAGE_TOKENS];
            let held = |at| held(at).expect("every position was fed");
            let at = |end: usize| match &self.slots {
                Some(slots) => (self.plan)(&slots[seq.slot][..end]),
                None => (self.plan)(&(0..end).map(held).collect::<Vec<_>>()),
            };
            let before = logits.len();
            match seq.outputs {
                Outputs::None => {}
                Outputs::Hidden => self.hidden.extend(&at(end)[..WIDTH]),
                Outputs::Last => logits.extend(at(end)),
                Outputs::All => (seq.first + 1..=end).for_each(|end| logits.extend(at(end))),
            }
            if let Some(best) = seq.best.filter(|_| self.leaves_out) {
                logits[before..].chunks_exact_mut(VOCAB + PADDING).for_each(|row| few::leave_best(best, row));
                self.left_out += 1;
            }
        }
    }

    fn head_bytes(&self) -> usize {
        0
    }

    fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}

/// What row `i` of a part stands for: its token, or a number made of an image's vector and position there.
fn fed(batch: &Batch<'_>, seq: &BatchSeq<'_>, i: usize) -> TokenId {
    let token = batch.tokens[seq.rows.start + i];
    let Some(seen) = seq.seen else { return token };
    let Some(image) = seen.rows.iter().find(|image| image.rows.contains(&i)) else { return token };
    let vector = &image.values[(i - image.rows.start) * WIDTH..][..WIDTH];
    let [time, height, width] = seen.positions[i];
    TokenId(1000 + vector[0] as u32 * 100 + time * 9 + height * 3 + width)
}

fn planned(tokens: &[TokenId]) -> Vec<f32> {
    let hash = tokens.iter().fold(17u64, |h, t| (h ^ u64::from(t.0)).wrapping_mul(0x0100_0000_01b3));
    let mut logits: Vec<f32> =
        (0..VOCAB as u64).map(|i| (hash.wrapping_mul(2 * i + 1) >> 44) as f32 / 65536.0).collect();
    logits.extend([1e9; PADDING]);
    logits
}

/// What the model says after `prompt`, by itself.
fn expected(prompt: &[TokenId], max_tokens: usize, stop: &[TokenId]) -> (Vec<TokenId>, Finish) {
    expected_by(planned, prompt, max_tokens, stop)
}

fn expected_by(plan: Plan, prompt: &[TokenId], max_tokens: usize, stop: &[TokenId]) -> (Vec<TokenId>, Finish) {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        let logits = &plan(&tokens)[..VOCAB];
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(TokenId(best as u32));
        if stop.contains(&TokenId(best as u32)) {
            return (tokens.split_off(prompt.len()), Finish::Stop);
        }
    }
    (tokens.split_off(prompt.len()), Finish::Length)
}

/// A scheduler with the events of every request.
struct Bench {
    scheduler: Scheduler<Mock>,
    events: Vec<Arc<Mutex<Vec<Event>>>>,
}

impl Bench {
    fn new(pages: usize) -> Bench {
        Bench::with_slots(pages, None)
    }

    /// A model with recurrent state in so many slots.
    fn with_slots(pages: usize, slots: Option<usize>) -> Bench {
        let slots = slots.map(|slots| vec![Vec::new(); slots + CHECKPOINTS]);
        Bench::with_mock(pages, slots, None)
    }

    /// A model that takes such visuals.
    fn with_mock(pages: usize, slots: Option<Vec<Vec<TokenId>>>, vision: Option<VisionInfo>) -> Bench {
        let mock = Mock {
            plan: planned,
            pages: vec![[None; PAGE_TOKENS]; pages],
            slots,
            batches: Vec::new(),
            left_out: 0,
            leaves_out: true,
            hidden: Vec::new(),
            vision,
            block: None,
            looks: HashMap::new(),
        };
        Bench { scheduler: Scheduler::new(mock, pages, VOCAB, Speculate::Auto), events: Vec::new() }
    }

    fn submit(&mut self, request: Request) -> Result<usize, Error> {
        request.check(self.scheduler.limits(), self.scheduler.vision())?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let id = self.events.len();
        self.scheduler.submit(
            SeqId(id as u64),
            request,
            Box::new(move |_, event| {
                heard.lock().unwrap().push(event);
                true
            }),
        );
        self.events.push(events);
        Ok(id)
    }

    /// One step, and what must hold after it.
    fn step(&mut self) {
        self.scheduler.step();
        let scheduler = &self.scheduler;
        let in_use: Vec<&[u32]> = scheduler.running.iter().map(|s| s.pages.as_slice()).collect();
        scheduler.pages.assert_sound(&in_use);
        for s in &scheduler.running {
            assert!(s.computed <= s.pages.len() * PAGE_TOKENS, "what is computed has its pages");
            assert!(s.shared_pages == s.computed / PAGE_TOKENS, "what is full is shared");
            assert!(s.draft.is_empty(), "a draft is of one step");
            let own = &s.pages[s.shared_pages..];
            assert!(own.iter().all(|p| in_use.iter().flat_map(|p| p.iter()).filter(|q| *q == p).count() == 1));
        }
        for (line, waits) in [(&scheduler.waiting, true), (&scheduler.running, false)] {
            assert!(line.is_sorted_by_key(|s| s.rank()), "served in order");
            assert!(!waits || line.iter().all(|s| s.pages.is_empty()), "who waits has no pages");
        }
        if let Some(free) = &scheduler.free_slots {
            let mut slots: Vec<usize> = scheduler.running.iter().map(|s| s.slot).chain(free.clone()).collect();
            slots.extend(scheduler.pages.checkpoint_slots());
            slots.sort_unstable();
            assert!(slots.into_iter().eq(0..scheduler.runner.slots().unwrap().total()), "every slot belongs to one");
        }
    }

    fn run(&mut self) {
        for _ in 0..10_000 {
            if self.scheduler.is_idle() {
                return;
            }
            self.step();
        }
        panic!("the scheduler does not come to an end");
    }

    fn answer(&self, id: usize) -> (Vec<TokenId>, Option<Finish>) {
        let events = self.events[id].lock().unwrap();
        let ids = events.iter().filter_map(|e| match e {
            Event::Token { id, .. } => Some(*id),
            _ => None,
        });
        let finish = match events.last() {
            Some(Event::Finished(finish)) => Some(*finish),
            _ => None,
        };
        assert!(events.iter().filter(|e| matches!(e, Event::Finished(_))).count() <= 1);
        (ids.collect(), finish)
    }

    fn cached(&self, id: usize) -> usize {
        let events = self.events[id].lock().unwrap();
        events
            .iter()
            .find_map(|e| if let Event::Prefill { cached_tokens, .. } = e { Some(*cached_tokens) } else { None })
            .unwrap()
    }
}

fn request(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: Sampling::greedy(),
        max_tokens,
        stop_tokens: vec![TokenId(3)],
        ..Request::default()
    }
}

fn tokens(seed: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|i| TokenId((i * 7 + i * i * 3 + seed * 11) % VOCAB as u32)).collect()
}

#[test]
fn many_requests_answer_as_each_alone() {
    let mut bench = Bench::new(24);
    let mut asked = Vec::new();
    for i in 0..40 {
        // Lengths around pages and batches; more of them than pages hold at once.
        let prompt = tokens(i, [1, 2, 63, 64, 65, 200, 511, 600][i as usize % 8]);
        let max_tokens = [1, 5, 64, 90][i as usize % 4];
        bench.submit(request(&prompt, max_tokens)).unwrap();
        asked.push((prompt, max_tokens));
        if i % 3 == 0 {
            bench.step();
        }
    }
    bench.run();
    for (i, (prompt, max_tokens)) in asked.iter().enumerate() {
        let (ids, finish) = expected(prompt, *max_tokens, &[TokenId(3)]);
        assert_eq!(bench.answer(i), (ids, Some(finish)), "request {i}");
    }
    assert!(bench.scheduler.runner.batches.iter().all(|&rows| rows <= BATCH_TOKENS));
}

#[test]
fn recurrent_sequences_wait_for_slots() {
    let mut bench = Bench::with_slots(60, Some(3));
    let mut asked = Vec::new();
    for i in 0..12 {
        // Every second prompt is the one before it, gone on with; one request is cancelled while it waits.
        let prompt = tokens(i / 2, [130, 300][i as usize % 2]);
        let id = bench.submit(request(&prompt, 9)).unwrap();
        asked.push((id, prompt));
    }
    bench.step();
    assert_eq!(bench.scheduler.running.len(), 3);
    bench.scheduler.cancel(SeqId(11));
    bench.run();
    for (id, prompt) in asked.iter().take(11) {
        let (ids, finish) = expected(prompt, 9, &[TokenId(3)]);
        assert_eq!(bench.answer(*id), (ids, Some(finish)), "request {id}");
        // The state was kept where the shorter prompt's last page ends.
        assert_eq!(bench.cached(*id), if id % 2 == 1 { 128 } else { 0 }, "request {id}");
    }
    assert_eq!(bench.answer(11), (Vec::new(), Some(Finish::Cancelled)));
}

#[test]
fn a_recurrent_conversation_goes_on_from_kept_states() {
    let mut bench = Bench::with_slots(60, Some(2));
    let mut prompt = tokens(5, 200);
    for turn in 0..3 {
        let mut wanted = request(&prompt, 150);
        wanted.stop_tokens.clear();
        let id = bench.submit(wanted).unwrap();
        bench.run();
        let ids = expected(&prompt, 150, &[]).0;
        assert_eq!(bench.answer(id).0, ids, "turn {turn}");
        // The latest page that the last answer filled.
        let cached = if turn == 0 { 0 } else { (prompt.len() - 30 - 1) / PAGE_TOKENS * PAGE_TOKENS };
        assert_eq!(bench.cached(id), cached, "turn {turn}");
        prompt.extend(ids);
        prompt.extend(tokens(90 + turn, 30));
    }
    // The second that begins like the first finds pages only; the third finds a state where they parted.
    let begin = tokens(33, 64 * 3);
    let with = |seed| begin.iter().copied().chain(tokens(seed, 100)).collect::<Vec<_>>();
    for (seed, cached) in [(1, 0), (2, 0), (4, 64 * 3)] {
        let id = bench.submit(request(&with(seed), 5)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id).0, expected(&with(seed), 5, &[TokenId(3)]).0);
        assert_eq!(bench.cached(id), cached, "seed {seed}");
    }
}

#[test]
fn a_beginning_in_common_is_computed_once() {
    for slots in [None, Some(8)] {
        let mut bench = Bench::with_slots(80, slots);
        let begin = tokens(7, 64 * 9 + 20);
        let prompt = |i: u32| begin.iter().copied().chain(tokens(40 + i, 10 + i as usize)).collect::<Vec<_>>();
        let ids: Vec<_> = (0..6).map(|i| bench.submit(request(&prompt(i), 5)).unwrap()).collect();
        bench.run();
        let mut computed = 0;
        for (i, id) in ids.into_iter().enumerate() {
            let prompt = prompt(i as u32);
            let (ids, finish) = expected(&prompt, 5, &[TokenId(3)]);
            computed += prompt.len() - bench.cached(id) + ids.len() - 1;
            assert_eq!(bench.answer(id), (ids, Some(finish)), "request {i}");
            assert!(i == 0 || bench.cached(id) >= 64 * 9, "request {i} found {}", bench.cached(id));
        }
        assert_eq!(bench.scheduler.runner.batches.iter().sum::<usize>(), computed, "what was found was not computed");
    }
}

#[test]
fn who_gives_way_loses_nothing() {
    for slots in [None, Some(4)] {
        // Room for one whole answer and a bit: the others give way again and again.
        let mut bench = Bench::with_slots(9, slots);
        let asked: Vec<_> = (0..5)
            .map(|i| {
                let prompt = tokens(i, 70 + i as usize);
                let mut wanted = request(&prompt, 400);
                wanted.stop_tokens.clear();
                wanted.logprobs = Some(0);
                (bench.submit(wanted).unwrap(), prompt)
            })
            .collect();
        bench.run();
        assert!(bench.scheduler.gauges.lock().preempted > 0);
        for (id, prompt) in asked {
            assert_eq!(bench.answer(id), (expected(&prompt, 400, &[]).0, Some(Finish::Length)), "request {id}");
            let events = bench.events[id].lock().unwrap();
            let told: Vec<_> = events
                .iter()
                .filter_map(|e| if let Event::Prefill { done_tokens, .. } = e { Some(*done_tokens) } else { None })
                .collect();
            assert!(told.is_sorted_by(|a, b| a < b), "progress is told once: {told:?}");
        }
    }
}

#[test]
fn priority_goes_first_and_low_gives_way() {
    let mut bench = Bench::new(8);
    let ask = |bench: &mut Bench, seed, priority| {
        let mut wanted = request(&tokens(seed, 200), 100);
        wanted.stop_tokens.clear();
        wanted.priority = priority;
        bench.submit(wanted).unwrap()
    };
    let low: Vec<_> = (0..2).map(|i| ask(&mut bench, i, Priority::Low)).collect();
    (0..20).for_each(|_| bench.step());
    let normal = ask(&mut bench, 7, Priority::Normal);
    let high = ask(&mut bench, 8, Priority::High);
    let mut ended = Vec::new();
    while !bench.scheduler.is_idle() {
        bench.step();
        let new = [low[0], low[1], normal, high].into_iter().filter(|&id| bench.answer(id).1.is_some());
        let new: Vec<_> = new.filter(|id| !ended.contains(id)).collect();
        ended.extend(new);
    }
    assert_eq!(ended[0], high);
    assert_eq!(ended[1], normal);
    for (id, seed) in [(low[0], 0), (low[1], 1), (normal, 7), (high, 8)] {
        assert_eq!(bench.answer(id).0, expected(&tokens(seed, 200), 100, &[]).0);
    }
}

#[test]
fn a_short_prompt_passes_a_long_one() {
    let mut bench = Bench::new(80);
    let long = bench.submit(request(&tokens(1, 4_000), 2)).unwrap();
    bench.step();
    let short = bench.submit(request(&tokens(2, 100), 2)).unwrap();
    bench.step();
    assert_eq!(bench.answer(short).0.len(), 1, "in its first step");
    bench.run();
    assert!(bench.answer(long).1.is_some());
}

#[test]
fn a_prompt_is_scored_however_it_is_cut() {
    let mut bench = Bench::new(12);
    let prompt = tokens(9, 150);
    // The same prompt is known already, and another one is under way.
    bench.submit(request(&prompt, 3)).unwrap();
    bench.run();
    bench.submit(request(&tokens(4, 90), 30)).unwrap();
    for max_tokens in [0, 2] {
        let mut wanted = request(&prompt, max_tokens);
        wanted.prompt_logprobs = Some(1);
        let id = bench.submit(wanted).unwrap();
        bench.run();
        let (ids, finish) = expected(&prompt, max_tokens, &[TokenId(3)]);
        assert_eq!(bench.answer(id), (ids, Some(finish)));
        let events = bench.events[id].lock().unwrap();
        let scored = events.iter().filter_map(|e| if let Event::Prompt(scored) = e { Some(scored) } else { None });
        let scored: Vec<_> = scored.flatten().collect();
        assert!(scored.iter().map(|s| s.id).eq(prompt[1..].iter().copied()));
        for (i, found) in scored.iter().enumerate() {
            let logits = &planned(&prompt[..i + 1])[..VOCAB];
            assert_eq!(**found, crate::sampler::logprobs(logits, prompt[i + 1], 1), "position {}", i + 1);
        }
    }
}

/// Allows even tokens only, and after the third token forces two.
struct Even(usize);

impl Guide for Even {
    fn mask(&mut self, logits: &mut [f32]) {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
    }

    fn accept(&mut self, _: TokenId) -> Verdict {
        self.0 += 1;
        match self.0 {
            3 => Verdict::Force(vec![TokenId(11), TokenId(13)]),
            8 => Verdict::Stop,
            _ => Verdict::Continue,
        }
    }
}

#[test]
fn a_guide_allows_forces_and_ends() {
    let mut bench = Bench::new(4);
    let mut wanted = request(&tokens(1, 20), 100);
    wanted.guide = Some(Box::new(Even(0)));
    let guided = bench.submit(wanted).unwrap();
    let free = bench.submit(request(&tokens(1, 20), 9)).unwrap();
    bench.run();
    let (ids, finish) = bench.answer(guided);
    assert_eq!((ids.len(), finish), (8, Some(Finish::Stop)));
    let odd: Vec<_> = ids.iter().enumerate().filter(|(_, id)| id.0 % 2 == 1).map(|(i, id)| (i, id.0)).collect();
    assert_eq!(odd, [(3, 11), (4, 13)]);
    assert_eq!(bench.answer(free).0, expected(&tokens(1, 20), 9, &[TokenId(3)]).0);
}

#[test]
fn a_long_prompt_does_not_hold_up_an_answer() {
    let mut bench = Bench::new(60);
    let mut short = request(&tokens(1, 3), 30);
    short.stop_tokens.clear();
    let short = bench.submit(short).unwrap();
    bench.step();
    let long = bench.submit(request(&tokens(2, 3_000), 1)).unwrap();
    let mut longest = 0;
    while bench.answer(long).1.is_none() {
        let before = bench.answer(short).0.len();
        bench.step();
        longest = longest.max(*bench.scheduler.runner.batches.last().unwrap());
        assert!(bench.answer(short).0.len() == before + 1 || before == 30, "a token in every step");
    }
    assert!(longest > 1 && longest <= BATCH_TOKENS);
}

#[test]
fn a_conversation_is_not_computed_again() {
    let mut bench = Bench::new(30);
    let mut prompt = tokens(5, 100);
    for turn in 0..4 {
        let id = bench.submit(request(&prompt, 20)).unwrap();
        bench.run();
        let (ids, finish) = bench.answer(id);
        assert_eq!(
            (ids.clone(), finish),
            {
                let (i, f) = expected(&prompt, 20, &[TokenId(3)]);
                (i, Some(f))
            },
            "turn {turn}"
        );
        // All that was computed before: the prompt and all of the answer but its last token.
        let cached = if turn == 0 { 0 } else { prompt.len() - 10 - 1 };
        assert_eq!(bench.cached(id), cached, "turn {turn}");
        prompt.extend(ids);
        prompt.extend(tokens(90 + turn, 10));
    }
    // Another conversation, a fork of the first, and the first again.
    let fork: Vec<_> = prompt[..130].iter().copied().chain(tokens(77, 50)).collect();
    for (prompt, cached) in [(tokens(6, 100), 0), (fork, 130)] {
        let id = bench.submit(request(&prompt, 8)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id).0, expected(&prompt, 8, &[TokenId(3)]).0);
        assert_eq!(bench.cached(id), cached);
    }
    let again = bench.submit(request(&prompt, 8)).unwrap();
    bench.run();
    assert_eq!(bench.answer(again).0, expected(&prompt, 8, &[TokenId(3)]).0);
}

#[test]
fn the_same_prompt_again_computes_its_last_token_only() {
    let mut bench = Bench::new(10);
    for prompt in [tokens(1, 64), tokens(2, 128), tokens(3, 5)] {
        for round in 0..2 {
            let id = bench.submit(request(&prompt, 3)).unwrap();
            bench.run();
            assert_eq!(bench.answer(id).0, expected(&prompt, 3, &[TokenId(3)]).0);
            assert_eq!(bench.cached(id), if round == 0 { 0 } else { prompt.len() - 1 });
        }
    }
}

#[test]
fn whatever_comes_each_answers_as_alone() {
    let mut random = Random::new(11);
    let mut below = move |n: usize| (random.next_f64() * n as f64) as usize;
    for round in 0..12 {
        let slots = [None, Some(3)][round % 2];
        let mut bench = Bench::with_slots(10 + below(20), slots);
        let mut asked: Vec<(usize, Vec<TokenId>, usize, bool)> = Vec::new();
        for i in 0..30 {
            // A fork of an earlier prompt with its answer, or a new one.
            let mut prompt = match below(3) {
                0 => tokens(i, 1 + below(300)),
                _ => asked.get(below(asked.len() + 1)).map_or(tokens(i, 70), |(id, prompt, ..)| {
                    let all: Vec<_> = prompt.iter().copied().chain(bench.answer(*id).0).collect();
                    all[..1 + below(all.len())].to_vec()
                }),
            };
            prompt.extend(tokens(i + 50, below(20)));
            prompt.truncate(500);
            let max_tokens = 1 + below(90);
            let mut wanted = request(&prompt, max_tokens);
            wanted.priority = [Priority::Low, Priority::Normal, Priority::Normal, Priority::High][below(4)];
            let id = bench.submit(wanted).unwrap();
            asked.push((id, prompt, max_tokens, false));
            (0..below(6)).for_each(|_| bench.step());
            if below(5) == 0 {
                let at = below(asked.len());
                asked[at].3 = true;
                bench.scheduler.cancel(SeqId(asked[at].0 as u64));
            }
        }
        bench.run();
        for (id, prompt, max_tokens, cancelled) in asked {
            let ((ids, finish), found) = (expected(&prompt, max_tokens, &[TokenId(3)]), bench.answer(id));
            match found.1 {
                Some(Finish::Cancelled) => assert!(cancelled && ids.starts_with(&found.0), "request {id}"),
                _ => assert_eq!(found, (ids, Some(finish)), "request {id} of round {round}"),
            }
        }
        assert_eq!(bench.scheduler.pages.available(), bench.scheduler.pages.total());
    }
}

#[test]
fn cancelled_where_it_stands() {
    let mut bench = Bench::new(12);
    let running = bench.submit(request(&tokens(1, 600), 60)).unwrap();
    let waiting = bench.submit(request(&tokens(2, 600), 60)).unwrap();
    bench.step();
    bench.scheduler.cancel(SeqId(waiting as u64));
    bench.step();
    assert_eq!(bench.answer(waiting), (Vec::new(), Some(Finish::Cancelled)));
    bench.step();
    let so_far = bench.answer(running).0.len();
    assert!(so_far > 0);
    bench.scheduler.cancel(SeqId(running as u64));
    bench.run();
    assert_eq!(bench.answer(running).1, Some(Finish::Cancelled));
    assert_eq!(bench.answer(running).0.len(), so_far);
    assert_eq!(bench.scheduler.pages.available(), 12);
}

#[test]
fn nobody_listening_ends_the_answer() {
    let mut bench = Bench::new(4);
    let mut left = 3;
    let listener = Box::new(move |_, _| {
        left -= 1;
        left > 0
    });
    bench.scheduler.submit(SeqId(0), request(&tokens(1, 4), 200), listener);
    bench.run();
    assert!(bench.scheduler.runner.batches.len() <= 4);
}

#[test]
fn an_answer_is_cut_to_what_pages_hold() {
    let mut bench = Bench::new(2);
    let mut long = request(&tokens(1, 100), 1_000_000);
    long.stop_tokens.clear();
    let id = bench.submit(long).unwrap();
    bench.run();
    let (ids, finish) = bench.answer(id);
    assert_eq!((ids.len(), finish), (2 * PAGE_TOKENS - 100 + 1, Some(Finish::Length)));
}

#[test]
fn refused_with_its_reason() {
    let mut bench = Bench::new(2);
    assert!(matches!(bench.submit(request(&[], 5)), Err(Error::PromptEmpty)));
    let long = bench.submit(request(&tokens(1, 129), 5));
    assert!(matches!(long, Err(Error::PromptTooLong { prompt_tokens: 129, context_tokens: 128, .. })));
    let unknown = bench.submit(request(&[TokenId(48)], 5));
    assert!(matches!(unknown, Err(Error::TokenUnknown { found: TokenId(48), vocab: 48 })));
    let mut bad = request(&tokens(1, 3), 5);
    bad.sampling.top_p = 2.0;
    assert!(matches!(bench.submit(bad), Err(Error::Sampling { setting: "top_p", .. })));
    let nothing = bench.submit(request(&tokens(1, 3), 0)).unwrap();
    bench.run();
    assert_eq!(bench.answer(nothing), (Vec::new(), Some(Finish::Length)));
    assert!(bench.scheduler.is_idle());
}

#[path = "scheduler_block_tests.rs"]
mod block;

#[path = "scheduler_few_tests.rs"]
mod few;

#[path = "scheduler_guess_tests.rs"]
mod guesses;

#[path = "scheduler_missed_tests.rs"]
mod missed;

#[path = "scheduler_image_tests.rs"]
mod images;

#[path = "scheduler_kept_tests.rs"]
mod kept;

#[path = "scheduler_values_tests.rs"]
mod values;
