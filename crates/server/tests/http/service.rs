//! The server as a service: it lets answers go, it stops in good order, it has its page with it.

use std::io::Read;

use serde_json::json;

use qwenkit_server::{Config, Keys, Server};

use crate::client::{Reply, config, model, serve, serve_config};

fn endless(stream: bool) -> Vec<u8> {
    json!({"messages": [{"role": "user", "content": "Go on"}], "ignore_eos": true, "stream": stream})
        .to_string()
        .into_bytes()
}

#[test]
fn a_client_that_goes_away_ends_its_answer() {
    let server = serve();
    for stream in [true, false] {
        let mut connection = server.send("POST", "/v1/chat/completions", "", &endless(stream));
        if stream {
            let mut some = [0; 600];
            connection.read_exact(&mut some).unwrap();
        } else {
            while server.get("/v1/loads").ok()["loads"][0]["running"] != 1 {}
        }
        drop(connection);
        // Without the cancellation it would go on through the whole context.
        let mut load = server.get("/v1/loads").ok();
        while load["loads"][0]["running"] != 0 {
            load = server.get("/v1/loads").ok();
        }
        assert_eq!(load["loads"][0]["kv_pages_used"], 0, "its pages are free");
    }
}

#[test]
fn stopping_lets_answers_finish() {
    let mut server = serve();
    let body = json!({
        "messages": [{"role": "user", "content": "Go on"}], "ignore_eos": true, "max_tokens": 400, "stream": true
    });
    let mut connection = server.send("POST", "/v1/chat/completions", "", body.to_string().as_bytes());
    let mut start = [0; 300];
    connection.read_exact(&mut start).unwrap();
    server.tell_to_stop();
    let mut rest = String::new();
    connection.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"));
    server.join();
}

#[test]
fn the_page_is_all_there() {
    let server = serve();
    let page = server.get("/");
    assert!(page.head.contains("content-security-policy: default-src 'none'"));
    let mut wanted = vec!["/web/main.js".to_owned(), "/web/style.css".to_owned(), "/web/icon.svg".to_owned()];
    assert!(wanted.iter().all(|path| page.text().contains(path)), "{}", page.text());
    let mut seen = Vec::new();
    while let Some(path) = wanted.pop() {
        if seen.contains(&path) {
            continue;
        }
        let file = server.get(&path);
        assert_eq!(file.status, 200, "{path}");
        let text = file.text();
        assert!(
            !text.contains("http://") && !text.contains("https://") || path.ends_with(".svg"),
            "{path} loads from elsewhere"
        );
        if path.ends_with(".js") {
            for line in text.lines().filter(|l| l.starts_with("import ") || l.starts_with("export * from")) {
                let from = line.rsplit('"').nth(1).unwrap();
                let folder = &path[..path.rfind('/').unwrap()];
                let joined = match from.strip_prefix("../") {
                    Some(up) => format!("{}/{up}", &folder[..folder.rfind('/').unwrap()]),
                    None => format!("{folder}/{}", from.trim_start_matches("./")),
                };
                wanted.push(joined);
            }
        }
        seen.push(path);
    }
    assert!(seen.len() > 10, "{seen:?}");
}

#[test]
fn requests_have_ids_and_the_server_tells_of_itself() {
    let server = serve();
    let given = Reply::read(server.send("GET", "/health", "x-request-id: mine-7\r\n", b""));
    assert!(given.head.contains("x-request-id: mine-7"));
    assert!(server.get("/v1/nothing").head.contains("x-request-id: req_"));
    assert_eq!(server.get("/ready").ok()["status"], "ready");
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "qwen2");
    // As Anthropic's clients page, and Ollama's asks.
    let page = server.get("/v1/models?beta=true&limit=1000").ok();
    assert_eq!((&page["has_more"], &page["last_id"]), (&json!(false), &json!("qwen2")));
    assert_eq!(server.get("/v1/models?after_id=qwen2").ok()["data"], json!([]));
    assert_eq!(server.get("/v1/models?before_id=nobody").status, 400);
    let empty = json!({"model": "", "name": "qwen2", "system": "", "template": "", "options": null, "verbose": false});
    assert_eq!(server.post("/api/show", &empty).ok()["model_info"]["general.architecture"], "qwen2");
    assert_eq!(server.get("/v1/models/default").ok()["id"], "qwen2");
    assert_eq!(server.get("/server_info").ok()["models"][0]["architecture"], "qwen2");
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn keys_have_scopes_limits_and_their_requests_are_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("audit.jsonl");
    let mut keys = Keys::default();
    keys.add_file(
        r#"[{"name": "shop", "key": "s", "requests_per_minute": 3}, {"name": "desk", "key": "d", "scopes": ["admin"]}]"#,
    )
    .unwrap();
    {
        let config = |config| Config { keys: keys.clone(), audit_log: Some(log.clone()), ..config };
        let server = serve_config(vec![model("qwen2", 2048, 64)], config);
        let get = |key: &str, path: &str| {
            Reply::read(server.send("GET", path, &format!("authorization: Bearer {key}\r\n"), b""))
        };
        let first = get("s", "/v1/models");
        assert!(
            first.head.contains("x-ratelimit-limit-requests: 3")
                && first.head.contains("x-ratelimit-remaining-requests: 2")
        );
        assert_eq!((get("s", "/metrics").status, get("d", "/metrics").status), (403, 200));
        assert_eq!((get("d", "/v1/models").status, get("x", "/v1/models").status), (403, 401));
        assert_eq!((get("s", "/v1/models").status, get("s", "/v1/models").status), (200, 200));
        let refused = get("s", "/v1/models");
        assert!(refused.status == 429 && refused.head.contains("retry-after: "), "{}", refused.head);
        assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    }
    assert_eq!(qwenkit_server::verify_audit_log(&log).unwrap().lines, 8);
    let text = std::fs::read_to_string(&log).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&last["key"], &last["status"], &last["path"]), (&json!("shop"), &json!(429), &json!("/v1/models")));
}

#[test]
fn other_pages_and_other_names_are_kept_out() {
    let server = serve();
    let get = |server: &crate::client::Running, headers: &str| {
        let mut stream = server.connect();
        std::io::Write::write_all(
            &mut stream,
            format!("GET /v1/models HTTP/1.1\r\nconnection: close\r\n{headers}\r\n").as_bytes(),
        )
        .unwrap();
        Reply::read(stream)
    };
    let port = server.address.port();
    assert_eq!(get(&server, "host: localhost\r\n").status, 200);
    assert_eq!(get(&server, &format!("host: localhost:{port}\r\norigin: http://localhost:{port}\r\n")).status, 200);
    assert_eq!(get(&server, "host: evil.example\r\n").status, 403);
    assert_eq!(get(&server, "host: localhost\r\norigin: http://evil.example\r\n").status, 403);
    let friend = |config| Config { origins: vec!["https://shop.example".to_owned()], ..config };
    let server = serve_config(vec![model("qwen2", 2048, 64)], friend);
    let reply = get(&server, "host: localhost\r\norigin: https://shop.example\r\n");
    assert!(
        reply.status == 200 && reply.head.contains("access-control-allow-origin: https://shop.example"),
        "{}",
        reply.head
    );
}

#[test]
fn pages_that_may_ask_are_told_so_before_they_do() {
    let friend = |config| Config { origins: vec!["https://shop.example".to_owned()], ..config };
    let server = serve_config(vec![model("qwen2", 2048, 64)], friend);
    let preflight = |origin: &str| {
        let headers = format!(
            "origin: {origin}\r\naccess-control-request-method: POST\r\n\
             access-control-request-headers: authorization,x-stainless-lang,x-stainless-retry-count\r\n"
        );
        Reply::read(server.send("OPTIONS", "/v1/chat/completions", &headers, b""))
    };
    let head = preflight("https://shop.example").head;
    assert!(head.contains("access-control-allow-origin: https://shop.example"), "{head}");
    assert!(head.contains("x-stainless-lang") && head.contains("x-stainless-retry-count"), "{head}");
    assert!(head.contains("access-control-allow-methods: ") && head.contains("post"), "{head}");
    assert!(!preflight("https://evil.example").head.contains("access-control-allow-origin"));
    let headers = "origin: https://shop.example\r\n";
    let head = Reply::read(server.send("GET", "/v1/models", headers, b"")).head;
    assert!(
        head.contains("access-control-expose-headers: ") && head.contains("x-ratelimit-remaining-tokens"),
        "{head}"
    );
}

#[test]
fn what_is_not_safe_or_makes_no_sense_is_no_server() {
    let refused = |change: fn(Config) -> Config| {
        let config = change(config());
        let checked = Server::check(&config).err().unwrap().to_string();
        assert_eq!(Server::bind(&config, vec![model("qwen2", 256, 1)]).err().unwrap().to_string(), checked);
        checked
    };
    let wide = refused(|config| Config { host: "0.0.0.0".parse().unwrap(), ..config });
    assert!(wide.contains("no API key") && wide.contains("--api-key"), "{wide}");
    let origin = refused(|config| Config { origins: vec!["shop.example".to_owned()], ..config });
    assert!(origin.contains("\"shop.example\"") && origin.contains("https://shop.example"), "{origin}");
    // A check takes neither the port nor the store of a server that runs.
    let folder = tempfile::tempdir().unwrap();
    let server = serve_config(vec![model("qwen2", 256, 1)], |c| Config { store: Some(folder.path().to_owned()), ..c });
    let same = Config { port: server.address.port(), store: Some(folder.path().to_owned()), ..config() };
    Server::check(&same).unwrap();
    assert!(Server::bind(&same, vec![model("qwen2", 256, 1)]).is_err());
}

#[test]
fn what_is_left_or_runs_in_batches_counts_against_the_key() {
    let mut keys = Keys::default();
    keys.add_file(r#"[{"name": "shop", "key": "s", "tokens_per_minute": 1000000}]"#).unwrap();
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { keys, ..config });
    let key = "authorization: Bearer s\r\n";
    let left = || {
        let head = Reply::read(server.send("GET", "/v1/models", key, b"")).head;
        let line = head.lines().find_map(|line| line.strip_prefix("x-ratelimit-remaining-tokens: "));
        line.unwrap_or_else(|| panic!("{head}")).trim().parse::<u64>().unwrap()
    };
    let before = left();
    let mut connection = server.send("POST", "/v1/chat/completions", key, &endless(true));
    connection.read_exact(&mut [0; 900]).unwrap();
    assert_eq!(left(), before, "nothing is charged before the end");
    drop(connection);
    while left() == before {}
    let before = left();
    let line = json!({
        "custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 50, "ignore_eos": true}
    });
    let file = server.upload(key, "batch", &line.to_string()).ok();
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
    let batch = Reply::read(server.send("POST", "/v1/batches", key, body.to_string().as_bytes())).ok();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    while Reply::read(server.send("GET", &path, key, b"")).ok()["status"] != "completed" {}
    assert!(before - left() > 50, "{before} {}", left());
}

#[test]
fn a_key_that_has_used_up_its_requests_holds_up_no_other_batch() {
    let mut keys = Keys::default();
    keys.add_file(r#"[{"name": "small", "key": "s", "requests_per_day": 3}, {"name": "shop", "key": "b"}]"#).unwrap();
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { keys, ..config });
    let line = |i: usize| {
        let body = json!({"prompt": "x", "max_tokens": 2});
        json!({"custom_id": format!("{i}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string()
            + "\n"
    };
    let begin = |key: &str| {
        let file = server.upload(key, "batch", &(0..4).map(line).collect::<String>()).ok();
        let body = json!({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
        Reply::read(server.send("POST", "/v1/batches", key, body.to_string().as_bytes())).ok()
    };
    begin("authorization: Bearer s\r\n");
    let key = "authorization: Bearer b\r\n";
    let path = format!("/v1/batches/{}", begin(key)["id"].as_str().unwrap());
    let begun = std::time::Instant::now();
    while Reply::read(server.send("GET", &path, key, b"")).ok()["status"] != "completed" {
        assert!(begun.elapsed().as_secs() < 60, "the batch of another key waits");
    }
}

#[test]
fn a_long_prompt_tells_how_long_it_will_take() {
    let server = serve();
    let ids: Vec<u32> = (0..1800).map(|i| 3 + i * 7 % 250).collect();
    let text = server.post("/v1/completions", &json!({"prompt": ids, "max_tokens": 2, "stream": true})).text();
    let told: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(": prefill ")).collect();
    assert!(told.len() > 1 && told[1..].iter().all(|line| line.ends_with(" s left")), "{told:?}");
    let (done, total) = told.last().unwrap().split(',').next().unwrap().split_once('/').unwrap();
    assert!(done == total && told.last().unwrap().ends_with(", 0.0 s left"), "{told:?}");
}

#[test]
fn metrics_count_what_was_done_under_both_names() {
    let server = serve();
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": true});
    let usage = server.post("/v1/chat/completions", &ask).ok()["usage"].clone();
    server.post("/v1/chat/completions", &json!({}));
    let text = server.get("/metrics").text();
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    for prefix in ["qwenkit_", "vllm:"] {
        assert_eq!(value(&format!("{prefix}generation_tokens_total{{model_name=\"qwen2\"}}")), 5.0);
        assert_eq!(json!(value(&format!("{prefix}prompt_tokens_total")) as u64), usage["prompt_tokens"]);
        assert_eq!(value(&format!("{prefix}time_to_first_token_seconds_count")), 1.0);
        assert_eq!(value(&format!("{prefix}num_requests_running")), 0.0);
    }
    assert_eq!(value("qwenkit_http_responses_total{path=\"/v1/chat/completions\",status=\"200\"}"), 1.0);
    assert_eq!(value("qwenkit_http_responses_total{path=\"/v1/chat/completions\",status=\"400\"}"), 1.0);
    // Each family is declared once, and every line of it has a number.
    let declared: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let mut unique = declared.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), declared.len());
}

#[test]
fn every_documented_path_is_there() {
    let server = serve();
    let document = server.get("/openapi.json").ok();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "x").replace("{name}", "qwen2").replace("{path}", "app.js");
        for method in operations.as_object().unwrap().keys() {
            let reply = Reply::read(server.send(&method.to_uppercase(), &path, "", b"{}"));
            assert!(reply.status != 405 && !reply.text().contains("no such path"), "{method} {path}");
            assert!(!reply.text().contains("the README lists what there is"), "{method} {path}");
        }
    }
}

#[test]
fn the_tokenizer_tells_of_itself() {
    let found = serve().get("/tokenizer_info").ok();
    assert_eq!((&found["eos_token"], &found["bos_token"]), (&json!("<|im_end|>"), &serde_json::Value::Null));
}
