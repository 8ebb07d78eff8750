//! How a command that did not succeed ends: what is printed, and with which exit code.
//!
//! Contract: every failure prints one message, unless the command has already told all. Not here: the messages.

use std::fmt;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use crate::terminal::{self, StdoutClosed};

/// The exit code of wrong usage.
pub(crate) const WRONG_USAGE: u8 = 2;
const FAILED: u8 = 1;
/// What shells report for a program that Ctrl-C ended.
pub(crate) const INTERRUPTED: u8 = 130;
/// What a process leaves to the one that speaks for it: a launcher ends the others as soon as one has gone with an error.
const GRACE: Duration = Duration::from_millis(500);

/// The command line asks for something that does not make sense; arguments that clap alone cannot judge.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

/// The command failed and its output already says how.
#[derive(Debug)]
pub(crate) struct Told;

/// Ctrl-C ended the work before it was done.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed, as the output says")
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Told {}
impl std::error::Error for Interrupted {}

/// A usage error.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Prints the failure and gives its exit code. Output that nobody reads any more is no failure.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<StdoutClosed>() {
        return ExitCode::SUCCESS;
    }
    if error.is::<Interrupted>() {
        return ExitCode::from(INTERRUPTED);
    }
    if terminal::is_silent() {
        thread::sleep(GRACE);
    }
    if !error.is::<Told>() {
        terminal::print_error(&error.to_string());
    }
    ExitCode::from(if error.is::<Usage>() { WRONG_USAGE } else { FAILED })
}
