//! The engine that is measured: what it is, how it is spoken to, and whether others use it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use forebay_engine_wire::{compat::apart, metrics::Scrape};
use forebay_engines::{
    EngineFacts, Reports,
    remote::{
        AttachError, AttachSettings, AttachSpec as Wanted, Attached, Dialect, HandOver, HeldKv, Overrides,
        RemoteEngine, RemoteLimits, RemoteParts,
        client::{ClientSettings, Endpoint, HttpClient, Limits},
        examine,
    },
};
use forebay_types::Incarnation;
use tokio::{runtime::Handle, sync::Notify};

use crate::{
    exit::{Exit, Failed},
    serve::{attached_client, attached_key, entropy},
    settings::attach_spec::AttachSpec,
};

/// How long one look at the metrics may take.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Bytes of the metrics.
const METRICS_BYTES_MAX: usize = 8 << 20;
/// Bytes of the list of models.
const MODELS_BYTES_MAX: usize = 1 << 20;
/// Block size of engines that name none.
const BLOCK_TOKENS: u32 = 16;

/// What several engines share.
pub(super) struct Shared {
    client: Arc<HttpClient>,
    held: Arc<HeldKv>,
}

impl Shared {
    pub(super) fn new() -> anyhow::Result<Self> {
        let client = HttpClient::new(&ClientSettings::default()).context("no HTTP client can be made")?;
        Ok(Self { client, held: HeldKv::new() })
    }
}

/// An engine that is attached.
pub(super) struct Target {
    pub(super) driver: Arc<RemoteEngine>,
    pub(super) facts: EngineFacts,
    pub(super) attached: Attached,
    endpoint: Endpoint,
}

/// What the engine's metrics say at one moment, over all of its ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Look {
    /// Requests that run or wait.
    pub(super) requests: f64,
    /// Prompt tokens since it started.
    pub(super) prompt_tokens: f64,
    /// Of those, cached.
    pub(super) cached_tokens: f64,
    /// Tokens generated since it started.
    pub(super) output_tokens: f64,
}

impl Target {
    /// Finds out what the engine at a URL is. Nothing but harmless questions is asked.
    ///
    /// # Errors
    /// If it cannot be used, with what to do about it.
    pub(super) async fn attach(
        spec: &AttachSpec,
        incarnation: u64,
        environment: &BTreeMap<String, String>,
        shared: &Shared,
    ) -> anyhow::Result<Self> {
        let name = spec.name();
        let key = attached_key(spec.key_env.as_deref(), spec.key_file.as_deref(), environment)?;
        let client = spec.ca_file.as_deref().map(attached_client).transpose()?;
        let client = client.unwrap_or_else(|| shared.client.clone());
        let endpoint =
            Endpoint::new(&spec.url, client, key.as_ref()).with_context(|| format!("engine {name}"))?;
        let wanted = Wanted {
            name: name.as_str().into(),
            dialect: spec.kind.as_deref().and_then(Dialect::named),
            role: spec.role,
            incarnation: Incarnation(incarnation),
            model: None,
            block_size_tokens: BLOCK_TOKENS,
            tokenizer: None,
            overrides: Overrides::default(),
            settings: AttachSettings::default(),
        };
        let mut attached =
            examine(&endpoint, &wanted).await.attached.map_err(|error| unusable(&name, &error))?;
        if attached.speech.tokens.is_none() {
            let sentence = format!(
                "engine {name} takes no prompts of token ids, so their length and what is cached of them cannot be chosen: \
                 measure vLLM (0.10.2 or later) or SGLang"
            );
            return Err(Failed { exit: Exit::Failure, sentence }.into());
        }
        // Prompts are made-up numbers: no tokenizer needs to agree on them.
        attached.facts.accepts.tokens = true;
        let driver = RemoteEngine::new(RemoteParts {
            facts: attached.facts.clone(),
            speech: attached.speech.clone(),
            endpoint: endpoint.clone(),
            reports: Arc::new(Reports::default()),
            limits: RemoteLimits::default(),
            runtime: Handle::current(),
            snapshots: Arc::new(|_| {}),
            on_trouble: Arc::new(Notify::new()),
            rooms: Arc::new(entropy),
            held: shared.held.clone(),
        });
        Ok(Self { driver, facts: attached.facts.clone(), attached, endpoint })
    }

    /// What its metrics say; `None` if it has none, or does not answer.
    pub(super) async fn look(&self) -> Option<Look> {
        if !self.attached.plan.metrics {
            return None;
        }
        let limits = Limits { body_bytes_max: METRICS_BYTES_MAX, deadline: Instant::now() + LOOK_MAX };
        let answer = self.endpoint.get("/metrics", limits).await.ok()?;
        let scrape = Scrape::read(&answer.body);
        let sum = |figure: fn(&forebay_engine_wire::metrics::Figures) -> f64| {
            scrape.ranks.values().map(figure).sum()
        };
        Some(Look {
            requests: sum(|rank| rank.running + rank.waiting),
            prompt_tokens: sum(|rank| rank.prompt_tokens),
            cached_tokens: sum(|rank| rank.cached_tokens),
            output_tokens: sum(|rank| rank.output_tokens),
        })
    }

    /// Whether it still answers at all.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) async fn answers(&self) -> Result<(), String> {
        let limits = Limits { body_bytes_max: MODELS_BYTES_MAX, deadline: Instant::now() + LOOK_MAX };
        self.endpoint.get("/v1/models", limits).await.map(drop).map_err(|error| error.to_string())
    }

    /// Why KV of this one is nothing for `other`, as a sentence; `None` if they can hand over.
    pub(super) fn cannot_hand_to(&self, other: &Target) -> Option<String> {
        let (mine, its) = (&self.facts, &other.facts);
        let sides =
            [(mine, mine.kv.can_export, "hands no KV over"), (its, its.kv.can_import, "takes no KV in")];
        for (facts, able, what) in sides {
            if !able {
                return Some(format!(
                    "engine {} {what}: `forebay doctor --engine` says what is missing",
                    facts.engine
                ));
            }
        }
        if self.attached.speech.hand_over != HandOver::TransferParams {
            return Some(
                "hand-overs are measured between vLLM engines alone so far; leave --pair out".to_owned(),
            );
        }
        let name = |facts: &EngineFacts| facts.engine.to_string();
        apart((&name(mine), &self.attached.layout), (&name(its), &other.attached.layout))
    }
}

fn unusable(name: &str, error: &AttachError) -> anyhow::Error {
    let exit = match error {
        AttachError::Unreachable(_) => Exit::Unreachable,
        _ => Exit::Failure,
    };
    let mend = error.mend().map_or(String::new(), |mend| format!("; {mend}"));
    Failed { exit, sentence: format!("engine {name} cannot be measured: {error}{mend}") }.into()
}
