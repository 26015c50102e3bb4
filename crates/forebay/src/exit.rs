//! Exit codes: what scripts may rely on. The table in `--help` is made from here.

use std::{io, process::ExitCode};

use tokio::signal::unix::Signal;

use crate::{client::ClientError, settings::problem::SettingsError};

/// Why the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All went well.
    Ok,
    /// It was tried and did not work.
    Failure,
    /// The command line or the settings are wrong; nothing was tried.
    Usage,
    /// No server answers at the address.
    Unreachable,
    /// The server answers, but does not know what was asked for.
    NotFound,
    /// Ctrl-C.
    Interrupted,
}

/// For the end of `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0    all went well
  1    it was tried and did not work
  2    the command line or the settings are wrong; nothing was tried
  3    no server answers at the address
  4    the server does not know what was asked for
  130  interrupted by Ctrl-C";

impl Exit {
    /// Classifies an error by its cause.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if let Some(exit) = error.downcast_ref::<Failed>() {
            return exit.exit;
        }
        if error.downcast_ref::<SettingsError>().is_some() {
            return Exit::Usage;
        }
        match error.downcast_ref::<ClientError>() {
            Some(ClientError::BadUrl { .. }) => Exit::Usage,
            Some(ClientError::Unreachable { .. } | ClientError::Slow { .. } | ClientError::Lost { .. }) => {
                Exit::Unreachable
            }
            Some(ClientError::Refused { status: 404, .. }) => Exit::NotFound,
            _ if is_broken_pipe(error) => Exit::Ok,
            _ => Exit::Failure,
        }
    }
}

/// What `work` comes to; `None` once Ctrl-C was pressed, which drops it and with it every request that runs.
pub(crate) async fn unless_interrupted<T>(
    interrupts: &mut Signal,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        biased;
        _ = interrupts.recv() => None,
        done = work => Some(done),
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Ok => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
            Exit::NotFound => 4,
            Exit::Interrupted => 130,
        })
    }
}

/// An error whose exit code its author knows.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub(crate) struct Failed {
    /// The code.
    pub(crate) exit: Exit,
    /// What happened and what to do.
    pub(crate) sentence: String,
}

/// Whether whoever read our output has gone, as `head` does: nothing is wrong, and nobody is left to tell.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The sentence, then a line for each cause, outermost first. A cause that is already quoted is left out.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let sentence = cause.to_string();
        if !text.contains(&sentence) {
            text.push_str("\n  cause: ");
            text.push_str(&sentence);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn errors_are_classified_by_their_cause() {
        let check = |error: anyhow::Error, expected: Exit| assert_eq!(Exit::of(&error), expected, "{error}");
        let refused = |status| ClientError::Refused { status, code: None, message: String::new() };
        check(anyhow::anyhow!("anything"), Exit::Failure);
        check(SettingsError(Vec::new()).into(), Exit::Usage);
        check(ClientError::BadUrl { url: String::new(), reason: "" }.into(), Exit::Usage);
        check(refused(404).into(), Exit::NotFound);
        check(refused(500).into(), Exit::Failure);
        check(io::Error::from(io::ErrorKind::BrokenPipe).into(), Exit::Ok);
        check(Failed { exit: Exit::NotFound, sentence: String::new() }.into(), Exit::NotFound);
        let wrapped: anyhow::Result<()> = Err(refused(404)).context("while explaining");
        check(wrapped.expect_err("an error"), Exit::NotFound);
    }
}
