//! Pages of the cache in files, so that a prompt that was computed once need not be computed again after a restart, or
//! after its pages were given up.
//!
//! A page's file is named by a hash of all text up to its end, in a folder named by what its content depends on: model,
//! instruction set, program. So a name that is there is the right one, and what is in it is held against a hash of its
//! own before it is believed. Files are a cache: whatever is missing, damaged or cannot be written is computed instead.
//! What they hold is made of what people asked, and is readable for nobody else.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use sha2::{Digest as _, Sha256};

use crate::{error::Error, pages::TextHash};

/// What each file begins with.
const MAGIC: &[u8; 8] = b"QKPAGE1\n";
const HEAD_BYTES: usize = MAGIC.len() + 32;
/// Bytes that wait to be written while the engine goes on; more waits in the engine's own pages.
const QUEUED_BYTES: usize = 64 << 20;
/// A page counts as used so much before the one that it is the beginning of: the end of a text goes first.
const STEP: Duration = Duration::from_millis(1);
/// What is used again and again is noted so often.
const TOUCHED_EVERY: Duration = Duration::from_secs(60);

/// Where beginnings of prompts are kept, and how much of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixCache {
    /// The folder; several models and programs may share it.
    pub folder: PathBuf,
    /// Bytes of all its files together; the longest unused go first.
    pub limit_bytes: u64,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    /// Keys and values of a page.
    Page,
    /// The recurrent state after it.
    State,
}

/// A file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    /// All text up to the page's end.
    pub(crate) text: TextHash,
    pub(crate) part: Part,
}

/// The files of one model.
pub(crate) struct DiskPages {
    folder: PathBuf,
    /// Bytes of a page, and of a state.
    sizes: [usize; 2],
    limit_bytes: u64,
    /// Files that are there or on their way, and when that was noted last; one that was removed by another process is missed when
    /// it is read.
    known: HashMap<Entry, Instant>,
    /// Files that the writer has removed, or could not write.
    gone: Gone,
    commands: Option<Sender<Command>>,
    queued_bytes: Arc<AtomicUsize>,
    failures: Arc<AtomicU64>,
    writer: Option<JoinHandle<Writer>>,
}

type Gone = Arc<Mutex<Vec<Entry>>>;

enum Command {
    Write { entry: Entry, depth: u32, bytes: Vec<u8> },
    Touch { entry: Entry, depth: u32 },
}

impl Entry {
    fn file_name(self) -> String {
        let name = hex(&self.text.0);
        match self.part {
            Part::Page => name + ".page",
            Part::State => name + ".state",
        }
    }

    fn of_file_name(name: &str) -> Option<Entry> {
        let (digits, kind) = name.split_once('.')?;
        let text = text_of_digits(digits)?;
        let part = match kind {
            "page" => Part::Page,
            "state" => Part::State,
            _ => return None,
        };
        Some(Entry { text, part })
    }
}

fn text_of_digits(digits: &str) -> Option<TextHash> {
    if digits.len() != 64 || !is_hex(digits) {
        return None;
    }
    let mut text = [0; 32];
    for (i, byte) in text.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(TextHash(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_hex(digits: &str) -> bool {
    digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl DiskPages {
    /// The files in `cache` of what `identity` stands for, whose pages and states have so many bytes.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub(crate) fn open(cache: &PrefixCache, identity: [u8; 32], sizes: [usize; 2]) -> Result<DiskPages, Error> {
        let folder = cache.folder.join(hex(&identity[..16]));
        let refused = |reason| Error::PrefixCache { folder: cache.folder.clone(), reason };
        private_folder(&folder).map_err(refused)?;
        let (mut known, now) = (HashMap::new(), Instant::now());
        for file in fs::read_dir(&folder).map_err(refused)? {
            let name = file.map_err(refused)?.file_name();
            known.extend(name.to_str().and_then(Entry::of_file_name).map(|entry| (entry, now)));
        }
        // A folder that can be read but not written to would be told of by nobody later.
        let probe = folder.join(format!(".probe-{}", std::process::id()));
        private_file(&probe).map_err(refused)?;
        // In another container a process of the same number may have removed it.
        let _ = fs::remove_file(&probe);
        let (commands, received) = channel();
        let (queued_bytes, failures) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let gone = Gone::default();
        let writer = Writer {
            all: cache.folder.clone(),
            folder: folder.clone(),
            limit_bytes: cache.limit_bytes,
            unscanned_bytes: cache.limit_bytes,
            queued_bytes: Arc::clone(&queued_bytes),
            failures: Arc::clone(&failures),
            gone: Arc::clone(&gone),
        };
        let spawned = thread::Builder::new().name("qwenkit-pages".into()).spawn(move || writer.run(&received));
        let writer = Some(spawned.map_err(|reason| Error::Thread { reason })?);
        let limit_bytes = cache.limit_bytes;
        let commands = Some(commands);
        Ok(DiskPages { folder, sizes, limit_bytes, known, gone, commands, queued_bytes, failures, writer })
    }

    /// Whether there seems to be such a file.
    pub(crate) fn has(&self, entry: Entry) -> bool {
        self.known.contains_key(&entry)
    }

    /// Takes in what the writer has removed meanwhile.
    pub(crate) fn refresh(&mut self) {
        let gone = std::mem::take(&mut *self.gone.lock().unwrap_or_else(PoisonError::into_inner));
        for entry in gone {
            self.known.remove(&entry);
        }
    }

    /// Notes that what a file holds was used, if that was not noted lately.
    pub(crate) fn used(&mut self, entry: Entry, depth: u32) {
        if let Some(noted) = self.known.get_mut(&entry).filter(|noted| noted.elapsed() > TOUCHED_EVERY) {
            *noted = Instant::now();
            self.send(Command::Touch { entry, depth });
        }
    }

    /// Pages of this model that are there.
    pub(crate) fn pages(&self) -> usize {
        self.known.keys().filter(|entry| entry.part == Part::Page).count()
    }

    /// Bytes that this process may write at once without removing them again.
    pub(crate) fn room_bytes(&self) -> u64 {
        self.limit_bytes / 2
    }

    /// Bytes of a file.
    pub(crate) fn file_bytes(&self, part: Part) -> u64 {
        (HEAD_BYTES + self.sizes[part as usize]) as u64
    }

    /// Waits until all is written. Whoever has more writes it then.
    pub(crate) fn finish(mut self) -> Option<Writer> {
        self.end()
    }

    fn end(&mut self) -> Option<Writer> {
        self.commands = None;
        // A panic of the writer has been printed on its own thread.
        self.writer.take()?.join().ok()
    }

    /// What a file holds, if it is whole; `depth` is its page's number in the text. One that is not whole is removed.
    pub(crate) fn read(&mut self, entry: Entry, depth: u32) -> Option<Vec<u8>> {
        let path = self.folder.join(entry.file_name());
        let found = read_whole(&path, self.sizes[entry.part as usize]);
        match &found {
            Ok(Some(_)) => self.send(Command::Touch { entry, depth }),
            // One that is not there, or that the system does not give now, is as good as none to this process.
            Err(_) => self.forget(entry),
            Ok(None) => {
                self.forget(entry);
                // If it cannot be removed, it is not read again by this process either way.
                let _ = fs::remove_file(&path);
            }
        }
        found.ok().flatten()
    }

    fn forget(&mut self, entry: Entry) {
        self.known.remove(&entry);
    }

    /// Whether the writer keeps up.
    pub(crate) fn has_room(&self) -> bool {
        self.queued_bytes.load(Ordering::Relaxed) < QUEUED_BYTES
    }

    /// Has a file written, soon.
    pub(crate) fn write(&mut self, entry: Entry, depth: u32, bytes: Vec<u8>) {
        self.queued_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        self.known.insert(entry, Instant::now());
        self.send(Command::Write { entry, depth, bytes });
    }

    /// Files that could not be written.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A writer that has ended leaves a cache that is not added to.
            let _ = commands.send(command);
        }
    }
}

impl Drop for DiskPages {
    /// Waits until all is written.
    fn drop(&mut self) {
        self.end();
    }
}

/// Writes files, and removes the longest unused when they are too many.
pub(crate) struct Writer {
    /// The folder of all models.
    all: PathBuf,
    folder: PathBuf,
    limit_bytes: u64,
    /// Bytes written since all files were counted.
    unscanned_bytes: u64,
    queued_bytes: Arc<AtomicUsize>,
    failures: Arc<AtomicU64>,
    gone: Gone,
}

impl Writer {
    fn run(mut self, commands: &Receiver<Command>) -> Writer {
        for command in commands {
            let done = match command {
                Command::Write { entry, depth, bytes } => {
                    let done = self.write(entry, depth, &bytes);
                    self.queued_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
                    done
                }
                // Somebody else may have removed it.
                Command::Touch { entry, depth } => {
                    let _ = touch(&self.folder.join(entry.file_name()), depth);
                    Ok(())
                }
            };
            if done.is_err() {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        self
    }

    fn tell_gone(&self, gone: impl IntoIterator<Item = Entry>) {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner).extend(gone);
    }

    /// Writes a file now.
    ///
    /// # Errors
    /// When the disk is full, say.
    pub(crate) fn write(&mut self, entry: Entry, depth: u32, bytes: &[u8]) -> io::Result<()> {
        self.unscanned_bytes += (HEAD_BYTES + bytes.len()) as u64;
        // All processes that share the folder count for themselves, so each counts now and then what is really there.
        if self.unscanned_bytes > self.limit_bytes / 16 {
            let removed = make_room(&self.all, self.limit_bytes - self.limit_bytes / 8)?;
            let own = removed.iter().filter(|path| path.starts_with(&self.folder));
            self.tell_gone(own.filter_map(|path| Entry::of_file_name(path.file_name()?.to_str()?)));
            self.unscanned_bytes = 0;
        }
        let path = self.folder.join(entry.file_name());
        let unfinished = path.with_extension(format!("{}.part", std::process::id()));
        let written = private_file(&unfinished).and_then(|mut file| {
            file.write_all(MAGIC)?;
            file.write_all(&Sha256::digest(bytes))?;
            file.write_all(bytes)
        });
        let named = written.and_then(|()| touch(&unfinished, depth)).and_then(|()| fs::rename(&unfinished, &path));
        if named.is_err() {
            // The disk may be full; what is left of the file would only make that worse.
            let _ = fs::remove_file(&unfinished);
            self.tell_gone([entry]);
        }
        named
    }
}

/// What a file holds, if that is so many bytes with the hash that it begins with; none if it is not.
fn read_whole(path: &Path, size: usize) -> io::Result<Option<Vec<u8>>> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() != (HEAD_BYTES + size) as u64 {
        return Ok(None);
    }
    let mut bytes = Vec::with_capacity(size);
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head)?;
    file.take(size as u64).read_to_end(&mut bytes)?;
    let (magic, hash) = head.split_at(MAGIC.len());
    Ok((magic == MAGIC && bytes.len() == size && hash == &Sha256::digest(&bytes)[..]).then_some(bytes))
}

/// A file's name, size and time of change; those of all parts of a file that is split; or those of a folder's files.
pub(crate) fn stamps(path: &Path) -> Vec<(OsString, u64, Option<SystemTime>)> {
    let stamp = |path: &Path| {
        let facts = path.metadata().ok().filter(|facts| facts.is_file())?;
        Some((path.file_name()?.to_owned(), facts.len(), facts.modified().ok()))
    };
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // As in name-00001-of-00003.gguf.
    let stem = name.split_once("-of-").and_then(|(before, _)| Some(before.rsplit_once('-')?.0));
    let (folder, is_part) = match (stem, path.parent()) {
        (Some(stem), Some(folder)) => (folder, stem),
        _ => (path, ""),
    };
    let Ok(files) = fs::read_dir(folder) else { return stamp(path).into_iter().collect() };
    let files = files.filter_map(|file| Some(file.ok()?.path()));
    let is_part =
        |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(is_part));
    let mut found: Vec<_> = files.filter(is_part).filter_map(|path| stamp(&path)).collect();
    found.sort();
    found
}

/// Notes that a file is used now.
fn touch(path: &Path, depth: u32) -> io::Result<()> {
    let moment = SystemTime::now().checked_sub(STEP * depth).unwrap_or(SystemTime::UNIX_EPOCH);
    File::options().write(true).open(path)?.set_modified(moment)
}

/// Removes the longest unused files of all models until the rest has at most so many bytes; which it has removed. What is
/// somebody else's, or cannot be seen, is let be.
fn make_room(folder: &Path, limit_bytes: u64) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for model in fs::read_dir(folder)?.flatten() {
        if !model.file_name().to_str().is_some_and(|name| name.len() == 32 && is_hex(name)) {
            continue;
        }
        let Ok(found) = fs::read_dir(model.path()) else { continue };
        for file in found.flatten() {
            // One that a process has left unfinished is of no use any more, and one that it is writing is the youngest.
            let is_unfinished = |name: &str| {
                name.split_once('.')
                    .is_some_and(|(digits, end)| text_of_digits(digits).is_some() && end.ends_with("part"))
            };
            let is_ours = |name: &str| Entry::of_file_name(name).is_some() || is_unfinished(name);
            if let (true, Ok(facts)) = (file.file_name().to_str().is_some_and(is_ours), file.metadata()) {
                files.push((facts.modified()?, facts.len(), file.path()));
            }
        }
    }
    let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    files.sort();
    let mut removed = Vec::new();
    for (_, bytes, path) in files {
        if total <= limit_bytes {
            break;
        }
        // Another process may have done the same.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {}
            _ => {
                total -= bytes;
                removed.push(path);
            }
        }
    }
    Ok(removed)
}

fn private_folder(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

fn private_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 2] = [100, 7];

    fn entry(number: u8) -> Entry {
        Entry { text: TextHash([number; 32]), part: Part::Page }
    }

    fn cache(folder: &Path, limit_bytes: u64) -> PrefixCache {
        PrefixCache { folder: folder.join("deep/er"), limit_bytes }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let model = fs::read_dir(folder.join("deep/er")).unwrap().next().unwrap().unwrap().path();
        let mut files: Vec<PathBuf> = fs::read_dir(model).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn what_was_written_is_there_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let open = |identity| DiskPages::open(&cache(folder.path(), 1 << 20), [identity; 32], SIZES).unwrap();
        let mut first = open(1);
        let state = Entry { part: Part::State, ..entry(1) };
        first.write(entry(1), 0, vec![5; 100]);
        first.write(state, 0, vec![6; 7]);
        drop(first);
        let mut second = open(1);
        assert_eq!((second.pages(), second.failures()), (1, 0));
        assert!(second.has(entry(1)) && second.has(state) && !second.has(entry(2)));
        assert_eq!(second.read(entry(1), 0), Some(vec![5; 100]));
        assert_eq!(second.read(state, 0), Some(vec![6; 7]));
        assert!(!open(2).has(entry(1)), "another model's");
        #[cfg(unix)]
        for path in files(folder.path()) {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions());
            assert_eq!(mode & 0o077, 0, "nobody else reads what people asked");
        }
    }

    #[test]
    fn a_damaged_file_is_as_good_as_none_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let open = || DiskPages::open(&cache(folder.path(), 1 << 20), [1; 32], SIZES).unwrap();
        let mut pages = open();
        pages.write(entry(1), 0, vec![5; 100]);
        drop(pages);
        let path = files(folder.path()).remove(0);
        let whole = fs::read(&path).unwrap();
        let mut damages: Vec<Vec<u8>> = (0..whole.len()).step_by(13).map(|at| whole[..at].to_vec()).collect();
        damages.extend((0..whole.len()).step_by(7).map(|at| {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            damaged
        }));
        damages.push([&whole[..], &[0]].concat());
        for damaged in damages {
            fs::write(&path, &damaged).unwrap();
            let mut pages = open();
            assert_eq!(pages.read(entry(1), 0), None);
            assert!(!pages.has(entry(1)) && !path.exists());
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(open().read(entry(1), 0), Some(vec![5; 100]));
    }

    #[test]
    fn the_longest_unused_and_the_ends_of_texts_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let limit = 16 * (HEAD_BYTES + 100) as u64;
        let open = || DiskPages::open(&cache(folder.path(), limit), [1; 32], SIZES).unwrap();
        let mut pages = open();
        // Two texts of eight pages.
        (0..16).for_each(|i| pages.write(entry(i), u32::from(i % 8), vec![i; 100]));
        drop(pages);
        // An hour ago.
        for path in files(folder.path()) {
            let file = File::options().write(true).open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.set_modified(modified - Duration::from_secs(3600)).unwrap();
        }
        let mut pages = open();
        // The first one is used again, so the second goes, from its end.
        (0..8).for_each(|i| assert!(pages.read(entry(i), u32::from(i)).is_some()));
        (16..20).for_each(|i| pages.write(entry(i), 0, vec![i; 100]));
        let others = folder.path().join("deep/er/others");
        fs::create_dir(&others).unwrap();
        fs::write(others.join("film.part"), vec![0; 4000]).unwrap();
        // The writer tells what it has removed.
        while pages.queued_bytes.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        let before = pages.pages();
        pages.refresh();
        assert!(pages.pages() < before);
        drop(pages);
        assert!(others.join("film.part").exists(), "somebody else's file");
        fs::remove_dir_all(others).unwrap();
        let mut pages = open();
        assert!(pages.pages() <= 17, "{} files", pages.pages());
        assert!((0..8).all(|i| pages.has(entry(i))), "the text that was used last");
        let left: Vec<u8> = (8..16).filter(|&i| pages.has(entry(i))).collect();
        assert!(left.len() < 8 && left.iter().copied().eq(8..8 + left.len() as u8), "its beginning is left: {left:?}");
        assert_eq!(pages.read(entry(19), 0), Some(vec![19; 100]));
    }

    #[test]
    fn a_folder_that_cannot_be_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("deep"), "a file").unwrap();
        let Err(refused) = DiskPages::open(&cache(folder.path(), 1), [1; 32], SIZES) else { panic!("it is a file") };
        assert!(refused.to_string().contains("deep/er"), "{refused}");
    }
}
