//! Ranks: several that train one thing find the bits that one process finds which takes all shares itself, and, but for the order of
//! sums, what one process finds with a batch as large; whatever is learnt. A rank that fails ends all of them.

mod threads;

use std::path::{Path, PathBuf};

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Model, Whole};
use qwenkit_tensor::TokenId;
use qwenkit_train::{
    AdamW, AdapterShape, Alone, Curve, Error, Example, Goal, Happening, Learner, Lessons, Outcome, Pair, Place, Ranks,
    RunSettings, Schedule, StepSettings, Team, USUAL_TARGETS, references, run,
};
use threads::Thread;

fn files() -> ModelFiles {
    ModelFiles::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/qwen2")).unwrap()
}

fn settings(steps: usize) -> RunSettings {
    RunSettings {
        schedule: Schedule { rate: 1e-2, curve: Curve::Cosine, warmup_steps: 2, steps },
        batch: 6,
        seed: 5,
        step: StepSettings { optimiser: AdamW::default(), clip: Some(1.0), piece_tokens: 40 },
        validate_every: 4,
        patience: Some(3),
        checkpoint_every: 3,
    }
}

/// Sequences of very different lengths, of which very different shares are learnt: a mean of means would be another loss.
fn uneven(count: usize) -> Vec<Example> {
    let example = |i: usize| {
        let len = 6 + (i * 11) % 23;
        Example {
            ids: (0..len).map(|t| TokenId(((20 + 7 * i + t * (1 + i % 3)) % 300) as u32)).collect(),
            goal: Goal::Tokens((0..len).map(|t| t > (i * 5) % len.min(9)).collect()),
        }
    };
    (0..count).map(example).collect()
}

fn labelled(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..5 + i % 7)
            .map(|t| TokenId(if t == 2 { 40 + (i % 3) as u32 } else { (i * 13 + t * 5) as u32 % 300 }))
            .collect(),
        goal: Goal::Label((i % 3) as u32),
    };
    (0..count).map(example).collect()
}

/// What is trained, and on what.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Tokens,
    Labels,
    Preferences,
    Whole,
}

/// What a run left: its happenings without times, and all numbers.
#[derive(Debug, PartialEq)]
struct Left {
    losses: Vec<f64>,
    norms: Vec<f64>,
    tokens: Vec<usize>,
    validations: Vec<Outcome>,
    outcome: Outcome,
    values: Vec<u32>,
}

/// A run of one rank, in a folder that all share.
fn trained(kind: Kind, team: Team<'_>, folder: &Path, resume: bool, stop: usize) -> Result<Left, Error> {
    let compute = Compute::new(1, Isa::detect().unwrap());
    let mut model = match kind {
        Kind::Whole => Model::load_plain(&files(), &compute, &mut |_| {}).unwrap(),
        _ => Model::load(&files(), &compute, &mut |_| {}).unwrap(),
    };
    let labels = (kind == Kind::Labels).then_some(3);
    let targets = USUAL_TARGETS.map(str::to_owned).to_vec();
    let shape = AdapterShape { rank: 4, alpha: 8.0, rslora: false, dora: false, targets, from_layer: 0, labels };
    let kept;
    let mut learner = if kind == Kind::Whole {
        let whole = Whole::of(&mut model).unwrap();
        Learner::whole(model, whole, &compute, false)
    } else {
        kept = model;
        let start = shape.start(kept.plan(), 1).unwrap();
        Learner::new(&kept, &compute, start, false)
    };
    learner.team = team;
    let examples = if kind == Kind::Labels { labelled(34) } else { uneven(34) };
    let place = Place { checkpoint: folder.join("checkpoint.safetensors"), identity: format!("{kind:?}") };
    let pairs: Vec<Pair> = if kind == Kind::Preferences {
        let file = folder.join("references.safetensors");
        let leads = references(&mut learner, &examples, 60, (&file, &place.identity), &mut |_| true)?;
        let pair = |([chosen, rejected], reference): (&[Example; 2], f64)| Pair {
            chosen: chosen.clone(),
            rejected: rejected.clone(),
            reference,
        };
        examples.as_chunks().0.iter().zip(leads).map(pair).collect()
    } else {
        Vec::new()
    };
    let lessons = match kind {
        Kind::Preferences => {
            let lessons = |pairs| Lessons::Pairs { pairs, beta: 0.1 };
            (lessons(&pairs[..13]), lessons(&pairs[13..]))
        }
        _ => (examples[..27].into(), examples[27..].into()),
    };
    let (mut losses, mut norms, mut tokens, mut validations) = (vec![], vec![], vec![], vec![]);
    let outcome = run(&mut learner, lessons, &settings(11), Some(&place), resume, &mut |happening| {
        match happening {
            Happening::Step { step, report, .. } => {
                losses.push(report.loss);
                norms.push(report.grad_norm);
                tokens.push(report.tokens);
                return step != stop;
            }
            Happening::Validation { outcome, .. } => validations.push(outcome),
            _ => {}
        }
        true
    })?;
    let values = learner.values().iter().map(|value| value.to_bits()).collect();
    Ok(Left { losses, norms, tokens, validations, outcome, values })
}

/// The same call of every rank of a group of threads.
fn on_ranks<T: Send>(count: usize, call: impl Fn(Team<'_>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let call = &call;
        let ranks = Thread::group(count).into_iter();
        let threads: Vec<_> = ranks.map(|ranks| scope.spawn(move || call(Team::new(&ranks, None).unwrap()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn alone(kind: Kind, shares: usize) -> Left {
    let folder = tempfile::tempdir().unwrap();
    trained(kind, Team::new(&Alone, Some(shares)).unwrap(), folder.path(), false, 0).unwrap()
}

/// The batch has six samples either way; the last of an epoch three, or one.
#[test]
fn ranks_find_the_bits_of_one_process_with_as_many_shares() {
    for (kind, count) in
        [(Kind::Tokens, 2), (Kind::Tokens, 3), (Kind::Labels, 2), (Kind::Preferences, 2), (Kind::Whole, 2)]
    {
        let folder = tempfile::tempdir().unwrap();
        let found = on_ranks(count, |team| trained(kind, team, folder.path(), false, 0).unwrap());
        let expected = alone(kind, count);
        for (rank, found) in found.iter().enumerate() {
            assert!(
                *found == expected,
                "{kind:?}, rank {rank} of {count}: {:?} and {:?}",
                found.losses,
                expected.losses
            );
        }
        assert!(expected.losses.len() > 4 && !expected.validations.is_empty());
    }
}

/// Losses differ by the order in which gradients are summed alone: first ones not at all, later ones by what steps make of it.
#[test]
fn two_ranks_find_the_losses_of_one_with_twice_the_batch() {
    for kind in [Kind::Tokens, Kind::Labels, Kind::Preferences, Kind::Whole] {
        let (one, two) = (alone(kind, 1), alone(kind, 2));
        let apart = |a: &[f64], b: &[f64]| {
            assert_eq!(a.len(), b.len(), "{kind:?}");
            a.iter().zip(b).map(|(a, b)| (a - b).abs() / a.abs().max(1e-3)).fold(0.0, f64::max)
        };
        assert_eq!(one.tokens, two.tokens);
        let (losses, norms) = (apart(&one.losses, &two.losses), apart(&one.norms, &two.norms));
        println!("{kind:?}: losses {losses:.1e}, norms {norms:.1e} apart");
        assert!(apart(&one.losses[..1], &two.losses[..1]) < 1e-12, "{kind:?}");
        assert!(losses < 1e-5 && norms < 1e-4, "{kind:?}: {losses} and {norms}");
    }
}

/// Stopped by one rank alone, gone on with by ranks, and by one process in their place.
#[test]
fn a_run_goes_on_with_the_same_numbers_on_ranks_and_alone() {
    for kind in [Kind::Tokens, Kind::Preferences] {
        let expected = alone(kind, 2);
        for stop in [2, 5] {
            let begin = || {
                let folder = tempfile::tempdir().unwrap();
                let found = on_ranks(2, |team| {
                    let own = if team.rank() == 1 { stop } else { 0 };
                    trained(kind, team, folder.path(), false, own).unwrap_err()
                });
                assert!(
                    found.iter().all(|error| matches!(error, Error::Stopped { step } if *step == stop)),
                    "{found:?}"
                );
                folder
            };
            let folder = begin();
            let found = on_ranks(2, |team| trained(kind, team, folder.path(), true, 0).unwrap());
            assert_eq!(found[0], found[1]);
            assert_eq!((&found[0].values, &found[0].losses[..]), (&expected.values, &expected.losses[stop..]));
            let folder = begin();
            let found = trained(kind, Team::new(&Alone, Some(2)).unwrap(), folder.path(), true, 0).unwrap();
            assert_eq!((&found.values, &found.losses[..]), (&expected.values, &expected.losses[stop..]));
        }
    }
}

/// The others hear of it where they next wait, with what the rank says, and nobody waits for ever.
#[test]
fn a_rank_that_fails_or_is_gone_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let path =
        |rank: usize| -> PathBuf { if rank == 2 { folder.path().join("none") } else { folder.path().to_owned() } };
    // The third rank's folder has no checkpoint to go on from.
    on_ranks(3, |team| trained(Kind::Tokens, team, folder.path(), false, 3).unwrap_err());
    let found = on_ranks(3, |team| trained(Kind::Tokens, team, &path(team.rank()), true, 0).unwrap_err().to_string());
    assert!(found.iter().all(|text| text.contains("rank 2 goes by something else")), "{found:?}");

    let found = on_ranks(3, |team| {
        if team.rank() == 1 {
            return team.end(Some("the disk is full")).map_err(|error| error.to_string()).map(|()| String::new());
        }
        trained(Kind::Tokens, team, folder.path(), false, 0).map_err(|error| error.to_string()).map(|_| String::new())
    });
    assert_eq!(found[1], Ok(String::new()), "it knows why");
    for rank in [0, 2] {
        assert_eq!(found[rank], Err("rank 1 of 3: the disk is full".to_owned()));
    }

    let found = on_ranks(2, |team| match team.rank() {
        0 => trained(Kind::Tokens, team, folder.path(), false, 0).map(|_| ()),
        _ => Ok(()),
    });
    assert!(matches!(&found[0], Err(Error::Lost { what }) if what.contains("rank 1")), "{found:?}");
}

#[test]
fn ranks_that_go_by_other_things_are_named() {
    let found = on_ranks(3, |team| {
        let facts = if team.rank() == 1 { "lr: 1\nbatch: 9" } else { "lr: 1\nbatch: 8" };
        team.agree(facts).unwrap_err().to_string()
    });
    for text in found {
        assert!(
            text.contains("rank 1 ") && text.contains("batch: 9; rank 0: batch: 8") && !text.contains("lr"),
            "{text}"
        );
    }
    let apart = on_ranks(3, |team| {
        let values = [1.0, if team.rank() == 2 { -0.0 } else { 0.0 }];
        team.hold_equal(&values, 7).unwrap_err().to_string()
    });
    assert!(apart[0].contains("behind step 7 the numbers of rank 2 "), "{apart:?}");
    on_ranks(2, |team| team.hold_equal(&[1.0], 7).unwrap());
}

#[test]
fn several_ranks_take_one_share_each() {
    let ranks = Thread::group(2);
    assert_eq!(Team::new(&ranks[0], Some(2)).unwrap().shares(), 2);
    assert!(matches!(Team::new(&ranks[0], Some(4)), Err(Error::Shares { shares: 4, ranks: 2 })));
    assert_eq!(ranks[1].rank(), 1);
}
