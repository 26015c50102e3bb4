//! Finding out what an engine is and how to speak to it, once for each of its lives.
//!
//! In: an [`Endpoint`] and what is wanted of the engine ([`AttachSpec`]). Out: [`Attached`], all that the rest needs, and
//! [`Findings`], a sentence for everything that is missing or off. Start at [`examine`]; what each maker's server is asked
//! is in `vllm`, `sglang` and `openai`, KV events in `events`, token ids and tokenizers in `tokens`.
//!
//! Every question is bounded in time and length, is harmless (the costliest generates one token) and may fail: then the
//! engine is taken to lack the ability, and a finding says so. Only what makes it unusable is an [`AttachError`].

mod events;
mod openai;
mod probe;
mod sglang;
mod tokens;
mod vllm;

use std::{fmt, sync::Arc, time::Duration};

use forebay_engine_wire::{
    compat::{Layout, kv_layout},
    discovery::{Dialled, FoundModel, FoundModels, KvSource, Server},
    metrics::{Pool, Scrape},
};
use forebay_perf_model::StepCoefficients;
use forebay_types::{EngineName, Incarnation, Role};

use super::{
    Abort, Dialect, HandOver, RankPin, Speech, TokenRoute,
    client::{Endpoint, HttpError},
    findings::{Findings, Severity},
    observe::ObservePlan,
};
use crate::driver::{Accepts, CacheSight, EngineFacts, KvAbilities};
use probe::Probe;

pub use tokens::{ComparedByGateways, TokenizerProbe, tokenizers_agree};
pub(super) use tokens::{audit, tokenize_question};

/// Legs that may wait at a rank of an engine that names no bound.
const WAITING_MAX_DEFAULT: u32 = 256;
/// Token budget of a step of an engine that names none: vLLM's default on data-centre GPUs.
const STEP_TOKENS_DEFAULT: u32 = 8192;
/// Context of an engine that names none: it refuses what is too long itself.
const CONTEXT_TOKENS_DEFAULT: u32 = i32::MAX as u32;

/// What is wanted of an engine.
#[derive(Clone)]
pub struct AttachSpec {
    /// The name that survives restarts.
    pub name: EngineName,
    /// Whose words it speaks; `None`: find out.
    pub dialect: Option<Dialect>,
    /// What it may be asked to do; `None`: whatever it can.
    pub role: Option<Role>,
    /// The life that begins.
    pub incarnation: Incarnation,
    /// The model that it must serve; `None`: the first that it lists.
    pub model: Option<Arc<str>>,
    /// The fleet's block size, for engines that have none of their own.
    pub block_size_tokens: u32,
    /// The gateway's tokenizer, to be compared with the engine's. Without one the engine is given text.
    pub tokenizer: Option<Arc<dyn TokenizerProbe>>,
    /// What is not found out but said.
    pub overrides: Overrides,
    /// Bounds.
    pub settings: AttachSettings,
}

impl fmt::Debug for AttachSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachSpec")
            .field("name", &self.name)
            .field("dialect", &self.dialect)
            .field("role", &self.role)
            .field("incarnation", &self.incarnation)
            .field("overrides", &self.overrides)
            .finish_non_exhaustive()
    }
}

/// What an operator says about an engine, in place of what would be found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Overrides {
    /// Where rank 0 publishes KV events, in the engine's words; the ports of further ranks count up. For engines that do
    /// not say it themselves (vLLM before 0.32).
    pub kv_events: Option<KvSource>,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: Option<u32>,
    /// Tokens of a KV block.
    pub block_size_tokens: Option<u32>,
    /// Blocks of a rank's pool.
    pub blocks_total: Option<u32>,
    /// Token budget of one scheduler step.
    pub step_tokens_max: Option<u32>,
    /// Legs that may wait at a rank.
    pub waiting_max: Option<u32>,
    /// First guess at the speed of a step.
    pub prior: Option<StepCoefficients>,
}

/// Bounds of one examination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachSettings {
    /// For one document.
    pub document_within: Duration,
    /// For one request that computes something. The first one of an engine compiles.
    pub generate_within: Duration,
    /// Of one document. vLLM's OpenAPI document has 320 kB.
    pub document_bytes_max: usize,
}

impl Default for AttachSettings {
    fn default() -> Self {
        Self {
            document_within: Duration::from_secs(5),
            generate_within: Duration::from_secs(60),
            document_bytes_max: 8 << 20,
        }
    }
}

/// An engine that can be used.
#[derive(Debug, Clone)]
pub struct Attached {
    /// What it is.
    pub facts: EngineFacts,
    /// How to speak to it.
    pub speech: Speech,
    /// Where to watch it.
    pub plan: ObservePlan,
    /// What its KV layout is the number of; for the sentence that says why two engines may not be paired.
    pub layout: Layout,
}

/// What an examination gave.
#[derive(Debug, Clone)]
pub struct Examination {
    /// The engine, or why it cannot be used.
    pub attached: Result<Attached, AttachError>,
    /// What was noticed, the error included.
    pub findings: Findings,
}

impl Examination {
    fn new(attached: Result<Attached, AttachError>, mut findings: Findings) -> Self {
        if let Err(error) = &attached {
            findings.add(Severity::Error, error.to_string(), error.mend());
        }
        Self { attached, findings }
    }
}

/// Why an engine cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// It is not there.
    #[error("{0}")]
    Unreachable(HttpError),
    /// It is there, and not ready yet.
    #[error("it is not ready: {0}")]
    NotReady(HttpError),
    /// It wants a key, or another one.
    #[error("it refuses the key, or wants one: {0}")]
    Key(HttpError),
    /// It is no engine.
    #[error("it is no engine: {0}")]
    NoEngine(Arc<str>),
    /// It serves other models.
    #[error("it serves {found}, not {wanted}")]
    WrongModel {
        /// What was asked for.
        wanted: Arc<str>,
        /// Its models.
        found: Arc<str>,
    },
    /// It names no model, and none was named for it.
    #[error("it does not say which model it serves")]
    NoModel,
}

impl AttachError {
    /// What to do about it.
    pub fn mend(&self) -> Option<&'static str> {
        match self {
            Self::Unreachable(_) => Some("check that it runs, its host and its port"),
            Self::NotReady(_) => Some("wait: vLLM takes one to three minutes to start"),
            Self::Key(_) => Some("give its key (key_file or key_env) with the engine"),
            Self::NoEngine(_) => Some("give the address of vLLM, SGLang, or a server with OpenAI's routes"),
            Self::WrongModel { .. } => Some("correct the model or the address"),
            Self::NoModel => Some("name its model"),
        }
    }
}

/// What the maker's own questions found.
struct Found {
    server: Server,
    version: Option<String>,
    model: FoundModel,
    context_tokens_max: Option<u32>,
    dtype: Option<String>,
    cache_dtype: Option<String>,
    connector: Option<String>,
    /// `None`: it has no blocks, or does not say.
    block_size_tokens: Option<u32>,
    blocks_total: Option<u32>,
    step_tokens_max: Option<u32>,
    dp_ranks: u16,
    /// The number by which the first of them goes.
    first_rank: u16,
    role: Role,
    can_export: bool,
    can_import: bool,
    hand_over: HandOver,
    tokens: Option<TokenRoute>,
    tokens_agree: bool,
    salts_cache: bool,
    ranks: RankPin,
    abort: Abort,
    sight: CacheSight,
    events: Vec<Dialled>,
    health: &'static str,
    metrics: bool,
    loads: bool,
    started_seconds: Option<f64>,
}

impl Found {
    /// Of a server of which nothing is known but its model.
    fn plain(server: Server, model: FoundModel) -> Self {
        Self {
            server,
            version: None,
            context_tokens_max: model.context_tokens_max,
            model,
            dtype: None,
            cache_dtype: None,
            connector: None,
            block_size_tokens: None,
            blocks_total: None,
            step_tokens_max: None,
            dp_ranks: 1,
            first_rank: 0,
            role: Role::Both,
            can_export: false,
            can_import: false,
            hand_over: HandOver::None,
            tokens: None,
            tokens_agree: false,
            salts_cache: false,
            ranks: RankPin::None,
            abort: Abort::Close,
            sight: CacheSight::Approximate { why: "it publishes no KV events".into() },
            events: Vec::new(),
            health: "/health",
            metrics: false,
            loads: false,
            started_seconds: None,
        }
    }

    fn finish(self, spec: &AttachSpec, findings: &Findings) -> Attached {
        let overrides = &spec.overrides;
        let role = spec.role.unwrap_or(self.role);
        let block_size_tokens =
            overrides.block_size_tokens.or(self.block_size_tokens).unwrap_or(spec.block_size_tokens).max(1);
        let layout = Layout {
            server: self.server,
            version: self.version,
            root: self.model.root.clone().or_else(|| Some(self.model.id.clone())),
            dtype: self.dtype,
            cache_dtype: self.cache_dtype,
            block_size_tokens,
            connector: self.connector,
        };
        let dialect = dialect(self.server);
        let step_tokens_max =
            overrides.step_tokens_max.or(self.step_tokens_max).unwrap_or(STEP_TOKENS_DEFAULT);
        let blocks_total = overrides.blocks_total.or(self.blocks_total).unwrap_or(0);
        let context = overrides.context_tokens_max.or(self.context_tokens_max);
        let id: Arc<str> = self.model.id.as_str().into();
        let facts = EngineFacts {
            engine: spec.name.clone(),
            kind: dialect.name(),
            incarnation: spec.incarnation,
            model: spec.model.clone().unwrap_or_else(|| id.clone()),
            role,
            dp_ranks: self.dp_ranks,
            block_size_tokens,
            block_bytes: 0,
            blocks_total,
            step_tokens_max,
            context_tokens_max: context.unwrap_or(CONTEXT_TOKENS_DEFAULT),
            waiting_max: overrides.waiting_max.unwrap_or(WAITING_MAX_DEFAULT),
            kv: KvAbilities {
                layout: kv_layout(&layout),
                can_export: self.can_export && role.prefills(),
                can_import: self.can_import && role.decodes(),
                needs_warming: self.can_export || self.can_import,
            },
            accepts: Accepts { tokens: self.tokens.is_some() && self.tokens_agree, body: true },
            continues_sampling: false,
            cache_sight: self.sight,
            notes: findings.notes(),
            prior: overrides.prior.unwrap_or(StepCoefficients::H100_8B),
        };
        let speech = Speech {
            dialect,
            model: id,
            tokens: self.tokens,
            hand_over: self.hand_over,
            ranks: self.ranks,
            salts_cache: self.salts_cache,
            abort: self.abort,
        };
        let plan = ObservePlan {
            server: self.server,
            health: self.health,
            metrics: self.metrics,
            loads: self.loads,
            pool: Pool { blocks_total, block_size_tokens },
            step_tokens_max,
            first_rank: self.first_rank,
            started_seconds: self.started_seconds,
            block_size_tokens: self.block_size_tokens,
            events: self.events,
        };
        Attached { facts, speech, plan, layout }
    }
}

fn dialect(server: Server) -> Dialect {
    match server {
        Server::Vllm => Dialect::Vllm,
        Server::Sglang => Dialect::Sglang,
        Server::Trtllm => Dialect::Trtllm,
        Server::LlamaCpp | Server::Other => Dialect::Openai,
    }
}

/// What every server is asked first.
struct First {
    models: Option<FoundModels>,
    metrics: Option<Scrape>,
    version: Option<String>,
}

/// Finds out what the engine at `endpoint` is. For a doctor; [`attach`] is the same for those who only want the engine.
pub async fn examine(endpoint: &Endpoint, spec: &AttachSpec) -> Examination {
    let mut findings = Findings::default();
    Examination::new(find_out(endpoint, spec, &mut findings).await, findings)
}

/// Reads what the engine at `endpoint` says of itself, and asks it to compute nothing: for those who only look on. What is
/// found by asking (token routes, hand-over) counts as missing, and is not among the findings.
pub async fn look(endpoint: &Endpoint, spec: &AttachSpec) -> Examination {
    let mut findings = Findings::default();
    Examination::new(read(endpoint, spec, &mut findings).await, findings)
}

async fn read(
    endpoint: &Endpoint,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> Result<Attached, AttachError> {
    let probe = Probe::new(endpoint, &spec.settings);
    let first = probe.first().await?;
    let found = match probe.server(&first, spec.dialect, findings).await? {
        Server::Vllm => vllm::read(&probe, spec, &first, findings).await?.0,
        Server::Sglang => sglang::read(&probe, spec, &first, findings).await?.0,
        server => Found::plain(server, choose_model(first.models.as_ref(), spec, findings)?),
    };
    Ok(found.finish(spec, findings))
}

/// Finds out what the engine at `endpoint` is. What was noticed is in its facts' notes.
///
/// # Errors
/// If it cannot be used.
pub async fn attach(endpoint: &Endpoint, spec: &AttachSpec) -> Result<Attached, AttachError> {
    examine(endpoint, spec).await.attached
}

async fn find_out(
    endpoint: &Endpoint,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> Result<Attached, AttachError> {
    let probe = Probe::new(endpoint, &spec.settings);
    let first = probe.first().await?;
    let server = probe.server(&first, spec.dialect, findings).await?;
    let found = match server {
        Server::Vllm => vllm::find_out(&probe, spec, first, findings).await?,
        Server::Sglang => sglang::find_out(&probe, spec, first, findings).await?,
        Server::Trtllm | Server::LlamaCpp | Server::Other => {
            openai::find_out(&probe, spec, server, first, findings).await?
        }
    };
    Ok(found.finish(spec, findings))
}

/// The model to serve among those that the engine lists.
fn choose_model(
    models: Option<&FoundModels>,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> Result<FoundModel, AttachError> {
    let nothing = FoundModels::default();
    let models = models.unwrap_or(&nothing);
    if !models.one_model() {
        let roots: Vec<_> =
            models.base.iter().map(|model| model.root.as_deref().unwrap_or(&model.id)).collect();
        findings.warn(
            format!("it lists several models: {}", roots.join(", ")),
            "name the one to use; the others are not served",
        );
    }
    if !models.adapters.is_empty() {
        let names: Vec<_> = models.adapters.iter().map(|adapter| adapter.id.as_str()).collect();
        findings.info(format!("its adapters {} are not routed to by name", names.join(", ")));
    }
    match (&spec.model, models.base.first()) {
        (None, Some(first)) => Ok(first.clone()),
        (None, None) => Err(AttachError::NoModel),
        (Some(wanted), None) => {
            findings.regret(format!("it lists no models, so that it serves {wanted} is not certain"));
            Ok(FoundModel { id: wanted.to_string(), ..FoundModel::default() })
        }
        (Some(wanted), Some(_)) => {
            let found = models.base.iter().chain(&models.adapters).find(|model| model.id == **wanted);
            found.cloned().ok_or_else(|| {
                let names: Vec<_> = models.base.iter().map(|model| model.id.as_str()).collect();
                AttachError::WrongModel { wanted: wanted.clone(), found: names.join(", ").into() }
            })
        }
    }
}
