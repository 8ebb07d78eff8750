//! The engine's thread and its handle: commands in, events out, one loop over a scheduler.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
    mpsc::{Receiver, Sender, TryRecvError, channel},
};
use std::thread::{self, JoinHandle};

use qwenkit_tensor::SeqId;

use crate::{
    error::Error,
    load::{Gauges, Load},
    request::{Limits, Request},
    runner::Runner,
    scheduler::Scheduler,
    sequence::Listener,
    vision::VisionInfo,
};

/// Everything that can be said to the loop.
enum Command {
    /// Requests that came together; the first step that has one of them has all.
    Submit(Vec<(SeqId, Request, Listener)>),
    Cancel(SeqId),
    Stop,
}

/// A running engine. Dropping it ends the loop, and every answer with it.
pub struct Engine {
    commands: Sender<Command>,
    next: AtomicU64,
    limits: Limits,
    vision: Option<VisionInfo>,
    max_waiting: usize,
    gauges: Arc<Gauges>,
    thread: Option<JoinHandle<()>>,
}

/// Ends one request from anywhere; its last event says `Cancelled`.
#[derive(Clone)]
pub struct Canceller {
    id: SeqId,
    commands: Sender<Command>,
}

impl Engine {
    /// Starts the loop over `scheduler` on a thread of its own. At most `max_waiting` requests wait for their turn.
    pub(crate) fn start<R: Runner + Send + 'static>(
        scheduler: Scheduler<R>,
        max_waiting: usize,
    ) -> Result<Engine, Error> {
        let (commands, received) = channel();
        let (limits, gauges, vision) = (scheduler.limits(), scheduler.gauges(), scheduler.vision().cloned());
        let spawned = thread::Builder::new().name("qwenkit-engine".into()).spawn(move || run(scheduler, &received));
        let thread = Some(spawned.map_err(|reason| Error::Thread { reason })?);
        Ok(Engine { commands, next: AtomicU64::new(0), limits, vision, max_waiting, gauges, thread })
    }

    /// Hands requests in, all of them or none: they wait together and begin together as far as there is room. A listener
    /// hears of its request on the engine's thread, so it must be quick; it is dropped after `Finished`, or without it
    /// if the engine stops before.
    ///
    /// # Errors
    /// When one of the requests can never be served, too many wait, or the engine has stopped.
    pub fn submit(&self, requests: Vec<(Request, Listener)>) -> Result<Vec<Canceller>, Error> {
        for (request, _) in &requests {
            request.check(self.limits, self.vision.as_ref())?;
        }
        let mut load = self.gauges.lock();
        if load.waiting + requests.len() > self.max_waiting {
            return Err(Error::QueueFull { asked: requests.len(), waiting: load.waiting, most: self.max_waiting });
        }
        load.waiting += requests.len();
        drop(load);
        let first = self.next.fetch_add(requests.len() as u64, Ordering::Relaxed);
        let numbered: Vec<_> =
            (first..).map(SeqId).zip(requests).map(|(id, (request, listener))| (id, request, listener)).collect();
        let canceller = |(id, ..): &(SeqId, Request, Listener)| Canceller { id: *id, commands: self.commands.clone() };
        let cancellers = numbered.iter().map(canceller).collect();
        self.commands.send(Command::Submit(numbered)).map_err(|_| Error::Stopped)?;
        Ok(cancellers)
    }

    /// What visuals requests may have; none where absent.
    pub fn vision(&self) -> Option<&VisionInfo> {
        self.vision.as_ref()
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        self.gauges.read()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A loop that has ended already needs no command.
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the loop has been printed on its own thread.
            let _ = thread.join();
        }
    }
}

impl Canceller {
    /// Ends the request after the batch that is being computed.
    pub fn cancel(&self) {
        // An engine that has stopped has ended the request too.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

/// The loop: all commands that have come, then one step; with nothing to do it waits for a command.
fn run<R: Runner>(mut scheduler: Scheduler<R>, commands: &Receiver<Command>) {
    loop {
        let command = match scheduler.is_idle() {
            true => commands.recv().map_err(|_| TryRecvError::Disconnected),
            false => commands.try_recv(),
        };
        match command {
            Ok(Command::Submit(requests)) => {
                requests.into_iter().for_each(|(id, request, listener)| scheduler.submit(id, request, listener));
            }
            Ok(Command::Cancel(id)) => scheduler.cancel(id),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return scheduler.keep_all(),
            Err(TryRecvError::Empty) => scheduler.step(),
        }
    }
}
