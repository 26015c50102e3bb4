//! Asks the engine what it is, then watches it, and puts everything on the [`Board`].
//!
//! In: its address and key. Out: [`WatchEnd`], why it is not watched any more; meanwhile the board, and [`Watched`]. Start
//! at [`Watcher::start`].
//!
//! It uses what a gateway uses for an engine given by URL, so that both know the same. The engine is watched from the
//! moment it is ready: before any gateway has said how its fleet names blocks, under a name of the agent's own, and anew
//! when one has.

use std::{
    sync::Arc,
    time::{Duration, Instant as StdInstant},
};

use forebay_engine_wire::discovery::KvSource;
use forebay_engines::{
    CacheSight as EngineSight, EngineFacts, LoadReport, Notice as EngineNotice, Report, Reports,
    remote::{
        AttachError, AttachSettings, AttachSpec, Attached, ComparedByGateways, Dialect, HandOver,
        ObserveSettings, Observer, Overrides, attach,
        client::{ClientSettings, Endpoint, HttpClient, HttpError, Limits, Secret as EngineSecret},
        observe,
    },
};
use forebay_kv_hash::{BlockHasher, HashKey as Key};
use forebay_proto::{CacheSight, EngineFacts as ToldFacts, HashKey, Notice, Secret};
use forebay_types::{EngineName, Incarnation, Role};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{entropy, link::Shared};

/// Between two questions whether it is ready.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// Between two questions of an engine that answers, but with something that it cannot be used for.
const ASK_UNUSABLE_EVERY: Duration = Duration::from_secs(5);
/// After which a cache that was asked for and did not come is asked for again.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(2);
/// For the question whether the engine refuses a wrong key.
const PROOF_WITHIN: Duration = Duration::from_secs(5);
/// Tokens of a block while no gateway has said and the engine does not either.
const BLOCK_SIZE_TOKENS: u32 = 16;
/// By which two readings of one process's beginning may differ.
const BEGAN_ERROR_MS: u64 = 1_000;
/// Bytes of the proof's answer.
const PROOF_BYTES_MAX: usize = 1 << 20;

/// Whom to ask.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) engine: EngineName,
    pub(crate) incarnation: Incarnation,
    pub(crate) role: Role,
    pub(crate) dialect: Option<Dialect>,
    pub(crate) url: String,
    /// How other hosts reach this one.
    pub(crate) advertised_host: String,
    pub(crate) key: Option<Secret>,
    /// The key is this life's own: whoever refuses it is somebody else.
    pub(crate) key_is_minted: bool,
    /// It must refuse another key: proof that the process that was found and the one that answers are the same.
    pub(crate) prove_key: bool,
    /// When its server's process began, in milliseconds since 1970, as it said itself to an earlier agent.
    pub(crate) began_ms: Option<u64>,
    /// Where it publishes KV events, as the agent told it to: for versions that do not say it themselves.
    pub(crate) events: Option<KvSource>,
    /// How it is watched.
    pub(crate) observe: ObserveSettings,
    /// Sentences for operators that the agent has.
    pub(crate) notes: Vec<String>,
}

/// Where the watching stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Watched {
    /// Nobody answers.
    Asking,
    /// Somebody answers, and is not ready; why, as a sentence.
    Answers(String),
    /// It serves.
    Ready {
        /// When its server's process began, in milliseconds since 1970, if it says so.
        began_ms: Option<u64>,
    },
}

/// Why an engine is not watched any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WatchEnd {
    /// It does not answer any more, or says that it is dead.
    Lapsed(String),
    /// Somebody else answers at its address.
    Foreign(String),
}

/// What a watcher says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WatchNews {
    /// The engine moved on.
    Stands(Watched),
    /// It is not watched any more.
    Ended(WatchEnd),
}

/// Watches one incarnation. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Watcher {
    task: JoinHandle<WatchEnd>,
    watched: watch::Receiver<Watched>,
}

impl Watcher {
    pub(crate) fn start(shared: Arc<Shared>, target: Target) -> Self {
        let (state, watched) = watch::channel(Watched::Asking);
        Self { task: tokio::spawn(run(shared, target, state)), watched }
    }

    /// What happens next. Not to be called again after [`WatchNews::Ended`].
    pub(crate) async fn next(&mut self) -> WatchNews {
        let Self { task, watched } = self;
        tokio::select! {
            biased;
            Ok(()) = watched.changed() => WatchNews::Stands(watched.borrow_and_update().clone()),
            ended = task => WatchNews::Ended(
                ended.unwrap_or_else(|error| WatchEnd::Lapsed(format!("watching it failed: {error}"))),
            ),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(shared: Arc<Shared>, target: Target, state: watch::Sender<Watched>) -> WatchEnd {
    let endpoint = match endpoint(&target) {
        Ok(endpoint) => endpoint,
        Err(why) => return WatchEnd::Lapsed(why),
    };
    let fleets = shared.key.watch().borrow().as_ref().map(|key| key.block_size_tokens);
    let block_size_tokens = fleets.unwrap_or(BLOCK_SIZE_TOKENS);
    let attached = match ask(&endpoint, &target, block_size_tokens, &state).await {
        Ok(attached) => attached,
        Err(end) => return end,
    };
    let began_ms = attached.plan.started_seconds.map(|seconds| (seconds * 1_000.0) as u64);
    if let (Some(known), Some(said)) = (target.began_ms, began_ms)
        && known.abs_diff(said) > BEGAN_ERROR_MS
    {
        return WatchEnd::Foreign("its metrics are of another process".to_owned());
    }
    if let Some(end) = prove(&endpoint, &target).await {
        return end;
    }
    shared.board.ready(
        told_facts(&attached, &target),
        attached.facts.kind.to_owned(),
        sight(&attached.facts.cache_sight),
    );
    state.send_replace(Watched::Ready { began_ms });
    let mut keys = shared.key.watch();
    loop {
        let fleets = keys.borrow_and_update().clone();
        shared.board.restart_feed(fleets.clone());
        let key = fleets.unwrap_or_else(|| own_key(attached.facts.block_size_tokens));
        let watching = watch_with(&shared, &endpoint, &attached, &key, &target.observe);
        tokio::select! {
            end = watching => return end,
            // Never an error: `shared` holds the sender.
            _ = keys.changed() => {}
        }
    }
}

fn endpoint(target: &Target) -> Result<Endpoint, String> {
    let client = HttpClient::new(&ClientSettings::default()).map_err(|error| error.to_string())?;
    let key = target.key.as_ref().map(|key| EngineSecret::new(key.expose()));
    Endpoint::new(&target.url, client, key.as_ref()).map_err(|error| error.to_string())
}

/// Asks until the engine is ready.
async fn ask(
    endpoint: &Endpoint,
    target: &Target,
    block_size_tokens: u32,
    state: &watch::Sender<Watched>,
) -> Result<Attached, WatchEnd> {
    let mut spec = AttachSpec {
        name: target.engine.clone(),
        dialect: target.dialect,
        role: Some(target.role),
        incarnation: target.incarnation,
        model: None,
        block_size_tokens,
        tokenizer: Some(Arc::new(ComparedByGateways)),
        overrides: Overrides::default(),
        settings: AttachSettings::default(),
    };
    let mut events = target.events.clone();
    loop {
        let pause = match attach(endpoint, &spec).await {
            // It does not say where its events are, but it was told.
            Ok(attached) if attached.facts.cache_sight != EngineSight::Events && events.is_some() => {
                spec.overrides.kv_events = events.take();
                continue;
            }
            Ok(attached) => return Ok(attached),
            Err(AttachError::Unreachable(_)) => ASK_EVERY,
            Err(error @ AttachError::Key(_)) if target.key_is_minted => {
                return Err(WatchEnd::Foreign(error.to_string()));
            }
            Err(error) => {
                let pause =
                    if matches!(error, AttachError::NotReady(_)) { ASK_EVERY } else { ASK_UNUSABLE_EVERY };
                let now = Watched::Answers(error.to_string());
                state.send_if_modified(|known| {
                    *known != now && {
                        *known = now;
                        true
                    }
                });
                pause
            }
        };
        sleep_until(Instant::now() + pause).await;
    }
}

/// Whether the engine refuses a key that is not its own. One that takes any key is not the one that was given a key.
async fn prove(endpoint: &Endpoint, target: &Target) -> Option<WatchEnd> {
    if !target.prove_key || target.key.is_none() {
        return None;
    }
    let wrong = EngineSecret::new(entropy::key().expose());
    let limits = Limits { body_bytes_max: PROOF_BYTES_MAX, deadline: StdInstant::now() + PROOF_WITHIN };
    match endpoint.with_key(Some(&wrong)).ok()?.get("/v1/models", limits).await {
        Err(HttpError::Status { status: 401 | 403, .. }) => None,
        Ok(_) => Some(WatchEnd::Foreign("it takes any key, and the engine takes only its own".to_owned())),
        Err(error) => Some(WatchEnd::Lapsed(error.to_string())),
    }
}

/// A key for as long as no gateway has said the fleet's.
fn own_key(block_size_tokens: u32) -> HashKey {
    let (low, high) = (entropy::random().to_le_bytes(), entropy::random().to_le_bytes());
    let mut key = [0; 16];
    key[..8].copy_from_slice(&low);
    key[8..].copy_from_slice(&high);
    HashKey { key, block_size_tokens }
}

/// Watches under one key until the engine is dead.
async fn watch_with(
    shared: &Shared,
    endpoint: &Endpoint,
    attached: &Attached,
    key: &HashKey,
    settings: &ObserveSettings,
) -> WatchEnd {
    let reports = Arc::new(Reports::default());
    let observer = observe(
        endpoint.clone(),
        attached.plan.clone(),
        &attached.facts,
        BlockHasher::new(Key(key.key), key.block_size_tokens),
        settings.clone(),
        reports.clone(),
        Arc::new(Notify::new()),
    );
    let mut again = interval(SNAPSHOT_WITHIN);
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            report = reports.next() => {
                let (gaps, died) = pass_on(shared, report);
                request(&observer, gaps);
                if let Some(why) = died {
                    return WatchEnd::Lapsed(why.to_string());
                }
            }
            _ = again.tick() => request(&observer, shared.board.gaps()),
        }
    }
}

fn request(observer: &Observer, ranks: Vec<u16>) {
    for dp_rank in ranks {
        observer.request_snapshot(dp_rank);
    }
}

/// Puts a report on the board; gives the ranks of which events are missing, and the last words.
fn pass_on(shared: &Shared, report: Report) -> (Vec<u16>, Option<Arc<str>>) {
    let Report { loads, steps, snapshots, kv, notices, died, lapsed: _ } = report;
    for notice in notices {
        shared.board.notice(told_notice(notice));
    }
    for snapshot in snapshots {
        shared.board.snapshot(snapshot);
    }
    let gaps = if kv.is_empty() { Vec::new() } else { shared.board.kv(kv) };
    for LoadReport { dp_rank, load, as_of } in loads {
        shared.board.load(dp_rank, load, as_of.into_std());
    }
    if !steps.is_empty() {
        shared.board.steps(steps);
    }
    (gaps, died)
}

fn told_notice(notice: EngineNotice) -> Notice {
    match notice {
        EngineNotice::Silent { why } => Notice::Silent { why: why.to_string() },
        EngineNotice::Heard => Notice::Heard,
        EngineNotice::Fenced { why } => Notice::Fenced { why: why.to_string() },
        EngineNotice::Draining => Notice::Note("the engine says that it drains".to_owned()),
        EngineNotice::CacheSight(now) => Notice::CacheSight(sight(&now)),
        EngineNotice::Note(text) => Notice::Note(text.to_string()),
    }
}

fn sight(sight: &EngineSight) -> CacheSight {
    match sight {
        EngineSight::Events => CacheSight::Events,
        EngineSight::Approximate { why } => CacheSight::Approximate { why: why.to_string() },
    }
}

/// The facts in the words of the wire, as other hosts need them, with the agent's own notes.
fn told_facts(attached: &Attached, target: &Target) -> ToldFacts {
    let EngineFacts {
        engine: _,
        kind: _,
        incarnation: _,
        model,
        role: _,
        dp_ranks,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv,
        accepts,
        continues_sampling,
        cache_sight: _,
        notes: found,
        prior,
    } = attached.facts.clone();
    let notes = target.notes.iter().cloned().chain(found.iter().map(ToString::to_string));
    let mut speech = attached.speech.clone();
    if let HandOver::Bootstrap { host, .. } = &mut speech.hand_over {
        // It was found on the loopback.
        *host = target.advertised_host.as_str().into();
    }
    ToldFacts {
        model: model.to_string(),
        served_aliases: Vec::new(),
        dp_ranks,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv: forebay_proto::KvAbilities {
            layout: kv.layout,
            can_export: kv.can_export,
            can_import: kv.can_import,
            needs_warming: kv.needs_warming,
        },
        accepts: forebay_proto::Accepts { tokens: accepts.tokens, body: accepts.body },
        continues_sampling,
        dialect: forebay_proto::Dialect {
            version: attached.layout.version.clone().unwrap_or_default(),
            speech,
        },
        step_prior: prior,
        notes: notes.take(forebay_proto::limits::NOTES_MAX).collect(),
    }
}
