//! A run beside something that matters more: a server starts it for a job, and its users must not notice.
//!
//! Contract: whoever started the run says when to stop by closing its stdin, and says so by ending too.

use std::{fs, io, sync::atomic::Ordering, thread};

use super::training::STOP;

/// The lowest priority there is; a processor that nobody else wants is the run's all the same.
#[cfg(unix)]
const LOWEST: i32 = 19;

/// Gives way to every other program, and ends behind the step under way when stdin ends. To be called before there are other
/// threads: those that begin later do as this one.
pub(super) fn give_way() {
    // Where the system does not let a run be modest, it runs all the same.
    #[cfg(unix)]
    let _ = rustix::process::nice(LOWEST);
    // When memory runs out, this is to end and not the server.
    #[cfg(target_os = "linux")]
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    thread::spawn(|| {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        STOP.store(true, Ordering::Relaxed);
    });
}
