//! One connection between two ranks: frames both ways, signs of life between them, and limits to waiting.
//!
//! Contract: of what comes only the kind and length of frame is taken that is due, so that nothing that the other end says makes this one
//! allocate; every wait has an end. Not here: who connects (`start`), what frames mean to all ranks (`tcp`).

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Mutex, PoisonError, TryLockError},
    time::{Duration, Instant},
};

use crate::error::Error;

/// What a frame is. On the wire it is this byte, the length of what follows as a `u64`, and that; all numbers little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tag {
    /// A sign of life, empty; may come between any two others.
    Alive = 0,
    /// To rank 0: this rank has come to a meeting, with so much.
    Call = 1,
    /// From rank 0: all have come, with so much each.
    Go = 2,
    /// A part of a message, or of numbers.
    Data = 3,
    /// From rank 0: a rank is lost. Its number as a `u32`, then how, as text.
    Lost = 4,
}

/// Signs of life in the time without any behind which a rank counts as lost.
pub(super) const BEATS: u32 = 8;

const HEAD_BYTES: usize = 9;
/// Up to so much travels with its head, in one packet.
const SMALL_BYTES: usize = 1024;
/// The longest text about a rank that is lost, with its number.
const LOST_BYTES: usize = 2048;

/// A rank that cannot be reckoned with any more.
#[derive(Debug)]
pub(super) struct Trouble {
    /// Which one.
    pub(super) rank: usize,
    /// How it is known.
    pub(super) what: String,
    /// Whether rank 0 has said it, which then says it to people too.
    pub(super) is_hearsay: bool,
}

impl Trouble {
    /// As an error of one of `count` ranks.
    pub(super) fn error(self, count: usize) -> Error {
        let Trouble { rank, what, is_hearsay } = self;
        if is_hearsay {
            Error::OfRank { rank, count, what }
        } else {
            Error::lost(format!("rank {rank} is lost: {what}"))
        }
    }
}

/// How long something is waited for, and since when.
#[derive(Clone, Copy)]
pub(super) struct Wait {
    since: Instant,
    limit: Duration,
}

impl Wait {
    /// From now on.
    pub(super) fn of(limit: Duration) -> Wait {
        Wait { since: Instant::now(), limit }
    }

    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.since.elapsed())
    }
}

/// A connection to another rank.
pub(super) struct Line {
    /// The rank at the other end.
    pub(super) rank: usize,
    stream: TcpStream,
    /// Held while a frame is written; whether one was cut off, behind which nothing could be understood.
    writing: Mutex<bool>,
    /// How long no sign of life may come.
    silence: Duration,
}

impl Line {
    /// Takes a connection, of which both ends know whose it is.
    ///
    /// # Errors
    /// When the system refuses to set it up.
    pub(super) fn new(rank: usize, stream: TcpStream, silence: Duration) -> io::Result<Line> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(silence))?;
        Ok(Line { rank, stream, writing: Mutex::new(false), silence })
    }

    /// Whether the other end has closed it, as far as that can be seen before what it has sent is read.
    pub(super) fn is_closed(&self) -> bool {
        // Nobody writes meanwhile: a write does not wait either then.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.stream.set_nonblocking(true).and_then(|()| self.stream.peek(&mut [0]));
        let _ = self.stream.set_nonblocking(false);
        !matches!(found, Ok(1..)) && !matches!(found, Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Sends a frame; waits for the other end to take it.
    pub(super) fn send(&self, tag: Tag, payload: &[u8]) -> Result<(), Trouble> {
        let mut is_cut = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&mut is_cut, tag, payload)
    }

    /// Sends a sign of life, unless a frame is being sent, which is one.
    pub(super) fn beat(&self) {
        let mut is_cut = match self.writing.try_lock() {
            Ok(is_cut) => is_cut,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // Whoever waits for the other end finds what is wrong with it.
        let _ = self.write(&mut is_cut, Tag::Alive, &[]);
    }

    fn write(&self, is_cut: &mut bool, tag: Tag, payload: &[u8]) -> Result<(), Trouble> {
        if *is_cut {
            return Err(self.trouble("its connection is closed"));
        }
        let mut head = Vec::with_capacity(HEAD_BYTES + SMALL_BYTES);
        head.push(tag as u8);
        head.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        let (first, rest) = if payload.len() <= SMALL_BYTES { (payload, &[][..]) } else { (&[][..], payload) };
        head.extend_from_slice(first);
        let written = (&self.stream).write_all(&head).and_then(|()| (&self.stream).write_all(rest));
        written.map_err(|error| {
            *is_cut = true;
            self.of_io(&error)
        })
    }

    /// Waits for a frame of this kind that fills `payload`.
    pub(super) fn receive(&self, tag: Tag, payload: &mut [u8], wait: Wait) -> Result<(), Trouble> {
        loop {
            let mut head = [0; HEAD_BYTES];
            self.read(&mut head, wait)?;
            let len = u64::from_le_bytes(head[1..].try_into().unwrap_or_default());
            match head[0] {
                found if found == tag as u8 && len == payload.len() as u64 => return self.read(payload, wait),
                found if found == Tag::Alive as u8 && len == 0 => {}
                found if found == Tag::Lost as u8 && (4..=LOST_BYTES as u64).contains(&len) => {
                    let mut text = vec![0; len as usize];
                    self.read(&mut text, wait)?;
                    return Err(heard(&text));
                }
                _ => return Err(self.trouble("it sent something that is no message")),
            }
        }
    }

    fn read(&self, bytes: &mut [u8], wait: Wait) -> Result<(), Trouble> {
        // Counted in parts of the time, so that the other end is not to blame where this machine has stood still.
        let (mut done, mut missed) = (0, 0);
        while done < bytes.len() {
            let left = wait.left();
            if left.is_zero() {
                return Err(self.trouble(format!("it has not come within {} s", wait.limit.as_secs())));
            }
            let patience = left.min(self.silence / BEATS);
            let read =
                self.stream.set_read_timeout(Some(patience)).and_then(|()| (&self.stream).read(&mut bytes[done..]));
            match read {
                Ok(0) => return Err(self.trouble("its connection is closed")),
                Ok(count) => (done, missed) = (done + count, 0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) && missed + 1 < BEATS => missed += 1,
                Err(error) => return Err(self.of_io(&error)),
            }
        }
        Ok(())
    }

    /// Says that a rank is lost, if that still can be said.
    pub(super) fn tell(&self, trouble: &Trouble) {
        let mut text = (trouble.rank as u32).to_le_bytes().to_vec();
        text.extend(trouble.what.bytes().take(LOST_BYTES - 4));
        let _ = self.send(Tag::Lost, &text);
    }

    /// Ends what any thread waits for here.
    pub(super) fn cut(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Reads until the other end says so too, at the latest when the wait is over: a system that closes a connection on which something
    /// is unread takes back what it has sent.
    pub(super) fn drain(&self, wait: Wait) {
        let mut rest = [0; 4096];
        while !wait.left().is_zero() {
            let read = self.stream.set_read_timeout(Some(wait.left().max(Duration::from_millis(1))));
            match read.and_then(|()| (&self.stream).read(&mut rest)) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }

    fn of_io(&self, error: &io::Error) -> Trouble {
        if is_timeout(error) {
            let seconds = self.silence.as_secs();
            return self.trouble(format!(
                "nothing was heard of it for {seconds} s, as if its machine or the network were gone"
            ));
        }
        self.trouble(format!("its connection is closed ({error})"))
    }

    /// Something about the other end.
    pub(super) fn trouble(&self, what: impl Into<String>) -> Trouble {
        Trouble { rank: self.rank, what: what.into(), is_hearsay: false }
    }
}

/// What rank 0 said of another one; the text has a number at its head.
fn heard(text: &[u8]) -> Trouble {
    let (rank, what) = text.split_at(4);
    let rank = u32::from_le_bytes(rank.try_into().unwrap_or_default()) as usize;
    Trouble { rank, what: String::from_utf8_lossy(what).into_owned(), is_hearsay: true }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Both ends of a connection: of rank 1, and the bare stream of who speaks to it.
    fn pair(silence: Duration) -> (Line, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Line::new(1, listener.accept().unwrap().0, silence).unwrap(), other)
    }

    fn receive(line: &Line, len: usize, limit: Duration) -> Result<Vec<u8>, String> {
        let mut found = vec![0; len];
        line.receive(Tag::Data, &mut found, Wait::of(limit)).map(|()| found).map_err(|trouble| trouble.what)
    }

    #[test]
    fn frames_come_whole_and_signs_of_life_do_not_count() {
        let (line, other) = pair(LONG);
        let other = Line::new(0, other, LONG).unwrap();
        let long: Vec<u8> = (0..100_000).map(|i| (i * 7) as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| {
                other.beat();
                other.send(Tag::Data, &long[..5]).unwrap();
                other.beat();
                other.beat();
                other.send(Tag::Data, &long).unwrap();
                other.send(Tag::Data, &[]).unwrap();
            });
            assert_eq!(receive(&line, 5, LONG).unwrap(), long[..5]);
            assert_eq!(receive(&line, long.len(), LONG).unwrap(), long);
            assert!(receive(&line, 0, LONG).unwrap().is_empty());
        });
        assert!(!line.is_closed());
        other.tell(&Trouble { rank: 7, what: "so it is".to_owned(), is_hearsay: false });
        let trouble = line.receive(Tag::Go, &mut [], Wait::of(LONG)).unwrap_err();
        assert_eq!((trouble.rank, &trouble.what[..], trouble.is_hearsay), (7, "so it is", true));
        drop(other);
        assert!(receive(&line, 1, LONG).unwrap_err().contains("closed"));
        assert!(line.is_closed());
    }

    /// No length is believed: nothing is read, and nothing allocated, that is not due.
    #[test]
    fn frames_that_are_not_due_are_refused() {
        let frame = |tag: u8, len: u64| [&[tag][..], &len.to_le_bytes(), &[0; 64]].concat();
        for bytes in
            [frame(3, 6), frame(3, u64::MAX), frame(1, 5), frame(0, 1), frame(4, 3), frame(4, 1 << 20), frame(9, 5)]
        {
            let (line, mut other) = pair(LONG);
            other.write_all(&bytes).unwrap();
            assert_eq!(receive(&line, 5, LONG).unwrap_err(), "it sent something that is no message", "{bytes:?}");
        }
    }

    #[test]
    fn waits_end() {
        let (line, other) = pair(LONG);
        assert_eq!(receive(&line, 1, Duration::from_millis(30)).unwrap_err(), "it has not come within 0 s");
        drop((line, other));
        let (line, other) = pair(Duration::from_millis(30));
        assert!(receive(&line, 1, LONG).unwrap_err().starts_with("nothing was heard of it for 0 s"));
        // As does that for somebody who takes nothing.
        let rounds = (0..1000).find_map(|_| line.send(Tag::Data, &[0; 1 << 20]).err());
        assert!(rounds.unwrap().what.starts_with("nothing was heard"));
        assert!(line.send(Tag::Data, &[]).unwrap_err().what.contains("closed"), "what was cut off is not gone on with");
        drop(other);
    }
}
