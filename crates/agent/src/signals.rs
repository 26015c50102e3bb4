//! What signals mean to an agent.
//!
//! | signal | without `--stop-engine` | with `--stop-engine` |
//! | --- | --- | --- |
//! | SIGTERM | the agent ends, the engine serves on | drain, end the engine, end the agent |
//! | SIGINT (Ctrl-C) | drain, end the engine, end the agent | the same |
//! | SIGTERM or SIGINT once more | the wait is cut short: first the drain's, then the engine's own time to end | the same |
//! | SIGHUP | nothing: a closed terminal ends neither | the same |
//! | SIGUSR1, SIGUSR2 | passed on to the engine's process | the same |
//! | SIGKILL, a crash | the engine serves on | the same |
//!
//! SIGTERM is what service managers and upgrades send, and a serving engine is worth more than its agent: 150 s of
//! start-up and a warm cache. systemd units need `KillMode=process` for that, or systemd ends the engine itself. SIGINT is
//! what a person at a terminal sends, who expects nothing to stay.

use std::io;

use rustix::process::Signal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::Command;

/// Commands that wait. A second signal of a kind says nothing new.
const COMMANDS_MAX: usize = 4;

/// Listens for signals from now on and turns them into commands, for as long as somebody reads them. Within a Tokio runtime.
///
/// # Errors
/// The signals cannot be listened for.
pub fn commands(stop_engine: bool) -> io::Result<mpsc::Receiver<Command>> {
    let on_term = if stop_engine { Command::Stop } else { Command::Leave };
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut user1 = signal(SignalKind::user_defined1())?;
    let mut user2 = signal(SignalKind::user_defined2())?;
    let (sender, commands) = mpsc::channel(COMMANDS_MAX);
    tokio::spawn(async move {
        loop {
            let command = tokio::select! {
                _ = term.recv() => on_term,
                _ = interrupt.recv() => Command::Stop,
                _ = user1.recv() => Command::Signal(Signal::USR1),
                _ = user2.recv() => Command::Signal(Signal::USR2),
                _ = hang_up.recv() => {
                    tracing::info!("the terminal is gone; agent and engine go on");
                    continue;
                }
                () = sender.closed() => return,
            };
            if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(command) {
                return;
            }
        }
    });
    Ok(commands)
}
