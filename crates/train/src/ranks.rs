//! Several processes that train one thing together: ranks, counted from 0. Each takes its share of a step's samples; what they find is
//! summed, so that all hold the same numbers, bit for bit, behind every step.
//!
//! Contract: every rank meets the others in the same order. A rank that cannot go on says so where the others next wait for it
//! ([`Team::end`]), and all of them end. Not here: who starts ranks (`launch`), what carries bytes between them (`tcp`, `mpi`).

use std::cmp::Reverse;

use crate::{data::hash::Hash, error::Error};

/// What carries bytes and numbers between ranks.
pub trait Ranks {
    /// Which one this is.
    fn rank(&self) -> usize;

    /// How many there are.
    fn count(&self) -> usize;

    /// What every rank brought, in order of rank; lengths may differ.
    ///
    /// # Errors
    /// When a rank is gone, or does not come.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Puts in place of the numbers the sum of all ranks' numbers. Each is summed in order of rank, so that its bits do not depend on
    /// how bytes travel, and they are the same on every rank. All bring equally many.
    ///
    /// # Errors
    /// As `gather`.
    fn sum(&self, numbers: &mut [f32]) -> Result<(), Error>;
}

/// One process alone.
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![own.to_vec()])
    }

    fn sum(&self, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }
}

/// What the first byte of a message says of who sent it.
const GOES_ON: u8 = 0;
const HAS_FAILED: u8 = 1;

/// Ranks, and into how many shares the samples of a step are dealt. Gradients are summed share by share, so that the shares, and not
/// the ranks that compute them, say what comes of a run: one process that takes all shares finds the same bits as a rank for each.
#[derive(Clone, Copy)]
pub struct Team<'a> {
    ranks: &'a dyn Ranks,
    shares: usize,
}

impl<'a> Team<'a> {
    /// One process, one share.
    pub const ALONE: Team<'static> = Team { ranks: &Alone, shares: 1 };

    /// A share for each rank, or so many for a process that is alone.
    ///
    /// # Errors
    /// When there are several ranks and another number of shares.
    pub fn new(ranks: &'a dyn Ranks, shares: Option<usize>) -> Result<Team<'a>, Error> {
        let count = ranks.count();
        let shares = shares.unwrap_or(count).max(1);
        if count > 1 && shares != count {
            return Err(Error::Shares { shares, ranks: count });
        }
        Ok(Team { ranks, shares })
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.ranks.rank()
    }

    /// How many ranks there are.
    pub fn count(&self) -> usize {
        self.ranks.count()
    }

    /// Shares of a step's samples.
    pub fn shares(&self) -> usize {
        self.shares
    }

    /// Whether this is the rank that writes and tells.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What every rank brought, in order of rank.
    ///
    /// # Errors
    /// When one of them has failed, is gone, or does not come.
    pub fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.meet(&[&[GOES_ON], own].concat())
    }

    /// Ends together: waits for all, of whom some may have failed; `failure` is why this one has. To be called once, by every rank that
    /// has not heard yet that another one failed.
    ///
    /// # Errors
    /// [`Error::OfRank`] when another one failed, and as `gather`.
    pub fn end(&self, failure: Option<&str>) -> Result<(), Error> {
        let message = match failure {
            None => vec![GOES_ON],
            Some(what) => [&[HAS_FAILED], what.as_bytes()].concat(),
        };
        self.meet(&message).map(|_| ())
    }

    fn meet(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut all = self.ranks.gather(message)?;
        for (rank, found) in all.iter_mut().enumerate() {
            match found.first() {
                Some(&GOES_ON) => drop(found.remove(0)),
                // This rank knows why it failed, and says it itself.
                Some(&HAS_FAILED) if rank == self.rank() => {}
                Some(&HAS_FAILED) => {
                    let what = String::from_utf8_lossy(&found[1..]).into_owned();
                    return Err(Error::OfRank { rank, count: self.count(), what });
                }
                _ => return Err(Error::lost(format!("rank {rank} sent something that is no message"))),
            }
        }
        Ok(all)
    }

    /// Whether all ranks say yes.
    ///
    /// # Errors
    /// As `gather`.
    pub fn all(&self, own: bool) -> Result<bool, Error> {
        Ok(self.gather(&[u8::from(own)])?.iter().all(|found| found == &[1]))
    }

    /// Holds what the ranks go by against each other: a text of lines, each of them a fact.
    ///
    /// # Errors
    /// When a rank goes by something else than rank 0, and as `gather`.
    pub fn agree(&self, facts: &str) -> Result<(), Error> {
        if self.count() == 1 {
            return Ok(());
        }
        let all = self.gather(facts.as_bytes())?;
        let Some(rank) = all.iter().position(|found| *found != all[0]) else { return Ok(()) };
        let [first, other] = [0, rank].map(|rank| String::from_utf8_lossy(&all[rank]).into_owned());
        let missing = |of: &str, others: &str| {
            let lines: Vec<&str> = of.lines().filter(|line| !others.lines().any(|other| other == *line)).collect();
            lines.join(", ")
        };
        Err(Error::Disagree { rank, own: missing(&other, &first), first: missing(&first, &other) })
    }

    /// Holds the numbers of all ranks against each other, by their hash.
    ///
    /// # Errors
    /// When they differ, which they cannot unless a machine computes wrongly; and as `gather`.
    pub fn hold_equal(&self, values: &[f32], step: usize) -> Result<(), Error> {
        if self.count() == 1 {
            return Ok(());
        }
        let mut hash = Hash::new();
        values.iter().for_each(|value| hash.add(u64::from(value.to_bits())));
        let all = self.gather(&hash.finish().to_le_bytes())?;
        let apart: Vec<String> = (0..all.len()).filter(|&rank| all[rank] != all[0]).map(|r| r.to_string()).collect();
        if apart.is_empty() { Ok(()) } else { Err(Error::Apart { ranks: apart.join(", "), step }) }
    }

    /// Numbers of all ranks one behind the other, in order of rank.
    pub(crate) fn join(&self, own: &[f64]) -> Result<Vec<f64>, Error> {
        if self.count() == 1 {
            return Ok(own.to_vec());
        }
        let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
        let all = self.gather(&bytes)?.concat();
        Ok(all.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
    }

    /// Of a list, the part that this rank goes through where all ranks share it: one run, behind those of lower ranks.
    pub(crate) fn part<'l, T>(&self, list: &'l [T]) -> &'l [T] {
        let border = |rank: usize| list.len() * rank / self.count();
        &list[border(self.rank())..border(self.rank() + 1)]
    }

    pub(crate) fn sum(&self, numbers: &mut [f32]) -> Result<(), Error> {
        self.ranks.sum(numbers)
    }
}

/// Deals a batch into shares of about equally many tokens, as the slowest share says how long a step takes: the longest first, each to
/// the share that has the fewest. Within a share samples keep their order.
pub(crate) fn deal<T: Copy>(batch: &[T], shares: usize, len: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut longest_first: Vec<usize> = (0..batch.len()).collect();
    longest_first.sort_by_key(|&place| Reverse(len(&batch[place])));
    let (mut tokens, mut share_of) = (vec![0; shares], vec![0; batch.len()]);
    for place in longest_first {
        let share = (0..shares).min_by_key(|&share| tokens[share]).unwrap_or(0);
        tokens[share] += len(&batch[place]);
        share_of[place] = share;
    }
    let of =
        |share: usize| batch.iter().zip(&share_of).filter(move |(_, own)| **own == share).map(|(x, _)| *x).collect();
    (0..shares).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_hold_every_sample_once_in_order_and_about_equally_many_tokens() {
        let lens: Vec<usize> = (0..37).map(|i| 5 + (i * 29) % 90).collect();
        let batch: Vec<usize> = (0..lens.len()).collect();
        assert!(deal(&batch, 1, |&i| lens[i])[0] == batch, "one share is the batch as it is");
        for shares in [2, 3, 8] {
            let dealt = deal(&batch, shares, |&i| lens[i]);
            assert!(dealt.iter().all(|share| share.is_sorted()));
            let tokens: Vec<usize> = dealt.iter().map(|share| share.iter().map(|&i| lens[i]).sum()).collect();
            let (least, most) = (tokens.iter().min().unwrap(), tokens.iter().max().unwrap());
            assert!(most - least < 15, "{tokens:?}");
            let mut all = dealt.concat();
            all.sort_unstable();
            assert_eq!(all, batch);
        }
        let few = deal(&[7usize], 3, |len| *len);
        assert_eq!(few, [vec![7], vec![], vec![]], "a share may be empty");
    }

    #[test]
    fn a_process_alone_takes_any_number_of_shares() {
        assert_eq!(Team::new(&Alone, None).unwrap().shares(), 1);
        assert_eq!(Team::new(&Alone, Some(5)).unwrap().shares(), 5);
        let team = Team::ALONE;
        assert!(team.all(true).unwrap() && !team.all(false).unwrap());
        assert_eq!(team.join(&[1.0, 2.0]).unwrap(), [1.0, 2.0]);
        assert_eq!(team.part(&[1, 2, 3]), [1, 2, 3]);
        team.end(Some("why")).unwrap();
    }
}
