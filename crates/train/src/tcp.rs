//! Ranks over TCP, as `torchrun` starts them: rank 0 listens, the others connect to it, and all that they say goes by way of it.
//!
//! Contract: sums are taken in order of rank; ranks wait for each other asleep and not for ever, and one that is lost ends all, by name. Who
//! reaches the port and knows this protocol can pose as a rank: nothing is secret, nothing is signed. Not here: what is said.

mod beat;
mod hello;
mod line;
mod meeting;
mod start;

use std::{
    net::TcpListener,
    panic::resume_unwind,
    sync::{Arc, mpsc},
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use self::{
    beat::Beat,
    line::{BEATS, Line, Tag, Trouble, Wait},
    start::Reception,
};
use crate::{error::Error, ranks::Ranks};

pub use meeting::Meeting;

/// Bytes of a frame of data, at the most; another thread's signs of life wait for so much.
const PART_BYTES: usize = 1 << 20;
/// Numbers of such a frame.
const PART: usize = PART_BYTES / size_of::<f32>();
/// Bytes of a message, at the most: what no rank has to say.
const MESSAGE_BYTES: u64 = 1 << 32;
/// How long a rank that ends waits for the others to have read what it said last.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// Until all have come, at the start.
    pub start: Duration,
    /// For a rank that is busy. The others wait twice as long for rank 0, which tells them who does not come.
    pub work: Duration,
    /// For any sign of life.
    pub silence: Duration,
}

/// All ranks that were started together.
pub struct Tcp {
    rank: usize,
    count: usize,
    /// To all other ranks in order, of rank 0; to rank 0, of any other.
    lines: Vec<Arc<Line>>,
    waits: Waits,
    /// Before `lines` end.
    beat: Option<Beat>,
}

/// What ranks come together for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Gather = 0,
    Sum = 1,
}

impl Tcp {
    /// Rank 0 of `count`, when all others have come to `listener`, with the same `job` ([`Meeting`]) and version.
    ///
    /// # Errors
    /// When one stays away or cannot be taken.
    pub fn first(listener: TcpListener, count: usize, job: &str, waits: Waits) -> Result<Tcp, Error> {
        let beat = Beat::new(waits.silence / BEATS).map_err(|error| Error::lost(format!("no thread: {error}")))?;
        let mut reception = Reception { count, job, waits, beat: &beat, lines: vec![None; count.saturating_sub(1)] };
        let outcome = reception.receive(&listener);
        let lines = reception.lines.into_iter().flatten().collect();
        let tcp = Tcp { rank: 0, count, lines, waits, beat: Some(beat) };
        match outcome {
            Ok(()) => Ok(tcp),
            Err(trouble) => {
                tcp.tell(&trouble);
                Err(Error::NotMet { what: format!("rank {}: {}", trouble.rank, trouble.what) })
            }
        }
    }

    /// Another rank, when rank 0 has taken it.
    ///
    /// # Errors
    /// When that is not found, or does not take it.
    pub fn other(meeting: &Meeting, rank: usize, waits: Waits) -> Result<Tcp, Error> {
        let line = Arc::new(start::call(meeting, rank, waits)?);
        let beat = Beat::new(waits.silence / BEATS).map_err(|error| Error::lost(format!("no thread: {error}")))?;
        beat.add(&line);
        Ok(Tcp { rank, count: meeting.count, lines: vec![line], waits, beat: Some(beat) })
    }

    /// Returns when all ranks have come here for the same, with the lengths that each has brought. Nothing long is sent before, so that a
    /// rank that is busy holds up no connection.
    fn meet(&self, kind: Kind, len: usize) -> Result<Vec<u64>, Trouble> {
        let len = len as u64;
        let mut lens = vec![0; 8 * self.count];
        if self.rank > 0 {
            let wait = Wait::of(self.waits.work * 2);
            self.lines[0].send(Tag::Call, &[&[kind as u8][..], &len.to_le_bytes()].concat())?;
            self.lines[0].receive(Tag::Go, &mut lens, wait)?;
        } else {
            let wait = Wait::of(self.waits.work);
            lens[..8].copy_from_slice(&len.to_le_bytes());
            for line in &self.lines {
                let mut call = [0; 9];
                line.receive(Tag::Call, &mut call, wait)?;
                let its = u64::from_le_bytes(call[1..].try_into().unwrap_or_default());
                let is_due = match kind {
                    Kind::Gather => its <= MESSAGE_BYTES,
                    Kind::Sum => its == len,
                };
                if call[0] != kind as u8 || !is_due {
                    return Err(line.trouble("it does something else than rank 0"));
                }
                lens[8 * line.rank..][..8].copy_from_slice(&call[1..]);
            }
            self.lines.iter().try_for_each(|line| line.send(Tag::Go, &lens))?;
        }
        Ok(lens.as_chunks().0.iter().map(|len| u64::from_le_bytes(*len)).collect())
    }

    fn gathered(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Trouble> {
        let lens = self.meet(Kind::Gather, own.len())?;
        let mut all: Vec<Vec<u8>> = vec![Vec::new(); self.count];
        all[self.rank] = own.to_vec();
        if self.rank > 0 {
            send_message(&self.lines[0], own)?;
            for rank in (0..self.count).filter(|rank| *rank != self.rank) {
                all[rank] = self.message(&self.lines[0], lens[rank])?;
            }
        } else {
            for line in &self.lines {
                all[line.rank] = self.message(line, lens[line.rank])?;
            }
            for line in &self.lines {
                let others = all.iter().enumerate().filter(|(rank, _)| *rank != line.rank);
                others.map(|(_, message)| message).try_for_each(|message| send_message(line, message))?;
            }
        }
        Ok(all)
    }

    /// A part of something long.
    fn data(&self, line: &Line, part: &mut [u8]) -> Result<(), Trouble> {
        line.receive(Tag::Data, part, Wait::of(self.waits.work))
    }

    /// A message of this length; memory is taken as it comes.
    fn message(&self, line: &Line, len: u64) -> Result<Vec<u8>, Trouble> {
        let mut message = Vec::new();
        let mut left = usize::try_from(len).map_err(|_| line.trouble("its message is longer than memory"))?;
        while left > 0 {
            let (size, start) = (left.min(PART_BYTES), message.len());
            message.resize(start + size, 0);
            self.data(line, &mut message[start..])?;
            left -= size;
        }
        Ok(message)
    }

    /// Rank 0's part of a sum: of each part of the numbers it adds those of the others as they come, in order of rank; threads send the
    /// parts that are done, while the next ones come.
    fn sum_first(&self, numbers: &mut [f32]) -> Result<(), Trouble> {
        thread::scope(|scope| {
            let send = |line: &Arc<Line>| {
                let (sender, sums) = mpsc::channel::<&[f32]>();
                let line = line.clone();
                let send =
                    move || sums.into_iter().try_for_each(|part| line.send(Tag::Data, bytemuck::cast_slice(part)));
                (sender, scope.spawn(send))
            };
            let (senders, threads): (Vec<_>, Vec<_>) = self.lines.iter().map(send).unzip();
            let mut found = vec![0.0; PART.min(numbers.len())];
            let added = numbers.chunks_mut(PART).try_for_each(|sums| {
                let found = &mut found[..sums.len()];
                for line in &self.lines {
                    self.data(line, bytemuck::cast_slice_mut(found))?;
                    sums.iter_mut().zip(&*found).for_each(|(sum, number)| *sum += number);
                }
                // A thread that has ended says why.
                let sums: &[f32] = sums;
                senders.iter().for_each(|sender| _ = sender.send(sums));
                Ok(())
            });
            drop(senders);
            // All of them end: who takes nothing for too long is lost.
            let sent: Vec<_> = threads.into_iter().map(joined).collect();
            added.and(sent.into_iter().collect())
        })
    }

    /// Another rank's part: a thread sends its numbers, part by part, and sums come back in their place.
    fn sum_other(&self, numbers: &mut [f32]) -> Result<(), Trouble> {
        let line = &self.lines[0];
        thread::scope(|scope| {
            let (sender, sent) = mpsc::channel::<&mut [f32]>();
            let thread = scope.spawn(move || {
                for part in numbers.chunks_mut(PART) {
                    line.send(Tag::Data, bytemuck::cast_slice(part))?;
                    if sender.send(part).is_err() {
                        break;
                    }
                }
                Ok(())
            });
            let mut parts = sent.into_iter();
            let found = parts.try_for_each(|part| self.data(line, bytemuck::cast_slice_mut(part)));
            if found.is_err() {
                // The thread may be sending to somebody who takes nothing any more.
                line.cut();
            }
            drop(parts);
            found.and(joined(thread))
        })
    }

    /// A trouble as an error, of which the others are told.
    fn known<T>(&self, found: Result<T, Trouble>) -> Result<T, Error> {
        found.map_err(|trouble| {
            self.tell(&trouble);
            let trouble = if self.rank > 0 && !trouble.is_hearsay { self.reason(trouble) } else { trouble };
            trouble.error(self.count)
        })
    }

    /// Rank 0 tells the others who is lost.
    fn tell(&self, trouble: &Trouble) {
        if self.rank == 0 {
            self.lines.iter().filter(|line| line.rank != trouble.rank).for_each(|line| line.tell(trouble));
        }
    }

    /// Why rank 0 has gone, if it has said so: that may lie behind what could not be sent to it.
    fn reason(&self, trouble: Trouble) -> Trouble {
        match self.lines[0].receive(Tag::Lost, &mut [], Wait::of(FAREWELL)) {
            Err(told) if told.is_hearsay => told,
            _ => trouble,
        }
    }
}

fn send_message(line: &Line, message: &[u8]) -> Result<(), Trouble> {
    message.chunks(PART_BYTES).try_for_each(|part| line.send(Tag::Data, part))
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

impl Drop for Tcp {
    fn drop(&mut self) {
        drop(self.beat.take());
        // Who panics cannot say anything; that its connections close is enough.
        if thread::panicking() {
            return;
        }
        self.lines.iter().for_each(|line| line.finish());
        let wait = Wait::of(FAREWELL);
        self.lines.iter().for_each(|line| line.drain(wait));
    }
}

impl Ranks for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.known(self.gathered(own))
    }

    /// All numbers go to rank 0 once, and all sums from it to every other rank, both at a time: as much for each of the others as a ring
    /// would send, and for rank 0 so much for each of them.
    fn sum(&self, numbers: &mut [f32]) -> Result<(), Error> {
        self.known(self.meet(Kind::Sum, numbers.len()).and_then(|_| match self.rank {
            0 => self.sum_first(numbers),
            _ => self.sum_other(numbers),
        }))
    }
}
