//! Keeps engines alive, or follows those that somebody else keeps alive, and passes on what they report.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use forebay_engines::{
    Audit, CacheSight, ClientBody, Driver, EngineFacts, Launch, LoadReport, Notice, Report,
};
use forebay_fleet::{Event, LoadSight};
use forebay_kv_index::Applied;
use forebay_types::{EngineName, FirstToken, Incarnation, Role, TokenId};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Duration, Instant, sleep_until};

use super::{OrchestratorSettings, Shared};
use crate::metrics::{AuditLabels, Audited};

/// Longest pause before an engine that lives elsewhere is looked for again: its return should be seen soon, and looking
/// is one connection.
const ATTACH_BACK_OFF_MAX: Duration = Duration::from_secs(2);

/// One engine over all its lives.
pub(super) struct Slot {
    pub(super) name: EngineName,
    pub(super) role: Role,
    pub(super) restarts: AtomicU64,
    pub(super) current: Mutex<Option<Arc<dyn Driver>>>,
    pub(super) said: Mutex<Said>,
    /// Who is beside the engine, if anybody is.
    pub(super) keeper: Mutex<Option<Arc<dyn Keeper>>>,
    draining: AtomicBool,
}

/// Who is beside an engine that lives elsewhere, and does for it what only its own host can.
pub trait Keeper: Send + Sync {
    /// Its last `lines` log lines, or why there are none.
    fn logs(&self, lines: usize) -> BoxFuture<'static, Result<Vec<String>, String>>;
    /// Is told that the engine shall drain, so that every gateway hears of it.
    fn drain(&self);
}

/// What an operator is told of an engine, beyond figures.
pub(super) struct Said {
    pub(super) kind: &'static str,
    /// Without a life: `starting` or `lost`.
    pub(super) state: &'static str,
    pub(super) detail: Arc<str>,
    pub(super) notes: Vec<Arc<str>>,
    pub(super) cache_sight: Option<CacheSight>,
}

/// Notes kept of one engine.
const NOTES_MAX: usize = 32;

impl Slot {
    pub(super) fn new(name: EngineName, kind: &'static str, role: Role) -> Self {
        let said = Said { kind, state: "starting", detail: "".into(), notes: Vec::new(), cache_sight: None };
        Self {
            name,
            role,
            restarts: AtomicU64::new(0),
            current: Mutex::new(None),
            said: Mutex::new(said),
            keeper: Mutex::new(None),
            draining: AtomicBool::new(false),
        }
    }

    fn say(&self, state: &'static str, detail: impl Into<Arc<str>>) {
        let mut said = self.said.lock();
        said.state = state;
        said.detail = detail.into();
    }

    /// Keeps what an operator should read, once, the latest ones.
    fn remember(&self, note: Arc<str>) {
        let mut said = self.said.lock();
        if said.notes.len() == NOTES_MAX {
            said.notes.remove(0);
        }
        if !said.notes.contains(&note) {
            said.notes.push(note);
        }
    }
}

/// Starts an engine, follows it until it dies, and begins again after a pause, until the process closes.
pub(super) async fn keep_alive(shared: Arc<Shared>, slot: Arc<Slot>, launcher: Arc<dyn Launch>) {
    let settings = &shared.settings;
    let longest = match launcher.is_attached() {
        true => ATTACH_BACK_OFF_MAX.min(settings.restart_back_off_max),
        false => settings.restart_back_off_max,
    };
    let mut back_off = settings.restart_back_off;
    loop {
        let incarnation = Incarnation(shared.next_incarnation.fetch_add(1, Ordering::Relaxed));
        let began = Instant::now();
        match launcher.launch(incarnation).await {
            Ok(driver) => {
                join(&shared, &slot, &driver);
                let last_words = follow(&shared, &slot, &driver).await;
                leave(&shared, &slot, incarnation, &last_words);
                if shared.closing.load(Ordering::Acquire) {
                    return;
                }
                tracing::error!(engine = %slot.name, %incarnation, reason = %last_words, "engine died");
            }
            Err(error) => {
                if *slot.said.lock().detail != *error.reason {
                    tracing::error!(%error, "engine did not start");
                }
                slot.say("lost", error.reason);
            }
        }
        if began.elapsed() > settings.restart_back_off_max {
            back_off = settings.restart_back_off; // it lived long enough to count as well
        }
        sleep_until(Instant::now() + back_off).await;
        if shared.closing.load(Ordering::Acquire) {
            return;
        }
        back_off = (back_off * 2).min(longest);
        slot.restarts.fetch_add(1, Ordering::Relaxed);
    }
}

/// An engine whose lives somebody else reports, such as the agent beside it. It leaves when this is dropped.
pub struct Member {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
}

impl Member {
    pub(super) fn new(shared: Arc<Shared>, name: EngineName, kind: &'static str, role: Role) -> Self {
        let slot = Arc::new(Slot::new(name, kind, role));
        shared.slots.write().push(slot.clone());
        Self { shared, slot }
    }

    /// It is not serving yet, and what it does instead, as a sentence.
    pub fn starting(&self, detail: &str) {
        self.slot.say("starting", detail);
    }

    /// Who is beside it now.
    pub fn kept_by(&self, keeper: Option<Arc<dyn Keeper>>) {
        *self.slot.keeper.lock() = keeper;
    }

    /// A life begins; an earlier one ends. It lasts until its [`Driver::reports`] tell of its death.
    pub fn join(&self, driver: Arc<dyn Driver>) {
        let (shared, slot) = (self.shared.clone(), self.slot.clone());
        // Let go of the lock first: leaving takes it.
        let before = slot.current.lock().clone();
        if let Some(before) = before {
            leave(&shared, &slot, before.facts().incarnation, "another life began");
            slot.restarts.fetch_add(1, Ordering::Relaxed);
        }
        join(&shared, &slot, &driver);
        self.shared.runtime.spawn(async move {
            let incarnation = driver.facts().incarnation;
            let last_words = follow(&shared, &slot, &driver).await;
            tracing::warn!(engine = %slot.name, %incarnation, reason = %last_words, "engine left");
            leave(&shared, &slot, incarnation, &last_words);
        });
    }

    /// The life ended.
    pub fn left(&self, why: &str) {
        let current = self.slot.current.lock().clone();
        if let Some(driver) = current {
            driver.stop();
            leave(&self.shared, &self.slot, driver.facts().incarnation, why);
        } else {
            self.slot.say("lost", why);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.left("its agent left");
        self.shared.slots.write().retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

fn join(shared: &Shared, slot: &Slot, driver: &Arc<dyn Driver>) {
    let facts = driver.facts();
    let now = shared.now();
    slot.draining.store(false, Ordering::Release);
    {
        let mut core = shared.core.lock();
        core.note(now, Event::Joined(fleet_facts(facts, driver.is_in_process(), &shared.settings)));
        core.note(now, Event::Ready(facts.incarnation));
        for rank in facts.ranks() {
            let guessed = facts.cache_sight != CacheSight::Events;
            if guessed || facts.accepts.body {
                shared.guess_cache(&mut core, rank, facts.blocks_total, guessed);
            }
        }
        // Under the lock: whoever is told of the rank finds its driver.
        shared.drivers.write().insert(facts.incarnation, driver.clone());
        *slot.current.lock() = Some(driver.clone());
        *slot.said.lock() = Said {
            kind: facts.kind,
            state: "ready",
            detail: "".into(),
            notes: facts.notes.clone(),
            cache_sight: Some(facts.cache_sight.clone()),
        };
        shared.count_models(&mut core);
    }
    tracing::info!(engine = %facts.engine, incarnation = %facts.incarnation, model = %facts.model, "engine joined");
    shared.joined.notify_one();
}

/// Ends a life, once.
fn leave(shared: &Shared, slot: &Slot, incarnation: Incarnation, why: &str) {
    let mut core = shared.core.lock();
    if shared.drivers.write().remove(&incarnation).is_none() {
        return;
    }
    shared.count_models(&mut core);
    let now = shared.now();
    core.note(now, Event::Lost(incarnation));
    core.forget(incarnation);
    shared.caches.forget(incarnation);
    let mut current = slot.current.lock();
    if current.as_ref().is_some_and(|driver| driver.facts().incarnation == incarnation) {
        *current = None;
        slot.say("lost", why);
    }
}

/// Passes reports on until the last one; answers with the engine's last words.
async fn follow(shared: &Shared, slot: &Slot, driver: &Arc<dyn Driver>) -> Arc<str> {
    let facts = driver.facts();
    loop {
        let Report { loads, steps, snapshots, kv, notices, died, lapsed } = driver.reports().next().await;
        let now = shared.now();
        let mut lost_events = Vec::new();
        {
            // Without the cores' lock: look-ups go on, and nobody waits for a large snapshot.
            let index = &shared.caches.index;
            for snapshot in snapshots {
                // Anything but `Ok` leaves the rank out of the index: it is then routed to by load alone.
                let reset = index.reset(snapshot.rank, snapshot.sequence_next, snapshot.contents);
                if reset != Applied::Ok {
                    tracing::warn!(rank = %snapshot.rank, ?reset, "the index cannot follow this rank");
                }
            }
            for batch in &kv {
                if matches!(index.apply(batch), Applied::Gap { .. })
                    && !lost_events.contains(&batch.rank.dp_rank)
                {
                    lost_events.push(batch.rank.dp_rank);
                }
            }
            let mut core = shared.core.lock();
            for LoadReport { dp_rank, load, as_of } in loads {
                let as_of = as_of.into_std().saturating_duration_since(shared.origin);
                core.note(now, Event::Load { rank: facts.rank(dp_rank), load, as_of });
            }
            for (dp_rank, step) in steps {
                core.note(now, Event::Step { rank: facts.rank(dp_rank), step });
            }
        }
        for dp_rank in lost_events {
            tracing::warn!(engine = %slot.name, dp_rank, "KV events were lost; asking for a snapshot");
            driver.request_snapshot(dp_rank);
        }
        for notice in notices {
            take_notice(shared, slot, facts, notice);
        }
        if let Some(reason) = died {
            if !lapsed {
                core_died(shared, facts.incarnation);
            }
            return reason;
        }
    }
}

/// An operator's wish: nothing new goes there. In-process and attached engines drain in this process's eyes alone.
pub(super) fn drain(shared: &Shared, slot: &Slot) {
    slot.draining.store(true, Ordering::Release);
    slot.say("draining", "an operator drains it");
    let current = slot.current.lock().clone();
    if let Some(driver) = current {
        shared.core.lock().note(shared.now(), Event::Draining(driver.facts().incarnation));
    }
    let keeper = slot.keeper.lock().clone();
    if let Some(keeper) = keeper {
        keeper.drain();
    }
}

/// The engine is known to be dead: whoever was there without an answer is remembered.
fn core_died(shared: &Shared, incarnation: Incarnation) {
    let now = shared.now();
    shared.core.lock().quarantine.died(now, incarnation);
}

fn take_notice(shared: &Shared, slot: &Slot, facts: &EngineFacts, notice: Notice) {
    let (now, incarnation) = (shared.now(), facts.incarnation);
    let note = |event| {
        shared.core.lock().note(now, event);
    };
    match notice {
        Notice::Silent { why } => {
            tracing::warn!(engine = %slot.name, %why, "engine is silent");
            slot.say("silent", why);
            note(Event::Silent(incarnation));
        }
        Notice::Heard => {
            slot.say("ready", "");
            match slot.draining.load(Ordering::Acquire) {
                true => note(Event::Draining(incarnation)),
                false => note(Event::Ready(incarnation)),
            }
        }
        Notice::Fenced { why } => {
            tracing::error!(engine = %slot.name, %why, "engine is fenced");
            slot.say("fenced", why);
            note(Event::Fenced(incarnation));
        }
        Notice::Draining => {
            tracing::info!(engine = %slot.name, "engine drains");
            slot.draining.store(true, Ordering::Release);
            note(Event::Draining(incarnation));
        }
        Notice::CacheSight(sight) => {
            let guessed = sight != CacheSight::Events;
            slot.said.lock().cache_sight = Some(sight);
            let mut core = shared.core.lock();
            for rank in facts.ranks() {
                shared.guess_cache(&mut core, rank, facts.blocks_total, guessed);
            }
        }
        Notice::Note(text) => {
            tracing::warn!(engine = %slot.name, note = %text, "engine");
            slot.remember(text);
        }
    }
}

/// Asks an engine for the tokens of a request that it was just given as ours. If they are others it is given text from
/// then on.
pub(super) fn audit(shared: &Arc<Shared>, driver: &dyn Driver, words: &ClientBody, ours: Arc<[TokenId]>) {
    let Some(audit) = driver.audit_tokens(words, ours) else { return };
    let (shared, facts) = (shared.clone(), driver.facts());
    let (engine, incarnation) = (facts.engine.clone(), facts.incarnation);
    tokio::spawn(async move {
        let outcome = match audit.await {
            Audit::Agrees => Audited::Agrees,
            Audit::Unanswered => Audited::Unanswered,
            Audit::Differs(difference) => {
                let why = format!(
                    "its tokenizer disagrees with ours on a request: {difference}; it is given text, not tokens"
                );
                tracing::error!(%engine, %why, "engine");
                let slot = shared.slots.read().iter().find(|slot| slot.name == engine).cloned();
                if let Some(slot) = slot {
                    slot.remember(why.into());
                }
                let mut core = shared.core.lock();
                core.note(shared.now(), Event::TextOnly(incarnation));
                shared.count_models(&mut core);
                Audited::Differs
            }
        };
        shared.metrics.tokenizer_audits.get_or_create(&AuditLabels { outcome }).inc();
    });
}

fn fleet_facts(
    facts: &EngineFacts,
    in_process: bool,
    settings: &OrchestratorSettings,
) -> forebay_fleet::EngineFacts {
    let profile = if in_process { None } else { settings.profile_of(&facts.model) };
    let block_bytes = facts.block_bytes_or_nominal();
    let EngineFacts {
        engine,
        kind: _,
        incarnation,
        model,
        role,
        dp_ranks,
        block_size_tokens,
        block_bytes: _,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv,
        accepts,
        continues_sampling: _,
        cache_sight: _,
        notes: _,
        prior,
    } = facts.clone();
    forebay_fleet::EngineFacts {
        engine,
        incarnation,
        model,
        role,
        dp_ranks,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv_layout: kv.layout,
        can_export: kv.can_export,
        can_import: kv.can_import,
        needs_warming: kv.needs_warming,
        first_token: if in_process { FirstToken::Handed } else { FirstToken::OfDecode },
        takes_tokens: accepts.tokens,
        takes_body: accepts.body,
        steps_together: dp_ranks > 1 && profile.as_ref().is_some_and(|profile| profile.is_of_group()),
        profile,
        load_sight: if in_process { LoadSight::EveryStep } else { LoadSight::Sampled },
        step_prior: prior,
    }
}
