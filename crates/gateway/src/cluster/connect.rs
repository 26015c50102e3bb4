//! From what an agent says of its engine to a driver that sends legs there.

use std::{sync::Arc, time::Duration};

use forebay_engines::{
    Accepts, CacheSight, EngineFacts, KvAbilities, Reports,
    remote::{
        AttachSettings, HeldKv, RemoteEngine, RemoteLimits, RemoteParts, Speech, TokenizerProbe,
        client::{Endpoint, HttpClient, Secret},
        tokenizers_agree,
    },
};
use forebay_proto::{self as proto, Hello, Ready, TokenizerFile};
use tokio::{runtime::Handle, sync::Notify, time::timeout};

use super::keeper::Asker;

/// The tokenizers of this process.
pub trait Tokenizers: Send + Sync {
    /// That of a model, to be compared with an engine's. Without one its engines are given text.
    fn of(&self, model: &str) -> Option<Arc<dyn TokenizerProbe>>;

    /// Takes that of a model from the files that an agent sent. May take seconds, and blocks.
    ///
    /// # Errors
    /// A sentence: why it cannot be used.
    fn learn(&self, model: &str, files: &[TokenizerFile]) -> Result<(), String>;
}

/// What speaks to engines: one for all of a process.
#[derive(Clone)]
pub struct Outbound {
    /// Connections.
    pub http: Arc<HttpClient>,
    /// KV that legs hold.
    pub held: Arc<HeldKv>,
    /// Unpredictable numbers, for meeting points and request ids.
    pub draw: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Tokenizers of models.
    pub tokenizers: Arc<dyn Tokenizers>,
}

/// Longest that comparing tokenizers may take: a stream's other news wait for it.
const COMPARISON_WITHIN: Duration = Duration::from_secs(10);

/// The driver of a life that serves.
///
/// # Errors
/// A sentence: where it is cannot be an address.
pub(super) async fn driver(
    hello: &Hello,
    ready: Ready,
    shared: &Outbound,
    reports: Arc<Reports>,
    asker: Arc<Asker>,
) -> Result<Arc<RemoteEngine>, String> {
    let key = hello.data_plane.api_key.as_ref().map(|key| Secret::new(key.expose()));
    let endpoint = Endpoint::new(&hello.data_plane.url, shared.http.clone(), key.as_ref())
        .map_err(|error| error.to_string())?;
    let speech = ready.facts.dialect.speech.clone();
    let mut facts = facts(hello, ready, speech.dialect.name());
    if facts.accepts.tokens
        && let Err(why) = agreement(&endpoint, &speech, &facts.model, shared).await
    {
        facts.accepts.tokens = false;
        facts.notes.push(format!("{why}: it is given text, not tokens").into());
    }
    Ok(RemoteEngine::new(RemoteParts {
        facts,
        speech,
        endpoint,
        reports,
        limits: RemoteLimits::default(),
        runtime: Handle::current(),
        snapshots: Arc::new(move |dp_rank| asker.request_snapshot(dp_rank)),
        // The agent looks for itself.
        on_trouble: Arc::new(Notify::new()),
        rooms: shared.draw.clone(),
        held: shared.held.clone(),
    }))
}

async fn agreement(
    endpoint: &Endpoint,
    speech: &Speech,
    model: &str,
    shared: &Outbound,
) -> Result<(), String> {
    let probe = shared.tokenizers.of(model).ok_or("there is no tokenizer for its model here")?;
    let settings = AttachSettings::default();
    let compared = tokenizers_agree(endpoint, speech, &*probe, &settings);
    match timeout(COMPARISON_WITHIN, compared).await {
        Ok(agreed) => agreed,
        Err(_) => Err("its tokenizer was not compared in time".to_owned()),
    }
}

fn facts(hello: &Hello, ready: Ready, kind: &'static str) -> EngineFacts {
    let Ready { facts, cache_sight } = ready;
    let proto::EngineFacts {
        model,
        served_aliases: _,
        dp_ranks,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv: proto::KvAbilities { layout, can_export, can_import, needs_warming },
        accepts: proto::Accepts { tokens, body },
        continues_sampling,
        dialect: _,
        step_prior,
        notes,
    } = facts;
    EngineFacts {
        engine: hello.engine.clone(),
        kind,
        incarnation: hello.incarnation,
        model: model.into(),
        role: hello.role,
        dp_ranks,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv: KvAbilities { layout, can_export, can_import, needs_warming },
        accepts: Accepts { tokens, body },
        continues_sampling,
        cache_sight: sight(cache_sight),
        notes: notes.into_iter().map(Into::into).collect(),
        prior: step_prior,
    }
}

/// How much is known of its cache, in the engines' words.
pub(super) fn sight(sight: proto::CacheSight) -> CacheSight {
    match sight {
        proto::CacheSight::Events => CacheSight::Events,
        proto::CacheSight::Approximate { why } => CacheSight::Approximate { why: why.into() },
    }
}
