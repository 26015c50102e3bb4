//! The agent: one engine, from its start to its end, over as many lives as it takes.
//!
//! In: [`Options`], and [`Command`]s from whoever handles signals. Out: an [`Exit`]. Start at [`run`]; how a life begins is
//! in [`begin`], what happens during it in [`follow`], how it is ended in [`end`].

mod begin;
mod end;
mod follow;

use std::{sync::Arc, time::Duration};

use forebay_proto::{DataPlane, EngineState, Progress, limits::LAST_WORDS_LINES_MAX};
use forebay_types::Role;
use parking_lot::Mutex;
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    board::{Board, LAST_WORDS_MAX},
    command::{CommandError, EngineCommand},
    entropy,
    feed::FeedLimits,
    gateways::{LinkStates, keep_links},
    incarnation::Minter,
    keys::FleetKey,
    link::Shared,
    logs::LogRing,
    options::Options,
    progress::{Ending, lacks_nixl, last_words},
    restart::{Death, History},
    state::{EngineFolder, State, StateError},
    tokenizer::Source,
};
use begin::Life;

/// What an agent can be told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End the agent and leave the engine as it is; the next agent finds it.
    Leave,
    /// Drain the engine, end it, then end the agent. Said again, the wait is cut short.
    Stop,
    /// Pass this signal on to the engine.
    Signal(Signal),
}

/// How an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The engine serves on.
    Left,
    /// The engine has ended too.
    Stopped,
}

/// Why an agent cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The engine's command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The engine's program cannot be started.
    #[error("cannot start `{program}`")]
    Start {
        /// Its first word.
        program: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A port, a log.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        cause: std::io::Error,
    },
}

/// How an agent stands, for whoever runs it in the same process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// How the links to gateways stand.
    pub links: LinkStates,
}

/// Runs an agent until it is told to end. `commands` is dropped for [`Command::Leave`].
///
/// Within a Tokio runtime. Dropping the future is the same as the agent's sudden death: the engine serves on.
///
/// # Errors
/// It cannot begin, or the engine's program cannot be started at all.
pub async fn run(options: Options, commands: mpsc::Receiver<Command>) -> Result<Exit, AgentError> {
    run_with_status(options, commands, watch::Sender::new(Status::default())).await
}

/// As [`run`], and says how it stands.
///
/// # Errors
/// As [`run`].
pub async fn run_with_status(
    options: Options,
    commands: mpsc::Receiver<Command>,
    status: watch::Sender<Status>,
) -> Result<Exit, AgentError> {
    let mut agent = Agent::new(options, commands)?;
    // Ended with this function: aborted when the set is dropped.
    let mut tasks = JoinSet::new();
    let (states, mut news) = watch::channel(LinkStates::new());
    tasks.spawn(keep_links(agent.shared.clone(), agent.options.registry.watch(), states));
    tasks.spawn(async move {
        while news.changed().await.is_ok() {
            let links = news.borrow_and_update().clone();
            status.send_modify(|status| status.links = links);
        }
    });
    let exit = agent.live().await?;
    if exit == Exit::Stopped {
        // For the last words to leave.
        sleep_until(Instant::now() + LAST_WORDS_MAX).await;
    }
    Ok(exit)
}

/// One engine's agent.
struct Agent {
    options: Options,
    command: EngineCommand,
    folder: EngineFolder,
    shared: Arc<Shared>,
    tokenizer: watch::Sender<Source>,
    commands: mpsc::Receiver<Command>,
    drains: mpsc::Receiver<String>,
    history: History,
    started: Instant,
    /// What is written down of this engine.
    state: State,
    /// KV transfer is to be configured; given up where the engine cannot.
    transfer: bool,
    /// Sentences for operators that are the agent's own.
    notes: Vec<String>,
}

impl Agent {
    fn new(options: Options, commands: mpsc::Receiver<Command>) -> Result<Self, AgentError> {
        let command = begin::read_command(&options)?;
        let folder = EngineFolder::lock(&options.state_folder, &options.engine)?;
        let (state, note) = begin::read_state(&folder, &options.engine)?;
        // A request of a time when no agent was there to take it.
        let _ = std::fs::remove_file(folder.stop_request());
        let (drains_sender, drains) = mpsc::channel(1);
        let (tokenizer, source) = watch::channel(Source::Unknown("no engine was started yet".to_owned()));
        let shared = Arc::new(Shared {
            engine: options.engine.clone(),
            role: options.role,
            labels: options.labels.clone(),
            board: Board::new(FeedLimits::default()),
            key: FleetKey::new(),
            minter: Mutex::new(Minter::after(state.incarnation)),
            log: LogRing::default(),
            tokenizer: source,
            tls: options.tls.clone(),
            insecure: options.insecure,
            drains: drains_sender,
        });
        Ok(Self {
            command,
            folder,
            shared,
            tokenizer,
            commands,
            drains,
            history: History::new(options.restart),
            started: Instant::now(),
            state,
            transfer: options.transfer,
            notes: note.into_iter().collect(),
            options,
        })
    }

    /// Life after life.
    async fn live(&mut self) -> Result<Exit, AgentError> {
        let mut life = match self.adopt()? {
            Some(life) => life,
            None => {
                let prepared = self.prepare()?;
                self.present(&prepared.words[0], "the process starts");
                self.launch(&prepared)?
            }
        };
        loop {
            let ending = match self.follow(&mut life).await {
                Followed::Left => return Ok(Exit::Left),
                Followed::Stop(why) => {
                    self.stop(&mut life, &why).await?;
                    return Ok(Exit::Stopped);
                }
                Followed::Died(ending) => ending,
            };
            life = match self.rise_again(life, ending).await? {
                Risen::Life(life) => *life,
                Risen::Exit(exit) => return Ok(exit),
            };
        }
    }

    /// Says that a life is over, waits, starts the next one.
    async fn rise_again(&mut self, mut life: Life, ending: Ending) -> Result<Risen, AgentError> {
        let words = self.bury(&mut life, ending)?;
        let death =
            Death { at: self.started.elapsed(), lived: life.began.elapsed(), was_ready: life.was_ready };
        drop(life);
        let mut wait = self.history.died(death, entropy::share());
        loop {
            let until = Instant::now() + wait.wait;
            let again = format!("it starts again in {} s; {words}", wait.wait.as_secs_f64().ceil());
            tracing::error!(engine = %self.options.engine, reason = %words, deaths = wait.deaths, wait = ?wait.wait, "the engine died");
            self.notes = wait.poisoned.iter().cloned().collect();
            // For the last words to reach the gateways before the next life begins.
            if let Some(exit) = self.wait_until(Instant::now() + LAST_WORDS_MAX).await {
                return Ok(Risen::Exit(exit));
            }
            let prepared = self.prepare()?;
            self.present(&prepared.words[0], wait.poisoned.as_deref().unwrap_or(&again));
            if let Some(exit) = self.wait_until(until).await {
                self.shared.board.died("the agent ends before the engine was started again", Vec::new());
                return Ok(Risen::Exit(exit));
            }
            match self.launch(&prepared) {
                Ok(life) => return Ok(Risen::Life(Box::new(life))),
                Err(error @ AgentError::Start { .. }) => {
                    // It could be started once: perhaps its file is just being replaced.
                    tracing::error!(engine = %self.options.engine, error = &error as &dyn std::error::Error, "no new life");
                    self.shared.board.died(&error.to_string(), Vec::new());
                    let at = self.started.elapsed();
                    let death = Death { at, lived: Duration::ZERO, was_ready: false };
                    wait = self.history.died(death, entropy::share());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The end of a life, for gateways and for the next agent. Answers with the last words.
    fn bury(&mut self, life: &mut Life, ending: Ending) -> Result<String, AgentError> {
        self.read_log(life);
        life.finish_log(&self.shared.log);
        let tail = self.shared.log.tail(LAST_WORDS_LINES_MAX);
        let mut words = last_words(ending, tail.iter().map(|line| &**line));
        if let Some(why) = &life.killed_because {
            words = why.clone();
        }
        let no_nixl = lacks_nixl(tail.iter().map(|line| &**line));
        if no_nixl && self.transfer && self.options.role == Role::Both {
            self.transfer = false;
            words = "NIXL is not installed beside vLLM, so it starts again without KV transfer: `pip install nixl` mends it"
                .to_owned();
        }
        self.shared.board.died(&words, tail.iter().map(ToString::to_string).collect());
        self.state.life = None;
        self.folder.write(&self.state)?;
        Ok(words)
    }

    /// Waits between two lives, or is told to end.
    async fn wait_until(&mut self, until: Instant) -> Option<Exit> {
        loop {
            tokio::select! {
                () = sleep_until(until) => return None,
                command = self.commands.recv() => match command.unwrap_or(Command::Leave) {
                    // There is no engine to leave.
                    Command::Leave | Command::Stop => return Some(Exit::Stopped),
                    Command::Signal(_) => {}
                },
                Some(_) = self.drains.recv() => {}
            }
        }
    }

    /// Gateways are told of a life that begins.
    fn present(&self, program: &str, sentence: &str) {
        let Some(life) = &self.state.life else {
            return;
        };
        let kind = life.program.dialect().unwrap_or_else(|| program.rsplit('/').next().unwrap_or(program));
        let url = life.advertised_url.clone();
        let data_plane = DataPlane { url, api_key: life.key.clone() };
        let progress = Progress { state: EngineState::Loading, sentence: sentence.to_owned() };
        self.shared.board.begin(self.state.incarnation, kind.to_owned(), data_plane, progress);
        if let Some(why) = &life.draining {
            self.shared.board.drain(why.clone());
        }
    }
}

/// How following a life ended.
enum Followed {
    /// The process is gone.
    Died(Ending),
    /// The agent is to end alone.
    Left,
    /// Both are to end; why.
    Stop(String),
}

/// What came after a death.
enum Risen {
    Life(Box<Life>),
    Exit(Exit),
}
