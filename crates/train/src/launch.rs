//! Whether a launcher started this process as one of several, by the variables that launchers set.
//!
//! Not here: what the processes say to each other (`ranks`).

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
}

/// Launchers and the variables of rank and number; the more special first, as several may be set. Of Slurm it is the number of the
/// step's processes, which `srun` sets: SLURM_NTASKS is there in a batch script too, which is one process.
const KNOWN: [(&str, &str, &str); 4] = [
    ("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("an MPI launcher", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("torchrun", "RANK", "WORLD_SIZE"),
];

impl Launched {
    /// What the variables say, read by `variable`; `None` where this process is alone.
    pub fn by_variables(variable: impl Fn(&str) -> Option<String>) -> Option<Launched> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        KNOWN.iter().find_map(|&(by, of_rank, of_count)| {
            let (rank, count) = (number(of_rank)?, number(of_count)?);
            let variables = format!("{of_rank}={rank}, {of_count}={count}");
            (count > 1 && rank < count).then_some(Launched { rank, count, by, variables })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(set: &[(&str, &str)]) -> Option<Launched> {
        Launched::by_variables(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        let of = |set: &[(&str, &str)]| found(set).map(|l| (l.rank, l.count, l.by));
        assert_eq!(
            of(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]),
            Some((1, 2, "mpirun of Open MPI"))
        );
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "4")]), Some((0, 4, "an MPI launcher")));
        assert_eq!(
            of(&[("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_NTASKS", "4")]),
            Some((3, 4, "srun"))
        );
        let launched = found(&[("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")]).unwrap();
        assert_eq!((launched.by, &launched.variables[..]), ("torchrun", "RANK=1, WORLD_SIZE=2"));
    }

    #[test]
    fn one_process_is_alone_whatever_is_set() {
        for set in [
            &[][..],
            &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")],
            // A batch script of four tasks, outside of srun.
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")],
            &[("RANK", "first"), ("WORLD_SIZE", "2")],
            &[("RANK", "2"), ("WORLD_SIZE", "2")],
            &[("WORLD_SIZE", "2")],
        ] {
            assert_eq!(found(set), None, "{set:?}");
        }
    }
}
