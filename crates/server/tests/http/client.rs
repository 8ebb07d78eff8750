//! A server over a tiny model on a free port of loopback, and a client that sends exactly the bytes it is told to.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use qwenkit_engine::{Options, Session, Speculate};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Isa;
use qwenkit_server::{Config, Keys, Limits, ModelSource, Quota, Server};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::oneshot;

/// Nothing here takes so long; a test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A copy of the qwen3 checkpoint with the chat template of a model that thinks.
pub(crate) fn thinking_checkpoint() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures().join("parity/qwen3")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "gguf") {
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let path = folder.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = fs::read_to_string(fixtures().join("text/qwen3.jinja")).unwrap().into();
    fs::write(path, config.to_string()).unwrap();
    // The tags are tokens of their own, as in every model that thinks.
    let path = folder.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (i, tag) in ["<think>", "</think>", "<tool_call>", "</tool_call>"].into_iter().enumerate() {
        let old = format!("<|reserved_{}|>", 278 + i);
        let added = file["added_tokens"].as_array_mut().unwrap();
        let token = added.iter_mut().find(|token| token["content"] == *old).unwrap();
        (token["content"], token["special"]) = (tag.into(), false.into());
    }
    fs::write(path, file.to_string()).unwrap();
    folder
}

pub(crate) fn model(name: &str, context_tokens: usize, max_waiting: usize) -> ModelSource {
    model_at(&fixtures().join("parity").join(name), name, context_tokens, max_waiting)
}

pub(crate) fn model_at(path: &Path, name: &str, context_tokens: usize, max_waiting: usize) -> ModelSource {
    let session = session_at(path, context_tokens, max_waiting);
    ModelSource::loaded(name.to_owned(), vec![format!("{name}-alias")], session)
}

/// A tiny checkpoint of the repository.
pub(crate) fn session(name: &str) -> Session {
    session_at(&fixtures().join("parity").join(name), 2048, 64)
}

/// A tiny checkpoint with its vision tower.
pub(crate) fn seeing(name: &str, context_tokens: usize) -> ModelSource {
    let files = ModelFiles::open(&fixtures().join("parity").join(name)).unwrap();
    let session = Session::open_seeing(&files, None, &options(context_tokens, 64), &mut |_| {}).unwrap();
    ModelSource::loaded(name.to_owned(), Vec::new(), session)
}

/// An image of the repository, as it is in a file.
pub(crate) fn image_file(name: &str) -> Vec<u8> {
    fs::read(fixtures().join("images").join(name)).unwrap()
}

fn options(context_tokens: usize, max_waiting: usize) -> Options {
    Options {
        threads: 1,
        isa: Isa::detect().unwrap(),
        context_tokens: Some(context_tokens),
        max_waiting,
        speculate: Speculate::Auto,
        prefix_cache: None,
    }
}

fn session_at(path: &Path, context_tokens: usize, max_waiting: usize) -> Session {
    let files = ModelFiles::open(path).unwrap();
    Session::open(&files, &options(context_tokens, max_waiting), &mut |_| {}).unwrap()
}

/// The qwen2 checkpoint behind a server.
pub(crate) fn serve() -> Running {
    serve_with(vec![model("qwen2", 2048, 64)], &[])
}

pub(crate) fn serve_with(models: Vec<ModelSource>, keys: &[&str]) -> Running {
    serve_at(models, keys, None)
}

/// A server that keeps things in a folder.
pub(crate) fn serve_at(models: Vec<ModelSource>, keys: &[&str], store: Option<PathBuf>) -> Running {
    let keys = Keys::new(keys.iter().copied(), Quota::default());
    serve_config(models, |config| Config { keys, store, ..config })
}

/// Loopback, any free port, nothing else asked.
pub(crate) fn config() -> Config {
    Config { limits: Limits { body_bytes: 1 << 20, ..Limits::default() }, ..Config::default() }
}

/// A server on loopback with a changed configuration.
pub(crate) fn serve_config(models: Vec<ModelSource>, change: impl FnOnce(Config) -> Config) -> Running {
    let server = Server::bind(&change(config()), models).unwrap();
    let address = server.address().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let run = move || {
        let told = async {
            let _ = stopped.await;
        };
        server.run(told);
    };
    Running { address, stop: Some(stop), thread: Some(std::thread::spawn(run)) }
}

impl Running {
    /// Tells the server to stop, and goes on.
    pub(crate) fn tell_to_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until the server has stopped.
    pub(crate) fn join(&mut self) {
        self.tell_to_stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A request on its way; the response has not been read.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server may refuse a body before it has read it.
        let _ = stream.write_all(body);
        stream
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::read(self.send("POST", path, "content-type: application/json\r\n", body.to_string().as_bytes()))
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        Reply::read(self.send("GET", path, "", b""))
    }

    /// Asks again until a state is reached; the server says when.
    pub(crate) fn wait_for(&self, path: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let found = self.get(path).ok();
            if reached(&found) {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{found}");
            std::thread::yield_now();
        }
    }

    /// A new file.
    pub(crate) fn upload(&self, headers: &str, purpose: &str, content: &str) -> Reply {
        let body = format!(
            "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
             --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{content}\r\n--b--\r\n"
        );
        let headers = format!("content-type: multipart/form-data; boundary=b\r\n{headers}");
        Reply::read(self.send("POST", "/v1/files", &headers, body.as_bytes()))
    }

    /// The error of a request that must be refused with `status`.
    pub(crate) fn refused(&self, path: &str, body: &Value, status: u16) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, status, "{path} {body}: {}", reply.text());
        let error = reply.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        error
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tell_to_stop();
        if let (Some(thread), false) = (self.thread.take(), std::thread::panicking()) {
            thread.join().unwrap();
        }
    }
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn read(mut stream: TcpStream) -> Reply {
        let mut bytes = Vec::new();
        // A connection that the server resets after its answer has still brought the answer.
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut piece) {
            bytes.extend_from_slice(&piece[..n]);
        }
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("a response with a head");
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let rest = &bytes[end + 4..];
        let body = if head.contains("transfer-encoding: chunked") { unchunked(rest) } else { rest.to_vec() };
        Reply { status, head, body }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The whole answer of a request that must succeed.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The data of a stream's events, which ends as streams do.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let text = self.text();
        let mut lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(lines.pop(), Some("[DONE]"));
        lines.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { return body };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
    }
}
