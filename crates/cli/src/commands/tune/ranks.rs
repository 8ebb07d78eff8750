//! `tune` as one of several processes that a launcher started: who they are, what they share, and how they end together.
//!
//! Contract: the first rank alone speaks and writes; an error of any rank ends all, and is said once. Not here: what ranks find
//! together (`qwenkit-train`).

use std::collections::BTreeMap;
use std::time::Duration;
use std::{env, fs};

use qwenkit_train::{Alone, Error, Joined, Launched, Meeting, Ranks, Tcp, Team, Waits};

use crate::failure::{Interrupted, Told, usage};
use crate::{machine, terminal};

/// How long ranks wait for each other: for one that is busy far longer than a step, a validation, or the writing of a checkpoint.
const WAITS: Waits = Waits {
    start: Duration::from_secs(10 * 60),
    work: Duration::from_secs(30 * 60),
    silence: Duration::from_secs(2 * 60),
};

/// Leaves speaking to the first rank: the others have the same arguments, and would say the same.
pub(super) fn let_the_first_speak() {
    if let Ok(Some(Launched { rank: 1.., .. })) = launched() {
        terminal::be_silent();
    }
}

/// Runs `train`, in one process or as one of several; `shares` says into how many shares one process deals its steps.
///
/// # Errors
/// Those of `train` on any rank. When ranks were started and cannot reach each other.
pub(super) fn run(shares: Option<u32>, train: impl FnOnce(Team<'_>) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let shares = shares.map(|shares| shares as usize);
    let Some(launched) = launched()? else { return train(Team::new(&Alone, shares)?) };
    let joining = join(&launched).inspect_err(|error| {
        // Rank 0 does not know it.
        if let Some(Error::NotMet { .. } | Error::Lost { .. }) = error.downcast_ref() {
            terminal::speak_again();
        }
    })?;
    let outcome = Team::new(joining.ranks(), shares).map_err(Into::into).and_then(|team| end(team, train(team)));
    if let Err(error) = &outcome
        && matches!(error.downcast_ref(), Some(Error::Lost { .. }))
    {
        // Nobody else may be left to say it, and the ranks that are left are not to wait.
        terminal::speak_again();
        terminal::print_error(&format!("rank {} of {}: {error}", launched.rank, launched.count));
        joining.abandon();
        return Err(Told.into());
    }
    if let Err(error) = &outcome
        && launched.rank == 0
        && !error.is::<Interrupted>()
    {
        // Before the connection to them ends, where all wait for each other: a launcher ends the others as soon as one has gone with an error.
        terminal::print_error(&error.to_string());
        terminal::be_silent();
    }
    outcome
}

/// Refuses work that several processes would each do whole.
///
/// # Errors
/// When a launcher started this process as one of several.
pub(super) fn refuse(what: &str) -> anyhow::Result<()> {
    let Some(launched) = launched()? else { return Ok(()) };
    let Launched { count, by, variables, .. } = launched;
    Err(usage(format!(
        "{by} started {count} of this program ({variables}), and {what} is done by one\nhint: start it without a launcher"
    )))
}

fn launched() -> anyhow::Result<Option<Launched>> {
    Launched::by_variables(|name| env::var(name).ok()).map_err(|error| usage(error.to_string()))
}

/// This process as one of several.
enum Joining {
    Tcp(Tcp),
    #[cfg(feature = "mpi")]
    Mpi(qwenkit_train::Mpi),
}

impl Joining {
    fn ranks(&self) -> &dyn Ranks {
        match self {
            Joining::Tcp(ranks) => ranks,
            #[cfg(feature = "mpi")]
            Joining::Mpi(ranks) => ranks,
        }
    }

    /// Ends ranks that may wait for ever: those of MPI. Over TCP they see that this one has gone.
    fn abandon(&self) {
        match self {
            Joining::Tcp(_) => {}
            #[cfg(feature = "mpi")]
            Joining::Mpi(ranks) => ranks.abort(1),
        }
    }
}

fn join(launched: &Launched) -> anyhow::Result<Joining> {
    match launched.joined {
        Joined::Mpi => by_mpi(launched),
        Joined::Tcp => by_tcp(launched),
    }
}

fn by_tcp(launched: &Launched) -> anyhow::Result<Joining> {
    let meeting = Meeting::by_variables(launched, |name| env::var(name).ok());
    let meeting = meeting.map_err(|error| {
        // Rank 0 may lack nothing, and would wait for this one without knowing why.
        terminal::speak_again();
        usage(error.to_string())
    })?;
    if launched.rank > 0 {
        return Ok(Joining::Tcp(Tcp::other(&meeting, launched.rank, WAITS)?));
    }
    let listener = meeting.listen()?;
    if let Ok(place) = listener.local_addr() {
        let any = format!("port {} of all addresses", place.port());
        let place = if place.ip().is_unspecified() { any } else { place.to_string() };
        terminal::note(&format!("rank 0 of {} waits for the others at {place}", launched.count));
    }
    Ok(Joining::Tcp(Tcp::first(listener, launched.count, &meeting.job, WAITS)?))
}

#[cfg(feature = "mpi")]
fn by_mpi(launched: &Launched) -> anyhow::Result<Joining> {
    let ranks = qwenkit_train::Mpi::begin(WAITS.work)?;
    let Launched { rank, count, by, variables, .. } = launched;
    if (ranks.rank(), ranks.count()) != (*rank, *count) {
        return Err(usage(format!(
            "{by} says that this is rank {rank} of {count} ({variables}), and MPI that it is rank {} of {}\n\
             hint: start it by the launcher of the MPI that it was built with: mpirun, or srun --mpi=pmix; or set MASTER_ADDR and \
             MASTER_PORT for srun without MPI",
            ranks.rank(),
            ranks.count()
        )));
    }
    Ok(Joining::Mpi(ranks))
}

#[cfg(not(feature = "mpi"))]
fn by_mpi(launched: &Launched) -> anyhow::Result<Joining> {
    let Launched { count, by, variables, .. } = launched;
    Err(usage(format!(
        "{by} started {count} of this program ({variables}), and it was built without MPI: each would train by itself, and all write \
         into one folder\nhint: build it with `--features mpi`, start it by torchrun, or start one process without the launcher; srun \
         needs no MPI where MASTER_ADDR and MASTER_PORT are set"
    )))
}

/// The end that all ranks come to together: what a rank met that the others have not heard of is said to them here.
fn end(team: Team<'_>, outcome: anyhow::Result<()>) -> anyhow::Result<()> {
    match outcome {
        Ok(()) => Ok(team.end(None)?),
        Err(error) if matches!(error.downcast_ref(), Some(Error::OfRank { .. } | Error::Lost { .. })) => Err(error),
        Err(error) => {
            let what = if error.is::<Interrupted>() { "stopped".to_owned() } else { error.to_string() };
            // Another one's failure is no news here, but that nobody hears of this one's is.
            match team.end(Some(&what)) {
                Err(lost @ Error::Lost { .. }) => Err(lost.into()),
                _ => Err(error),
            }
        }
    }
}

/// Among how many ranks the memory and the cores that a process sees are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sharing {
    /// Ranks on this machine.
    pub(super) memory: usize,
    /// Those of them that may use the same cores.
    pub(super) cores: usize,
}

impl Sharing {
    /// Asks all ranks where they are.
    ///
    /// # Errors
    /// When another rank cannot go on.
    pub(super) fn of(team: Team<'_>) -> anyhow::Result<Sharing> {
        let machine = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cores = status.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap_or_default();
        let all = team.gather(format!("{}\n{cores}", machine.trim()).as_bytes())?;
        Ok(Sharing::among(&all, team.rank()))
    }

    /// Each rank says its machine and, on a second line, its cores.
    fn among(all: &[Vec<u8>], rank: usize) -> Sharing {
        let machine = |place: &[u8]| place.split(|byte| *byte == b'\n').next().unwrap_or_default().to_vec();
        let mut machines: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        all.iter().for_each(|place| *machines.entry(machine(place)).or_default() += 1);
        let cores = all.iter().filter(|place| **place == all[rank]).count();
        Sharing { memory: machines[&machine(&all[rank])], cores }
    }

    /// Threads of a rank unless somebody says otherwise.
    pub(super) fn threads(&self) -> usize {
        (machine::cores() / self.cores).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_on_a_machine_and_cores_where_they_are_the_same() {
        let all = ["a\n0-3", "a\n4-7", "b\n0-7", "b\n0-7", "b\n0-7"].map(|place| place.as_bytes().to_vec());
        let of = |rank: usize| Sharing::among(&all, rank);
        assert_eq!(of(0), Sharing { memory: 2, cores: 1 });
        assert_eq!(of(3), Sharing { memory: 3, cores: 3 });
        assert_eq!(Sharing::of(Team::ALONE).unwrap(), Sharing { memory: 1, cores: 1 });
    }
}
