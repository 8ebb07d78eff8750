//! What ranks say when they connect: who they are and what job they are of, and whether rank 0 takes them.
//!
//! Contract: of a stranger's bytes no more than a hello's length is read, and nothing is believed before its first bytes are right. Not
//! here: connections and waits (`start`).

/// The first bytes of a hello and of an answer, in the machine's own order of bytes: ranks of another order could not read numbers. The
/// last digit is of the protocol, this crate's `line` and `tcp`.
const HELLO: u64 = u64::from_le_bytes(*b"QwenRnk1");
/// Another one than a hello's, so that nobody takes an echo for an answer.
const ANSWER: u64 = u64::from_le_bytes(*b"QwenAns1");

/// Bytes before the text of either.
const HEAD_BYTES: usize = 10;
/// Bytes of either, at the most.
pub(super) const MOST_BYTES: usize = HEAD_BYTES + 1024;

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) rank: usize,
    pub(super) version: String,
    pub(super) job: String,
}

impl Hello {
    /// A rank of this program.
    pub(super) fn of(rank: usize, job: &str) -> Hello {
        Hello { rank, version: env!("CARGO_PKG_VERSION").to_owned(), job: job.to_owned() }
    }

    /// As it travels.
    pub(super) fn bytes(&self) -> Vec<u8> {
        framed(HELLO, &format!("{}\n{}\n{}", self.rank, self.version, self.job))
    }

    /// Out of what has come so far: nothing while it is not whole.
    ///
    /// # Errors
    /// When that is no hello.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Hello>, NotOurs> {
        let Some(text) = unframed(HELLO, bytes)? else { return Ok(None) };
        let mut parts = text.splitn(3, '\n');
        let mut part = || parts.next().ok_or(NotOurs);
        let rank = part()?.parse().map_err(|_| NotOurs)?;
        Ok(Some(Hello { rank, version: part()?.to_owned(), job: part()?.to_owned() }))
    }
}

/// What rank 0 says to that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is a rank like others.
    Welcome,
    /// It is of another job than this one; its own may be elsewhere.
    OtherJob(String),
    /// The job cannot go on with it, for this reason.
    Refused(String),
}

impl Answer {
    /// As it travels.
    pub(super) fn bytes(&self) -> Vec<u8> {
        match self {
            Answer::Welcome => framed(ANSWER, "welcome\n"),
            Answer::OtherJob(job) => framed(ANSWER, &format!("other job\n{job}")),
            Answer::Refused(why) => framed(ANSWER, &format!("refused\n{why}")),
        }
    }

    /// As `Hello::read`.
    ///
    /// # Errors
    /// When that is no answer.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Answer>, NotOurs> {
        let Some(text) = unframed(ANSWER, bytes)? else { return Ok(None) };
        match text.split_once('\n') {
            Some(("welcome", _)) => Ok(Some(Answer::Welcome)),
            Some(("other job", job)) => Ok(Some(Answer::OtherJob(job.to_owned()))),
            Some(("refused", why)) => Ok(Some(Answer::Refused(why.to_owned()))),
            _ => Err(NotOurs),
        }
    }
}

/// Bytes of somebody who is no rank.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotOurs;

fn framed(magic: u64, text: &str) -> Vec<u8> {
    // Whole characters, as half of one is no text.
    let text = &text.as_bytes()[..text.floor_char_boundary(MOST_BYTES - HEAD_BYTES)];
    [&magic.to_ne_bytes()[..], &(text.len() as u16).to_le_bytes(), text].concat()
}

fn unframed(magic: u64, bytes: &[u8]) -> Result<Option<&str>, NotOurs> {
    let magic = magic.to_ne_bytes();
    let known = bytes.len().min(magic.len());
    if bytes[..known] != magic[..known] {
        return Err(NotOurs);
    }
    let Some(len) = bytes.get(8..HEAD_BYTES) else { return Ok(None) };
    let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
    let text = &bytes[HEAD_BYTES..];
    // Nobody says more before the other has said something.
    if len > MOST_BYTES - HEAD_BYTES || text.len() > len {
        return Err(NotOurs);
    }
    if text.len() < len {
        return Ok(None);
    }
    str::from_utf8(text).map(Some).map_err(|_| NotOurs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos_and_answers_come_back_and_are_not_mistaken_for_each_other() {
        let hello = Hello { rank: 3, version: "1.2.3".to_owned(), job: "run a\nb, 4 ranks".to_owned() };
        let bytes = hello.bytes();
        for len in 0..bytes.len() {
            assert_eq!(Hello::read(&bytes[..len]), Ok(None), "{len} bytes");
        }
        assert_eq!(Hello::read(&bytes), Ok(Some(hello)));
        assert_eq!(Answer::read(&bytes), Err(NotOurs), "an echo");
        for answer in [Answer::Welcome, Answer::OtherJob("x".to_owned()), Answer::Refused("why\nnot".to_owned())] {
            assert_eq!(Answer::read(&answer.bytes()), Ok(Some(answer)));
        }
        let long = Answer::Refused("x".repeat(9000)).bytes();
        assert!(long.len() == MOST_BYTES && Answer::read(&long).is_ok());
        // The last character would lie on both sides of the end.
        let why = format!("x{}", "\u{e9}".repeat(9000));
        let long = Answer::Refused(why.clone()).bytes();
        let Ok(Some(Answer::Refused(cut))) = Answer::read(&long) else { panic!("{long:?}") };
        assert!(long.len() == MOST_BYTES - 1 && why.starts_with(&cut));
    }

    #[test]
    fn strangers_are_known_by_their_first_bytes() {
        let (bytes, own) = (Hello::of(1, "job").bytes(), HELLO.to_ne_bytes());
        let with_len = |len: u16, text: &[u8]| [&own[..], &len.to_le_bytes(), text].concat();
        for stranger in [
            b"G".to_vec(),
            b"GET / HTTP/1.1\r\n".to_vec(),
            [&bytes[..], b"more"].concat(),
            with_len(u16::MAX, b""),
            with_len(2, &[0xFF, 0xFE]),
            with_len(3, b"1\n2"),
            with_len(5, b"x\n1\n2"),
        ] {
            assert_eq!(Hello::read(&stranger), Err(NotOurs), "{stranger:?}");
        }
        let swapped = [&HELLO.swap_bytes().to_ne_bytes()[..], &bytes[8..]].concat();
        assert_eq!(Hello::read(&swapped), Err(NotOurs), "a machine of another order of bytes");
    }
}
