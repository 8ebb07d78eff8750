//! One file from a hub: whole, resumed, redirected, refused, cut and forged. The hub is a server on loopback.

mod server;

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use qwenkit_hub::{Error, ModelRef, Pacing, PullEvent, PullOptions, Store, StoredModel, resolve};
use server::{Hub, HubFile, Reply, Server, noise, sha256};

/// Three megabytes: more than one progress step, more than a socket's buffer.
const LENGTH: usize = 3 << 20;

thread_local! {
    static WAITS: RefCell<Vec<Duration>> = const { RefCell::new(Vec::new()) };
}

fn record_wait(wait: Duration) {
    WAITS.with_borrow_mut(|waits| waits.push(wait));
}

struct Bench {
    folder: tempfile::TempDir,
    store: Store,
    options: PullOptions,
    events: Vec<PullEvent>,
}

impl Bench {
    fn new(endpoint: String) -> Bench {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open_with_cache(folder.path().join("models"), None);
        let pacing = Pacing { attempts: 4, wait: record_wait, ..Pacing::default() };
        let options = PullOptions { endpoint: Some(endpoint), pythons: Vec::new(), pacing, ..PullOptions::default() };
        Bench { folder, store, options, events: Vec::new() }
    }

    fn pull(&mut self, name: &str) -> Result<StoredModel, Error> {
        self.events.clear();
        let model = resolve(name).expect("a well-formed name");
        let events = &mut self.events;
        self.store.pull(&model, &self.options, &mut |event| events.push(event))
    }

    fn resumed(&self) -> Option<u64> {
        self.events
            .iter()
            .find_map(|e| if let PullEvent::Resumed { have_bytes } = e { Some(*have_bytes) } else { None })
    }

    fn retries(&self) -> usize {
        self.events.iter().filter(|e| matches!(e, PullEvent::Retrying { .. })).count()
    }

    fn partial(&self) -> PathBuf {
        self.folder.path().join("models/owner+tiny-gguf/tiny-q4_k_m.gguf.partial")
    }

    fn assert_absent(&self) {
        assert_eq!(self.store.find(&tiny()), None);
        assert!(self.store.list().is_empty());
    }
}

const TINY: &str = "owner/tiny-GGUF";

fn tiny() -> ModelRef {
    resolve(TINY).expect("a well-formed name")
}

fn is_download(path: &str) -> bool {
    path.contains("/resolve/")
}

/// A hub whose n-th download request (from 0) may be answered otherwise.
fn hub_with(content: &[u8], odd: impl Fn(usize, &server::Request, Reply) -> Reply + Send + Sync + 'static) -> Server {
    let (hub, count) = (Hub::one_gguf(content), AtomicUsize::new(0));
    Server::start(move |request| {
        let reply = hub.answer(request);
        if is_download(&request.path) { odd(count.fetch_add(1, Ordering::SeqCst), request, reply) } else { reply }
    })
}

#[test]
fn a_whole_download_is_stored_with_its_facts() {
    let content = noise(LENGTH, 1);
    let server = hub_with(&content, |_, _, reply| reply);
    let mut bench = Bench::new(server.url());
    let model = bench.pull(TINY).expect("the hub behaves");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    assert_eq!(model.sha256, Some(sha256(&content)));
    assert_eq!((model.size_bytes, model.licence.as_deref()), (LENGTH as u64, Some("apache-2.0")));
    assert_eq!(bench.events.last(), Some(&PullEvent::Done));
    assert!(bench.events.contains(&PullEvent::Size { total_bytes: LENGTH as u64 }));
    assert!(bench.events.contains(&PullEvent::Progress { done_bytes: LENGTH as u64 }));
    assert_eq!(bench.store.find(&tiny()), Some(model.clone()));
    assert_eq!(bench.store.list(), vec![model]);
    assert!(!bench.partial().exists());
    assert_eq!(server.downloads().len(), 1);
    bench.pull(TINY).expect("it is here");
    assert_eq!(server.requests().len(), 3, "a model that is here asks nobody");
}

#[test]
fn a_cut_connection_is_continued_from_the_byte_it_broke_at() {
    let content = noise(LENGTH, 2);
    let server = hub_with(&content, |n, _, reply| Reply { cut_after: (n < 2).then_some(1 << 20), ..reply });
    let mut bench = Bench::new(server.url());
    let model = bench.pull(TINY).expect("the third attempt is whole");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    let starts: Vec<_> = server.downloads().iter().map(server::Request::range_start).collect();
    assert_eq!(starts, [None, Some(1 << 20), Some(2 << 20)]);
    assert_eq!(bench.retries(), 2);
    assert!(server.downloads()[1].header("if-range").is_some_and(|tag| tag.starts_with('"')));
}

#[test]
fn a_line_that_never_holds_ends_in_one_message_and_the_next_pull_continues() {
    let content = noise(LENGTH, 3);
    let healthy = hub_with(&content, |_, _, reply| reply);
    let cutting =
        hub_with(&content, |n, _, reply| Reply { cut_after: Some(if n == 0 { 100_000 } else { 0 }), ..reply });
    let mut bench = Bench::new(cutting.url());
    let error = bench.pull(TINY).expect_err("no attempt delivers");
    assert!(matches!(error, Error::Interrupted { have_bytes: 100_000, attempts: 4, .. }), "{error}");
    assert!(error.to_string().contains("run the same command again"));
    assert_eq!(cutting.downloads().len(), 4);
    bench.assert_absent();
    bench.options.endpoint = Some(healthy.url());
    let model = bench.pull(TINY).expect("the hub behaves now");
    assert_eq!(bench.resumed(), Some(100_000));
    assert_eq!(healthy.downloads()[0].range_start(), Some(100_000));
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
}

#[test]
fn a_server_without_ranges_makes_the_file_begin_again() {
    let content = noise(LENGTH, 4);
    let whole = content.clone();
    let server = hub_with(&content, move |n, _, _| Reply {
        cut_after: (n == 0).then_some(1 << 20),
        ..Reply::body(200, whole.clone())
    });
    let mut bench = Bench::new(server.url());
    let model = bench.pull(TINY).expect("the second attempt is whole");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    assert_eq!(server.downloads()[1].range_start(), Some(1 << 20));
}

#[test]
fn a_partial_of_other_content_is_not_continued() {
    let (old, new) = (noise(LENGTH, 5), noise(LENGTH, 6));
    let before = hub_with(&old, |n, _, reply| Reply { cut_after: Some(if n == 0 { 500_000 } else { 0 }), ..reply });
    let after = hub_with(&new, |_, _, reply| reply);
    let mut bench = Bench::new(before.url());
    bench.pull(TINY).expect_err("no attempt delivers");
    assert_eq!(fs::metadata(bench.partial()).expect("the bytes are kept").len(), 500_000);
    bench.options.endpoint = Some(after.url());
    let model = bench.pull(TINY).expect("the new content arrives");
    assert_eq!(bench.resumed(), None);
    assert_eq!(after.downloads()[0].range_start(), None);
    assert_eq!(fs::read(&model.path).expect("the file is there"), new);
}

#[test]
fn a_partial_without_its_note_is_not_trusted() {
    let content = noise(LENGTH, 7);
    let server = hub_with(&content, |_, _, reply| reply);
    let mut bench = Bench::new(server.url());
    fs::create_dir_all(bench.partial().parent().expect("it has a folder")).expect("writable");
    fs::write(bench.partial(), noise(1000, 8)).expect("writable");
    let model = bench.pull(TINY).expect("the hub behaves");
    assert_eq!((bench.resumed(), server.downloads()[0].range_start()), (None, None));
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
}

#[test]
fn a_range_answered_from_another_place_is_thrown_away() {
    let content = noise(LENGTH, 9);
    let whole = content.clone();
    let server = hub_with(&content, move |n, _, reply| match n {
        0 => Reply { cut_after: Some(700_000), ..reply },
        1 => Reply::body(206, &whole[600_000..]).with("content-range", format!("bytes 600000-{}/{LENGTH}", LENGTH - 1)),
        _ => reply,
    });
    let mut bench = Bench::new(server.url());
    let model = bench.pull(TINY).expect("the third attempt is whole");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    assert_eq!(server.downloads()[2].range_start(), None);
}

/// A checkpoint's small file, which the hub lists without a checksum; download request 0 is cut after 400 bytes.
fn small_file_hub(answer: impl Fn(usize, &server::Request) -> Reply + Send + Sync + 'static) -> Server {
    let weights = HubFile { path: "model.safetensors", content: noise(10, 22), large: true };
    let config = HubFile { path: "config.json", content: noise(1000, 23), large: false };
    let (hub, count) = (Hub { repository: "owner/small", files: vec![config, weights] }, AtomicUsize::new(0));
    Server::start(move |request| {
        if !request.path.ends_with("/config.json") {
            return hub.answer(request);
        }
        let n = count.fetch_add(1, Ordering::SeqCst);
        Reply { cut_after: (n == 0).then_some(400), ..answer(n, request) }
    })
}

#[test]
fn a_file_without_checksum_is_continued_only_under_its_entity_tag() {
    let (old, new) = (noise(1000, 23), noise(1000, 24));
    let (before, after) = (old.clone(), new.clone());
    // The content changes between the attempts: once the server honours If-Range, once it ignores it.
    let honest = small_file_hub(move |n, request| server::serve(request, if n == 0 { &before } else { &after }));
    let (before, after) = (old.clone(), new.clone());
    let careless = small_file_hub(move |n, request| {
        let mut request = request.clone();
        request.headers.retain(|(name, _)| name != "if-range");
        server::serve(&request, if n == 0 { &before } else { &after })
    });
    // And once there is no tag at all.
    let (before, after) = (old, new.clone());
    let tagless = small_file_hub(move |n, request| {
        let reply = server::serve(request, if n == 0 { &before } else { &after });
        Reply { headers: reply.headers.into_iter().filter(|(name, _)| name != "etag").collect(), ..reply }
    });
    for server in [honest, careless, tagless] {
        let mut bench = Bench::new(server.url());
        let model = bench.pull("owner/small").expect("a later attempt is whole");
        assert_eq!(fs::read(model.path.join("config.json")).expect("the file is there"), new);
    }
}

#[test]
fn a_file_that_an_interrupted_pull_had_finished_is_not_fetched_again() {
    let weights = |n| HubFile {
        path: ["a-q4_k_m-00001-of-00002.gguf", "a-q4_k_m-00002-of-00002.gguf"][n],
        content: noise(2000, n as u64),
        large: true,
    };
    let hub = Hub { repository: "owner/two", files: vec![weights(0), weights(1)] };
    let (whole, cut) = (hub.clone(), hub);
    let healthy = Server::start(move |request| whole.answer(request));
    let failing = Server::start(move |request| {
        let second = request.path.contains("00002-of-00002");
        if second { Reply::status(503) } else { cut.answer(request) }
    });
    let mut bench = Bench::new(failing.url());
    bench.pull("owner/two").expect_err("the second part does not come");
    assert!(bench.store.list().is_empty(), "half a set is no model");
    bench.options.endpoint = Some(healthy.url());
    bench.pull("owner/two").expect("the hub behaves");
    let asked: Vec<_> = healthy.downloads().into_iter().map(|r| r.path).collect();
    assert!(asked.len() == 1 && asked[0].ends_with("00002-of-00002.gguf"), "{asked:?}");
}

#[test]
fn wrong_content_is_deleted_and_both_checksums_are_named() {
    let (promised, forged) = (noise(LENGTH, 10), noise(LENGTH, 11));
    let (expected, found) = (sha256(&promised), sha256(&forged));
    let server = hub_with(&promised, move |_, request, _| server::serve(request, &forged));
    let mut bench = Bench::new(server.url());
    let error = bench.pull(TINY).expect_err("the content is forged");
    let text = error.to_string();
    assert!(
        matches!(error, Error::WrongChecksum { .. }) && text.contains(&expected) && text.contains(&found),
        "{text}"
    );
    bench.assert_absent();
    let left: Vec<_> = fs::read_dir(bench.folder.path().join("models/owner+tiny-gguf")).expect("listable").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_resumed_file_is_hashed_from_its_first_byte() {
    let content = noise(LENGTH, 12);
    let cutting =
        hub_with(&content, |n, _, reply| Reply { cut_after: Some(if n == 0 { 900_000 } else { 0 }), ..reply });
    let healthy = hub_with(&content, |_, _, reply| reply);
    let mut bench = Bench::new(cutting.url());
    bench.pull(TINY).expect_err("no attempt delivers");
    let mut bytes = fs::read(bench.partial()).expect("the bytes are kept");
    bytes[17] ^= 1;
    fs::write(bench.partial(), bytes).expect("writable");
    bench.options.endpoint = Some(healthy.url());
    let error = bench.pull(TINY).expect_err("one bit of the kept bytes is wrong");
    assert!(matches!(error, Error::WrongChecksum { .. }), "{error}");
    bench.assert_absent();
    bench.pull(TINY).expect("nothing of the wrong bytes is left");
}

#[test]
fn another_length_than_listed_is_refused_before_the_download() {
    let content = noise(LENGTH, 13);
    let server = hub_with(&content, |_, _, _| Reply::body(200, noise(1000, 14)));
    let mut bench = Bench::new(server.url());
    let error = bench.pull(TINY).expect_err("the length is wrong");
    assert!(error.to_string().contains("should have 3145728 bytes, 1000 are offered"), "{error}");
    bench.assert_absent();
}

#[test]
fn the_token_goes_to_the_hub_and_never_where_it_redirects() {
    let content = noise(LENGTH, 15);
    let elsewhere = {
        let content = content.clone();
        Server::start(move |request| server::serve(request, &content))
    };
    // Another port is another origin already; another name too.
    let target = format!("{}/signed?secret=1", elsewhere.url_as_localhost());
    let server = hub_with(&content, move |_, _, _| Reply::status(302).with("location", target.clone()));
    let mut bench = Bench::new(server.url());
    bench.options.token = Some("hf_secret".to_owned());
    let model = bench.pull(TINY).expect("the redirect leads to the content");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    assert!(server.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));
    assert_eq!(elsewhere.requests().len(), 1);
    assert_eq!(elsewhere.requests()[0].header("authorization"), None);
}

#[test]
fn a_relative_redirect_keeps_the_token_and_the_range() {
    let content = noise(LENGTH, 16);
    let (hub, whole) = (Hub::one_gguf(&content), content.clone());
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        if request.path.starts_with("/moved/") {
            let cut_after = (count.fetch_add(1, Ordering::SeqCst) == 0).then_some(1_500_000);
            Reply { cut_after, ..server::serve(request, &whole) }
        } else if is_download(&request.path) {
            Reply::status(307).with("location", "/moved/here")
        } else {
            hub.answer(request)
        }
    });
    let mut bench = Bench::new(server.url());
    bench.options.token = Some("hf_secret".to_owned());
    let model = bench.pull(TINY).expect("the redirect leads to the content");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    let moved: Vec<_> = server.requests().into_iter().filter(|r| r.path == "/moved/here").collect();
    assert_eq!(moved[1].range_start(), Some(1_500_000));
    assert!(moved.iter().all(|r| r.header("authorization").is_some()));
}

#[test]
fn redirects_in_a_circle_end() {
    let server = hub_with(&noise(10, 17), |_, request, _| Reply::status(302).with("location", request.path.clone()));
    let error = Bench::new(server.url()).pull(TINY).expect_err("it never ends");
    assert!(error.to_string().contains("redirects"), "{error}");
    assert_eq!(server.downloads().len(), 9);
}

#[test]
fn an_absent_repository_is_named_with_its_neighbours() {
    let server = Server::start(|_| Reply::status(404));
    let error = Bench::new(server.url()).pull("Qwen/Qwen3-4B-GUF").expect_err("there is none");
    let text = error.to_string();
    assert!(matches!(error, Error::RepositoryNotFound { .. }), "{text}");
    assert!(text.contains("`Qwen/Qwen3-4B-GGUF`"), "{text}");
    assert_eq!(server.requests().len(), 1, "absence is not worth another attempt");
}

#[test]
fn an_absent_file_is_named_with_its_neighbours() {
    let server = hub_with(&noise(10, 18), |_, _, reply| reply);
    let error = Bench::new(server.url()).pull("owner/tiny-GGUF:tiny-q4_k_s.gguf").expect_err("there is none");
    assert!(matches!(&error, Error::FileNotFound { nearest, .. } if nearest == &["tiny-q4_k_m.gguf"]), "{error}");
}

#[test]
fn a_closed_door_leads_to_the_models_page_and_the_token() {
    for status in [401, 403] {
        let server = Server::start(move |_| Reply::status(status));
        let error = Bench::new(server.url()).pull(TINY).expect_err("the door is closed");
        let text = error.to_string();
        assert!(text.contains("HF_TOKEN") && text.contains(&format!("{}/owner/tiny-GGUF", server.url())), "{text}");
        assert!(text.contains("no HF_TOKEN is set") && text.contains(&status.to_string()), "{text}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[test]
fn the_hub_hiding_absence_behind_401_is_understood() {
    let server = Server::start(|_| Reply::status(401).with("x-error-code", "RepoNotFound"));
    let error = Bench::new(server.url()).pull(TINY).expect_err("there is none");
    assert!(matches!(error, Error::RepositoryNotFound { .. }), "{error}");
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    WAITS.with_borrow_mut(Vec::clear);
    let content = noise(LENGTH, 19);
    let server = hub_with(&content, |n, _, reply| match n {
        0 => Reply::status(429).with("retry-after", "7"),
        1 => Reply::status(503),
        _ => reply,
    });
    let mut bench = Bench::new(server.url());
    bench.pull(TINY).expect("the third attempt is whole");
    assert_eq!(bench.retries(), 2);
    WAITS.with_borrow(|waits| assert_eq!(waits, &[Duration::from_secs(7), Duration::from_secs(2)]));
}

#[test]
fn a_hub_that_stays_busy_ends_in_its_status() {
    let server = Server::start(|_| Reply::status(503));
    let error = Bench::new(server.url()).pull(TINY).expect_err("it stays busy");
    assert!(matches!(error, Error::Status { status: 503, attempts: 4, .. }), "{error}");
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_silent_server_is_given_up_and_asked_again() {
    let content = noise(LENGTH, 20);
    let server = hub_with(&content, |n, _, reply| match n {
        0 => Reply { cut_after: Some(1 << 20), hold: true, ..reply },
        _ => reply,
    });
    let mut bench = Bench::new(server.url());
    bench.options.pacing.silence_timeout = Duration::from_millis(300);
    let model = bench.pull(TINY).expect("the second attempt is whole");
    assert_eq!(fs::read(&model.path).expect("the file is there"), content);
    assert_eq!(bench.retries(), 1);
}

#[test]
fn an_unreachable_hub_fails_at_once_and_says_so() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = unused.local_addr().expect("a bound socket has an address");
    drop(unused);
    let mut bench = Bench::new(format!("http://{address}"));
    let error = bench.pull(TINY).expect_err("nobody listens");
    assert!(matches!(error, Error::Unreachable { .. }) && error.to_string().contains("HF_ENDPOINT"), "{error}");
    assert_eq!(bench.retries(), 0);
    bench.assert_absent();
}

#[test]
fn a_login_page_instead_of_the_hub_is_no_listing() {
    let server = Server::start(|_| Reply::body(200, "<html>please log in</html>"));
    let error = Bench::new(server.url()).pull(TINY).expect_err("that is no hub");
    assert!(matches!(error, Error::BadAnswer { .. }) && error.to_string().contains("login page"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_message_with_the_bytes_needed() {
    let content = noise(LENGTH, 21);
    let server = hub_with(&content, |_, _, reply| reply);
    let mut bench = Bench::new(server.url());
    fs::create_dir_all(bench.partial().parent().expect("it has a folder")).expect("writable");
    std::os::unix::fs::symlink("/dev/full", bench.partial()).expect("links are allowed");
    let error = bench.pull(TINY).expect_err("nothing can be written");
    assert!(matches!(error, Error::DiskFull { needed_bytes: Some(needed), .. } if needed == LENGTH as u64), "{error}");
    assert!(error.to_string().contains("3.1 MB") && error.to_string().contains("QWENKIT_HOME"), "{error}");
    bench.assert_absent();
    fs::remove_file(bench.partial()).expect("removable");
    bench.pull(TINY).expect("there is room now");
}

#[test]
fn a_split_model_comes_with_all_its_parts_and_a_checkpoint_with_its_papers() {
    let file = |path, length, large| HubFile { path, content: noise(length, length as u64), large };
    let hub = Hub {
        repository: "owner/parts",
        files: vec![
            file("big-q4_k_m-00002-of-00002.gguf", 2000, true),
            file("big-q4_k_m-00001-of-00002.gguf", 3000, true),
            file("config.json", 30, false),
            file("tokenizer.json", 40, false),
            file("model.safetensors", 5000, true),
            file("pytorch_model.bin", 6000, true),
            file("onnx/model.onnx", 7000, true),
            file("README.md", 50, false),
            file("LICENSE", 60, false),
        ],
    };
    let server = Server::start(move |request| hub.answer(request));
    let mut bench = Bench::new(server.url());
    let split = bench.pull("owner/parts:q4_k_m").expect("both parts are there");
    assert!(split.path.ends_with("big-q4_k_m-00001-of-00002.gguf"));
    assert_eq!((split.size_bytes, split.sha256), (5000, None));
    let checkpoint = bench.pull("owner/parts").expect("the checkpoint is there");
    let mut names: Vec<_> = fs::read_dir(&checkpoint.path)
        .expect("a folder")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("plain names"))
        .collect();
    names.sort();
    let expected = ["LICENSE", "README.md", "config.json", "manifest.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names, expected);
    assert_eq!(bench.store.list().len(), 2);
}
