//! The scheduler with a model's own block that guesses: it gets every position once, with the state before it, and whatever it says
//! answers are those without it.

use super::*;
use crate::worth::RowCost;

/// A block that knows the mock's plan, and errs now and then. A state of the model is (position + 1, token, 0); one of the block
/// has the first position that the model had not computed, plus 1, in the last place.
#[derive(Default)]
pub(super) struct Block {
    states: Vec<f32>,
    /// Tokens that the block was given, by page.
    pages: HashMap<u32, [Option<TokenId>; PAGE_TOKENS]>,
    /// Positions with the state before them, and without.
    informed: usize,
    uninformed: usize,
}

impl Block {
    pub(super) fn states(&self) -> &[f32] {
        &self.states
    }

    pub(super) fn hear(&mut self, batch: &Batch<'_>) {
        self.states.clear();
        for seq in batch.seqs {
            let tokens = &batch.tokens[seq.rows.clone()];
            let state = |(i, token): (usize, &TokenId)| [(seq.first + i + 1) as f32, token.0 as f32, 0.0];
            self.states.extend(tokens.iter().enumerate().flat_map(state));
        }
    }

    pub(super) fn guess(
        &mut self,
        guesses: &Guesses<'_>,
        model: &[[Option<TokenId>; PAGE_TOKENS]],
        plan: Plan,
    ) -> (Vec<TokenId>, Vec<f32>) {
        assert_eq!(guesses.states.len(), guesses.tokens.len() * WIDTH);
        let (mut ids, mut made) = (Vec::new(), Vec::new());
        for seq in guesses.seqs {
            // Behind a state of the block, the model's pages do not hold the tokens.
            let computed = (guesses.states[seq.rows.start * WIDTH + 2] as usize).checked_sub(1);
            let (page, place) = (|at: usize| seq.pages[at / PAGE_TOKENS], |at: usize| at % PAGE_TOKENS);
            let known = computed.unwrap_or(seq.first);
            let mut text: Vec<TokenId> = (0..known).map(|at| model[page(at) as usize][place(at)].unwrap()).collect();
            text.extend((known..seq.first).map(|at| self.pages[&page(at)][place(at)].unwrap()));
            for row in seq.rows.clone() {
                let (at, state) = (text.len(), &guesses.states[row * WIDTH..][..WIDTH]);
                let before = text.last().map(|token| [at as f32, token.0 as f32]);
                match state {
                    [0.0, 0.0, 0.0] => self.uninformed += 1,
                    _ => {
                        assert_eq!(
                            before.as_ref().map(|x| &x[..]),
                            Some(&state[..2]),
                            "the state before position {at}"
                        );
                        self.informed += 1;
                    }
                }
                let token = guesses.tokens[row];
                self.pages.entry(page(at)).or_insert([None; PAGE_TOKENS])[place(at)] = Some(token);
                text.push(token);
            }
            if seq.wanted {
                let logits = &plan(&text)[..VOCAB];
                let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                // Every seventh guess is another token than the right one.
                let best = (best + usize::from(text.len().is_multiple_of(7))) % VOCAB;
                ids.push(TokenId(best as u32));
                let last = text.len() - 1;
                made.extend([text.len() as f32, text[last].0 as f32, (computed.unwrap_or(last) + 1) as f32]);
            }
        }
        (ids, made)
    }
}

fn bench(pages: usize, slots: Option<usize>, speculate: Speculate) -> Bench {
    let mut bench = Bench::with_slots(pages, slots);
    bench.scheduler.speculate = speculate;
    bench.scheduler.row_cost = RowCost::fixed(0.01);
    bench.scheduler.runner.block = Some(Block::default());
    bench
}

fn without_stop(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request { stop_tokens: Vec::new(), ..request(prompt, max_tokens) }
}

#[test]
fn answers_are_those_without_the_block() {
    for slots in [None, Some(4)] {
        for (at_once, speculate) in [(1, Speculate::Mtp), (3, Speculate::Mtp), (2, Speculate::Auto)] {
            let mut bench = bench(40, slots, speculate);
            let prompts: Vec<_> = (0..at_once).map(|i| tokens(i, 50 + 17 * i as usize)).collect();
            let ids: Vec<_> = prompts.iter().map(|prompt| bench.submit(without_stop(prompt, 200)).unwrap()).collect();
            bench.run();
            for (id, prompt) in ids.into_iter().zip(&prompts) {
                assert_eq!(bench.answer(id).0, expected(prompt, 200, &[]).0, "{slots:?}, {at_once} at once");
            }
            let load = *bench.scheduler.gauges.lock();
            assert!(load.drafted_tokens > load.accepted_tokens && load.accepted_tokens > 90, "{load:?}");
            assert!(bench.scheduler.runner.batches.len() < 130, "{} steps", bench.scheduler.runner.batches.len());
            let Block { informed, uninformed, .. } = bench.scheduler.runner.block.as_ref().unwrap();
            assert_eq!(*uninformed, prompts.len(), "the first position of each alone");
            assert!(*informed > prompts.iter().map(Vec::len).sum::<usize>() + 150 * prompts.len());
        }
    }
}

#[test]
fn the_block_goes_on_where_others_have_computed_the_beginning() {
    let mut bench = bench(40, None, Speculate::Mtp);
    let begin = tokens(3, 200);
    for turn in 0..3 {
        let prompt: Vec<_> = begin.iter().copied().chain(tokens(50 + turn, 40)).collect();
        let id = bench.submit(without_stop(&prompt, 60)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id).0, expected(&prompt, 60, &[]).0);
    }
    assert_eq!(bench.scheduler.runner.block.as_ref().unwrap().uninformed, 3);
    assert!(bench.scheduler.gauges.lock().accepted_tokens > 50);
}

#[test]
fn who_gives_way_and_who_is_cancelled_leave_nothing_wrong_behind() {
    let mut random = Random::new(21);
    let mut below = move |n: usize| (random.next_f64() * n as f64) as usize;
    for round in 0..6 {
        let mut bench = bench(9 + below(10), [None, Some(3)][round % 2], Speculate::Auto);
        let mut asked = Vec::new();
        for i in 0..16 {
            let (prompt, max_tokens) = (tokens(i, 1 + below(200)), 1 + below(200));
            asked.push((bench.submit(request(&prompt, max_tokens)).unwrap(), prompt, max_tokens));
            (0..below(15)).for_each(|_| bench.step());
            if below(6) == 0 {
                bench.scheduler.cancel(SeqId(below(asked.len()) as u64));
            }
        }
        bench.run();
        for (id, prompt, max_tokens) in asked {
            let ((ids, finish), found) = (expected(&prompt, max_tokens, &[TokenId(3)]), bench.answer(id));
            match found.1 {
                Some(Finish::Cancelled) => assert!(ids.starts_with(&found.0), "request {id}"),
                _ => assert_eq!(found, (ids, Some(finish)), "request {id} of round {round}"),
            }
        }
        assert_eq!(bench.scheduler.pages.available(), bench.scheduler.pages.total());
    }
}

#[test]
fn without_need_the_block_is_not_asked() {
    for speculate in [Speculate::Off, Speculate::Ngram] {
        let mut bench = bench(20, None, speculate);
        let id = bench.submit(without_stop(&tokens(1, 300), 100)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id).0, expected(&tokens(1, 300), 100, &[]).0);
        assert_eq!(bench.scheduler.runner.block.as_ref().unwrap().informed, 0);
    }
}
