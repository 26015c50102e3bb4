//! How a life begins: a process is started, or one is found that an earlier agent started.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use forebay_engines::remote::Dialect;
use forebay_types::{EngineName, Incarnation};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use super::{Agent, AgentError};
use crate::{
    command::{EngineCommand, Ports, Prepared, Setup, event_source},
    entropy,
    logs::{self, LogRing, LogTail},
    options::Options,
    ports,
    process::EngineProcess,
    progress::Follower,
    state::{EngineFolder, Found, LifeState, STATE_FORMAT, State, ports_of_others},
    tokenizer::Source,
    watcher::{Target, Watcher},
};

/// Between two reads of the log.
const LOG_EVERY: std::time::Duration = std::time::Duration::from_millis(200);
/// Bytes of an engine's configuration file that are read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// One life of the engine, and what follows it.
pub(super) struct Life {
    pub(super) process: EngineProcess,
    pub(super) tail: LogTail,
    pub(super) log_tick: Interval,
    pub(super) follower: Follower,
    pub(super) watcher: Option<Watcher>,
    pub(super) began: Instant,
    /// It served at least once.
    pub(super) was_ready: bool,
    /// By when it must serve; then it is killed.
    pub(super) serves_by: Option<(Instant, String)>,
    /// When it is looked for again after it was given up.
    pub(super) returns_at: Option<Instant>,
    pub(super) killed_because: Option<String>,
}

impl Life {
    pub(super) fn finish_log(&mut self, ring: &LogRing) {
        self.tail.finish(|line| ring.push(line));
    }
}

/// The command, with what its configuration file sets.
pub(super) fn read_command(options: &Options) -> Result<EngineCommand, AgentError> {
    let mut command = EngineCommand::read(&options.command)?;
    if let Some(path) = command.config_path().map(str::to_owned) {
        let text = read_bounded(Path::new(&path));
        let what = "cannot read the configuration file that the engine's command names";
        command.take_config(&text.map_err(|cause| AgentError::Io { what, cause })?);
    }
    Ok(command)
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(CONFIG_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// What an earlier agent left, or the state of an engine that nobody started yet, and a sentence if something was wrong.
pub(super) fn read_state(
    folder: &EngineFolder,
    engine: &EngineName,
) -> Result<(State, Option<String>), AgentError> {
    let fresh = State {
        format: STATE_FORMAT,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: engine.clone(),
        incarnation: Incarnation(0),
        last_ports: Ports::new(),
        life: None,
    };
    match folder.read()? {
        Found::Nothing => Ok((fresh, None)),
        Found::State(state) => {
            let State { format: _, agent_version: _, engine: _, incarnation, last_ports, life } = *state;
            Ok((State { incarnation, last_ports, life, ..fresh }, None))
        }
        Found::PutAside(sentence) => {
            tracing::warn!(%engine, "{sentence}");
            Ok((fresh, Some(sentence)))
        }
    }
}

impl Agent {
    /// Finds the engine of an earlier agent, if it still runs.
    pub(super) fn adopt(&mut self) -> Result<Option<Life>, AgentError> {
        let Some(known) = self.state.life.clone() else {
            return Ok(None);
        };
        // The agent may have died between the start of the process and writing down which it is.
        let Some(identity) = known.process.clone().or_else(|| EngineProcess::find(known.started_as)) else {
            self.state.life = None;
            return Ok(None);
        };
        let what = "an engine of an earlier agent runs, and cannot be watched";
        let adopted = EngineProcess::adopt(&identity).map_err(|cause| AgentError::Io { what, cause })?;
        let Some(process) = adopted else {
            let left = EngineProcess::sweep(&identity, known.started_as);
            tracing::info!(engine = %self.options.engine, pid = identity.pid, workers_killed = left, "the engine of the earlier agent is gone");
            self.state.life = None;
            return Ok(None);
        };
        if known.command != self.options.command {
            self.notes.push(
                "the engine runs with the command of an earlier agent, which differs from the one given now: --stop-engine \
                 and a new start apply it"
                    .to_owned(),
            );
        }
        tracing::info!(engine = %self.options.engine, pid = identity.pid, incarnation = %self.state.incarnation, "adopted the engine of an earlier agent");
        self.state.life = Some(LifeState { process: Some(identity), ..known.clone() });
        self.folder.write(&self.state)?;
        let program = known.command.first().map_or("engine", String::as_str).to_owned();
        self.present(&program, "a new agent has found it");
        let tail = LogTail::catch_up(self.folder.log(), self.folder.earlier_log());
        Ok(Some(self.life(process, tail, true)))
    }

    /// Everything that a new life needs: number, key, ports, words. Written down before the process exists.
    pub(super) fn prepare(&mut self) -> Result<Prepared, AgentError> {
        let options = &self.options;
        let incarnation = self.shared.mint();
        let others = ports_of_others(&options.state_folder, &options.engine);
        let wishes = self.command.ports(options.role, &options.environment);
        let ports = ports::choose(&wishes, &self.state.last_ports, &others, entropy::random())
            .map_err(|cause| AgentError::Io { what: "no ports for the engine", cause })?;
        let (listen_host, key) = (options.listens_on(), entropy::key());
        let secret_file = self.folder.secret_file();
        let prepared = self.command.prepare(&Setup {
            role: options.role,
            gpu: options.has_gpu(),
            transfer: self.transfer,
            chunk_budget: options.chunk_budget,
            listen_host: &listen_host,
            advertised_host: &options.advertised_host,
            key: &key,
            ports: &ports,
            environment: &options.environment,
            secret_file: &secret_file.to_string_lossy(),
            url: options.url.as_deref(),
        })?;
        if let Some(secret) = &prepared.secret_file {
            self.folder.write_secret(secret)?;
        }
        self.state.incarnation = incarnation;
        self.state.last_ports = ports.clone();
        self.state.life = Some(LifeState {
            process: None,
            started_as: incarnation,
            command: options.command.clone(),
            program: self.command.program(),
            local_url: prepared.local_url.clone(),
            advertised_url: prepared.advertised_url.clone(),
            key: prepared.key.clone(),
            key_fences: prepared.key_fences,
            ports,
            model: prepared.model.clone(),
            started_unix_ms: entropy::unix_ms(),
            server_began_ms: None,
            draining: None,
            notes: prepared.notes.clone(),
        });
        Ok(prepared)
    }

    /// Starts the process that was prepared.
    pub(super) fn launch(&mut self, prepared: &Prepared) -> Result<Life, AgentError> {
        let (log, earlier) = (self.folder.log(), self.folder.earlier_log());
        logs::begin(&log, &earlier)
            .map_err(|cause| AgentError::Io { what: "no log for the engine", cause })?;
        self.folder.write(&self.state)?;
        let life = self.state.incarnation;
        let process = match EngineProcess::start(prepared, life, &log) {
            Ok(process) => process,
            Err(cause) => {
                self.state.life = None;
                self.folder.write(&self.state)?;
                return Err(AgentError::Start { program: prepared.words[0].clone(), cause });
            }
        };
        if let Some(state) = &mut self.state.life {
            state.process = Some(process.identity().clone());
        }
        if let Err(error) = self.folder.write(&self.state) {
            // Nobody would find it again.
            process.kill();
            return Err(error.into());
        }
        tracing::info!(engine = %self.options.engine, pid = process.identity().pid, incarnation = %life, "started the engine");
        for note in &prepared.notes {
            tracing::info!(engine = %self.options.engine, "{note}");
        }
        let tail = LogTail::new(log, earlier);
        Ok(self.life(process, tail, false))
    }

    fn life(&mut self, process: EngineProcess, tail: LogTail, adopted: bool) -> Life {
        let model = self.state.life.as_ref().and_then(|life| life.model.clone());
        let (told, cache) = (self.options.tokenizer.as_deref(), self.options.hub_cache.as_deref());
        self.tokenizer.send_replace(Source::find(told, model.as_deref(), cache));
        let start_max = self.options.limits.start_max;
        let mut log_tick = interval(LOG_EVERY);
        log_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let late = format!("it was not ready within {} s and was killed", start_max.as_secs());
        Life {
            process,
            tail,
            log_tick,
            follower: Follower::new(self.command.program()),
            watcher: Some(self.watch(adopted)),
            began: Instant::now(),
            was_ready: false,
            serves_by: Some((Instant::now() + start_max, late)),
            returns_at: None,
            killed_because: None,
        }
    }

    /// Watches the life that is written down. `prove`: that the one who answers is the process that was found.
    pub(super) fn watch(&self, prove: bool) -> Watcher {
        let life = self.state.life.as_ref().expect("a life is written down before it is watched");
        let target = Target {
            engine: self.options.engine.clone(),
            incarnation: self.state.incarnation,
            role: self.options.role,
            dialect: life.program.dialect().and_then(Dialect::named),
            url: life.local_url.clone(),
            advertised_host: self.options.advertised_host.clone(),
            key: life.key.clone(),
            key_is_minted: life.key_fences,
            prove_key: prove && life.key_fences,
            began_ms: life.server_began_ms.filter(|_| prove),
            observe: self.options.observe.clone(),
            events: event_source(life.program, &life.ports),
            notes: self.notes.iter().chain(&life.notes).cloned().collect(),
        };
        Watcher::start(self.shared.clone(), target)
    }
}
