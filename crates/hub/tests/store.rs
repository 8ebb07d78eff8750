//! The store between pulls: what counts as there, what other tools left, removal, offline, and two pulls at once.

mod server;

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use qwenkit_hub::{CatalogueEntry, DEFAULT_MODEL, Error, ModelRef, PullEvent, PullOptions, Store, catalogue, resolve};
use server::{Hub, Reply, Server, noise, sha256};

const TINY: &str = "owner/tiny-GGUF";

fn model(name: &str) -> ModelRef {
    resolve(name).expect("a well-formed name")
}

fn options(endpoint: String) -> PullOptions {
    PullOptions { endpoint: Some(endpoint), pythons: Vec::new(), ..PullOptions::default() }
}

fn hub(content: &[u8]) -> Server {
    let hub = Hub::one_gguf(content);
    Server::start(move |request| hub.answer(request))
}

fn store_in(folder: &Path) -> Store {
    Store::open_with_cache(folder.join("models"), None)
}

#[test]
fn a_model_counts_only_while_all_its_bytes_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (server, store) = (hub(&noise(5000, 1)), store_in(folder.path()));
    let pulled = store.pull(&model(TINY), &options(server.url()), &mut |_| {}).expect("the hub behaves");
    let manifest = pulled.path.with_file_name("manifest.json");
    let good = fs::read(&manifest).expect("the record is there");
    for damaged in [&good[..good.len() / 2], b"{}", b"", b"\xff\xfe"] {
        fs::write(&manifest, damaged).expect("writable");
        assert_eq!(store.find(&model(TINY)), None);
        assert!(store.list().is_empty());
    }
    fs::write(&manifest, &good).expect("writable");
    assert!(store.find(&model(TINY)).is_some());
    fs::write(&pulled.path, noise(4999, 1)).expect("writable");
    assert_eq!(store.find(&model(TINY)), None, "a byte is missing");
    let again = store.pull(&model(TINY), &options(server.url()), &mut |_| {}).expect("the hub behaves");
    assert_eq!(again.sha256, Some(sha256(&noise(5000, 1))));
}

#[test]
fn a_manifest_cannot_point_outside_its_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (server, store) = (hub(&noise(5000, 2)), store_in(folder.path()));
    let pulled = store.pull(&model(TINY), &options(server.url()), &mut |_| {}).expect("the hub behaves");
    let manifest = pulled.path.with_file_name("manifest.json");
    fs::copy(&pulled.path, folder.path().join("models/elsewhere.gguf")).expect("writable");
    let text = fs::read_to_string(&manifest).expect("the record is there");
    fs::write(&manifest, text.replace("tiny-q4_k_m.gguf", "../elsewhere.gguf")).expect("writable");
    assert_eq!(store.find(&model(TINY)), None);
}

#[test]
fn removing_frees_the_bytes_and_says_how_many() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (server, store) = (hub(&noise(5000, 3)), store_in(folder.path()));
    let pulled = store.pull(&model(TINY), &options(server.url()), &mut |_| {}).expect("the hub behaves");
    let removed = store.remove(&model(TINY)).expect("it is there");
    assert!(removed.size_bytes >= 5000 && removed.name == pulled.name, "{removed:?}");
    assert!(!pulled.path.exists());
    assert_eq!(store.find(&model(TINY)), None);
    let error = store.remove(&model(TINY)).expect_err("it is gone");
    assert!(matches!(error, Error::NotInStore { .. }) && error.to_string().contains("qwenkit list"), "{error}");
}

#[test]
fn what_an_interrupted_pull_left_can_be_removed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (hub, store) = (Hub::one_gguf(&noise(5000, 4)), store_in(folder.path()));
    let server = Server::start(move |request| Reply { cut_after: Some(4000), ..hub.answer(request) });
    let mut options = options(server.url());
    options.pacing.attempts = 1;
    store.pull(&model(TINY), &options, &mut |_| {}).expect_err("it is cut");
    let removed = store.remove(&model(TINY)).expect("something is there");
    assert!(removed.size_bytes >= 4000 && removed.source.contains("interrupted"), "{removed:?}");
    assert!(matches!(store.remove(&model(TINY)), Err(Error::NotInStore { .. })));
}

#[test]
fn a_path_is_found_and_never_removed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("mine.gguf");
    fs::write(&file, b"GGUF").expect("writable");
    let (store, mine) = (store_in(folder.path()), ModelRef::Path(file.clone()));
    assert_eq!(store.find(&mine).map(|m| (m.path, m.size_bytes)), Some((file.clone(), 4)));
    assert!(matches!(store.remove(&mine), Err(Error::NotOurs { .. })));
    assert!(file.exists());
}

#[test]
fn offline_opens_no_socket_and_names_both_ways_out() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (server, store) = (hub(&noise(5000, 5)), store_in(folder.path()));
    let offline = PullOptions { offline: true, ..options(server.url()) };
    for name in [TINY, DEFAULT_MODEL] {
        let error = store.pull(&model(name), &offline, &mut |_| {}).expect_err("it is not here");
        let text = error.to_string();
        assert!(
            text.contains(&format!("offline: `{name}`")) && text.contains(&format!("qwenkit pull {name}")),
            "{text}"
        );
        assert!(text.contains("copy the file"), "{text}");
    }
    assert!(server.requests().is_empty());
    store.pull(&model(TINY), &options(server.url()), &mut |_| {}).expect("the hub behaves");
    let asked = server.requests().len();
    store.pull(&model(TINY), &offline, &mut |_| {}).expect("now it is here");
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn a_second_pull_waits_for_the_first_and_downloads_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let content = noise(50_000, 6);
    let (hub, store) = (Hub::one_gguf(&content), store_in(folder.path()));
    // The file's content is withheld until the second pull reports that it waits.
    let (begun, has_begun) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let server = Arc::new(Server::start(move |request| {
        if request.path.contains("/resolve/") {
            begun.send(()).expect("the test listens");
            released.lock().expect("one download at a time").recv().expect("the second pull waits");
        }
        hub.answer(request)
    }));
    let first = {
        let (store, options) = (store.clone(), options(server.url()));
        thread::spawn(move || store.pull(&model(TINY), &options, &mut |_| {}))
    };
    has_begun.recv().expect("the first pull downloads");
    assert!(matches!(store.remove(&model(TINY)), Err(Error::Busy { .. })));
    let mut waited = false;
    let second = store.pull(&model(TINY), &options(server.url()), &mut |event| {
        if matches!(event, PullEvent::Waiting { .. }) {
            waited = true;
            release.send(()).expect("the server waits");
        }
    });
    let first = first.join().expect("no panic").expect("the hub behaves");
    assert_eq!(second.expect("the first pull's model"), first);
    assert!(waited);
    assert_eq!(server.downloads().len(), 1);
    assert_eq!(fs::read(first.path).expect("the file is there"), content);
}

/// Builds `models--owner--name` as the Hugging Face libraries do: blobs by hash, snapshots of links.
#[cfg(unix)]
fn fill_cache(cache: &Path, repository: &str, files: &[(&str, &[u8])]) {
    let folder = cache.join(format!("models--{}", repository.replace('/', "--")));
    let snapshot = folder.join("snapshots").join(server::COMMIT);
    for sub in [&folder.join("blobs"), &folder.join("refs"), &snapshot] {
        fs::create_dir_all(sub).expect("writable");
    }
    fs::write(folder.join("refs/main"), server::COMMIT).expect("writable");
    for (name, content) in files {
        fs::write(folder.join("blobs").join(sha256(content)), content).expect("writable");
        std::os::unix::fs::symlink(Path::new("../../blobs").join(sha256(content)), snapshot.join(name))
            .expect("linkable");
    }
}

#[cfg(unix)]
#[test]
fn what_other_tools_downloaded_is_used_and_left_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = folder.path().join("hub");
    let store = Store::open_with_cache(folder.path().join("models"), Some(cache.clone()));
    fill_cache(&cache, "owner/tiny-GGUF", &[("tiny-q4_k_m.gguf", b"GGUF and more"), ("tiny-q8_0.gguf", b"GGUF")]);
    fill_cache(&cache, "owner/tiny", &[("config.json", b"{}"), ("model.safetensors", b"weights")]);
    fill_cache(
        &cache,
        "owner/half",
        &[("config.json", b"{}"), ("model.safetensors.index.json", br#"{"weight_map":{"a":"m-1.safetensors"}}"#)],
    );
    let offline = PullOptions { offline: true, ..PullOptions::default() };
    let gguf = store.pull(&model(TINY), &offline, &mut |_| {}).expect("the cache has it");
    assert!(gguf.path.ends_with("tiny-q4_k_m.gguf") && gguf.source.contains("Hugging Face cache"), "{gguf:?}");
    assert_eq!(store.find(&model("owner/tiny-GGUF:Q8_0")).map(|m| m.size_bytes), Some(4));
    assert_eq!(store.find(&model("owner/tiny")).map(|m| m.size_bytes), Some(9));
    assert_eq!(store.find(&model("owner/half")), None, "a shard is missing");
    assert_eq!(store.find(&model("owner/tiny-GGUF@v2")), None, "another revision");
    assert!(matches!(store.remove(&model(TINY)), Err(Error::NotOurs { .. })));
    assert!(gguf.path.exists());
}

#[cfg(unix)]
#[test]
fn a_catalogued_model_in_the_cache_must_be_the_very_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = folder.path().join("hub");
    let store = Store::open_with_cache(folder.path().join("models"), Some(cache.clone()));
    let known: &CatalogueEntry = catalogue().iter().find(|e| e.sha256.is_some()).expect("the default model");
    fill_cache(&cache, known.repository, &[(known.file, b"something else")]);
    assert_eq!(store.find(&ModelRef::Catalogue(known)), None);
    let unknown = catalogue().iter().find(|e| e.sha256.is_none()).expect("most entries");
    fill_cache(&cache, unknown.repository, &[(unknown.file, b"weights")]);
    assert!(store.find(&ModelRef::Catalogue(unknown)).is_some());
}

#[test]
fn a_model_pulled_by_its_repository_is_found_by_its_short_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = store_in(folder.path());
    let entry: &'static CatalogueEntry = Box::leak(Box::new(CatalogueEntry {
        name: "tiny:1m",
        repository: "owner/tiny-GGUF",
        file: "tiny-q4_k_m.gguf",
        ..catalogue()[0].clone()
    }));
    let server = hub(&noise(5000, 7));
    let pulled = store
        .pull(&model("owner/tiny-GGUF:tiny-q4_k_m.gguf"), &options(server.url()), &mut |_| {})
        .expect("the hub behaves");
    assert_eq!(store.find(&ModelRef::Catalogue(entry)), Some(pulled.clone()));
    let forged = Box::leak(Box::new(CatalogueEntry { sha256: Some("00"), ..entry.clone() }));
    assert_eq!(store.find(&ModelRef::Catalogue(forged)), None, "the checksum is another");
    store.remove(&ModelRef::Catalogue(entry)).expect("found by its origin");
    assert!(!pulled.path.exists());
}

#[test]
fn modelscope_is_asked_in_its_own_way_and_never_given_the_token() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (content, store) = (noise(5000, 8), store_in(folder.path()));
    let body = content.clone();
    let server = Server::start(move |request| {
        let path = request.path.as_str();
        if path == "/api/v1/models/owner/tiny/repo/files?Revision=master&Recursive=true" {
            let sum = sha256(&body);
            Reply::body(
                200,
                format!(
                    r#"{{"Code":200,"Success":true,"Data":{{"Files":[
                    {{"Type":"tree","Path":"sub"}},
                    {{"Type":"blob","Path":"tiny-q8_0.gguf","Size":5000,"Sha256":"{sum}"}}]}}}}"#
                ),
            )
        } else if path == "/models/owner/tiny/resolve/master/tiny-q8_0.gguf" {
            server::serve(request, &body)
        } else if path.contains("/api/v1/") {
            Reply::body(200, r#"{"Code":404,"Success":false,"Message":"no such model"}"#)
        } else {
            Reply::status(404)
        }
    });
    let options = PullOptions {
        modelscope_endpoint: Some(server.url()),
        token: Some("hf_secret".to_owned()),
        ..PullOptions::default()
    };
    let pulled = store.pull(&model("modelscope:owner/tiny"), &options, &mut |_| {}).expect("the hub behaves");
    assert_eq!(fs::read(&pulled.path).expect("the file is there"), content);
    assert!(server.requests().iter().all(|r| r.header("authorization").is_none()));
    assert_eq!(store.find(&model("owner/tiny:tiny-q8_0.gguf")), None, "the other hub's repository is another model");
    let error = store.pull(&model("modelscope:owner/none"), &options, &mut |_| {}).expect_err("there is none");
    assert!(matches!(error, Error::RepositoryNotFound { .. }), "{error}");
}

#[test]
fn a_catalogue_checksum_outranks_the_hubs_listing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (server, store) = (hub(&noise(5000, 9)), store_in(folder.path()));
    let entry: &'static CatalogueEntry = Box::leak(Box::new(CatalogueEntry {
        name: "tiny:2m",
        repository: "owner/tiny-GGUF",
        file: "tiny-q4_k_m.gguf",
        sha256: Some("1111111111111111111111111111111111111111111111111111111111111111"),
        ..catalogue()[0].clone()
    }));
    let error = store
        .pull(&ModelRef::Catalogue(entry), &options(server.url()), &mut |_| {})
        .expect_err("the hub lists another file");
    assert!(error.to_string().contains("the catalogue expects 1111"), "{error}");
    assert!(server.downloads().is_empty(), "no byte is fetched for a file that is already known to be wrong");
}
