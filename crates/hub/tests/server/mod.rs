//! A hub of the tests' own on loopback: one repository with files, ranges, and whatever misbehaviour a test asks for.
//!
//! Each connection carries one request. What is asked is recorded, so that tests can say what must not have been sent.
#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// First byte of `Range: bytes=N-`.
    pub(crate) fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What to answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut_after: Option<usize>,
    /// After that, keep the connection open and silent until the client closes it.
    pub(crate) hold: bool,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Reply {
        Reply { status, ..Reply::default() }
    }

    pub(crate) fn body(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, body: body.into(), ..Reply::default() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A listening server; it ends with the test process.
pub(crate) struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let address = listener.local_addr().expect("a bound socket has an address");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, handler): (_, Arc<Handler>) = (Arc::clone(&requests), Arc::new(handler));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                thread::spawn(move || answer(stream, &seen, &*handler));
            }
        });
        Server { address, requests }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same server under another host name, hence another origin.
    pub(crate) fn url_as_localhost(&self) -> String {
        format!("http://localhost:{}", self.address.port())
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no test panics while it holds this").clone()
    }

    /// Requests for the content of files.
    pub(crate) fn downloads(&self) -> Vec<Request> {
        self.requests().into_iter().filter(|r| r.path.contains("/resolve/")).collect()
    }
}

fn answer(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, handler: &Handler) {
    let Some(request) = read_request(&stream) else { return };
    seen.lock().expect("no test panics while it holds this").push(request.clone());
    let reply = handler(&request);
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| name == "content-length") {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let sent = &reply.body[..reply.cut_after.unwrap_or(reply.body.len()).min(reply.body.len())];
    // The client may hang up at any moment; that is its right.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent)).and_then(|()| stream.flush());
    if reply.hold {
        let _ = stream.read(&mut [0; 1]);
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut headers = Vec::new();
    loop {
        let line = lines.next()?.ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Some(Request { path, headers })
}

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the pretended repository.
#[derive(Debug, Clone)]
pub(crate) struct HubFile {
    pub(crate) path: &'static str,
    pub(crate) content: Vec<u8>,
    /// Large files are listed with their SHA-256, small ones without.
    pub(crate) large: bool,
}

/// A pretended Hugging Face repository.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    pub(crate) repository: &'static str,
    pub(crate) files: Vec<HubFile>,
}

impl Hub {
    /// A GGUF repository with one large file.
    pub(crate) fn one_gguf(content: &[u8]) -> Hub {
        let file = HubFile { path: "tiny-q4_k_m.gguf", content: content.to_vec(), large: true };
        Hub { repository: "owner/tiny-GGUF", files: vec![file] }
    }

    /// What a well-behaved hub answers.
    pub(crate) fn answer(&self, request: &Request) -> Reply {
        let api = format!("/api/models/{}", self.repository);
        let path = request.path.split('?').next().unwrap_or_default();
        if path == format!("{api}/revision/main") {
            return Reply::body(200, format!(r#"{{"sha":"{COMMIT}","cardData":{{"license":"apache-2.0"}}}}"#));
        }
        if path == format!("{api}/tree/{COMMIT}") {
            let files: Vec<String> = self.files.iter().map(listed).collect();
            return Reply::body(200, format!("[{}]", files.join(",")));
        }
        let prefix = format!("/{}/resolve/{COMMIT}/", self.repository);
        let file = path.strip_prefix(&prefix).and_then(|name| self.files.iter().find(|f| f.path == name));
        file.map_or(Reply::status(404), |file| serve(request, &file.content))
    }
}

fn listed(file: &HubFile) -> String {
    let size = file.content.len();
    let lfs = if file.large {
        format!(r#","lfs":{{"oid":"{}","size":{size}}}"#, sha256(&file.content))
    } else {
        String::new()
    };
    format!(r#"{{"type":"file","path":"{}","size":{size}{lfs}}}"#, file.path)
}

/// Serves content with ranges and an entity tag, as content networks do.
pub(crate) fn serve(request: &Request, content: &[u8]) -> Reply {
    let etag = format!("\"{}\"", &sha256(content)[..16]);
    let same = request.header("if-range").is_none_or(|tag| tag == etag);
    let reply = match request.range_start().filter(|_| same) {
        Some(start) if start >= content.len() => Reply::status(416),
        Some(start) => Reply::body(206, &content[start..])
            .with("content-range", format!("bytes {start}-{}/{}", content.len() - 1, content.len())),
        None => Reply::body(200, content),
    };
    reply.with("etag", etag)
}

pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes without a pattern that a misplaced resume could hide behind.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}
