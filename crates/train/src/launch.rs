//! Whether a launcher started this process as one of several, by the variables that launchers set.
//!
//! Contract: a process that is one of several is never taken for one alone: where variables say that there are several and not which one
//! this is, that is an error. Not here: what the processes say to each other (`ranks`).

use crate::error::Error;

/// What joins processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// The MPI whose launcher started them.
    Mpi,
    /// TCP, where MASTER_ADDR and MASTER_PORT say.
    Tcp,
}

/// One of several processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Which one it is.
    pub rank: usize,
    /// How many there are.
    pub count: usize,
    /// The launcher.
    pub by: &'static str,
    /// The variables that say so, with their values.
    pub variables: String,
    /// What joins them.
    pub joined: Joined,
}

/// Launchers of MPI and the variables of rank and number; the more special first, as several may be set. Of Slurm it is the number of the
/// step's processes, which `srun` sets: SLURM_NTASKS is there in a batch script too, which is one process.
const KNOWN: [(&str, &str, &str); 3] = [
    ("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("an MPI launcher", "PMI_RANK", "PMI_SIZE"),
    (SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];
const SRUN: &str = "srun";
const TORCHRUN: &str = "torchrun";

impl Launched {
    /// What the variables say, read by `variable`; `None` where this process is alone.
    ///
    /// # Errors
    /// When torchrun's variables speak of several processes, and not of which one this is.
    pub fn by_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launched>, Error> {
        // Torchrun itself is often started by srun or mpirun, whose variables its processes have too.
        if variable("TORCHELASTIC_RUN_ID").is_some() {
            return Launched::by_torchrun(&variable);
        }
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let found = KNOWN.iter().find_map(|&(by, of_rank, of_count)| {
            let (rank, count) = (number(of_rank)?, number(of_count)?);
            let variables = format!("{of_rank}={rank}, {of_count}={count}");
            // Who says where ranks of srun meet means that.
            let is_told = by == SRUN && variable("MASTER_ADDR").is_some() && variable("MASTER_PORT").is_some();
            let joined = if is_told { Joined::Tcp } else { Joined::Mpi };
            (count > 1 && rank < count).then_some(Launched { rank, count, by, variables, joined })
        });
        found.map_or_else(|| Launched::by_torchrun(&variable), |found| Ok(Some(found)))
    }

    fn by_torchrun(variable: &impl Fn(&str) -> Option<String>) -> Result<Option<Launched>, Error> {
        let lacking = |what: String| Err(Error::Launch { what });
        let Some(text) = variable("WORLD_SIZE") else {
            let is_meant = variable("MASTER_ADDR").is_some() || variable("MASTER_PORT").is_some();
            return match variable("RANK") {
                Some(rank) if is_meant => lacking(format!("RANK={rank} is set, and WORLD_SIZE is missing")),
                _ => Ok(None),
            };
        };
        let Ok(count) = text.trim().parse::<usize>() else {
            return lacking(format!("WORLD_SIZE is `{text}`, and no number of processes"));
        };
        if count <= 1 {
            return Ok(None);
        }
        let Some(text) = variable("RANK") else {
            return lacking(format!("WORLD_SIZE={count} is set, and RANK is missing"));
        };
        let Some(rank) = text.trim().parse().ok().filter(|rank| *rank < count) else {
            return lacking(format!("RANK is `{text}`, and not a number below WORLD_SIZE={count}"));
        };
        let variables = format!("RANK={rank}, WORLD_SIZE={count}");
        Ok(Some(Launched { rank, count, by: TORCHRUN, variables, joined: Joined::Tcp }))
    }

    /// That a variable is missing which says how the processes come together.
    pub(crate) fn lacks(&self, name: &str) -> Error {
        let Launched { by, count, variables, .. } = self;
        Error::Launch { what: format!("{by} started {count} of this program ({variables}), and {name} is missing") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(set: &[(&str, &str)]) -> Result<Option<Launched>, String> {
        let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Launched::by_variables(variable).map_err(|error| error.to_string())
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        let of = |set: &[(&str, &str)]| found(set).unwrap().map(|l| (l.rank, l.count, l.by, l.joined));
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert_eq!(of(&mpi), Some((1, 2, "mpirun of Open MPI", Joined::Mpi)));
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "4")]), Some((0, 4, "an MPI launcher", Joined::Mpi)));
        let srun = [("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_NTASKS", "4")];
        assert_eq!(of(&srun), Some((3, 4, "srun", Joined::Mpi)));
        let told = [("MASTER_ADDR", "first"), ("MASTER_PORT", "29500")];
        assert_eq!(of(&[&srun[..], &told].concat()), Some((3, 4, "srun", Joined::Tcp)));
        assert_eq!(of(&[&mpi[..], &told].concat()), Some((1, 2, "mpirun of Open MPI", Joined::Mpi)));

        let torch = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")];
        let launched = found(&torch).unwrap().unwrap();
        assert_eq!((launched.by, &launched.variables[..]), ("torchrun", "RANK=5, WORLD_SIZE=8"));
        // One torchrun for each machine, started by srun; and a container of a job by RANK and WORLD_SIZE, in which somebody calls mpirun.
        let within = [&srun[..], &torch, &[("TORCHELASTIC_RUN_ID", "none")]].concat();
        assert_eq!(of(&within), Some((5, 8, "torchrun", Joined::Tcp)));
        assert_eq!(of(&[&torch[..], &mpi].concat()), Some((1, 2, "mpirun of Open MPI", Joined::Mpi)));
    }

    #[test]
    fn one_process_is_alone_whatever_is_set() {
        for set in [
            &[][..],
            &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")],
            // A batch script of four tasks, outside of srun.
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")],
            &[("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "none")],
            &[("RANK", "gold")],
            &[("MASTER_ADDR", "first"), ("MASTER_PORT", "29500")],
        ] {
            assert_eq!(found(set), Ok(None), "{set:?}");
        }
    }

    #[test]
    fn one_of_several_that_does_not_know_which_is_an_error() {
        for (set, name) in [
            (&[("WORLD_SIZE", "2")][..], "RANK is missing"),
            (&[("RANK", "first"), ("WORLD_SIZE", "2")], "RANK is `first`"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK is `2`"),
            (&[("RANK", "0"), ("WORLD_SIZE", "all")], "WORLD_SIZE is `all`"),
            (&[("RANK", "0"), ("MASTER_ADDR", "first")], "WORLD_SIZE is missing"),
        ] {
            let error = found(set).unwrap_err();
            assert!(error.contains(name), "{set:?}: {error}");
        }
    }
}
