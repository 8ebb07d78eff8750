//! `tune` under launchers: several processes that nothing joins do not train each by itself, one error says so, and one process
//! under a launcher is alone.

use std::fs;

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
        ("RANK", "WORLD_SIZE"),
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
