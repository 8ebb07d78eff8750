//! A pull that is killed in the middle: nothing looks whole afterwards, and the next pull continues it.

mod server;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use qwenkit_hub::{PullEvent, PullOptions, Store, resolve};
use server::{Hub, Reply, Server, noise};

const TINY: &str = "owner/tiny-GGUF";
const ROOT_VARIABLE: &str = "QWENKIT_TEST_KILLED_ROOT";
const ENDPOINT_VARIABLE: &str = "QWENKIT_TEST_KILLED_ENDPOINT";
/// The first reply stops here and stays open.
const DELIVERED: usize = 3 << 19;

/// The victim: this same test in a process of its own, pulling and saying how far it is.
fn pull_as_victim(root: PathBuf) {
    let endpoint = std::env::var(ENDPOINT_VARIABLE).expect("the parent sets both variables");
    let store = Store::open_with_cache(root, None);
    let options = PullOptions { endpoint: Some(endpoint), ..PullOptions::default() };
    let _ = store.pull(&resolve(TINY).expect("a well-formed name"), &options, &mut |event| {
        if let PullEvent::Progress { done_bytes } = event {
            // Straight to the pipe: the test harness would keep printed lines to itself.
            let _ = writeln!(std::io::stderr(), "progress {done_bytes}");
        }
    });
}

#[test]
fn a_killed_pull_leaves_no_model_and_is_continued() {
    if let Some(root) = std::env::var_os(ROOT_VARIABLE) {
        return pull_as_victim(root.into());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = folder.path().join("models");
    let content = noise(3 << 20, 1);
    let (hub, downloads) = (Hub::one_gguf(&content), AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let reply = hub.answer(request);
        let first = request.path.contains("/resolve/") && downloads.fetch_add(1, Ordering::SeqCst) == 0;
        if first { Reply { cut_after: Some(DELIVERED), hold: true, ..reply } } else { reply }
    });
    let mut victim = Command::new(std::env::current_exe().expect("a test has an executable"))
        .args(["--exact", "a_killed_pull_leaves_no_model_and_is_continued", "--nocapture"])
        .env(ROOT_VARIABLE, &root)
        .env(ENDPOINT_VARIABLE, server.url())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the test starts again");
    let all_delivered = format!("progress {DELIVERED}");
    let mut lines = BufReader::new(victim.stderr.take().expect("it is piped")).lines();
    let seen = lines.any(|line| line.is_ok_and(|line| line == all_delivered));
    assert!(seen, "the victim ended before it got what the server sent");

    let (store, model) = (Store::open_with_cache(root.clone(), None), resolve(TINY).expect("a well-formed name"));
    assert_eq!(store.find(&model), None, "half a model is no model");
    victim.kill().expect("it runs");
    victim.wait().expect("it was started");
    assert_eq!(store.find(&model), None);
    assert!(store.list().is_empty());
    let partial = root.join("owner+tiny-gguf/tiny-q4_k_m.gguf.partial");
    assert_eq!(fs::read(&partial).expect("the bytes are kept"), &content[..DELIVERED]);

    let options = PullOptions { endpoint: Some(server.url()), ..PullOptions::default() };
    let mut events = Vec::new();
    let pulled = store.pull(&model, &options, &mut |event| events.push(event)).expect("the lock died with its holder");
    assert!(events.contains(&PullEvent::Resumed { have_bytes: DELIVERED as u64 }));
    assert_eq!(server.downloads()[1].range_start(), Some(DELIVERED));
    assert_eq!(fs::read(&pulled.path).expect("the file is there"), content);
    assert_eq!(store.find(&model), Some(pulled));
}
