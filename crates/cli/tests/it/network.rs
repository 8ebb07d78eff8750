//! `--air-gap`: the system refuses to let anything out, and what needs no network goes on. That nothing else needs it either
//! is shown in a network of its own, by `.ci/clients/air_gap.py`.

#![cfg(target_os = "linux")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Stdio,
};

use crate::program::{Place, fixture};

fn network(outcome: crate::program::Outcome) -> String {
    outcome.exits(0).json()["network"].as_str().expect("doctor speaks of the network").to_owned()
}

#[test]
fn the_system_lets_nothing_out_where_that_is_asked_for() {
    let place = Place::new();
    assert!(network(place.run(&["doctor", "--json", "--threads", "1"])).starts_with("open"));
    assert!(network(place.run(&["doctor", "--json", "--threads", "1", "--air-gap"])).starts_with("closed"));
    let mut by_variable = place.command(&["doctor", "--threads", "1"]);
    let output = by_variable.env("QWENKIT_AIR_GAP", "1").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("closed: the system refuses"));
    let output = place.command(&["doctor", "--threads", "1"]).env("QWENKIT_AIR_GAP", "").output().unwrap();
    assert!(
        String::from_utf8(output.stdout).unwrap().contains("open; only `pull` uses it"),
        "an empty variable says nothing"
    );
}

#[test]
fn what_is_missing_is_not_fetched_and_what_is_there_runs() {
    let place = Place::new();
    place.run(&["pull", "qwen3:4b", "--air-gap"]).fails_with(1, &["offline"]);
    let model = fixture("parity/qwen2");
    let args = ["run", "--model", &model, "--prompt-ids", "1,2,3", "--max-tokens", "4", "--temperature", "0"];
    let free = place.run(&args).exits(0);
    assert_eq!(place.run(&[&args[..], &["--air-gap"]].concat()).exits(0).out, free.out);
}

#[test]
fn a_locked_server_answers_those_who_come_to_it() {
    let place = Place::new();
    let settings = place.path("serve.json");
    std::fs::write(&settings, r#"{"air-gap": true, "port": 0, "ctx": 128}"#).unwrap();
    let mut command = place.command(&["serve", &fixture("parity/qwen2"), "--config", settings.to_str().unwrap()]);
    let mut server = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(server.stderr.take().unwrap()).lines();
    let address = lines.find_map(|line| Some(line.unwrap().split_once("page  http://")?.1.to_owned()));
    let mut stream = TcpStream::connect(address.expect("the server says where it listens")).unwrap();
    let body = r#"{"prompt": [1, 2, 3], "max_tokens": 2}"#;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}",
        body.len()
    );
    write!(stream, "{head}\r\ncontent-type: application/json\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("completion_tokens"), "{answer}");
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap();
    let mut locked = 0;
    for thread in threads {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "every thread is under the lock: {status}");
        locked += 1;
    }
    assert!(locked > 1);
    server.kill().unwrap();
    server.wait().unwrap();
}
