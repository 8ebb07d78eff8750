//! `tune` under launchers: processes of torchrun train one adapter, with the bits of one process; several that nothing joins do not
//! train each by itself, one error says so, and one process under a launcher is alone.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Stdio};

use crate::program::{Place, fixture};

/// What a process of a launcher says, and its exit code.
fn launched(place: &Place, variables: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String) {
    let output = place.command(args).envs(variables.iter().copied()).output().expect("the binary starts");
    (output.status.code(), String::from_utf8(output.stderr).expect("text"))
}

fn data(place: &Place) {
    let lines: String = (0..24).map(|i| format!("a text of number {i},{}\n", ["even", "odd"][i % 2])).collect();
    fs::write(place.path("data.csv"), format!("text,label\n{lines}")).expect("writable");
}

#[test]
#[cfg(not(feature = "mpi"))]
fn several_processes_without_mpi_refuse_to_train_one_by_one() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    data(&place);
    let args = ["tune", "--model", &model, "--data", "data.csv", "--out", "out", "--steps", "1"];
    for (rank, count) in [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ] {
        let (code, told) = launched(&place, &[(rank, "0"), (count, "2")], &args);
        assert_eq!(code, Some(2), "{told}");
        assert_eq!(told.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{told}");
        for part in [&format!("started 2 of this program ({rank}=0, {count}=2)")[..], "without MPI", "--features mpi"] {
            assert!(told.contains(part), "`{part}` is not in: {told}");
        }
        // One of them has said it for all.
        assert_eq!(launched(&place, &[(rank, "1"), (count, "2")], &args), (Some(2), String::new()));
    }
    assert!(!place.path("out").exists());
}

/// What torchrun sets for two processes. It listens at MASTER_PORT itself, for as long as this lives.
struct Torchrun {
    agent: TcpListener,
}

impl Torchrun {
    fn new() -> Torchrun {
        Torchrun { agent: TcpListener::bind("127.0.0.1:0").expect("a port") }
    }

    fn variables(&self, rank: usize) -> Vec<(&'static str, String)> {
        let port = self.agent.local_addr().expect("an address").port();
        let all = [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string()), ("WORLD_SIZE", "2".to_owned())];
        let place = [("MASTER_ADDR", "localhost".to_owned()), ("MASTER_PORT", port.to_string())];
        let own = [("TORCHELASTIC_RUN_ID", "a run".to_owned()), ("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned())];
        [&all[..], &[("LOCAL_WORLD_SIZE", "2".to_owned())], &place, &own].concat()
    }

    fn start(&self, place: &Place, rank: usize, args: &[&str]) -> Child {
        let mut command = place.command(args);
        command.envs(self.variables(rank)).stdin(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("it starts")
    }
}

/// The exit code of a process, and what it told.
fn ended(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().expect("it ends");
    (output.status.code(), String::from_utf8(output.stderr).expect("text"))
}

#[test]
fn two_processes_of_torchrun_write_what_one_writes_that_takes_both_shares() {
    let (place, model, torchrun) = (Place::new(), fixture("parity/qwen2"), Torchrun::new());
    data(&place);
    let of_run = ["tune", "--model", &model, "--data", "data.csv", "--steps", "5", "--rank", "4", "--out"];
    let two = [&of_run[..], &["two", "--batch", "3"]].concat();
    let [first, second] = [0, 1].map(|rank| torchrun.start(&place, rank, &two));
    assert_eq!(ended(second), (Some(0), String::new()), "the first one speaks");
    let (code, told) = ended(first);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("rank 0 of 2 waits for the others at 127.0.0.1:") || told.contains("[::1]:"), "{told}");
    assert!(told.contains("2 processes train together"), "{told}");

    place.run(&[&of_run[..], &["one", "--batch", "6", "--shares", "2"]].concat()).exits(0);
    let file = |out: &str, name: &str| fs::read(place.path(out).join(name)).expect("a file");
    for name in ["adapter_model.safetensors", "qwenkit.json"] {
        assert!(file("one", name) == file("two", name), "{name} differs");
    }
}

/// A rank that is killed in the middle of a run: the one that is left ends, says which one is lost, and what to do.
#[test]
fn a_process_that_is_killed_ends_the_others() {
    let (place, model, torchrun) = (Place::new(), fixture("parity/qwen2"), Torchrun::new());
    data(&place);
    let args = ["tune", "--model", &model, "--data", "data.csv", "--out", "out", "--steps", "1000000"];
    let [mut first, mut second] = [0, 1].map(|rank| torchrun.start(&place, rank, &args));
    let mut lines = BufReader::new(first.stderr.take().expect("a pipe"));
    let mut line = String::new();
    while !line.starts_with("step ") {
        line.clear();
        assert!(lines.read_line(&mut line).expect("text") > 0, "it ended before its first step");
    }
    second.kill().expect("killed");
    second.wait().expect("ended");
    let mut told = String::new();
    lines.read_to_string(&mut told).expect("text");
    assert_eq!(first.wait().expect("ended").code(), Some(1), "{told}");
    assert_eq!(told.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{told}");
    assert!(told.contains("error: rank 0 of 2: rank 1 is lost: its connection is closed"), "{told}");
    assert!(told.contains("--resume"), "{told}");
}

/// An error of one rank is said once, by the first one.
#[test]
fn ranks_with_other_arguments_end_together() {
    let (place, model, torchrun) = (Place::new(), fixture("parity/qwen2"), Torchrun::new());
    data(&place);
    let args = |rate| ["tune", "--model", &model, "--data", "data.csv", "--out", "out", "--steps", "3", "--lr", rate];
    let first = torchrun.start(&place, 0, &args("1e-3"));
    let second = torchrun.start(&place, 1, &args("1e-4"));
    assert_eq!(ended(second), (Some(1), String::new()));
    let (code, told) = ended(first);
    assert!(
        code == Some(1) && told.contains("rank 1 goes by something else than rank 0 (lr: 1e-4; rank 0: lr: 1e-3)"),
        "{told}"
    );
    assert_eq!(told.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{told}");
}

#[test]
fn a_variable_of_torchrun_that_is_missing_is_named() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    data(&place);
    let args = ["tune", "--model", &model, "--data", "data.csv", "--out", "out", "--steps", "1"];
    let all = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")];
    for (name, _) in all {
        let set: Vec<_> = all.into_iter().filter(|(other, _)| *other != name).collect();
        let (code, told) = launched(&place, &set, &args);
        assert!(code == Some(2) && told.contains(&format!("{name} is missing")), "{told}");
        assert_eq!(told.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{told}");
    }
    // Rank 0 may have all of them, and would wait for the one that has not.
    let (code, told) = launched(&place, &[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")], &args);
    assert!(code == Some(2) && told.contains("MASTER_PORT is missing"), "{told}");
    assert!(!place.path("out").exists());
    let (code, told) = launched(&place, &[("RANK", "0"), ("WORLD_SIZE", "1")], &args);
    assert_eq!(code, Some(0), "{told}");
}

#[test]
fn recorded_ids_are_for_one_process() {
    let place = Place::new();
    let args = ["tune", "--ids", "ids.safetensors", "--adapter-init", "adapter"];
    let (code, told) = launched(&place, &[("RANK", "0"), ("WORLD_SIZE", "4")], &args);
    assert!(code == Some(2) && told.contains("--ids is done by one"), "{told}");
    assert_eq!(launched(&place, &[("RANK", "3"), ("WORLD_SIZE", "4")], &args), (Some(2), String::new()));
}

/// Shares are part of what a run's numbers depend on.
#[test]
fn a_run_in_shares_goes_on_in_as_many() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    data(&place);
    let run = |out: &str, more: &[&str]| {
        let mut args = vec!["tune", "--model", &model, "--data", "data.csv", "--out", out, "--steps", "3"];
        args.extend(["--batch", "6", "--validation", "0", "--rank", "4"]);
        args.extend(more);
        place.run(&args)
    };
    run("one", &[]).exits(0);
    run("three", &["--shares", "3"]).exits(0);
    let settings = |out: &str| fs::read_to_string(place.path(out).join("qwenkit.json")).expect("a record");
    assert!(settings("three").contains("\"shares: 3\"") && !settings("one").contains("shares"));
    run("none", &["--shares", "0"]).fails_with(2, &[]);
}
