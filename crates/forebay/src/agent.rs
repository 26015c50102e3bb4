//! `forebay agent`: beside one engine, on its host.
//!
//! In: flags, the engine's command, signals. Out: a running [`forebay_agent`]. Start at [`run`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, anyhow, bail};
use forebay_agent::{Command, Exit as AgentExit, Limits, Options};
use forebay_proto::tls::TlsFiles;
use forebay_registry::{Etcd, EtcdLocation, Join, JoinSettings, Registry, SystemResolver, parse_join};
use forebay_types::EngineName;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{cli::AgentArgs, exit::Exit, serve::entropy};

/// Signals that wait to be acted on.
const COMMANDS_MAX: usize = 16;

/// Runs the agent until it is told to end; or ends a running one, with `--stop-engine` alone.
///
/// # Errors
/// What kept it from starting.
pub(crate) async fn run(args: &AgentArgs, environment: &BTreeMap<String, String>) -> anyhow::Result<Exit> {
    let name = engine_name(args)?;
    let state_folder = state_folder(args, environment)?;
    if args.command.is_empty() {
        forebay_agent::stop_engine(&state_folder, &name, Limits::default()).await?;
        return Ok(Exit::Ok);
    }
    let tls = match (&args.cluster_ca, &args.cluster_cert, &args.cluster_key) {
        (Some(ca), Some(cert), Some(key)) => Some(TlsFiles::read(ca, Some((cert, key)))?),
        _ => None,
    };
    let mut options = Options::new(name, args.command.clone(), state_folder, registry(args)?);
    options.role = args.role.into();
    options.labels = labels(&args.label)?;
    options.tls = tls;
    options.insecure = args.insecure;
    options.advertised_host = args.advertise.clone();
    options.url = args.url.clone();
    options.transfer = !args.no_transfer;
    options.tokenizer = args.tokenizer.clone();
    options.hub_cache = environment
        .get("HF_HUB_CACHE")
        .map(PathBuf::from)
        .or_else(|| environment.get("HOME").map(|home| Path::new(home).join(".cache/huggingface/hub")));
    options.environment = environment.clone();
    options.echo = args.echo;

    let (sender, commands) = mpsc::channel(COMMANDS_MAX);
    let signals = tokio::spawn(pass_signals(Signals::new()?, sender, args.stop_engine));
    let exit = forebay_agent::run(options, commands).await;
    signals.abort();
    match exit? {
        AgentExit::Left => tracing::info!("agent ends; its engine serves on, and the next agent finds it"),
        AgentExit::Stopped => tracing::info!("agent and engine have ended"),
    }
    Ok(Exit::Ok)
}

fn engine_name(args: &AgentArgs) -> anyhow::Result<EngineName> {
    if let Some(name) = &args.name {
        return Ok(name.as_str().into());
    }
    if args.command.is_empty() {
        bail!("say which engine: `forebay agent --stop-engine --name NAME`");
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let port = args.command.windows(2).find(|pair| pair[0] == "--port").map(|pair| pair[1].clone());
    let port = port
        .or_else(|| args.command.iter().find_map(|word| word.strip_prefix("--port=").map(ToOwned::to_owned)));
    Ok(port.map_or_else(|| host.clone(), |port| format!("{host}-{port}")).into())
}

fn state_folder(args: &AgentArgs, environment: &BTreeMap<String, String>) -> anyhow::Result<PathBuf> {
    let under = |name: &str| environment.get(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    args.state_folder
        .clone()
        .or_else(|| under("XDG_STATE_HOME").map(|state| state.join("forebay/agents")))
        .or_else(|| under("HOME").map(|home| home.join(".local/state/forebay/agents")))
        .ok_or_else(|| anyhow!("neither XDG_STATE_HOME nor HOME is set: give `--state-folder`"))
}

fn registry(args: &AgentArgs) -> anyhow::Result<Arc<dyn Registry>> {
    if let Some(url) = &args.registry {
        let location = EtcdLocation::parse(url)?;
        return Ok(Arc::new(Etcd::open(location.settings(entropy())?)?));
    }
    let join = args.join.as_deref().context("give `--join HOST:PORT`")?;
    Ok(Arc::new(Join::new(parse_join(join)?, Arc::new(SystemResolver), JoinSettings::default())?))
}

fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let one = |text: &String| {
        let (key, value) =
            text.split_once('=').ok_or_else(|| anyhow!("`{text}` is no label; write KEY=VALUE"))?;
        Ok((key.to_owned(), value.to_owned()))
    };
    texts.iter().map(one).collect()
}

/// The signals that an agent acts on.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }
}

/// Ctrl-C means the engine too, as it would without an agent; SIGTERM means it only with `--stop-engine`, so that a service
/// manager can restart the agent alone. Others go to the engine.
async fn pass_signals(mut signals: Signals, commands: mpsc::Sender<Command>, stop_engine: bool) {
    use rustix::process::Signal as Number;
    loop {
        let command = tokio::select! {
            _ = signals.terminate.recv() => if stop_engine { Command::Stop } else { Command::Leave },
            _ = signals.interrupt.recv() => Command::Stop,
            _ = signals.hangup.recv() => Command::Signal(Number::HUP),
            _ = signals.user1.recv() => Command::Signal(Number::USR1),
            _ = signals.user2.recv() => Command::Signal(Number::USR2),
        };
        if commands.send(command).await.is_err() {
            return;
        }
    }
}
