//! What the HTTP side is made of, and what it takes from outside.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use forebay_text::{ChatTemplate, PrefixCache, PrefixCacheLimits, Tokenizer};
use forebay_types::TokenId;
use parking_lot::RwLock;

use super::{
    body::Bodies,
    keys::ApiKeys,
    limits::{HttpLimits, RequestLimits},
    live::LiveIds,
};
use crate::{
    metrics::Metrics,
    orchestrator::api::{Orchestrate, ServedModel},
};

/// Text of one served model.
#[derive(Debug, Clone)]
pub struct ModelText {
    /// The id that requests name and that [`Orchestrate::models`] lists.
    pub id: Arc<str>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to a prompt.
    pub template: ChatTemplate,
    /// Longest sequence, prompt and output together.
    pub context_tokens_max: u32,
    /// The model's own end-of-turn tokens, which end an answer unless the client says `ignore_eos`.
    pub stop_tokens: Vec<TokenId>,
}

/// Text of models that attached engines serve, which become known only when they do.
#[derive(Debug, Clone)]
pub struct AttachedText {
    /// The model that it is for; `None`: any that no other is for.
    pub model: Option<Arc<str>>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to a prompt.
    pub template: ChatTemplate,
    /// The model's own end-of-turn tokens.
    pub stop_tokens: Vec<TokenId>,
}

/// Most models whose texts are kept: each takes tens of megabytes.
const TEXTS_MAX: usize = 64;

/// Texts of models that attached engines serve: those that an operator gave, and those that agents brought. Clones share
/// them.
#[derive(Debug, Clone, Default)]
pub struct AttachedTexts(Arc<RwLock<Vec<AttachedText>>>);

impl AttachedTexts {
    /// Those of an operator.
    pub fn new(texts: Vec<AttachedText>) -> Self {
        Self(Arc::new(RwLock::new(texts)))
    }

    /// That of a model: its own, or the one for any.
    pub fn of(&self, model: &str) -> Option<AttachedText> {
        let texts = self.0.read();
        let named = texts.iter().find(|text| text.model.as_deref() == Some(model));
        named.or_else(|| texts.iter().find(|text| text.model.is_none())).cloned()
    }

    /// That of a model whose name is not known yet: the one for any, or the only one.
    pub fn of_any(&self) -> Option<AttachedText> {
        let texts = self.0.read();
        let any = texts.iter().find(|text| text.model.is_none());
        any.or_else(|| texts.first().filter(|_| texts.len() == 1)).cloned()
    }

    /// Keeps another one, unless there is one for its model.
    ///
    /// # Errors
    /// A sentence, if too many are kept.
    pub fn add(&self, text: AttachedText) -> Result<(), String> {
        let mut texts = self.0.write();
        if texts.iter().any(|known| known.model == text.model) {
            return Ok(());
        }
        if texts.len() >= TEXTS_MAX {
            return Err(format!("{TEXTS_MAX} tokenizers are kept, which is the limit; give --tokenizer"));
        }
        texts.push(text);
        Ok(())
    }
}

/// The time, for metrics and for the field `created`.
pub trait Clock: Send + Sync + 'static {
    /// Since an origin of the clock's choice; never goes back.
    fn now(&self) -> Duration;
    /// Seconds since the Unix epoch.
    fn unix_seconds(&self) -> u64;
}

/// Unpredictable numbers, for requests that name no seed and for ids of requests.
pub trait Seeds: Send + Sync + 'static {
    /// One more. Never waits.
    fn draw(&self) -> u64;
}

/// What a process gives to HTTP.
pub struct Parts {
    /// The fleet.
    pub orchestrator: Arc<dyn Orchestrate>,
    /// Text of the models whose engines this process starts.
    pub models: Vec<ModelText>,
    /// Text of models whose engines are attached.
    pub attached: AttachedTexts,
    /// Who may ask. `None` lets everybody in, as the tenant `anonymous`.
    pub keys: Option<ApiKeys>,
    /// Shared with the orchestrator.
    pub metrics: Arc<Metrics>,
    /// Bounds of connections and bodies.
    pub http_limits: HttpLimits,
    /// Bounds of requests.
    pub request_limits: RequestLimits,
    /// The system's clock, or a test's.
    pub clock: Arc<dyn Clock>,
    /// Seeded from the system's entropy, or by a test.
    pub seeds: Arc<dyn Seeds>,
}

/// The HTTP side of one process: what both listeners serve. Clones share it.
#[derive(Clone)]
pub struct Gateway(pub(crate) Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) orchestrator: Arc<dyn Orchestrate>,
    models: RwLock<BTreeMap<Arc<str>, Arc<ModelText>>>,
    attached: AttachedTexts,
    pub(crate) keys: Option<ApiKeys>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) http_limits: HttpLimits,
    /// The memory of large bodies.
    pub(crate) bodies: Arc<Bodies>,
    pub(crate) request_limits: RequestLimits,
    /// The tokens of recent prompts' texts.
    pub(crate) texts: Arc<PrefixCache>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) seeds: Arc<dyn Seeds>,
    pub(crate) live: Arc<LiveIds>,
    pub(crate) audits: Audits,
}

/// Of the requests that attached engines are given as tokens, one in so many is audited.
const AUDITED_ONE_IN: u64 = 1_000;

/// Which requests are audited: the first, and every so many after it.
#[derive(Debug, Default)]
pub(crate) struct Audits(AtomicU64);

impl Audits {
    /// Whether this request is.
    pub(crate) fn is_due(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(AUDITED_ONE_IN)
    }
}

impl Gateway {
    /// Puts the parts together. Does nothing until it is served.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            orchestrator,
            models,
            attached,
            keys,
            metrics,
            http_limits,
            request_limits,
            clock,
            seeds,
        } = parts;
        let models = models.into_iter().map(|model| (model.id.clone(), Arc::new(model))).collect();
        Self(Arc::new(Shared {
            orchestrator,
            models: RwLock::new(models),
            attached,
            keys,
            bodies: Bodies::new(http_limits.bodies_bytes_max, metrics.body_bytes.clone()),
            metrics,
            http_limits,
            texts: Arc::new(PrefixCache::new(PrefixCacheLimits {
                bytes_max: request_limits.text_cache_bytes_max,
            })),
            request_limits,
            clock,
            seeds,
            live: Arc::default(),
            audits: Audits::default(),
        }))
    }

    /// Requests that are being answered: their ids. Zero when nothing leaks and nobody asks.
    pub fn live_requests(&self) -> usize {
        self.0.live.len()
    }
}

impl Shared {
    /// Text of a model, if this process can make text of its tokens. That of an attached model is made when it is first
    /// asked for.
    pub(crate) fn text(&self, name: &str, served: Option<&ServedModel>) -> Option<Arc<ModelText>> {
        let known = self.models.read().get(name).cloned();
        let fits = |text: &Arc<ModelText>| {
            served.is_none_or(|served| {
                !served.takes_body || served.context_tokens_max == text.context_tokens_max
            })
        };
        if let Some(text) = known.filter(fits) {
            return Some(text);
        }
        let served = served?;
        let AttachedText { model: _, tokenizer, template, stop_tokens } = self.attached.of(name)?;
        let text = Arc::new(ModelText {
            id: served.id.clone(),
            tokenizer,
            template,
            context_tokens_max: served.context_tokens_max,
            stop_tokens,
        });
        // Bounded: only models that engines serve get here.
        self.models.write().insert(served.id.clone(), text.clone());
        Some(text)
    }

    /// The models that can be asked for, for errors.
    pub(crate) fn model_names(&self) -> Vec<Arc<str>> {
        let mut names: Vec<Arc<str>> = self.models.read().keys().cloned().collect();
        names.extend(self.orchestrator.models().into_iter().map(|model| model.id));
        names.sort_unstable();
        names.dedup();
        names
    }
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("models", &self.0.model_names()).finish_non_exhaustive()
    }
}
