//! An engine of this host from outside its agent: `forebay agent --stop-engine NAME`, and its log.

use std::{io, path::Path, time::Duration};

use forebay_types::EngineName;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use crate::{
    logs::{LogRing, LogTail},
    options::Limits,
    process::EngineProcess,
    state::{EngineFolder, Found, LifeState, STOP_REQUEST, StateError},
};

/// Between two looks whether the agent has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What an agent may take beyond its engine's drain and end.
const AGENT_ENDS_WITHIN: Duration = Duration::from_secs(10);

/// What became of an engine that was to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// Its agent has drained and ended it, and has ended too.
    ByItsAgent,
    /// It had no agent; it was told to end, and did.
    WithoutAgent,
    /// It did not run.
    DidNotRun,
}

/// Why an engine could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was left there is of no use.
    #[error("{0}")]
    Unusable(String),
    /// The agent does not end.
    #[error("agent {pid} of engine {engine} has not ended within {} s; it may still be draining", .within.as_secs())]
    Slow {
        /// Which.
        engine: EngineName,
        /// The agent's number.
        pid: i32,
        /// How long was waited.
        within: Duration,
    },
    /// No signal, no descriptor.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

/// Ends an engine and its agent: asks the agent, if there is one, which drains first; else ends the engine that an agent
/// left serving, without a drain, as no gateway is told.
///
/// # Errors
/// The state cannot be read, or the agent does not end.
pub async fn stop_engine(
    state_folder: &Path,
    engine: &EngineName,
    limits: Limits,
) -> Result<Stopped, StopError> {
    if let Some(pid) = EngineFolder::holder(state_folder, engine)? {
        let asked = ask_agent(state_folder, engine, pid, limits).await?;
        if asked {
            return Ok(Stopped::ByItsAgent);
        }
    }
    let folder = EngineFolder::lock(state_folder, engine)?;
    let mut state = match folder.read()? {
        Found::Nothing => return Ok(Stopped::DidNotRun),
        Found::State(state) => state,
        Found::PutAside(sentence) => return Err(StopError::Unusable(sentence)),
    };
    let Some(life) = state.life.take() else {
        return Ok(Stopped::DidNotRun);
    };
    let ran = end(&life, limits.stop_max).await?;
    folder.write(&state)?;
    Ok(if ran { Stopped::WithoutAgent } else { Stopped::DidNotRun })
}

/// False if the agent is gone by now.
async fn ask_agent(root: &Path, engine: &EngineName, pid: i32, limits: Limits) -> Result<bool, StopError> {
    let io = |what| move |cause: io::Error| StopError::Io { what, cause };
    let number = Pid::from_raw(pid).ok_or_else(|| StopError::Unusable(format!("{pid} is no process")))?;
    let Ok(agent) = pidfd_open(number, PidfdFlags::empty()) else {
        return Ok(false);
    };
    if EngineFolder::holder(root, engine)? != Some(pid) {
        return Ok(false);
    }
    let request = EngineFolder::path_of(root, engine)?.join(STOP_REQUEST);
    std::fs::write(&request, b"").map_err(io("cannot leave the request to end the engine"))?;
    pidfd_send_signal(&agent, Signal::TERM).map_err(|error| io("cannot tell the agent")(error.into()))?;
    let within = limits.drain_max + limits.stop_max + AGENT_ENDS_WITHIN;
    let gone = async {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if EngineFolder::holder(root, engine)? != Some(pid) {
                return Ok(true);
            }
        }
    };
    let slow = |_| Err(StopError::Slow { engine: engine.clone(), pid, within });
    timeout_at(Instant::now() + within, gone).await.unwrap_or_else(slow)
}

async fn end(life: &LifeState, stop_max: Duration) -> Result<bool, StopError> {
    let Some(identity) = life.process.clone().or_else(|| EngineProcess::find(life.started_as)) else {
        return Ok(false);
    };
    let adopted = EngineProcess::adopt(&identity);
    let adopted = adopted.map_err(|cause| StopError::Io { what: "the engine cannot be watched", cause })?;
    let Some(mut process) = adopted else {
        EngineProcess::sweep(&identity, life.started_as);
        return Ok(false);
    };
    process.signal(Signal::TERM);
    if timeout(stop_max, process.ended()).await.is_err() {
        process.kill();
        process.ended().await;
    }
    Ok(true)
}

/// The last `lines` lines that an engine of this host has logged, oldest first; of the life before too, if this one has
/// fewer.
///
/// # Errors
/// The engine's name cannot be a folder's, or its log cannot be read.
pub fn read_log(state_folder: &Path, engine: &EngineName, lines: usize) -> Result<Vec<String>, StateError> {
    let folder = EngineFolder::path_of(state_folder, engine)?;
    let ring = LogRing::default();
    for file in ["engine.log.1", "engine.log"] {
        let path = folder.join(file);
        // Read only: an agent may be at it.
        let mut tail = LogTail::catch_up(&path, Path::new("")).read_only();
        loop {
            let read = tail.read(|line| ring.push(line));
            if read.map_err(|cause| StateError::Io { path: path.clone(), cause })? == 0 {
                break;
            }
        }
        tail.finish(|line| ring.push(line));
    }
    Ok(ring.tail(lines).iter().map(ToString::to_string).collect())
}
