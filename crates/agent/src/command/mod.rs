//! What to add to an engine's command line so that a fleet can use it.
//!
//! In: the user's words, the role, free ports, a key. Out: the words and variables to start it with, and how to reach it.
//! Start at [`EngineCommand::read`], then [`EngineCommand::prepare`]; what each maker's engine needs is in [`vllm`],
//! [`sglang`] and [`dialect`].
//!
//! Invariants: what the user set stays as it is, in whatever form; words are only added, at the end; a command that is not
//! known is run as it is, with a note; no secret is put among the words.

mod dialect;
pub mod flags;
mod sglang;
#[cfg(test)]
mod tests;
mod vllm;

use std::collections::BTreeMap;

use forebay_engine_wire::discovery::KvSource;
use forebay_proto::Secret;
use forebay_types::Role;
use serde::{Deserialize, Serialize};

use flags::Flags;

/// Whose program a command starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// `vllm serve`, `python -m vllm.entrypoints.openai.api_server`.
    Vllm,
    /// `sglang serve`, `python -m sglang.launch_server`.
    Sglang,
    /// `forebay engine`, which speaks vLLM's dialect.
    Forebay,
    /// Anything else.
    Unknown,
}

impl Program {
    /// What an engine of this program is called: `vllm`, `sglang`; `None` where it has to be found out by asking it.
    pub fn dialect(self) -> Option<&'static str> {
        match self {
            Self::Vllm | Self::Forebay => Some("vllm"),
            Self::Sglang => Some("sglang"),
            Self::Unknown => None,
        }
    }
}

/// A user's command, understood as far as it can be.
#[derive(Debug, Clone)]
pub struct EngineCommand {
    words: Vec<String>,
    program: Program,
    /// The first word after those that name the program.
    arguments: usize,
    flags: Flags,
}

/// Why a command cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Nothing after `--`.
    #[error(
        "there is no command to run: write the engine's after `--`, as in `forebay agent -- vllm serve MODEL`"
    )]
    Empty,
    /// Nobody can tell where it will listen.
    #[error(
        "it cannot be told where `{program}` listens ({why}): say it with the agent's own --url http://127.0.0.1:PORT"
    )]
    NoEndpoint {
        /// Its first word.
        program: String,
        /// What stands in the way.
        why: &'static str,
    },
}

/// A use of ports that an engine has, and how many in a row it takes: rank `r` uses the first plus `r`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortWish {
    /// For what.
    pub purpose: Purpose,
    /// How many in a row. At least 1.
    pub count: u16,
}

/// What a port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Requests.
    Http,
    /// KV events.
    Events,
    /// KV events once more.
    Replay,
    /// NIXL's hand-shake between engines.
    SideChannel,
    /// SGLang's meeting point of prefill and decode servers.
    Bootstrap,
}

/// The first port of each use.
pub type Ports = BTreeMap<Purpose, u16>;

/// Where an engine that was told these ports publishes KV events, if it does not say so itself.
pub fn event_source(program: Program, ports: &Ports) -> Option<KvSource> {
    let (events, replay) = (ports.get(&Purpose::Events)?, ports.get(&Purpose::Replay)?);
    (program == Program::Vllm).then(|| KvSource {
        dp_rank: 0,
        events: format!("tcp://*:{events}"),
        replay: Some(format!("tcp://*:{replay}")),
        topic: vllm::TOPIC.to_owned(),
    })
}

/// What decides on the additions.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    /// What the engine may be asked to do.
    pub role: Role,
    /// There is a GPU: KV is laid out for fast hand-over.
    pub gpu: bool,
    /// Configure the transfer of KV between engines.
    pub transfer: bool,
    /// Tokens of prefill in a step; `None` leaves the engine's own default.
    pub chunk_budget: Option<ChunkBudget>,
    /// What the engine is to listen on: an address, or `0.0.0.0`.
    pub listen_host: &'a str,
    /// How other hosts reach this one.
    pub advertised_host: &'a str,
    /// The key of this incarnation.
    pub key: &'a Secret,
    /// Those that [`EngineCommand::ports`] asked for.
    pub ports: &'a Ports,
    /// What the engine will find in its environment.
    pub environment: &'a BTreeMap<String, String>,
    /// A path of which only this agent's user can read, for a program that takes its key from a file.
    pub secret_file: &'a str,
    /// Where the user says that the engine listens.
    pub url: Option<&'a str>,
}

/// How many tokens of prefill one step may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkBudget {
    /// 8,192 for prefill engines, which nobody waits for between steps; 1,024 for all that decode, whose steps then last
    /// about 30 ms and not as long as a whole prompt, for prefills that take 8 to 34 % longer.
    ByRole,
    /// So many.
    Tokens(u32),
}

impl ChunkBudget {
    fn tokens(self, role: Role) -> u32 {
        match (self, role) {
            (Self::Tokens(tokens), _) => tokens,
            (Self::ByRole, Role::Prefill) => 8_192,
            (Self::ByRole, Role::Decode | Role::Both) => 1_024,
        }
    }
}

/// How to start an engine, and how to reach it then.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Program and arguments.
    pub words: Vec<String>,
    /// Variables beyond the agent's own. They hold the key: never log them.
    pub variables: BTreeMap<String, Secret>,
    /// What [`Setup::secret_file`] must hold; absent if it is not used.
    pub secret_file: Option<Secret>,
    /// `http` or `https`, host, port: as this host reaches it.
    pub local_url: String,
    /// As gateways reach it.
    pub advertised_url: String,
    /// What it asks its clients for.
    pub key: Option<Secret>,
    /// The key was minted for this incarnation, so it fences gateways that know an earlier one.
    pub key_fences: bool,
    /// Folder or name of the model, as the command has it.
    pub model: Option<String>,
    /// Sentences for operators.
    pub notes: Vec<String>,
}

/// What grows while a command is prepared.
#[derive(Debug, Default)]
struct Additions {
    words: Vec<String>,
    variables: BTreeMap<String, Secret>,
    secret_file: Option<Secret>,
    key: Option<Secret>,
    key_fences: bool,
    notes: Vec<String>,
}

impl Additions {
    fn flag(&mut self, name: &str, value: impl Into<String>) {
        self.words.extend([name.to_owned(), value.into()]);
    }

    fn switch(&mut self, name: &str) {
        self.words.push(name.to_owned());
    }

    fn variable(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), Secret::new(value));
    }

    fn note(&mut self, sentence: impl Into<String>) {
        self.notes.push(sentence.into());
    }

    /// The engine has the user's key and not one of ours.
    fn users_key(&mut self, key: Option<&str>) {
        self.key = key.map(Secret::new);
        self.note(
            "the engine's API key is the user's own: it stays the same in every life, so it does not fence gateways that \
             know an earlier one",
        );
    }
}

impl EngineCommand {
    /// Reads a command.
    ///
    /// # Errors
    /// [`CommandError::Empty`].
    pub fn read(words: &[String]) -> Result<Self, CommandError> {
        if words.first().is_none_or(|program| program.is_empty()) {
            return Err(CommandError::Empty);
        }
        let (program, arguments) = recognise(words);
        Ok(Self { flags: Flags::read(&words[arguments..]), words: words.to_vec(), program, arguments })
    }

    /// Whose program it is.
    pub fn program(&self) -> Program {
        self.program
    }

    /// The configuration file that it names; its text goes to [`EngineCommand::take_config`].
    pub fn config_path(&self) -> Option<&str> {
        matches!(self.program, Program::Vllm | Program::Sglang).then(|| self.flags.value("config")).flatten()
    }

    /// Counts what a configuration file sets as set by the user.
    pub fn take_config(&mut self, yaml: &str) {
        self.flags.take_config(yaml);
    }

    /// The ports that it needs beyond those that the user chose.
    pub fn ports(&self, setup_role: Role, environment: &BTreeMap<String, String>) -> Vec<PortWish> {
        match self.program {
            Program::Vllm => vllm::ports(self, environment),
            Program::Sglang => sglang::ports(self, setup_role),
            Program::Forebay => dialect::ports(self),
            Program::Unknown => Vec::new(),
        }
    }

    /// The words and variables to start it with.
    ///
    /// # Errors
    /// [`CommandError::NoEndpoint`].
    pub fn prepare(&self, setup: &Setup<'_>) -> Result<Prepared, CommandError> {
        let mut additions = Additions::default();
        match self.program {
            Program::Vllm => vllm::add(self, setup, &mut additions),
            Program::Sglang => sglang::add(self, setup, &mut additions),
            Program::Forebay => dialect::add(self, setup, &mut additions),
            Program::Unknown => additions.note(format!(
                "`{}` is not a command that the agent knows: it runs as it is; KV events, transfer and keys are up to its \
                 own flags",
                self.words[0]
            )),
        }
        let (local_url, advertised_url) = self.urls(setup)?;
        if self.program == Program::Unknown {
            additions.key = self.flags.value("api-key").map(Secret::new);
        }
        let Additions { words, variables, secret_file, key, key_fences, notes } = additions;
        Ok(Prepared {
            words: self.words.iter().cloned().chain(words).collect(),
            variables,
            secret_file,
            local_url,
            advertised_url,
            key,
            key_fences,
            model: self.model(),
            notes,
        })
    }

    /// Schedulers behind one address.
    fn dp_ranks(&self) -> u16 {
        let names = ["data-parallel-size", "dp-size", "dp"];
        names.iter().find_map(|name| self.flags.number(name)).unwrap_or(1).max(1)
    }

    fn model(&self) -> Option<String> {
        let named = self.flags.value("model-path").or_else(|| self.flags.value("model")).map(str::to_owned);
        let first = || self.words.get(self.arguments).filter(|word| !word.starts_with('-')).cloned();
        match self.program {
            Program::Vllm => first().or(named),
            Program::Sglang => named.or_else(first),
            Program::Forebay | Program::Unknown => named,
        }
    }

    fn urls(&self, setup: &Setup<'_>) -> Result<(String, String), CommandError> {
        let no_endpoint = |why| CommandError::NoEndpoint { program: self.words[0].clone(), why };
        if let Some(url) = setup.url {
            let url = url.trim_end_matches('/').to_owned();
            return Ok((url.clone(), advertised(&url, setup.advertised_host)));
        }
        if self.flags.is_set("uds") {
            return Err(no_endpoint("it listens on a Unix socket"));
        }
        if self.flags.is_set("headless") {
            return Err(no_endpoint("a headless node takes no requests"));
        }
        let port = self.flags.number("port").or_else(|| setup.ports.get(&Purpose::Http).copied());
        let port: u16 = port.ok_or_else(|| no_endpoint("it has no --port that the agent could read"))?;
        let tls = ["ssl-keyfile", "ssl-certfile", "ssl-key-file"].iter().any(|flag| self.flags.is_set(flag));
        let scheme = if tls { "https" } else { "http" };
        let listens = self.flags.value("host").unwrap_or(setup.listen_host);
        let local = match listens {
            "" | "0.0.0.0" | "*" | "localhost" => "127.0.0.1",
            "::" | "[::]" => "::1",
            host => host,
        };
        let url = |host: &str| match host.contains(':') && !host.starts_with('[') {
            true => format!("{scheme}://[{host}]:{port}"),
            false => format!("{scheme}://{host}:{port}"),
        };
        Ok((url(local), url(setup.advertised_host)))
    }
}

/// `url` with another host in place of a loopback one.
fn advertised(url: &str, host: &str) -> String {
    for loopback in ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"] {
        for scheme in ["http://", "https://"] {
            if let Some(rest) = url.strip_prefix(scheme).and_then(|rest| rest.strip_prefix(loopback)) {
                let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
                return format!("{scheme}{host}{rest}");
            }
        }
    }
    url.to_owned()
}

/// The program, and where its arguments begin. What stands before it (`env`, `numactl`, `uv run`, a path) is the user's.
fn recognise(words: &[String]) -> (Program, usize) {
    let name = |word: &str| word.rsplit('/').next().unwrap_or(word).to_owned();
    for (index, word) in words.iter().enumerate() {
        let next = words.get(index + 1).map(String::as_str);
        let found = match (name(word).as_str(), next) {
            ("vllm", Some("serve")) => Some((Program::Vllm, 2)),
            ("sglang", Some("serve")) => Some((Program::Sglang, 2)),
            ("forebay", Some("engine")) => Some((Program::Forebay, 2)),
            ("-m", Some("vllm.entrypoints.openai.api_server")) => Some((Program::Vllm, 2)),
            ("-m", Some("vllm.entrypoints.cli.main")) => Some((Program::Vllm, 3)),
            ("-m", Some("sglang.launch_server")) => Some((Program::Sglang, 2)),
            _ => None,
        };
        if let Some((program, length)) = found {
            return (program, (index + length).min(words.len()));
        }
    }
    (Program::Unknown, 1)
}
