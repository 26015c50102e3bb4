//! Lives of an engine given by URL: [`RemoteLauncher`] attaches to it, watches it and makes its driver.
//!
//! The engine itself is started and stopped by others. A launch finds the life that runs; when that has died, the next
//! launch finds the next one, or that there is none.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use forebay_kv_hash::BlockHasher;
use forebay_types::{EngineName, Incarnation, Role};
use futures::future::BoxFuture;
use tokio::{runtime::Handle, sync::Notify};

use super::{
    Dialect, HeldKv, RemoteEngine, RemoteLimits, RemoteParts,
    attach::{AttachSettings, AttachSpec, Examination, Overrides, TokenizerProbe, examine, look},
    client::{Endpoint, HttpClient, Secret, UrlError},
    findings::Severity,
    observe::{ObserveSettings, observe},
};
use crate::{
    driver::{Driver, Launch, LaunchError},
    reports::Reports,
};

/// One engine as its operator names it.
#[derive(Clone)]
pub struct RemoteSpec {
    /// `None`: host and port.
    pub name: Option<EngineName>,
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: String,
    /// Whose words it speaks; `None`: find out.
    pub dialect: Option<Dialect>,
    /// What it may be asked to do; `None`: whatever it can.
    pub role: Option<Role>,
    /// Its API key.
    pub key: Option<Secret>,
    /// The model that it must serve; `None`: the first that it lists.
    pub model: Option<Arc<str>>,
    /// Words to choose it by.
    pub labels: BTreeMap<String, String>,
    /// How much of the load it is worth, beside others of its kind.
    pub weight: f64,
    /// What is not found out but said.
    pub overrides: Overrides,
    /// The tokenizer of its model. Without one it is given text.
    pub tokenizer: Option<Arc<dyn TokenizerProbe>>,
    /// Connections with TLS settings of its own; `None`: the context's.
    pub client: Option<Arc<HttpClient>>,
}

impl RemoteSpec {
    /// An engine of which only the address is named.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            name: None,
            url: url.into(),
            dialect: None,
            role: None,
            key: None,
            model: None,
            labels: BTreeMap::new(),
            weight: 1.0,
            overrides: Overrides::default(),
            tokenizer: None,
            client: None,
        }
    }
}

/// What all engines of a process share.
#[derive(Clone)]
pub struct RemoteContext {
    /// Connections.
    pub client: Arc<HttpClient>,
    /// The fleet's.
    pub hasher: BlockHasher,
    /// Bounds of finding out what an engine is.
    pub attach: AttachSettings,
    /// Bounds of watching it.
    pub observe: ObserveSettings,
    /// Bounds of its legs.
    pub limits: RemoteLimits,
    /// Where its legs run.
    pub runtime: Handle,
    /// Random numbers.
    pub rooms: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// KV that prefill engines hold.
    pub held: Arc<HeldKv>,
}

/// Starts lives of one engine given by URL.
pub struct RemoteLauncher {
    name: EngineName,
    spec: RemoteSpec,
    endpoint: Endpoint,
    context: Arc<RemoteContext>,
    /// As found at the first launch that succeeded.
    kind: OnceLock<&'static str>,
}

impl RemoteLauncher {
    /// For the engine that `spec` names. Nothing is asked of it yet.
    ///
    /// # Errors
    /// If its URL or key cannot be one.
    pub fn new(spec: RemoteSpec, context: Arc<RemoteContext>) -> Result<Self, UrlError> {
        let client = spec.client.clone().unwrap_or_else(|| context.client.clone());
        let endpoint = Endpoint::new(&spec.url, client, spec.key.as_ref())?;
        let name = spec.name.clone().unwrap_or_else(|| EngineName(endpoint.name().clone()));
        Ok(Self { name, spec, endpoint, context, kind: OnceLock::new() })
    }

    /// What it was made for.
    pub fn spec(&self) -> &RemoteSpec {
        &self.spec
    }

    /// Finds out what the engine is, and what is missing or off; for `forebay doctor`.
    pub async fn examine(&self) -> Examination {
        examine(&self.endpoint, &self.attach_spec(Incarnation(0))).await
    }

    /// What the engine says of itself; it is asked to compute nothing.
    pub async fn look(&self) -> Examination {
        look(&self.endpoint, &self.attach_spec(Incarnation(0))).await
    }

    /// Its address.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn attach_spec(&self, incarnation: Incarnation) -> AttachSpec {
        AttachSpec {
            name: self.name.clone(),
            dialect: self.spec.dialect,
            role: self.spec.role,
            incarnation,
            model: self.spec.model.clone(),
            block_size_tokens: self.context.hasher.block_size_tokens(),
            tokenizer: self.spec.tokenizer.clone(),
            overrides: self.spec.overrides.clone(),
            settings: self.context.attach.clone(),
        }
    }

    async fn begin(&self, incarnation: Incarnation) -> Result<Arc<dyn Driver>, LaunchError> {
        let Examination { attached, findings } =
            examine(&self.endpoint, &self.attach_spec(incarnation)).await;
        for finding in findings.iter() {
            match finding.severity {
                Severity::Info => tracing::info!(engine = %self.name, "{finding}"),
                Severity::Warning | Severity::Error => tracing::warn!(engine = %self.name, "{finding}"),
            }
        }
        let attached =
            attached.map_err(|error| LaunchError { engine: self.name.clone(), reason: error.to_string() })?;
        let _first_kind_stays = self.kind.set(attached.facts.kind);
        let context = &self.context;
        let reports = Arc::new(Reports::default());
        let on_trouble = Arc::new(Notify::new());
        let observer = observe(
            self.endpoint.clone(),
            attached.plan,
            &attached.facts,
            context.hasher,
            context.observe.clone(),
            reports.clone(),
            on_trouble.clone(),
        );
        Ok(RemoteEngine::new(RemoteParts {
            facts: attached.facts,
            speech: attached.speech,
            endpoint: self.endpoint.clone(),
            reports,
            limits: context.limits.clone(),
            runtime: context.runtime.clone(),
            // The engine's life and its watching end together.
            snapshots: Arc::new(move |dp_rank| observer.request_snapshot(dp_rank)),
            on_trouble,
            rooms: context.rooms.clone(),
            held: context.held.clone(),
        }))
    }
}

impl Launch for RemoteLauncher {
    fn name(&self) -> &EngineName {
        &self.name
    }

    /// Before the first launch what the operator says, or `remote`.
    fn kind(&self) -> &'static str {
        self.kind.get().copied().or(self.spec.dialect.map(Dialect::name)).unwrap_or("remote")
    }

    fn role(&self) -> Role {
        self.spec.role.unwrap_or_default()
    }

    fn is_attached(&self) -> bool {
        true
    }

    fn launch(&self, incarnation: Incarnation) -> BoxFuture<'_, Result<Arc<dyn Driver>, LaunchError>> {
        Box::pin(self.begin(incarnation))
    }
}
