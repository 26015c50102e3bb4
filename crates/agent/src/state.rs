//! What an agent leaves behind so that the next one finds its engine.
//!
//! In and out: [`State`], one JSON file for each engine, in a folder that only the agent's user can read. Start at
//! [`EngineFolder::lock`], then [`EngineFolder::read`] and [`EngineFolder::write`].
//!
//! Invariants: one agent at a time has an engine's folder, by a lock that its death releases; a file is replaced as a whole
//! or not at all; what cannot be read is put aside with a sentence and never guessed at.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use forebay_proto::Secret;
use forebay_types::{EngineName, Incarnation};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    command::{Ports, Program},
    process::Identity,
};

/// The shape of [`State`]. It rises when an older agent would misread a file.
pub const STATE_FORMAT: u32 = 1;
/// Bytes of a state file that are read.
const STATE_BYTES_MAX: u64 = 1 << 20;
/// See [`EngineFolder::stop_request`].
pub(crate) const STOP_REQUEST: &str = "stop";
/// Bytes of a folder's name.
const FOLDER_NAME_BYTES_MAX: usize = 200;

/// One engine's life, as its agent knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_FORMAT`] of the writer.
    pub format: u32,
    /// Of the writer's program.
    pub agent_version: String,
    /// Whose state it is.
    pub engine: EngineName,
    /// The highest incarnation so far; while a process is there, that process's.
    pub incarnation: Incarnation,
    /// The first port of each use in the last life; the next one takes them again if they are free.
    #[serde(default)]
    pub last_ports: Ports,
    /// The life that is under way.
    pub life: Option<LifeState>,
}

/// A life that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeState {
    /// Absent in the instant before the process is started.
    pub process: Option<Identity>,
    /// The incarnation under which the process was started; that of [`State`] is higher after a lapse.
    pub started_as: Incarnation,
    /// As the user wrote it.
    pub command: Vec<String>,
    /// Whose program it is.
    pub program: Program,
    /// As this host reaches it.
    pub local_url: String,
    /// As gateways reach it.
    pub advertised_url: String,
    /// What it asks its clients for.
    #[serde(with = "secret_text")]
    pub key: Option<Secret>,
    /// The key is this incarnation's own.
    pub key_fences: bool,
    /// The first port of each use.
    pub ports: Ports,
    /// Folder or name of the model, as the command has it.
    pub model: Option<String>,
    /// When it was started, in milliseconds since 1970, for people.
    pub started_unix_ms: u64,
    /// When its server's process began, in milliseconds since 1970, as it says itself.
    #[serde(default)]
    pub server_began_ms: Option<u64>,
    /// It takes nothing new, and why.
    #[serde(default)]
    pub draining: Option<String>,
    /// Sentences for operators about its command.
    #[serde(default)]
    pub notes: Vec<String>,
}

mod secret_text {
    use forebay_proto::Secret;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        secret: &Option<Secret>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        secret.as_ref().map(Secret::expose).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Secret>, D::Error> {
        Ok(Option::<String>::deserialize(deserializer)?.map(Secret::new))
    }
}

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent has it.
    #[error("another agent{} has engine {engine}: end that one first, or give this one another name", process(*.pid))]
    Held {
        /// Which.
        engine: EngineName,
        /// The other agent's number, if it could be read.
        pid: Option<i32>,
    },
    /// A file of the future.
    #[error(
        "{} was written by a newer agent ({version}), whose engine may be running: run that version, or end the engine \
         with it",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its writer.
        version: String,
    },
    /// The name cannot be a folder's.
    #[error("an engine's name has 1 to {FOLDER_NAME_BYTES_MAX} bytes for the agent; `{name}` has not")]
    Name {
        /// What was given.
        name: String,
    },
    /// The folder cannot be used.
    #[error("the agent's state in {} cannot be used", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

fn process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// What [`EngineFolder::read`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the first agent of this engine.
    Nothing,
    /// This.
    State(Box<State>),
    /// Something that is no state of this engine. It was put aside; the sentence says where and what that means.
    PutAside(String),
}

/// One engine's folder below the agents' state folder.
#[derive(Debug)]
pub struct EngineFolder {
    engine: EngineName,
    path: PathBuf,
    /// Held open for the lock on it.
    _lock: File,
}

impl EngineFolder {
    /// Where an engine's folder is, locked or not.
    ///
    /// # Errors
    /// The name cannot be a folder's.
    pub fn path_of(root: &Path, engine: &EngineName) -> Result<PathBuf, StateError> {
        let mut name = String::new();
        for byte in engine.as_str().bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => name.push(char::from(byte)),
                b'.' if !name.is_empty() => name.push('.'),
                other => _ = write!(name, "%{other:02x}"),
            }
        }
        if name.is_empty() || name.len() > FOLDER_NAME_BYTES_MAX {
            return Err(StateError::Name { name: engine.as_str().chars().take(80).collect() });
        }
        Ok(root.join(name))
    }

    /// Makes the folder if it is not there, and takes it for this agent.
    ///
    /// # Errors
    /// Another agent has it, or it cannot be written.
    pub fn lock(root: &Path, engine: &EngineName) -> Result<Self, StateError> {
        let path = Self::path_of(root, engine)?;
        let io = |cause| StateError::Io { path: path.clone(), cause };
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(io)?;
        fs::set_permissions(&path, Permissions::from_mode(0o700)).map_err(io)?;
        let mut options = File::options();
        let mut lock = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(io)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(StateError::Held { engine: engine.clone(), pid: read_pid(&mut lock) });
            }
            Err(error) => return Err(io(error.into())),
        }
        let mut number = || -> io::Result<()> {
            lock.set_len(0)?;
            lock.rewind()?;
            lock.write_all(std::process::id().to_string().as_bytes())
        };
        number().map_err(io)?;
        Ok(Self { engine: engine.clone(), path, _lock: lock })
    }

    /// The agent that has an engine's folder now; `None` if none has.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn holder(root: &Path, engine: &EngineName) -> Result<Option<i32>, StateError> {
        let path = Self::path_of(root, engine)?;
        let mut lock = match File::open(path.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(StateError::Io { path, cause }),
        };
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(read_pid(&mut lock)),
            Err(error) => Err(StateError::Io { path, cause: error.into() }),
        }
    }

    /// Where the engine's log is written.
    pub fn log(&self) -> PathBuf {
        self.path.join("engine.log")
    }

    /// Where the log before it lies.
    pub fn earlier_log(&self) -> PathBuf {
        self.path.join("engine.log.1")
    }

    /// Where a key is put for engines that read it from a file.
    pub fn secret_file(&self) -> PathBuf {
        self.path.join("engine.yaml")
    }

    /// Whose presence tells an agent that is told to leave to end the engine too.
    pub fn stop_request(&self) -> PathBuf {
        self.path.join(STOP_REQUEST)
    }

    fn state_file(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// What an earlier agent left.
    ///
    /// # Errors
    /// The file is there and cannot be read, or is a newer agent's.
    pub fn read(&self) -> Result<Found, StateError> {
        let path = self.state_file();
        let text = match read_bounded(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(cause) => return Err(StateError::Io { path, cause }),
        };
        match understand(&text) {
            Ok(state) if state.engine == self.engine => Ok(Found::State(Box::new(state))),
            Ok(state) => self.put_aside(&format!("it is of engine {}", state.engine)),
            Err(Misread::Newer(version)) => Err(StateError::Newer { path, version }),
            Err(Misread::Garbled(why)) => self.put_aside(&why),
        }
    }

    fn put_aside(&self, why: &str) -> Result<Found, StateError> {
        let (from, to) = (self.state_file(), self.path.join("state.json.unusable"));
        fs::rename(&from, &to).map_err(|cause| StateError::Io { path: from.clone(), cause })?;
        Ok(Found::PutAside(format!(
            "{} cannot be used ({why}); it was moved to {} and a new engine is started: if an engine of an earlier agent \
             still runs, end it by hand",
            from.display(),
            to.display()
        )))
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, state: &State) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(state).expect("a state is plain data");
        self.replace(&self.state_file(), &text)
    }

    /// Writes the file from which an engine reads its key.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_secret(&self, secret: &Secret) -> Result<(), StateError> {
        self.replace(&self.secret_file(), secret.expose().as_bytes())
    }

    /// Written beside it, made durable, then put in its place.
    fn replace(&self, path: &Path, text: &[u8]) -> Result<(), StateError> {
        let beside = path.with_extension("new");
        let write = || -> io::Result<()> {
            let _ = fs::remove_file(&beside);
            let mut file = File::options().create_new(true).write(true).mode(0o600).open(&beside)?;
            file.write_all(text)?;
            file.sync_all()?;
            fs::rename(&beside, path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|cause| StateError::Io { path: path.to_owned(), cause })
    }
}

fn read_pid(lock: &mut File) -> Option<i32> {
    let mut text = String::new();
    lock.rewind().ok()?;
    lock.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(STATE_BYTES_MAX + 1).read_to_end(&mut text)?;
    Ok(text)
}

enum Misread {
    Newer(String),
    Garbled(String),
}

/// What every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    agent_version: String,
}

fn understand(text: &[u8]) -> Result<State, Misread> {
    let garbled =
        |error: serde_json::Error| Misread::Garbled(format!("it is not what an agent writes: {error}"));
    if text.len() as u64 > STATE_BYTES_MAX {
        return Err(Misread::Garbled(format!("it is larger than {STATE_BYTES_MAX} bytes")));
    }
    let head: Head = serde_json::from_slice(text).map_err(garbled)?;
    if head.format > STATE_FORMAT {
        return Err(Misread::Newer(head.agent_version));
    }
    serde_json::from_slice(text).map_err(garbled)
}

/// Ports that the lives of all engines below `root` have, except `but`'s.
pub fn ports_of_others(root: &Path, but: &EngineName) -> Vec<u16> {
    let folders = fs::read_dir(root).into_iter().flatten().flatten();
    let states =
        folders.filter_map(|folder| understand(&read_bounded(&folder.path().join("state.json")).ok()?).ok());
    let lives = states.filter(|state| state.engine != *but).filter_map(|state| state.life);
    lives.flat_map(|life| life.ports.into_values()).collect()
}

#[cfg(test)]
mod tests;
