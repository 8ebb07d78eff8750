//! How ranks find each other: rank 0 takes calls at an address that all of them know, the others call until they are taken.
//!
//! Contract: both have an end; whoever calls and is no rank of this job is left alone, and holds up nobody. Not here: which address that is
//! (`meeting`), what is said then (`hello`, `line`).

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    Waits,
    beat::Beat,
    hello::{Answer, Hello, MOST_BYTES},
    line::{Line, Trouble},
    meeting::Meeting,
};
use crate::error::Error;

/// How long somebody who has connected may take to say who it is, and rank 0 to answer. Both do at once, unless a machine stands still.
const WORD: Duration = Duration::from_secs(30);
/// How long a machine may take to take a call.
const RING: Duration = Duration::from_secs(3);
/// Callers that may have said nothing yet; the oldest is given up for another one.
const MOST_CALLERS: usize = 256;
/// The longest version that is shown.
const VERSION_BYTES: usize = 32;
/// Between two looks at the door.
const LOOK: Duration = Duration::from_millis(5);

/// Somebody who has connected to rank 0.
struct Caller {
    stream: TcpStream,
    said: Vec<u8>,
    since: Instant,
}

enum Heard {
    /// Not all of a hello yet.
    Part,
    Hello(Hello),
    /// No rank, or one that has gone.
    Nobody,
}

impl Caller {
    fn listen(&mut self) -> Heard {
        let mut bytes = [0; MOST_BYTES + 1];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Heard::Nobody,
            Ok(count) => self.said.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Heard::Nobody,
        }
        match Hello::read(&self.said) {
            Ok(Some(hello)) => Heard::Hello(hello),
            Ok(None) if self.since.elapsed() < WORD => Heard::Part,
            _ => Heard::Nobody,
        }
    }

    /// An answer that ends it; one that cannot be sent at once is lost with a caller who is.
    fn dismiss(mut self, answer: &Answer) {
        let _ = self.stream.write_all(&answer.bytes());
    }
}

/// The other ranks of a job that rank 0 has taken so far.
pub(super) struct Reception<'a> {
    pub(super) count: usize,
    pub(super) job: &'a str,
    pub(super) waits: Waits,
    pub(super) beat: &'a Beat,
    /// By rank, without rank 0.
    pub(super) lines: Vec<Option<Arc<Line>>>,
}

impl Reception<'_> {
    /// Takes calls until all ranks have called.
    ///
    /// # Errors
    /// When one stays away, or has another version, or two are the same.
    pub(super) fn receive(&mut self, listener: &TcpListener) -> Result<(), Trouble> {
        let started = Instant::now();
        let mut callers: Vec<Caller> = Vec::new();
        let told = |rank: usize, what: String| Trouble { rank, what, is_hearsay: false };
        listener.set_nonblocking(true).map_err(|error| told(0, format!("it cannot listen: {error}")))?;
        loop {
            // Of those that are many it takes some, and hears these first.
            for _ in 0..MOST_CALLERS {
                let Ok((stream, _)) = listener.accept() else { break };
                if stream.set_nonblocking(true).is_ok() {
                    callers.push(Caller { stream, said: Vec::new(), since: Instant::now() });
                }
            }
            callers.drain(..callers.len().saturating_sub(MOST_CALLERS));
            for mut caller in std::mem::take(&mut callers) {
                match caller.listen() {
                    Heard::Part => callers.push(caller),
                    Heard::Hello(hello) => self.judge(caller, &hello)?,
                    Heard::Nobody => {}
                }
            }
            // One that has gone again may come again.
            self.lines.iter_mut().for_each(|line| drop(line.take_if(|line| line.is_closed())));
            let Some(missing) = self.lines.iter().position(Option::is_none) else { return Ok(()) };
            if started.elapsed() > self.waits.start {
                let seconds = self.waits.start.as_secs();
                let place = listener.local_addr().map_or_else(|_| "its address".to_owned(), |place| place.to_string());
                return Err(told(missing + 1, format!("it has not come to {place} within {seconds} s")));
            }
            thread::sleep(LOOK);
        }
    }

    fn judge(&mut self, mut caller: Caller, hello: &Hello) -> Result<(), Trouble> {
        let own = Hello::of(0, self.job);
        if hello.job != own.job {
            caller.dismiss(&Answer::OtherJob(own.job));
            return Ok(());
        }
        let rank = hello.rank;
        let is_taken = |line: &Option<Arc<Line>>| line.as_ref().is_some_and(|line| !line.is_closed());
        let why = if hello.version != own.version {
            let its = if is_version(&hello.version) { &hello.version } else { "of an unreadable version" };
            Some(format!("it is QwenKit {its}, and rank 0 is QwenKit {}", own.version))
        } else if rank == 0 || rank >= self.count || is_taken(&self.lines[rank - 1]) {
            Some("two processes are this rank, or it is none of the job: each needs a RANK of its own".to_owned())
        } else {
            None
        };
        if let Some(what) = why {
            caller.dismiss(&Answer::Refused(what.clone()));
            return Err(Trouble { rank, what, is_hearsay: false });
        }
        // A few bytes go into an empty buffer at once. Who has gone meanwhile calls again.
        if caller.stream.write_all(&Answer::Welcome.bytes()).is_ok()
            && let Ok(line) = Line::new(rank, caller.stream, self.waits.silence)
        {
            let line = Arc::new(line);
            self.beat.add(&line);
            self.lines[rank - 1] = Some(line);
        }
        Ok(())
    }
}

/// Whether a text of somebody unknown can be shown as a version.
fn is_version(text: &str) -> bool {
    (1..=VERSION_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Calls rank 0 until it takes this rank.
///
/// # Errors
/// When it is not found in time, or refuses.
pub(super) fn call(meeting: &Meeting, rank: usize, waits: Waits) -> Result<Line, Error> {
    let (started, mut pause) = (Instant::now(), Duration::from_millis(50));
    let hello = Hello::of(rank, &meeting.job).bytes();
    loop {
        let places = meeting.places();
        let mut why =
            places.as_ref().map_or_else(ToString::to_string, |_| format!("`{}` has no address", meeting.host));
        for (i, place) in places.into_iter().flatten().enumerate() {
            let found = match knock(place, &hello) {
                Ok((Answer::Welcome, stream)) => {
                    let line = Line::new(0, stream, waits.silence);
                    return line.map_err(|error| Error::lost(format!("rank 0 is lost: {error}")));
                }
                Ok((Answer::Refused(what), _)) => return Err(Error::OfRank { rank, count: meeting.count, what }),
                Ok((Answer::OtherJob(job), _)) => {
                    Err(format!("another job is there: {job}; this one: {}", meeting.job))
                }
                Err(what) => Ok(what),
            };
            // The first place is where rank 0 should be; behind it another job alone says something new.
            match found {
                Err(what) => why = format!("{place}: {what}"),
                Ok(what) if i == 0 => why = format!("{place}: {what}"),
                Ok(_) => {}
            }
        }
        if started.elapsed() + pause > waits.start {
            let what = format!("rank {rank} has not found rank 0 within {} s ({why})", waits.start.as_secs());
            return Err(Error::NotMet { what });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Calls at one place, and hears what is answered there.
fn knock(place: SocketAddr, hello: &[u8]) -> Result<(Answer, TcpStream), String> {
    let mut stream = TcpStream::connect_timeout(&place, RING).map_err(|error| error.to_string())?;
    // A system may give a caller the very port that it calls, which then answers itself.
    if stream.local_addr().is_ok_and(|own| own == place) {
        return Err("nobody listens there".to_owned());
    }
    let since = Instant::now();
    let set = stream.set_write_timeout(Some(WORD)).and_then(|()| stream.set_read_timeout(Some(WORD)));
    set.and_then(|()| stream.write_all(hello)).map_err(|error| error.to_string())?;
    let mut said = Vec::new();
    loop {
        // Byte by byte: frames may follow.
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1..) => said.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) => return Err("who is there hangs up".to_owned()),
            Err(error) => return Err(format!("who is there does not answer ({error})")),
        }
        match Answer::read(&said) {
            Ok(Some(answer)) => return Ok((answer, stream)),
            Ok(None) if since.elapsed() < WORD => {}
            _ => return Err("who is there is no rank of QwenKit".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_short_and_printable() {
        for text in [env!("CARGO_PKG_VERSION"), "0.0.0", "1.0.0-rc.1+a", &"1".repeat(32)] {
            assert!(is_version(text), "{text}");
        }
        for text in ["", "1.0 beta", "1.0\x1b[2J", "1.0\0", "1.0\r", "1.\u{e9}", &"1".repeat(33)] {
            assert!(!is_version(text), "{text:?}");
        }
    }
}
