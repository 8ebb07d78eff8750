//! Fine-tuning jobs over a job whose course is planned by its training file: what clients see, and what stays through restarts.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use qwenkit_server::{Config, Course, Done, Job, JobError, Keys, Order, Progress, Wish};
use serde_json::{Value, json};

use crate::{
    adapters::recorded,
    client::{Reply, Running, model, serve_config, serve_with},
};

/// A job that does what its training file says: `fail`, `wait`, `break` (wait at the first time, then work) or `work`.
#[derive(Debug, Default)]
struct Planned(Mutex<Vec<Order>>);

impl Job for Planned {
    fn name(&self) -> &'static str {
        "tune"
    }

    fn schema(&self) -> Value {
        json!({"type": "object", "properties": {"method": {"type": "string"}}})
    }

    fn run(&self, order: &Order, hear: &mut dyn FnMut(&[Progress]) -> Wish) -> Result<Done, JobError> {
        let file = order.settings["training_file"].as_str().unwrap();
        let plan = fs::read_to_string(order.folder.join(file)).unwrap();
        self.0.lock().unwrap().push(order.clone());
        if plan == "fail" {
            return Err(JobError::Failed { message: format!("`{file}`, line 1: found `fail`, expected work") });
        }
        let begun = Course { samples: 9, validation: 2, steps: 4, batch: 3, epochs: 2.0, rate_multiplier: 1.5 };
        let step = |step| Progress::Step { step, loss: 1.0 / step as f64, tokens: 10 };
        let mut wish = hear(&[Progress::Begun(begun), step(1), step(2)]);
        let marker = order.folder.join("marker");
        if plan == "wait" || (plan == "break" && !marker.exists()) {
            fs::write(&marker, "").unwrap();
            while wish == Wish::GoOn {
                wish = hear(&[]);
            }
            return Err(JobError::Stopped);
        }
        hear(&[step(3), Progress::Validation { step: 3, loss: 0.25, right: Some(0.5), is_best: true }, step(4)]);
        let adapter = order.folder.join("adapter");
        fs::create_dir_all(&adapter).unwrap();
        for name in ["adapter_model.safetensors", "adapter_config.json"] {
            fs::copy(recorded("qwen2").join(name), adapter.join(name)).unwrap();
        }
        Ok(Done { adapter })
    }
}

fn serve(folder: &Path, job: &Arc<Planned>) -> Running {
    let (store, jobs): (_, Vec<Arc<dyn Job>>) = (Some(folder.to_owned()), vec![Arc::clone(job) as _]);
    serve_config(vec![model("qwen2", 2048, 64)], |config| Config { store, jobs, ..config })
}

fn order(server: &Running, plan: &str, more: Value) -> Value {
    let file = server.upload("", "fine-tune", plan).ok();
    let mut body = json!({"model": "qwen2", "training_file": file["id"]});
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    server.post("/v1/fine_tuning/jobs", &body).ok()
}

fn path(job: &Value) -> String {
    format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap())
}

fn wait(server: &Running, job: &Value, status: &'static str) -> Value {
    server.wait_for(&path(job), |job| {
        let is_over = ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().unwrap());
        assert!(!is_over || job["status"] == status, "{job}");
        job["status"] == status
    })
}

fn messages(server: &Running, job: &Value) -> Vec<String> {
    let list = server.get(&format!("{}/events?limit=100&order=asc", path(job))).ok();
    list["data"].as_array().unwrap().iter().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

fn ask(name: &str) -> Value {
    json!({"model": name, "messages": [{"role": "user", "content": "Tell me about the river."}], "max_tokens": 12, "temperature": 0, "logprobs": true, "ignore_eos": true})
}

fn answer(server: &Running, name: &str) -> Value {
    server.post("/v1/chat/completions", &ask(name)).ok()["choices"][0]["logprobs"].clone()
}

#[test]
fn a_job_makes_a_model_that_the_next_server_has_too() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let server = serve(folder.path(), &job);
    let method =
        json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}});
    let valid = server.upload("", "fine-tune", "apart").ok();
    let more =
        json!({"suffix": "shop", "seed": 7, "method": method, "validation_file": valid["id"], "metadata": {"a": "b"}});
    let made = order(&server, "work", more);
    assert_eq!((&made["object"], &made["fine_tuned_model"]), (&json!("fine_tuning.job"), &Value::Null));
    assert!(made.get("owner").is_none() && made.get("kept").is_none(), "{made}");
    let done = wait(&server, &made, "succeeded");
    let name = done["fine_tuned_model"].as_str().unwrap().to_owned();
    let id = made["id"].as_str().unwrap().trim_start_matches("ftjob-");
    assert_eq!(name, format!("ft:qwen2:shop:{}", &id[..8]));
    let auto_filled = json!({"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.5});
    assert_eq!(
        (&done["hyperparameters"], &done["trained_tokens"], &done["metadata"]["a"]),
        (&auto_filled, &json!(40), &json!("b"))
    );
    assert_eq!(done["method"]["supervised"]["hyperparameters"], auto_filled);
    // The job was told what was asked, and has files by names of its own.
    let settings = json!({
        "method": "supervised", "training_file": "training_file.jsonl", "seed": 7,
        "validation_file": "validation_file.jsonl", "n_epochs": 2,
    });
    let told = job.0.lock().unwrap().clone();
    assert_eq!((told.len(), &*told[0].model, &told[0].settings), (1, "qwen2", &settings));
    let of_data = |name: &str| told[0].folder.join(name).exists();
    assert!(!of_data("training_file.jsonl") && !of_data("validation_file.jsonl"), "nobody needs the data any more");
    // What has happened, and pages of it.
    assert_eq!(
        messages(&server, &made)[1..5],
        [
            "The data are in order: 9 samples to learn from, 2 to validate with; 4 steps of 3",
            "Step 1/4: training loss=1.0000",
            "Step 2/4: training loss=0.5000",
            "Step 3/4: training loss=0.3333",
        ]
    );
    let newest = server.get(&format!("{}/events?limit=1", path(&made))).ok();
    assert_eq!(
        (&newest["data"][0]["message"], &newest["has_more"]),
        (&json!("The job has successfully completed"), &json!(true))
    );
    let next = format!("{}/events?limit=1&after={}", path(&made), newest["last_id"].as_str().unwrap());
    assert_eq!(server.get(&next).ok()["data"][0]["message"], format!("New fine-tuned model created: {name}"));
    let points = server.get(&format!("{}/checkpoints", path(&made))).ok();
    assert_eq!((points["data"].as_array().unwrap().len(), &points["data"][0]["step_number"]), (1, &json!(3)));
    assert_eq!(points["data"][0]["fine_tuned_model_checkpoint"], name);
    let results = server.get(&format!("/v1/files/{}/content", done["result_files"][0].as_str().unwrap())).text();
    assert_eq!(results.lines().nth(4), Some("3,,0.25,0.5"), "{results}");
    // It answers as its adapter does.
    let take_in = json!({"lora_name": "same", "lora_path": recorded("qwen2").to_str().unwrap()});
    server.post("/v1/load_lora_adapter", &take_in).ok();
    let expected = answer(&server, &name);
    assert_eq!(expected, answer(&server, "same"));
    assert_ne!(expected, answer(&server, "qwen2"));
    drop(server);
    let server = serve(folder.path(), &job);
    assert_eq!(answer(&server, &name), expected);
    assert_eq!(server.get("/v1/models").ok()["data"][1]["parent"], "qwen2");
    // One that makes no more of them still has those that there are.
    drop(server);
    let store = Some(folder.path().to_owned());
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { store, ..config });
    assert_eq!(answer(&server, &name), expected);
    drop(server);
    let server = serve(folder.path(), &job);
    // A job can begin with it.
    let more = order(&server, "work", json!({"model": name}));
    wait(&server, &more, "succeeded");
    let start = job.0.lock().unwrap()[1].settings["adapter"].clone();
    assert_eq!(Path::new(start.as_str().unwrap()), told[0].folder.join("adapter"));
    let delete = |name: &str| Reply::read(server.send("DELETE", &format!("/v1/models/{name}"), "", b""));
    assert_eq!((delete("qwen2").status, delete("nothing").status), (403, 404));
    assert_eq!(delete(&name).ok()["deleted"], true);
    assert_eq!(
        (server.refused("/v1/chat/completions", &ask(&name), 404)["code"].clone(), told[0].folder.exists()),
        (json!("model_not_found"), false)
    );
    drop(server);
    let server = serve(folder.path(), &job);
    server.refused("/v1/chat/completions", &ask(&name), 404);
    assert_eq!(server.get("/v1/models").ok()["data"].as_array().unwrap().len(), 2, "the other one is still there");
}

#[test]
fn a_job_that_fails_says_why_and_the_next_one_runs() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let server = serve(folder.path(), &job);
    let (bad, good) = (order(&server, "fail", json!({})), order(&server, "work", json!({})));
    let failed = wait(&server, &bad, "failed");
    let message = "`training_file.jsonl`, line 1: found `fail`, expected work";
    let error = json!({"code": "invalid_training_file", "message": message, "param": "training_file"});
    assert_eq!((&failed["error"], messages(&server, &bad).last().unwrap().as_str()), (&error, message));
    wait(&server, &good, "succeeded");
    let told = job.0.lock().unwrap().clone();
    assert!(!told[0].folder.exists() && told[1].folder.exists());
    let list = server.get("/v1/fine_tuning/jobs?limit=1").ok();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["has_more"]), (1, &json!(true)));
    assert_eq!(server.get(&format!("{}/checkpoints", path(&bad))).ok()["data"], json!([]));
    server.refused(&format!("{}/cancel", path(&bad)), &json!({}), 400);
    // A file that is gone before its job begins.
    let (first, second) = (order(&server, "wait", json!({})), order(&server, "work", json!({})));
    wait(&server, &first, "running");
    let file = format!("/v1/files/{}", second["training_file"].as_str().unwrap());
    assert_eq!(Reply::read(server.send("DELETE", &file, "", b"")).status, 200);
    server.post(&format!("{}/cancel", path(&first)), &json!({})).ok();
    let failed = wait(&server, &second, "failed");
    assert!(failed["error"]["message"].as_str().unwrap().contains("was deleted"), "{failed}");
}

#[test]
fn jobs_are_cancelled_paused_and_gone_on_with() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let server = serve(folder.path(), &job);
    let (first, second, third) =
        (order(&server, "break", json!({})), order(&server, "wait", json!({})), order(&server, "work", json!({})));
    wait(&server, &first, "running");
    assert_eq!(server.get(&path(&second)).ok()["status"], "queued", "one at a time");
    let steer = |job: &Value, what: &str| server.post(&format!("{}/{what}", path(job)), &json!({}));
    assert_eq!(steer(&third, "cancel").ok()["status"], "cancelled");
    assert_eq!(steer(&first, "resume").status, 400);
    assert_eq!(steer(&first, "pause").ok()["status"], "paused");
    // The next one has its turn meanwhile.
    wait(&server, &second, "running");
    assert_eq!(steer(&first, "resume").ok()["status"], "queued");
    assert_eq!(steer(&second, "cancel").ok()["status"], "cancelled");
    let done = wait(&server, &first, "succeeded");
    assert_eq!(done["trained_tokens"], 40, "what was told twice counts once");
    let told = job.0.lock().unwrap().clone();
    assert_eq!(told.len(), 3, "what was cancelled while it waited never ran");
    assert!(told[0].folder == told[2].folder && told[0].settings == told[2].settings);
    assert!(!told[1].folder.exists());
    assert_eq!(steer(&first, "cancel").status, 400);
}

#[test]
fn a_job_goes_on_in_the_next_server_and_nothing_is_told_twice() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let made = {
        let server = serve(folder.path(), &job);
        let made = order(&server, "break", json!({}));
        wait(&server, &made, "running");
        made
    };
    let server = serve(folder.path(), &job);
    wait(&server, &made, "succeeded");
    let told = job.0.lock().unwrap().clone();
    assert!(told.len() == 2 && told[0] == told[1], "{told:?}");
    let steps: Vec<String> =
        messages(&server, &made).into_iter().filter(|message| message.contains("training loss")).collect();
    assert_eq!(steps.len(), 4, "{steps:?}");
    assert!(messages(&server, &made).contains(&"The job goes on after step 2".to_owned()));
}

#[test]
fn what_cannot_be_is_refused() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let server = serve(folder.path(), &job);
    let file = server.upload("", "fine-tune", "work").ok()["id"].clone();
    let other = server.upload("", "batch", "work").ok()["id"].clone();
    for (body, status, param) in [
        (json!({"model": "qwen2"}), 400, "training_file"),
        (json!({"model": "gpt-4o", "training_file": file}), 404, "model"),
        (json!({"model": "qwen2", "training_file": "file-x"}), 404, "training_file"),
        (json!({"model": "qwen2", "training_file": other}), 400, "training_file"),
        (json!({"model": "qwen2", "training_file": file, "validation_file": "file-x"}), 404, "validation_file"),
        (json!({"model": "qwen2", "training_file": file, "colour": 1}), 400, "colour"),
    ] {
        assert_eq!(server.refused("/v1/fine_tuning/jobs", &body, status)["param"], param, "{body}");
    }
    assert_eq!(server.get("/v1/fine_tuning/jobs").ok()["data"], json!([]));
    assert_eq!(server.get("/v1/fine_tuning/jobs/ftjob-x").status, 404);
    let document = server.get("/openapi.json").ok();
    assert_eq!(document["components"]["schemas"]["tune"]["properties"]["method"]["type"], "string");
    let body = json!({"model": "qwen2", "training_file": file});
    let without = serve_with(vec![model("qwen2", 2048, 64)], &[]);
    let error = without.refused("/v1/fine_tuning/jobs", &body, 501);
    assert!(error["message"].as_str().unwrap().contains("without fine-tuning"), "{error}");
}

#[test]
fn jobs_are_for_keys_with_their_scope_and_apart_for_each() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::<Planned>::default());
    let mut keys = Keys::default();
    let scopes = r#"["models", "jobs"]"#;
    keys.add_file(&format!(
        r#"[{{"name": "a", "key": "a", "scopes": {scopes}}}, {{"name": "b", "key": "b", "scopes": {scopes}}}, {{"name": "c", "key": "c"}}]"#
    ))
    .unwrap();
    let (store, jobs): (_, Vec<Arc<dyn Job>>) = (Some(folder.path().to_owned()), vec![Arc::clone(&job) as _]);
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { store, jobs, keys, ..config });
    let send = |key: &str, method: &str, path: &str, body: &str| {
        let headers = format!("content-type: application/json\r\nauthorization: Bearer {key}\r\n");
        Reply::read(server.send(method, path, &headers, body.as_bytes()))
    };
    let file = server.upload("authorization: Bearer a\r\n", "fine-tune", "wait").ok();
    let body = json!({"model": "qwen2", "training_file": file["id"]}).to_string();
    assert_eq!(send("c", "POST", "/v1/fine_tuning/jobs", &body).status, 403);
    assert_eq!(send("b", "POST", "/v1/fine_tuning/jobs", &body).status, 404, "another key's file");
    let made = send("a", "POST", "/v1/fine_tuning/jobs", &body).ok();
    let of = |what: &str| format!("{}{what}", path(&made));
    for (method, what) in
        [("GET", ""), ("GET", "/events"), ("GET", "/checkpoints"), ("POST", "/cancel"), ("POST", "/pause")]
    {
        assert_eq!(send("b", method, &of(what), "{}").status, 404, "{what}");
    }
    assert_eq!(send("b", "GET", "/v1/fine_tuning/jobs", "").ok()["data"], json!([]));
    assert_eq!(send("a", "POST", &of("/cancel"), "{}").ok()["status"], "cancelled");
    assert_eq!(send("c", "DELETE", "/v1/models/qwen2", "").status, 403);
}

#[test]
fn who_watches_the_server_sees_how_fine_tuning_stands() {
    let (folder, job) = (tempfile::tempdir().unwrap(), Arc::default());
    let server = serve(folder.path(), &job);
    let value = |name: &str| {
        let text = server.get("/metrics").text();
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(found, _)| found == name));
        line.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
    };
    let jobs = |state: &str| value(&format!("qwenkit_fine_tuning_jobs{{status=\"{state}\"}}"));
    let of = |name: &str| value(&format!("qwenkit_fine_tuning_{name}"));
    let info = || server.get("/server_info").ok()["fine_tuning"].clone();
    assert_eq!((jobs("queued"), jobs("running"), of("steps_total")), (Some(0.0), Some(0.0), Some(0.0)));
    assert_eq!((&info()["available"], &info()["running"]), (&json!(true), &Value::Null));
    assert_eq!(of("running_step"), None);
    let (first, second) = (order(&server, "wait", json!({})), order(&server, "work", json!({})));
    server.wait_for("/server_info", |info| info["fine_tuning"]["since_start"]["steps"] == 2);
    assert_eq!((jobs("running"), jobs("queued"), jobs("succeeded")), (Some(1.0), Some(1.0), Some(0.0)));
    assert_eq!((of("running_step"), of("running_steps")), (Some(2.0), Some(4.0)));
    assert_eq!((of("steps_total"), of("trained_tokens_total")), (Some(2.0), Some(20.0)));
    assert!(of("running_tokens_per_second").is_some_and(|speed| speed > 0.0));
    let told = info();
    assert_eq!((&told["running"]["model"], &told["running"]["step"]), (&json!("qwen2"), &json!(2)));
    assert_eq!((&told["jobs"]["running"], &told["since_start"]["trained_tokens"]), (&json!(1), &json!(20)));
    server.post(&format!("{}/cancel", path(&first)), &json!({})).ok();
    wait(&server, &second, "succeeded");
    server.wait_for("/server_info", |info| info["fine_tuning"]["running"].is_null());
    assert_eq!((jobs("running"), jobs("cancelled"), jobs("succeeded")), (Some(0.0), Some(1.0), Some(1.0)));
    assert_eq!((of("steps_total"), of("trained_tokens_total")), (Some(6.0), Some(60.0)));
    assert_eq!((of("running_step"), of("running_tokens_per_second")), (None, None));
    let without = serve_with(vec![model("qwen2", 2048, 64)], &[]).get("/server_info").ok()["fine_tuning"].clone();
    assert_eq!(without["available"], false);
}
