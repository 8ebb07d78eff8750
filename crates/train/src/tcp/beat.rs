//! Signs of life to other ranks while this one computes, from a thread of its own.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::line::Line;

/// Of those that still count: a connection that nobody else holds is closed.
type Lines = Arc<Mutex<Vec<Weak<Line>>>>;

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
                let lines = {
                    let mut lines = all.lock().unwrap_or_else(PoisonError::into_inner);
                    lines.retain(|line| line.strong_count() > 0);
                    lines.clone()
                };
                lines.iter().filter_map(Weak::upgrade).for_each(|line| line.beat());
            }
        })?;
        Ok(Beat { lines, stop: Some(stop), thread: Some(thread) })
    }

    /// Tells this one too from now on, for as long as somebody else holds it.
    pub(super) fn add(&self, line: &Arc<Line>) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(line));
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

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        thread,
        time::Instant,
    };

    use super::*;

    #[test]
    fn a_line_that_nobody_holds_is_closed_and_forgotten() {
        let limit = Duration::from_secs(60);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        other.set_read_timeout(Some(limit)).unwrap();
        let line = Arc::new(Line::new(1, listener.accept().unwrap().0, limit).unwrap());
        let beat = Beat::new(Duration::from_millis(5)).unwrap();
        beat.add(&line);
        // Two signs of life: it is told again and again while it is held.
        other.read_exact(&mut [1; 18]).unwrap();
        drop(line);
        other.read_to_end(&mut Vec::new()).unwrap();
        let started = Instant::now();
        while !beat.lines.lock().unwrap().is_empty() {
            assert!(started.elapsed() < limit, "it is still there");
            thread::yield_now();
        }
    }
}
