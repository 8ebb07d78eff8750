//! Ranks: several that train one thing find the bits that one process finds which takes all shares itself, and, but for the order of
//! sums, what one process finds with a batch as large; whatever is learnt. A rank that fails ends all of them.

mod bits;
mod course;
mod threads;

use std::path::PathBuf;

use bits::holds_the_bits_of_one;
use course::{Kind, alone, trained};
use qwenkit_train::{Alone, Error, Ranks, Team};
use threads::Thread;

/// The same call of every rank of a group of threads.
fn on_ranks<T: Send>(count: usize, call: impl Fn(Team<'_>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let call = &call;
        let ranks = Thread::group(count).into_iter();
        let threads: Vec<_> = ranks.map(|ranks| scope.spawn(move || call(Team::new(&ranks, None).unwrap()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The batch has six samples either way; the last of an epoch three, or one.
#[test]
fn ranks_find_the_bits_of_one_process_with_as_many_shares() {
    holds_the_bits_of_one(|kind, count, folder| on_ranks(count, |team| trained(kind, team, folder, false, 0).unwrap()));
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

/// Stopped by one rank alone, gone on with by ranks, and by one process in their place; begun by one process and gone on with by ranks.
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
            let one = Team::new(&Alone, Some(2)).unwrap();
            let found = trained(kind, one, folder.path(), true, 0).unwrap();
            assert_eq!((&found.values, &found.losses[..]), (&expected.values, &expected.losses[stop..]));
            let folder = tempfile::tempdir().unwrap();
            trained(kind, one, folder.path(), false, stop).unwrap_err();
            let found = on_ranks(2, |team| trained(kind, team, folder.path(), true, 0).unwrap());
            assert_eq!((&found[1].values, &found[1].losses[..]), (&expected.values, &expected.losses[stop..]));
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
        0 => trained(Kind::Tokens, team, folder.path(), false, 0).err(),
        _ => None,
    });
    assert!(matches!(&found[0], Some(Error::Lost { what }) if what.contains("rank 1")), "{found:?}");
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
