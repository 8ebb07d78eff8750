//! Ranks as processes, joined by MPI: this program starts itself by `mpirun` and holds what ranks find against what one process finds;
//! ranks that fail, die or do not come end all of them, soon.
//!
//! Not a test of libtest: MPI is begun by the thread that a process begins with.

#[path = "../ranks/course.rs"]
mod course;

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use course::{Kind, alone, trained};
use qwenkit_train::{Error, Launched, Mpi, Ranks, Team};

const KINDS: [Kind; 4] = [Kind::Tokens, Kind::Labels, Kind::Preferences, Kind::Whole];
/// How long ranks wait for each other here.
const PATIENCE: Duration = Duration::from_secs(5);
/// What no call here may take.
const LIMIT: Duration = Duration::from_secs(100);

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match (Launched::by_variables(|name| env::var(name).ok()).unwrap(), &arguments[..]) {
        (Some(launched), [what, folder]) => be_rank(&launched, what, Path::new(folder)),
        _ => {
            bits_are_those_of_one_process();
            long_messages_and_sums_come_whole();
            failures_end_all();
        }
    }
}

fn bits_are_those_of_one_process() {
    for (count, kinds) in [(2, &KINDS[..]), (3, &KINDS[..1])] {
        let folder = tempfile::tempdir().unwrap();
        let (is_well, told) = ended(start(count, "train", folder.path()));
        assert!(is_well, "{told}");
        for &kind in kinds {
            let expected = format!("{:?}", alone(kind, count));
            for rank in 0..count {
                let found = fs::read_to_string(folder.path().join(format!("{kind:?}-{rank}"))).unwrap();
                assert!(found == expected, "{kind:?}, rank {rank} of {count}: found {found}\nexpected {expected}");
            }
            println!("{kind:?}: {count} ranks have the losses, validations and numbers of one process, bit for bit");
        }
    }
}

fn long_messages_and_sums_come_whole() {
    for count in [2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let (is_well, told) = ended(start(count, "carry", folder.path()));
        assert!(is_well, "{told}");
        println!("{count} ranks: long messages and sums are whole");
    }
}

fn failures_end_all() {
    for (what, expected) in [
        ("fail", "rank 1 of 2: the disk is full"),
        ("die", ""),
        ("panic", "something unforeseen"),
        ("stay away", "the other ranks have not come within 5 s"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let (is_well, told) = ended(start(2, what, folder.path()));
        let took = started.elapsed();
        assert!(!is_well && told.contains(expected), "{what}: {told}");
        assert!(took < Duration::from_secs(30), "{what}: {took:?}");
        println!("{what}: all ended after {:.1} s", took.as_secs_f64());
    }
}

/// Starts so many ranks of this program.
fn start(count: usize, what: &str, folder: &Path) -> (Child, std::path::PathBuf) {
    let told = folder.join("told");
    let file = fs::File::create(&told).unwrap();
    let child = Command::new("mpirun")
        .args(["-n", &count.to_string()])
        .arg(env::current_exe().unwrap())
        .arg(what)
        .arg(folder)
        // Containers have one user, few cores, and neither ssh nor the right to read another process's memory.
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_plm", "isolated")])
        .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .expect("mpirun (Debian: openmpi-bin)");
    (child, told)
}

/// Whether all ranks ended well, and what they and their launcher told.
fn ended((mut child, told): (Child, std::path::PathBuf)) -> (bool, String) {
    let started = Instant::now();
    loop {
        let status = child.try_wait().unwrap();
        let is_late = started.elapsed() > LIMIT;
        if is_late {
            let _ = child.kill();
        }
        if let Some(status) = status {
            return (status.success(), fs::read_to_string(told).unwrap());
        }
        assert!(!is_late, "not ended after {LIMIT:?}: {}", fs::read_to_string(told).unwrap());
        sleep(Duration::from_millis(20));
    }
}

fn be_rank(launched: &Launched, what: &str, folder: &Path) {
    let ranks = Mpi::begin(PATIENCE).unwrap();
    assert_eq!((ranks.rank(), ranks.count()), (launched.rank, launched.count), "{}", launched.variables);
    let team = Team::new(&ranks, None).unwrap();
    match what {
        "train" => {
            for kind in KINDS.into_iter().filter(|kind| ranks.count() == 2 || *kind == Kind::Tokens) {
                let found = trained(kind, team, folder, false, 0).unwrap();
                fs::write(folder.join(format!("{kind:?}-{}", ranks.rank())), format!("{found:?}")).unwrap();
            }
        }
        "carry" => carry(&ranks),
        _ => {
            // The second rank takes part in the first steps, and then in nothing.
            let fails = ranks.rank() == 1;
            let outcome = trained(Kind::Tokens, team, folder, false, if fails { 3 } else { 0 });
            assert!(matches!(outcome, Err(Error::Stopped { step: 3 })));
            if fails {
                match what {
                    "fail" => team.end(Some("the disk is full")).unwrap(),
                    "die" => std::process::abort(),
                    "panic" => panic!("something unforeseen"),
                    _ => sleep(LIMIT),
                }
            } else {
                let error = trained(Kind::Tokens, team, folder, false, 0).unwrap_err();
                eprintln!("{error}");
            }
            // Where all know of the failure, MPI ends as it should.
            drop(ranks);
            std::process::exit(1);
        }
    }
}

/// Messages of several blocks and lengths, and sums of several pieces, of which the last is not full.
fn carry(ranks: &Mpi) {
    let count = ranks.count();
    for len in [0, 1, 1 << 20, 2_500_001] {
        let of = |rank: usize| -> Vec<u8> { (0..len / (rank + 1)).map(|i| (i * 7 + rank) as u8).collect() };
        let found = ranks.gather(&of(ranks.rank())).unwrap();
        assert!(found.len() == count && (0..count).all(|rank| found[rank] == of(rank)), "{len} bytes");
    }
    for len in [0, 1, 5, (1 << 18) * count, 1_000_003] {
        // Numbers so different that another order of summing has other bits.
        let of = |rank: usize, i: usize| (i as f32 + 0.37).sin() * 10f32.powi(((i + 3 * rank) % 7) as i32 - 3);
        let mut numbers: Vec<f32> = (0..len).map(|i| of(ranks.rank(), i)).collect();
        ranks.sum(&mut numbers).unwrap();
        let expected = |i: usize| (1..count).fold(of(0, i), |sum, rank| sum + of(rank, i));
        let wrong = (0..len).find(|&i| numbers[i].to_bits() != expected(i).to_bits());
        assert_eq!(wrong, None, "of {len} numbers");
    }
}
