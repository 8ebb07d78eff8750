//! Ctrl-C: it ends the answer that is being given; pressed again, or between answers, the program.
//!
//! Not here: Ctrl-C while a line is being typed, which the line editor takes itself.

use std::sync::{Mutex, PoisonError};

use qwenkit_engine::Canceller;

use crate::failure::INTERRUPTED;

/// The answer being given. Taken out by the first Ctrl-C, so that the second finds none.
static CURRENT: Mutex<Option<Canceller>> = Mutex::new(None);

/// From now on Ctrl-C is handled here.
///
/// # Errors
/// When the system refuses the handler.
pub(crate) fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| match set(None) {
        Some(answer) => answer.cancel(),
        None => std::process::exit(i32::from(INTERRUPTED)),
    })
    .map_err(|error| anyhow::anyhow!("cannot set up Ctrl-C: {error}"))
}

/// While this lives, Ctrl-C ends the answer.
pub(crate) struct Interruptible(());

/// Makes Ctrl-C end this answer.
pub(crate) fn guard(answer: Canceller) -> Interruptible {
    set(Some(answer));
    Interruptible(())
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(answer: Option<Canceller>) -> Option<Canceller> {
    std::mem::replace(&mut *CURRENT.lock().unwrap_or_else(PoisonError::into_inner), answer)
}
