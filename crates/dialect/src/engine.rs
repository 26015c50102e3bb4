//! A whole engine process from settings: model, engine, server.
//!
//! Start at [`run`], or [`EngineProcess::start`] where its addresses are needed before it serves.

use std::{
    future::Future,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use forebay_engines::{
    Driver, EngineLimits, Launch, LaunchError,
    embedded::{EmbeddedFleet, EmbeddedLauncher, GgufMetadata, GgufTokenizer, Weights},
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{Mover, SharedMemoryMover, SharedMemorySettings};
use forebay_text::{ChatTemplate, GgufVocabulary, Tokenizer};
use forebay_types::{EngineName, Incarnation, Role};
use tokio::{net::TcpListener, runtime::Handle};

use crate::{
    hand_over::KvConnector,
    options::{ApiKey, ConnectorOptions, EventOptions, HttpLimits, KvRole, ModelText},
    server::{Addresses, BindError, DialectParts, DialectServer, Ended},
};

/// Weights of `random-tiny` are the same everywhere, so that its tokens are.
const RANDOM_TINY_SEED: u64 = 1;

/// Which engine is served.
#[derive(Debug, Clone)]
pub enum EngineModel {
    /// The embedded engine with small random weights, which need no file and are the same everywhere.
    RandomTiny,
    /// The embedded engine with the weights of a GGUF file.
    Gguf(PathBuf),
    /// The simulated engine.
    Simulated {
        /// 1 is real time, 2 twice as fast, 0 unpaced.
        speed: f64,
        /// Longest sequence; the pool may hold less.
        context_tokens_max: u32,
        /// Time of a step at speed 1.
        timing: StepCoefficients,
    },
}

/// Everything that makes one engine process.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// In logs, and in the names of threads.
    pub name: String,
    /// The engine.
    pub model: EngineModel,
    /// Id that requests name; `None`: `random-tiny`, the file's stem, or `sim`.
    pub served_model_name: Option<String>,
    /// A `tokenizer.json`, a folder with one, or a GGUF file; `None`: the model's own, or bytes.
    pub tokenizer: Option<PathBuf>,
    /// Blocks, block size, step budget, queue, lease of held KV, deadline of a hand-over.
    pub limits: EngineLimits,
    /// `Authorization: Bearer`.
    pub api_key: Option<ApiKey>,
    /// KV events.
    pub events: Option<EventOptions>,
    /// Hand-over of KV.
    pub connector: Option<ConnectorOptions>,
    /// Bounds of the server.
    pub http: HttpLimits,
    /// Lets sockets that are not loopback's be open to everybody: HTTP without a key, KV events and the side channel,
    /// which know no key at all.
    pub insecure: bool,
}

impl EngineOptions {
    /// `model` on loopback with free ports, with KV events, without hand-over.
    pub fn new(model: EngineModel) -> Self {
        Self {
            name: "dialect".to_owned(),
            model,
            served_model_name: None,
            tokenizer: None,
            limits: EngineLimits::default(),
            api_key: None,
            events: Some(EventOptions::default()),
            connector: None,
            http: HttpLimits::default(),
            insecure: false,
        }
    }
}

/// Why an engine process did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure {
    /// A socket would be open to everybody.
    #[error(
        "{socket} on {address} would be open to everybody: bind it to loopback, {instead}or say `--insecure`"
    )]
    Exposed {
        /// Which.
        socket: &'static str,
        /// Where.
        address: IpAddr,
        /// What else would do, or nothing.
        instead: &'static str,
    },
    /// A setting that cannot be.
    #[error("{0}")]
    Setting(String),
    /// The weights.
    #[error("the model {path} cannot be loaded: {reason}")]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer or its chat template.
    #[error("the tokenizer cannot be used: {0}")]
    Tokenizer(String),
    /// The system refused a thread, memory or entropy.
    #[error("the system refused: {0}")]
    System(String),
    /// The engine itself.
    #[error(transparent)]
    Engine(#[from] LaunchError),
    /// The server's sockets.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// An engine and its server, ready to serve.
pub struct EngineProcess {
    server: DialectServer,
}

impl EngineProcess {
    /// Loads the model, starts the engine, binds the sockets.
    ///
    /// # Errors
    /// What kept it from starting, as a sentence for whoever set it up.
    pub async fn start(options: EngineOptions, listener: TcpListener) -> Result<Self, StartFailure> {
        check(&options, &listener)?;
        let mut key = [0; 16];
        getrandom::fill(&mut key).map_err(|error| StartFailure::System(error.to_string()))?;
        let hasher = BlockHasher::new(HashKey(key), options.limits.block_size_tokens);
        let connector = options.connector.clone().map(|options| KvConnector::new(options, Handle::current()));
        let mover: Arc<dyn Mover> = match &connector {
            Some(connector) => connector.mover(),
            None => Arc::new(
                SharedMemoryMover::new(SharedMemorySettings::default())
                    .map_err(|error| StartFailure::System(error.to_string()))?,
            ),
        };
        let (driver, text) = build(&options, hasher, mover).await?;
        let EngineOptions { api_key, events, http: limits, .. } = options;
        let parts = DialectParts { driver, hasher, text, api_key, connector, events, limits };
        Ok(Self { server: DialectServer::bind(listener, parts).await? })
    }

    /// Where it is found.
    pub fn addresses(&self) -> &Addresses {
        self.server.addresses()
    }

    /// Serves until `shutdown` resolves or the engine dies.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Ended {
        self.server.serve(shutdown).await
    }
}

/// Starts an engine process, says where it is, and serves until `shutdown` resolves or the engine dies.
///
/// # Errors
/// As [`EngineProcess::start`].
pub async fn run(
    options: EngineOptions,
    listener: TcpListener,
    ready: impl FnOnce(&Addresses),
    shutdown: impl Future<Output = ()>,
) -> Result<Ended, StartFailure> {
    let process = EngineProcess::start(options, listener).await?;
    ready(process.addresses());
    Ok(process.serve(shutdown).await)
}

fn check(options: &EngineOptions, listener: &TcpListener) -> Result<(), StartFailure> {
    let EngineLimits { blocks_total, block_size_tokens, step_tokens_max, sequences_max, .. } = options.limits;
    if [blocks_total, block_size_tokens, step_tokens_max, sequences_max].contains(&0) {
        let message = "blocks, block size, step budget and sequences must be at least 1";
        return Err(StartFailure::Setting(message.to_owned()));
    }
    if options.insecure {
        return Ok(());
    }
    let exposed = |socket, address: IpAddr, instead| match address.is_loopback() {
        true => Ok(()),
        false => Err(StartFailure::Exposed { socket, address, instead }),
    };
    if options.api_key.is_none() {
        let address = listener.local_addr().map_err(BindError::Listener)?.ip();
        exposed("HTTP without a key", address, "set a key, ")?;
    }
    options.events.as_ref().map_or(Ok(()), |events| exposed("KV events", events.bind, ""))?;
    options
        .connector
        .as_ref()
        .map_or(Ok(()), |connector| exposed("the side channel of KV", connector.bind, ""))
}

async fn build(
    options: &EngineOptions,
    hasher: BlockHasher,
    mover: Arc<dyn Mover>,
) -> Result<(Arc<dyn Driver>, ModelText), StartFailure> {
    let named = |own: &str| Arc::<str>::from(options.served_model_name.as_deref().unwrap_or(own));
    let (name, limits) = (EngineName::from(options.name.as_str()), options.limits.clone());
    let role = match options.connector.as_ref().map(|connector| connector.role) {
        Some(KvRole::Producer) => Role::Prefill,
        Some(KvRole::Consumer) => Role::Decode,
        Some(KvRole::Both) | None => Role::Both,
    };
    let mut life = [0; 8];
    getrandom::fill(&mut life).map_err(|error| StartFailure::System(error.to_string()))?;
    let (runtime, incarnation) = (Handle::current(), Incarnation(u64::from_le_bytes(life)));
    let (id, path) = match &options.model {
        EngineModel::Simulated { speed, context_tokens_max, timing } => {
            let text =
                text(tokenizer(options.tokenizer.as_deref())?.unwrap_or_else(Tokenizer::bytes), u32::MAX)?;
            let fleet = SimulatedFleet {
                model: named("sim"),
                context_tokens_max: *context_tokens_max,
                limits,
                hasher,
                mover,
                runtime,
                candidates: text.tokenizer.plain_tokens().into(),
                timing: *timing,
                speed: *speed,
            };
            return Ok((SimulatedLauncher::new(name, role, fleet).launch(incarnation).await?, text));
        }
        EngineModel::RandomTiny => (named("random-tiny"), None),
        EngineModel::Gguf(path) => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            (named(&stem), Some(path.clone()))
        }
    };
    let weights = load(path).await?;
    let vocabulary = weights.config().vocab;
    let tokenizer = match tokenizer(options.tokenizer.as_deref())? {
        Some(tokenizer) => tokenizer,
        None if weights.tokenizer().merges.is_empty() => Tokenizer::bytes(),
        None => of_gguf(weights.tokenizer())?,
    };
    if tokenizer.vocab_size() > vocabulary as usize {
        let message = format!("it knows {} tokens, the model {vocabulary}", tokenizer.vocab_size());
        return Err(StartFailure::Tokenizer(message));
    }
    let text = text(tokenizer, vocabulary)?;
    // Nobody asks an engine behind HTTP for its prior, so none is measured.
    let prior = StepCoefficients::H100_8B;
    let fleet = EmbeddedFleet { model: id, weights, limits, hasher, mover, runtime, prior };
    Ok((EmbeddedLauncher::new(name, role, fleet).launch(incarnation).await?, text))
}

async fn load(path: Option<PathBuf>) -> Result<Arc<Weights>, StartFailure> {
    let Some(path) = path else { return Ok(Weights::random_tiny(RANDOM_TINY_SEED)) };
    let loading = path.clone();
    let loaded =
        tokio::task::spawn_blocking(move || Weights::load(&loading).map_err(|error| error.to_string())).await;
    let loaded = loaded.unwrap_or_else(|panic| Err(panic.to_string()));
    loaded.map_err(|reason| StartFailure::Model { path, reason })
}

fn text(tokenizer: Tokenizer, vocabulary_tokens: u32) -> Result<ModelText, StartFailure> {
    let template =
        ChatTemplate::of(&tokenizer).map_err(|error| StartFailure::Tokenizer(error.to_string()))?;
    let template = template.unwrap_or_else(ChatTemplate::chatml);
    let stop_tokens = tokenizer.eos().into();
    Ok(ModelText { tokenizer, template, stop_tokens, vocabulary_tokens })
}

fn tokenizer(path: Option<&Path>) -> Result<Option<Tokenizer>, StartFailure> {
    let failed = |error: &dyn std::fmt::Display| StartFailure::Tokenizer(error.to_string());
    let Some(path) = path else { return Ok(None) };
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let metadata = GgufMetadata::read(path).map_err(|error| failed(&error))?;
        let vocabulary = metadata.tokenizer().map_err(|error| failed(&error))?;
        return of_gguf(&vocabulary).map(Some);
    }
    Tokenizer::from_json_file(path).map(Some).map_err(|error| failed(&error))
}

fn of_gguf(vocabulary: &GgufTokenizer) -> Result<Tokenizer, StartFailure> {
    let GgufTokenizer { tokens, merges, token_types, bos, eos, chat_template, pre, model: _, add_bos } =
        vocabulary.clone();
    let vocabulary = GgufVocabulary { tokens, merges, token_types, bos, eos, pre, add_bos, chat_template };
    Tokenizer::from_gguf_parts(vocabulary).map_err(|error| StartFailure::Tokenizer(error.to_string()))
}
