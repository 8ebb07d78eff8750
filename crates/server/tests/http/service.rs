//! The server as a service: it lets answers go, it stops in good order, it has its page with it.

use std::io::Read;

use serde_json::json;

use crate::client::{Reply, serve};

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
    assert_eq!(server.get("/v1/models/default").ok()["id"], "qwen2");
    assert_eq!(server.get("/server_info").ok()["models"][0]["architecture"], "qwen2");
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
}
