//! The engine's thread and its handle: commands in, events out, one loop over a scheduler.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
    mpsc::{Receiver, Sender, TryRecvError, channel},
};
use std::{
    thread::{self, JoinHandle},
    time::Instant,
};

use qwenkit_tensor::SeqId;

use crate::{
    error::Error,
    request::{Event, Request},
    runner::Runner,
    scheduler::Scheduler,
};

/// Everything that can be said to the loop.
enum Command {
    Submit { id: SeqId, request: Box<Request>, events: Sender<Timed>, taken: Sender<Result<(), Error>> },
    Cancel(SeqId),
    Stop,
}

/// A running engine. Dropping it ends the loop, and every answer with it.
pub struct Engine {
    commands: Sender<Command>,
    next: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

/// An event and when it happened, which is not when it is heard.
type Timed = (Instant, Event);

/// The events of one request. Dropping it cancels the request.
pub struct Stream {
    events: Receiver<Timed>,
    canceller: Canceller,
}

/// Ends one request from anywhere; its last event says `Cancelled`.
#[derive(Clone)]
pub struct Canceller {
    id: SeqId,
    commands: Arc<Sender<Command>>,
}

impl Engine {
    /// Starts the loop over `scheduler` on a thread of its own.
    pub(crate) fn start<R: Runner + Send + 'static>(scheduler: Scheduler<R>) -> Result<Engine, Error> {
        let (commands, received) = channel();
        let spawned = thread::Builder::new().name("qwenkit-engine".into()).spawn(move || run(scheduler, &received));
        let thread = Some(spawned.map_err(|reason| Error::Thread { reason })?);
        Ok(Engine { commands, next: AtomicU64::new(0), thread })
    }

    /// Hands a request in.
    ///
    /// # Errors
    /// When the request can never be served, or the engine has stopped.
    pub fn submit(&self, request: Request) -> Result<Stream, Error> {
        let id = SeqId(self.next.fetch_add(1, Ordering::Relaxed));
        let (sender, events) = channel();
        let (taken, answer) = channel();
        let command = Command::Submit { id, request: Box::new(request), events: sender, taken };
        self.commands.send(command).map_err(|_| Error::Stopped)?;
        answer.recv().map_err(|_| Error::Stopped)??;
        Ok(Stream { events, canceller: Canceller { id, commands: Arc::new(self.commands.clone()) } })
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

impl Stream {
    /// The next event, with the moment at which it happened; waits for it.
    ///
    /// # Errors
    /// When the engine has stopped before the request's `Finished`.
    pub fn recv(&self) -> Result<(Instant, Event), Error> {
        self.events.recv().map_err(|_| Error::Stopped)
    }

    /// A handle that ends this request.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.canceller.cancel();
    }
}

impl Canceller {
    /// Ends the request after the token that is being computed.
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
            Ok(Command::Submit { id, request, events, taken }) => {
                let listener = Box::new(move |event| events.send((Instant::now(), event)).is_ok());
                let result = scheduler.submit(id, *request, listener);
                // Whoever asked may have gone; the stream's end cancels the request then.
                let _ = taken.send(result);
            }
            Ok(Command::Cancel(id)) => scheduler.cancel(id),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => scheduler.step(),
        }
    }
}
