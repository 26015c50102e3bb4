//! What an agent is told.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use forebay_engines::remote::ObserveSettings;
use forebay_proto::tls::TlsFiles;
use forebay_registry::Registry;
use forebay_types::{EngineName, Role};

use crate::{command::ChunkBudget, restart::RestartPolicy};

/// Everything that decides how an agent behaves.
#[derive(Clone)]
pub struct Options {
    /// The engine's name, one of its own in the fleet. It survives restarts.
    pub engine: EngineName,
    /// The engine's command, as after `--`.
    pub command: Vec<String>,
    /// What the engine may be asked to do.
    pub role: Role,
    /// What operators wrote on it; at most 64.
    pub labels: BTreeMap<String, String>,
    /// Where agents keep their state. The next agent of this engine must be given the same.
    pub state_folder: PathBuf,
    /// Where gateways are found.
    pub registry: Arc<dyn Registry>,
    /// What to show to gateways, and whom to believe.
    pub tls: Option<TlsFiles>,
    /// Gateways on other hosts may be dialled without TLS: the engine's key and the fleet's hash key then travel readable.
    pub insecure: bool,
    /// How gateways reach this host: a name or an address. `127.0.0.1` where they are all on this host.
    pub advertised_host: String,
    /// What the engine listens on, unless its command says so. By default the advertised host if that is an address, and
    /// all addresses if it is a name.
    pub listen_host: Option<String>,
    /// Where an engine listens whose command does not tell (`http://127.0.0.1:PORT`).
    pub url: Option<String>,
    /// Whether the host has a GPU. By default looked for under `/dev`.
    pub gpu: Option<bool>,
    /// Configure the transfer of KV between engines.
    pub transfer: bool,
    /// Tokens of prefill in one step; `None` leaves the engine's own default.
    pub chunk_budget: Option<ChunkBudget>,
    /// Folder with `tokenizer.json`, where it is not the model's.
    pub tokenizer: Option<PathBuf>,
    /// The hub's cache on this host, in which a model's name leads to its folder.
    pub hub_cache: Option<PathBuf>,
    /// The environment that the engine inherits, to see what the user has set there.
    pub environment: BTreeMap<String, String>,
    /// When a dead engine is started again.
    pub restart: RestartPolicy,
    /// Bounds of waiting.
    pub limits: Limits,
    /// How the engine is watched while it serves.
    pub observe: ObserveSettings,
    /// Repeat the engine's log lines in the agent's own log, at level `info`, target `engine`.
    pub echo: bool,
}

/// How long an agent waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For running requests, before an engine is ended.
    pub drain_max: Duration,
    /// For an engine that was told to end; then it is killed.
    pub stop_max: Duration,
    /// For an engine to be ready; then it is killed and started again.
    pub start_max: Duration,
    /// For a running engine to answer again; then it is killed and started again.
    pub hang_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            drain_max: Duration::from_secs(120),
            stop_max: Duration::from_secs(30),
            // Weights of a large model from a cold disk.
            start_max: Duration::from_secs(3_600),
            hang_max: Duration::from_secs(60),
        }
    }
}

impl Options {
    /// For an engine on this host alone, with defaults for everything that need not be said.
    pub fn new(
        engine: EngineName,
        command: Vec<String>,
        state_folder: PathBuf,
        registry: Arc<dyn Registry>,
    ) -> Self {
        Self {
            engine,
            command,
            role: Role::Both,
            labels: BTreeMap::new(),
            state_folder,
            registry,
            tls: None,
            insecure: false,
            advertised_host: "127.0.0.1".to_owned(),
            listen_host: None,
            url: None,
            gpu: None,
            transfer: true,
            chunk_budget: None,
            tokenizer: None,
            hub_cache: None,
            environment: BTreeMap::new(),
            restart: RestartPolicy::default(),
            limits: Limits::default(),
            observe: ObserveSettings::default(),
            echo: false,
        }
    }

    /// What the engine is told to listen on.
    pub(crate) fn listens_on(&self) -> String {
        let advertised = &self.advertised_host;
        let address = || advertised.parse::<std::net::IpAddr>().is_ok();
        match &self.listen_host {
            Some(host) => host.clone(),
            None if advertised == "localhost" => "127.0.0.1".to_owned(),
            None if address() => advertised.clone(),
            None => "0.0.0.0".to_owned(),
        }
    }

    /// Whether there is a GPU.
    pub(crate) fn has_gpu(&self) -> bool {
        let devices = ["/dev/nvidiactl", "/dev/kfd"];
        self.gpu.unwrap_or_else(|| devices.iter().any(|device| std::path::Path::new(device).exists()))
    }
}

impl std::fmt::Debug for Options {
    /// Without the environment, which holds secrets, and the command, which may.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("engine", &self.engine)
            .field("role", &self.role)
            .field("state_folder", &self.state_folder)
            .field("advertised_host", &self.advertised_host)
            .finish_non_exhaustive()
    }
}
