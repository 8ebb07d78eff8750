//! Pages in files: a prompt goes on from what another life of the engine has computed, and answers are what they are without.

use std::{fs, path::Path, time::Duration};

use super::*;
use crate::{
    disk::{DiskPages, PrefixCache},
    pages::{Key, PagePool},
};

/// Tokens that a slot of the mock remembers at most, and their bytes behind their number.
const STATE_TOKENS: usize = 1024;
pub(super) const STATE_BYTES: usize = 4 * (1 + STATE_TOKENS);

pub(super) fn bytes<'a>(tokens: impl IntoIterator<Item = &'a TokenId>) -> Vec<u8> {
    tokens.into_iter().flat_map(|id| id.0.to_le_bytes()).collect()
}

pub(super) fn tokens(bytes: &[u8]) -> Vec<TokenId> {
    bytes.chunks_exact(4).map(|id| TokenId(u32::from_le_bytes(id.try_into().unwrap()))).collect()
}

pub(super) fn state_bytes(state: &[TokenId]) -> Vec<u8> {
    let mut bytes = bytes([TokenId(state.len() as u32)].iter().chain(state));
    bytes.resize(STATE_BYTES, 0);
    bytes
}

pub(super) fn state_tokens(bytes: &[u8]) -> Vec<TokenId> {
    let all = tokens(bytes);
    all[1..1 + all[0].index()].to_vec()
}

fn files(folder: &Path) -> DiskPages {
    let cache = PrefixCache { folder: folder.to_owned(), limit_bytes: 1 << 30 };
    DiskPages::open(&cache, [1; 32], [4 * PAGE_TOKENS, STATE_BYTES]).unwrap()
}

/// An engine whose pages are kept.
fn keeping(folder: &Path, pages: usize, slots: Option<usize>) -> Bench {
    let mut bench = Bench::with_slots(pages, slots);
    bench.scheduler.keep_in(files(folder));
    bench
}

/// Asks for a few tokens after a prompt, alone, and says how many of the prompt's tokens were cached.
fn ask(bench: &mut Bench, prompt: &[TokenId]) -> usize {
    let id = bench.submit(request(prompt, 5)).unwrap();
    bench.run();
    let (found, finish) = bench.answer(id);
    assert_eq!((found, finish.unwrap()), expected(prompt, 5, &[TokenId(3)]));
    bench.cached(id)
}

const KINDS: [Option<usize>; 2] = [None, Some(3)];

#[test]
fn the_next_life_goes_on_from_the_last() {
    for slots in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let prompt = super::tokens(1, 300);
        let mut first = keeping(folder.path(), 24, slots);
        assert_eq!(ask(&mut first, &prompt), 0);
        first.scheduler.keep_all();
        let mut second = keeping(folder.path(), 24, slots);
        assert_eq!(ask(&mut second, &prompt), 256);
        assert_eq!(second.scheduler.runner.batches[0], 300 - 256, "the rest of the prompt is all that is computed");
        assert_eq!(second.scheduler.gauges().read().disk_tokens, 256);
        // From memory now; and a text that parts from it goes on from what they have in common.
        let cached = ask(&mut second, &prompt);
        assert_eq!(second.scheduler.gauges().read().disk_tokens, 256);
        assert!(cached >= 256);
        let mut third = keeping(folder.path(), 24, slots);
        let fork: Vec<TokenId> = prompt[..200].iter().copied().chain([TokenId(39); 100]).collect();
        let common = if slots.is_some() { 0 } else { 192 };
        assert_eq!(ask(&mut third, &fork), common, "a state is only where it was kept");
    }
}

#[test]
fn what_a_second_request_has_used_is_kept_at_once() {
    for slots in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let (shared, other) = (super::tokens(1, 300), super::tokens(2, 300));
        let mut first = keeping(folder.path(), 24, slots);
        ask(&mut first, &shared);
        ask(&mut first, &other);
        ask(&mut first, &shared);
        // Killed: nothing is written at the end.
        drop(first);
        let mut second = keeping(folder.path(), 24, slots);
        assert_eq!(ask(&mut second, &other), 0);
        assert_eq!(ask(&mut second, &shared), 256);
    }
}

#[test]
fn pages_given_up_come_back_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = keeping(folder.path(), 8, None);
    let (shared, other) = (super::tokens(1, 300), super::tokens(2, 450));
    ask(&mut bench, &shared);
    ask(&mut bench, &shared);
    drop(bench.scheduler.kept.take());
    ask(&mut bench, &other);
    bench.scheduler.keep_in(files(folder.path()));
    assert!(ask(&mut bench, &shared) >= 256);
    assert!(bench.scheduler.gauges().read().disk_tokens > 0);
}

#[test]
fn a_damaged_or_missing_file_costs_time_and_nothing_else() {
    for (slots, part) in [(None, ".page"), (Some(3), ".page"), (Some(3), ".state")] {
        let folder = tempfile::tempdir().unwrap();
        let prompt = super::tokens(1, 300);
        let mut bench = keeping(folder.path(), 24, slots);
        ask(&mut bench, &prompt);
        bench.scheduler.keep_all();
        let model = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let paths: Vec<_> = fs::read_dir(&model).unwrap().map(|file| file.unwrap().path()).collect();
        let paths: Vec<_> = paths.into_iter().filter(|path| path.to_str().unwrap().ends_with(part)).collect();
        assert!(!paths.is_empty());
        for (i, path) in paths.iter().enumerate() {
            let whole = fs::read(path).unwrap();
            let mut damaged = whole.clone();
            damaged[40 + i * 3] ^= 1;
            fs::write(path, damaged).unwrap();
            let mut next = keeping(folder.path(), 24, slots);
            assert!(ask(&mut next, &prompt) < 256);
            drop(next);
            fs::write(path, whole).unwrap();
            let mut next = keeping(folder.path(), 24, slots);
            fs::remove_file(path).unwrap();
            assert!(ask(&mut next, &prompt) < 256, "removed behind its back");
            next.scheduler.keep_all();
            assert_eq!(ask(&mut keeping(folder.path(), 24, slots), &prompt), 256, "and written again");
        }
    }
}

#[test]
fn crowded_lives_answer_as_each_request_alone() {
    for slots in KINDS {
        let folder = tempfile::tempdir().unwrap();
        for life in 0..4u32 {
            let mut bench = keeping(folder.path(), 14, slots);
            // In every other life a step reads one file, so that prompts wait, give way and are cancelled in between.
            let kept = bench.scheduler.kept.as_mut().unwrap();
            kept.fetch_time = if life % 2 == 1 { Duration::ZERO } else { kept.fetch_time };
            let mut asked = Vec::new();
            for i in 0..24u32 {
                let mut prompt = super::tokens(i % 3, [64, 130, 200, 333][(i + life) as usize % 4]);
                prompt.extend(super::tokens(i * 5 + life, i as usize * 3 % 70 + 1));
                asked.push((bench.submit(request(&prompt, 12)).unwrap(), prompt));
                if i % 4 == life {
                    bench.step();
                }
            }
            bench.run();
            for (id, prompt) in asked {
                let (found, finish) = bench.answer(id);
                assert_eq!((found, finish.unwrap()), expected(&prompt, 12, &[TokenId(3)]), "life {life}, request {id}");
            }
            assert!(life == 0 || bench.scheduler.gauges().read().disk_tokens > 0);
            if life % 2 == 0 {
                bench.scheduler.keep_all();
            }
        }
    }
}

#[test]
fn requests_that_want_the_prompts_own_numbers_read_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = super::tokens(1, 300);
    let mut bench = keeping(folder.path(), 24, None);
    ask(&mut bench, &prompt);
    bench.scheduler.keep_all();
    let mut bench = keeping(folder.path(), 24, None);
    let scored = Request { prompt_logprobs: Some(1), ..request(&prompt, 5) };
    let id = bench.submit(scored).unwrap();
    bench.run();
    assert_eq!(bench.cached(id), 0);
}

#[test]
fn only_text_that_is_the_same_for_everybody_is_kept() {
    let mut pool = PagePool::new(4, Vec::new());
    let plain: Vec<Key> = super::tokens(1, PAGE_TOKENS).into_iter().map(Key::of_token).collect();
    let adapted: Vec<Key> = plain.iter().map(|key| key.under(7)).collect();
    let seen: Vec<Key> = plain[1..].iter().copied().chain([Key::of_vector(9)]).collect();
    for (first, is_kept) in [(&plain, true), (&adapted, false), (&seen, false)] {
        let (page, next) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.share(page, None, first);
        pool.share(next, Some(page), &plain);
        assert_eq!((pool.plain(page).is_some(), pool.plain(next).is_some()), (is_kept, is_kept));
        assert_eq!(pool.plain_ahead(None, first).count(), usize::from(is_kept));
        assert_eq!(pool.plain_ahead(Some(page), &plain).count(), usize::from(is_kept));
        let ahead = pool.plain_ahead(None, first).next();
        assert_eq!(ahead, pool.plain(page), "the same name before and after it is there");
        pool.release(next);
        pool.release(page);
    }
}
