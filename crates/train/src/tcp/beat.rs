//! Signs of life to other ranks while this one computes, from a thread of its own.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::line::Line;

type Lines = Arc<Mutex<Vec<Arc<Line>>>>;

/// The thread; it ends with this.
pub(super) struct Beat {
    lines: Lines,
    /// Ends the thread when it is dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Beat {
    /// Begins, with nobody to tell.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn new(interval: Duration) -> io::Result<Beat> {
        let lines = Lines::default();
        let (stop, stopped) = channel();
        let all = lines.clone();
        let thread = Builder::new().name("signs of life".to_owned()).spawn(move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // Cloned: whoever adds one does not wait for the network.
                let lines = all.lock().unwrap_or_else(PoisonError::into_inner).clone();
                lines.iter().for_each(|line| line.beat());
            }
        })?;
        Ok(Beat { lines, stop: Some(stop), thread: Some(thread) })
    }

    /// Tells this one too from now on.
    pub(super) fn add(&self, line: Arc<Line>) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: nothing of it does.
            let _ = thread.join();
        }
    }
}
