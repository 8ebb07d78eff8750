//! The server's jobs with the program itself as the child: a model is tuned, a kill of the server costs nothing, and a bad file is
//! told by its line. And what `tune` has for it: data to validate with, one run in a folder at a time, an end when stdin ends.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{Place, fixture};

/// Nothing here takes so long. A job trains at the lowest priority: beside the other tests on few cores it gets next to nothing
/// until they are through, which takes minutes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(900);

/// Times the kill's job goes through its eight lines, two a step; steps after which the server is killed, and in all.
const EPOCHS: usize = 40;
const KILLED_AFTER: usize = 10;
const STEPS: usize = 4 * EPOCHS;

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(place: &Place) -> Server {
        let model = fixture("parity/qwen2");
        let args = ["serve", &model, "--port", "0", "--store", "store", "--threads", "1", "--job-threads", "1"];
        let mut command = place.command(&args);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let address = lines.find_map(|line| Some(line.ok()?.split_once("http://")?.1.to_owned())).expect("an address");
        // Whoever writes to a closed pipe would end.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address).expect("a server");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        write!(stream, "{head}content-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}").expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        assert!(text.starts_with("HTTP/1.1 200"), "{method} {path}: {text}");
        serde_json::from_str(text.split_once("\r\n\r\n").expect("a body").1).expect("JSON")
    }

    fn get(&self, path: &str) -> Value {
        self.ask("GET", path, "text/plain", "")
    }

    /// A job over a file of this content.
    fn order(&self, content: &str, more: &Value) -> String {
        let part = "--b\r\ncontent-disposition: form-data; name=";
        let form = format!(
            "{part}\"purpose\"\r\n\r\nfine-tune\r\n{part}\"file\"; filename=\"x.jsonl\"\r\n\r\n{content}\r\n--b--\r\n"
        );
        let file = self.ask("POST", "/v1/files", "multipart/form-data; boundary=b", &form);
        let mut body = more.clone();
        (body["model"], body["training_file"]) = (json!("default"), file["id"].clone());
        let job = self.ask("POST", "/v1/fine_tuning/jobs", "application/json", &body.to_string());
        job["id"].as_str().expect("an id").to_owned()
    }

    fn wait(&self, job: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let found = self.get(&format!("/v1/fine_tuning/jobs/{job}"));
            if reached(&found) {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{found}");
            std::thread::yield_now();
        }
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(count: usize) -> String {
    let line = |i: usize| {
        let turn = |role: &str, content: String| json!({"role": role, "content": content});
        format!(
            "{}\n",
            json!({"messages": [turn("user", format!("say {i}")), turn("assistant", format!("it is {i}"))]})
        )
    };
    (0..count).map(line).collect()
}

fn is_over(job: &Value) -> bool {
    ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().expect("a status"))
}

#[test]
fn a_job_goes_through_a_kill_of_its_server_and_comes_out_as_tune_alone() {
    let (place, content) = (Place::new(), lines(8));
    let server = Server::start(&place);
    let hyperparameters = json!({"n_epochs": EPOCHS, "batch_size": 2, "learning_rate_multiplier": 10});
    let job = server.order(&content, &json!({"suffix": "shop", "hyperparameters": hyperparameters}));
    let steps = |server: &Server| {
        let path = format!("/v1/fine_tuning/jobs/{job}/events?limit=1000");
        let events = server.get(&path)["data"].as_array().expect("a list").clone();
        events.iter().filter(|event| event["type"] == "metrics").count()
    };
    let begun = Instant::now();
    while steps(&server) < KILLED_AFTER {
        assert!(begun.elapsed() < PATIENCE, "{}", server.get(&format!("/v1/fine_tuning/jobs/{job}")));
        std::thread::yield_now();
    }
    let before = steps(&server);
    server.kill();
    assert!(before < STEPS, "the job was over before the kill");
    let server = Server::start(&place);
    let done = server.wait(&job, is_over);
    assert_eq!(done["status"], "succeeded", "{done}");
    assert_eq!(steps(&server), STEPS, "every step is told once");
    let name = done["fine_tuned_model"].as_str().expect("a name").to_owned();
    assert!(name.starts_with("ft:qwen2:shop:"), "{name}");
    let ask =
        json!({"model": name, "messages": [{"role": "user", "content": "say 3"}], "max_tokens": 8, "temperature": 0});
    let answer = server.ask("POST", "/v1/chat/completions", "application/json", &ask.to_string());
    assert_eq!(answer["model"], name);
    // The same run by hand.
    fs::write(place.path("train.jsonl"), &content).expect("writable");
    let model = fixture("parity/qwen2");
    let epochs = EPOCHS.to_string();
    let args = ["tune", "--model", &model, "--data", "train.jsonl", "--out", "alone", "--epochs", &epochs];
    place.run(&[&args[..], &["--batch", "2", "--lr", "2e-3", "--threads", "2"]].concat()).exits(0);
    let read = |path: String| fs::read(place.path(&path)).expect("an adapter");
    let of_job = read(format!("store/jobs/{job}/adapter/adapter_model.safetensors"));
    assert!(of_job == read("alone/adapter_model.safetensors".to_owned()), "the adapters differ");
}

#[test]
fn a_bad_file_fails_its_job_with_line_and_reason() {
    let place = Place::new();
    let server = Server::start(&place);
    let job = server.order(&lines(3).replacen("assistant", "robot", 1), &json!({}));
    let failed = server.wait(&job, is_over);
    let error = &failed["error"];
    assert_eq!((&failed["status"], &error["param"]), (&json!("failed"), &json!("training_file")), "{failed}");
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("training_file.jsonl") && message.contains("line 1") && message.contains("robot"),
        "{message}"
    );
    assert!(!message.contains("--") && !message.contains(place.path("").to_str().expect("a path")), "{message}");
    assert!(!place.path("store/jobs").join(&job).exists(), "nothing of the data is left");
    // So does one of another kind than the method's.
    let failed = server.wait(&server.order(&lines(3), &json!({"method": {"type": "dpo"}})), is_over);
    let expected = "the task is dpo, and training_file.jsonl holds a conversation (`messages`): no preferences";
    assert!(failed["error"]["message"].as_str().expect("a message").starts_with(expected), "{failed}");
    assert_eq!(failed["error"]["param"], "training_file");
    // And one that is cancelled leaves nothing either.
    let job = server.order(&lines(8), &json!({"hyperparameters": {"n_epochs": 1000}}));
    server.wait(&job, |found| found["status"] == "running");
    server.ask("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), "application/json", "");
    let (begun, folder) = (Instant::now(), place.path("store/jobs").join(&job));
    while folder.exists() {
        assert!(begun.elapsed() < PATIENCE, "{} is still there", folder.display());
        std::thread::yield_now();
    }
}

/// Children of a process.
#[cfg(target_os = "linux")]
fn children(id: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).expect("a process");
    let of_each = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    of_each.collect::<String>().split_whitespace().map(str::to_owned).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn a_training_that_the_system_ends_takes_nobody_along() {
    let place = Place::new();
    let server = Server::start(&place);
    let job = server.order(&lines(8), &json!({"hyperparameters": {"n_epochs": 1000}}));
    server.wait(&job, |found| found["status"] == "running");
    let [child] = &children(server.child.id())[..] else { panic!("{:?}", children(server.child.id())) };
    let killed = std::process::Command::new("kill").args(["-9", child]).status().expect("a program `kill`");
    assert!(killed.success());
    let failed = server.wait(&job, is_over);
    let message = failed["error"]["message"].as_str().unwrap_or_default();
    assert!(failed["status"] == "failed" && message.contains("memory ran short"), "{failed}");
    // And one that rests has no process.
    let job = server.order(&lines(8), &json!({"hyperparameters": {"n_epochs": 1000, "batch_size": 2}}));
    server.wait(&job, |found| found["status"] == "running");
    let path = format!("/v1/fine_tuning/jobs/{job}");
    assert_eq!(server.ask("POST", &format!("{path}/pause"), "application/json", "")["status"], "paused");
    let begun = Instant::now();
    while !children(server.child.id()).is_empty() {
        assert!(begun.elapsed() < PATIENCE, "the training goes on");
        std::thread::yield_now();
    }
    assert!(place.path("store/jobs").join(&job).join("adapter/checkpoint.safetensors").exists());
    server.ask("POST", &format!("{path}/resume"), "application/json", "");
    server.wait(&job, |found| found["status"] == "running");
    let events = server.get(&format!("{path}/events?limit=10000")).to_string();
    assert!(events.contains("The job goes on after step "), "{events}");
}

#[test]
fn a_check_says_whether_there_are_jobs() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let check = |more: &[&str]| place.run(&[&["serve", &*model, "--check", "--port", "0"], more].concat()).exits(0).err;
    let told = check(&["--store", "store", "--job-threads", "3"]);
    assert!(told.contains("fine-tuning with --job-threads 3, kept in store"), "{told}");
    assert!(check(&["--store", "store", "--job-threads", "0"]).contains("no fine-tuning (--job-threads is 0)"));
    assert!(check(&[]).contains("no fine-tuning, as nothing is kept (--store)"));
}

#[test]
fn tune_validates_with_data_of_their_own() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("a.jsonl"), lines(8)).expect("writable");
    fs::write(place.path("b.jsonl"), lines(3)).expect("writable");
    fs::write(place.path("c.jsonl"), "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n")
        .expect("writable");
    let tune = |more: &[&str]| {
        let args = ["tune", "--model", &model, "--data", "a.jsonl", "--out", "out", "--steps", "2"];
        place.run(&[&args[..], more].concat())
    };
    tune(&["--validation-data", "b.jsonl", "--validation", "2"]).exits(2);
    tune(&["--validation-data", "nowhere.jsonl"]).fails_with(1, &["nowhere.jsonl"]);
    tune(&["--validation-data", "c.jsonl"])
        .fails_with(1, &["a.jsonl holds a conversation", "c.jsonl, to validate with, a preference"]);
    let told = tune(&["--validation-data", "b.jsonl"]).exits(0);
    assert!(told.err.contains("8 samples to learn from, 3 to validate with"), "{told:?}");
    let course: Value =
        serde_json::from_slice(&fs::read(place.path("out/course.json")).expect("a course")).expect("JSON");
    assert_eq!((&course["samples"], &course["validation"], &course["steps"]), (&json!(8), &json!(3), &json!(2)));
    let record: Value =
        serde_json::from_slice(&fs::read(place.path("out/qwenkit.json")).expect("a record")).expect("JSON");
    assert_eq!(record["data"]["files"].as_array().map(Vec::len), Some(2));
}

/// A run as a server starts it, which ends with its stdin; beside it no other has the folder.
#[test]
#[cfg(target_os = "linux")]
fn a_run_ends_with_its_stdin_and_has_its_folder_for_itself() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("a.jsonl"), lines(8)).expect("writable");
    let args = ["tune", "--model", &model, "--data", "a.jsonl", "--out", "out", "--steps", "100000", "--beside"];
    let mut child = place.command(&args).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
    let begun = Instant::now();
    while !place.path("out/metrics.jsonl").exists() {
        assert!(begun.elapsed() < PATIENCE && child.try_wait().expect("a child").is_none(), "no step was done");
        std::thread::yield_now();
    }
    let status = fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("its state");
    let nice = status.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(16)).map(str::to_owned);
    assert_eq!(nice.as_deref(), Some("19"));
    assert_eq!(fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id())).expect("a number").trim(), "1000");
    place.run(&args[..9]).fails_with(2, &["a run is under way"]);
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("ended").code(), Some(130));
    assert!(place.path("out/checkpoint.safetensors").exists());
}
