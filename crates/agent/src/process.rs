//! An engine's process: started so that it outlives its agent, watched through a process descriptor, ended as a group.
//!
//! In: words, variables and a log file; or the [`Identity`] of a process that an earlier agent started. Out: its end. Start
//! at [`EngineProcess::start`] and [`EngineProcess::adopt`].
//!
//! Invariants: the process leads a group of its own, reads nothing from the terminal and writes to a file, so neither the
//! agent's death nor a closed terminal touches it; signals go through the descriptor, so never to another process that has
//! the number by now; when the leader ends, what is left of its group is killed.

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use forebay_types::Incarnation;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    command::Prepared,
    procfs::{self, LIFE_VARIABLE, boot_id, group_lives, stat},
    progress::Ending,
};

/// Which process it is, for as long as the machine keeps running and beyond: no two have the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the machine did.
    pub start_ticks: u64,
    /// Which run of the machine.
    pub boot_id: String,
}

impl Identity {
    fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start_ticks: stat(pid)?.start_ticks, boot_id: boot_id()? })
    }

    /// Whether that process still runs.
    pub fn lives(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id)
            && stat(self.pid).is_ok_and(|stat| stat.start_ticks == self.start_ticks && !stat.is_over())
    }
}

/// A running engine.
#[derive(Debug)]
pub struct EngineProcess {
    identity: Identity,
    pid: Pid,
    descriptor: AsyncFd<OwnedFd>,
    /// Absent if an earlier agent started it.
    child: Option<Child>,
    /// Known once it has ended and been collected.
    ending: Option<Ending>,
}

impl EngineProcess {
    /// Starts a life. Within a Tokio runtime.
    ///
    /// # Errors
    /// The program cannot be started, for instance because there is none of this name.
    pub fn start(prepared: &Prepared, life: Incarnation, log: &Path) -> io::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let (program, arguments) = prepared.words.split_first().expect("a prepared command has words");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        command.env(LIFE_VARIABLE, life.to_string());
        for (name, value) in &prepared.variables {
            command.env(name, value.expose());
        }
        let mut child = command.spawn()?;
        match Self::watch(child.id() as i32) {
            Ok((identity, pid, descriptor)) => {
                Ok(Self { identity, pid, descriptor, child: Some(child), ending: None })
            }
            Err(error) => {
                // A process that nobody watches must not stay.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Takes over a process that an earlier agent started. `None` if it is gone.
    ///
    /// # Errors
    /// It runs, but cannot be watched.
    pub fn adopt(identity: &Identity) -> io::Result<Option<Self>> {
        if !identity.lives() {
            return Ok(None);
        }
        match Self::watch(identity.pid) {
            // Looked at once more: the descriptor is that process's for good.
            Ok((found, pid, descriptor)) if found == *identity => {
                Ok(Some(Self { identity: found, pid, descriptor, child: None, ending: None }))
            }
            Ok(_) => Ok(None),
            Err(_) if !identity.lives() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Finds the process of a life whose agent died before it wrote down the process's number.
    pub fn find(life: Incarnation) -> Option<Identity> {
        Identity::of(procfs::leader_of(life)?).ok()
    }

    /// Ends what is left of a group whose leader is gone: an engine's workers may hold a GPU's memory without it. True if
    /// there was something that could be told to be of this life.
    pub fn sweep(identity: &Identity, life: Incarnation) -> bool {
        let ours = boot_id().is_ok_and(|boot| boot == identity.boot_id)
            && stat(identity.pid).is_err()
            && procfs::group_is_of(identity.pid, life);
        if let Some(group) = Pid::from_raw(identity.pid).filter(|_| ours) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        ours
    }

    fn watch(pid: i32) -> io::Result<(Identity, Pid, AsyncFd<OwnedFd>)> {
        let number = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let descriptor = pidfd_open(number, PidfdFlags::empty())?;
        let identity = Identity::of(pid)?;
        // Deprecated for types whose descriptor may change while it is registered; an `OwnedFd`'s cannot.
        #[allow(deprecated, reason = "the replacement is unsafe code for what `OwnedFd` guarantees")]
        let descriptor = AsyncFd::with_interest(descriptor, Interest::READABLE)?;
        Ok((identity, number, descriptor))
    }

    /// Which process it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether an earlier agent started it.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Waits for its end and kills what is left of its group. May be dropped and called again; after it has answered, it
    /// answers the same.
    pub async fn ended(&mut self) -> Ending {
        if let Some(ending) = self.ending {
            return ending;
        }
        let ending = loop {
            // The descriptor of a process becomes readable when the process ends, whoever's child it is. It cannot fail
            // before the runtime ends.
            let Ok(mut ready) = self.descriptor.readable().await else {
                return std::future::pending().await;
            };
            match Self::over(&self.identity, self.pid, &mut self.child) {
                Some(ending) => break ending,
                // Readiness may be spurious.
                None => ready.clear_ready(),
            }
        };
        self.ending = Some(ending);
        ending
    }

    /// How it ended, if it has. Kills what is left of its group while the number is not another's yet: an uncollected child
    /// keeps it, and so does a group with members.
    fn over(identity: &Identity, group: Pid, child: &mut Option<Child>) -> Option<Ending> {
        let Some(child) = child else {
            if identity.lives() {
                return None;
            }
            if stat(identity.pid).is_err() && group_lives(identity.pid) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            return Some(Ending::Unknown);
        };
        if stat(identity.pid).is_ok_and(|stat| !stat.is_over()) {
            return None;
        }
        let _ = kill_process_group(group, Signal::KILL);
        match child.try_wait() {
            Ok(Some(status)) => Some(of_status(status)),
            Ok(None) => None,
            Err(_) => Some(Ending::Unknown),
        }
    }

    /// Sends a signal to the process itself; engines pass it to their workers. An ended process is ignored.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(self.descriptor.get_ref(), signal);
    }

    /// Ends the process and its workers at once.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        if self.ending.is_none() && (self.child.is_some() || self.identity.lives()) {
            self.kill_group();
        }
    }

    fn kill_group(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }
}

fn of_status(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Code(code),
        (None, Some(signal)) => Ending::Signal(signal),
        (None, None) => Ending::Unknown,
    }
}
