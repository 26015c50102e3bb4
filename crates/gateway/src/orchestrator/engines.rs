//! Keeps engines alive and passes on what they report.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use forebay_engines::{Driver, EngineFacts, Launch, Report};
use forebay_fleet::Event;
use forebay_kv_index::Applied;
use forebay_placement::{Breaker, RankState};
use forebay_types::{Incarnation, RankLoad};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use super::{Shared, api::EngineStatus};

/// One engine over all its lives.
pub(super) struct Slot {
    launcher: Arc<dyn Launch>,
    restarts: AtomicU64,
    current: Mutex<Option<EngineFacts>>,
}

impl Slot {
    pub(super) fn new(launcher: Arc<dyn Launch>) -> Self {
        Self { launcher, restarts: AtomicU64::new(0), current: Mutex::new(None) }
    }
}

/// Starts an engine, follows it until it dies, and begins again after a pause, until the process closes.
pub(super) async fn keep_alive(shared: Arc<Shared>, slot: usize) {
    let settings = &shared.settings;
    let mut back_off = settings.restart_back_off;
    loop {
        let slot = &shared.slots[slot];
        let incarnation = Incarnation(shared.next_incarnation.fetch_add(1, Ordering::Relaxed));
        let began = Instant::now();
        match slot.launcher.launch(incarnation) {
            Ok(driver) => {
                join(&shared, slot, &driver);
                let last_words = follow(&shared, &driver).await;
                leave(&shared, slot, incarnation);
                if shared.closing.load(Ordering::Acquire) {
                    return;
                }
                tracing::error!(engine = %slot.launcher.name(), %incarnation, reason = %last_words, "engine died");
            }
            Err(error) => tracing::error!(%error, "engine did not start"),
        }
        if began.elapsed() > settings.restart_back_off_max {
            back_off = settings.restart_back_off; // it lived long enough to count as well
        }
        sleep_until(Instant::now() + back_off).await;
        if shared.closing.load(Ordering::Acquire) {
            return;
        }
        back_off = (back_off * 2).min(settings.restart_back_off_max);
        slot.restarts.fetch_add(1, Ordering::Relaxed);
    }
}

fn join(shared: &Shared, slot: &Slot, driver: &Arc<dyn Driver>) {
    let facts = driver.facts();
    let now = shared.now();
    let mut core = shared.core.lock();
    core.note(now, Event::Joined(fleet_facts(facts)));
    core.note(now, Event::Ready(facts.incarnation));
    // Under the lock: whoever is told of the rank finds its driver.
    shared.drivers.write().insert(facts.incarnation, driver.clone());
    *slot.current.lock() = Some(facts.clone());
    tracing::info!(engine = %facts.engine, incarnation = %facts.incarnation, model = %facts.model, "engine joined");
}

fn leave(shared: &Shared, slot: &Slot, incarnation: Incarnation) {
    let mut core = shared.core.lock();
    core.note(shared.now(), Event::Lost(incarnation));
    core.index.remove_incarnation(incarnation);
    shared.drivers.write().remove(&incarnation);
    *slot.current.lock() = None;
}

/// Passes reports on until the last one; answers with the engine's last words.
async fn follow(shared: &Shared, driver: &Arc<dyn Driver>) -> Arc<str> {
    let rank = driver.facts().rank();
    loop {
        let Report { load, steps, kv, snapshot, died } = driver.reports().next().await;
        let now = shared.now();
        let mut lost_events = false;
        {
            let mut core = shared.core.lock();
            if let Some(snapshot) = snapshot {
                // Anything but `Ok` leaves the rank out of the index: it is then routed to by load alone.
                let reset = core.index.reset(snapshot.rank, snapshot.sequence_next, snapshot.blocks);
                if reset != Applied::Ok {
                    tracing::warn!(%rank, ?reset, "the index cannot follow this rank");
                }
            }
            for batch in &kv {
                lost_events |= matches!(core.index.apply(batch), Applied::Gap { .. });
            }
            if let Some(load) = load {
                core.note(now, Event::Load { rank, load });
            }
            for step in steps {
                core.note(now, Event::Step { rank, step });
            }
        }
        if lost_events {
            tracing::warn!(engine = %driver.facts().engine, "KV events were lost; asking for a snapshot");
            driver.request_snapshot();
        }
        if let Some(reason) = died {
            return reason;
        }
    }
}

/// Every engine, in the order in which they were given.
pub(super) fn status(shared: &Shared) -> Vec<EngineStatus> {
    let mut core = shared.core.lock();
    let snapshot = core.fleet.snapshot(shared.now());
    let status = |slot: &Slot| {
        let current = slot.current.lock().clone();
        let rank = current.as_ref().and_then(|facts| snapshot.rank(facts.rank()));
        EngineStatus {
            engine: slot.launcher.name().clone(),
            kind: slot.launcher.kind().to_owned(),
            incarnation: current.as_ref().map_or(0, |facts| facts.incarnation.0),
            state: rank.map_or("lost", |rank| state_name(rank.state)).to_owned(),
            role: current.as_ref().map_or_else(|| slot.launcher.role(), |facts| facts.role),
            model: current.as_ref().map_or_else(|| "".into(), |facts| facts.model.clone()),
            load: rank.map_or_else(RankLoad::default, |rank| rank.load),
            breaker: rank.map_or("closed", |rank| breaker_name(rank.breaker)).to_owned(),
            prefill_share: rank.map_or(0.0, |rank| rank.prefill_share),
            indexed_blocks: rank.and_then(|rank| core.index.rank(rank.id)).map_or(0, |rank| rank.blocks),
            restarts: slot.restarts.load(Ordering::Relaxed),
        }
    };
    shared.slots.iter().map(status).collect()
}

fn state_name(state: RankState) -> &'static str {
    match state {
        RankState::Starting => "starting",
        RankState::Ready => "ready",
        RankState::Draining => "draining",
        RankState::Lost => "lost",
    }
}

fn breaker_name(breaker: Breaker) -> &'static str {
    match breaker {
        Breaker::Closed => "closed",
        Breaker::Open => "open",
        Breaker::HalfOpen => "half_open",
    }
}

fn fleet_facts(facts: &EngineFacts) -> forebay_fleet::EngineFacts {
    let EngineFacts {
        engine,
        kind: _,
        incarnation,
        model,
        role,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv_layout,
        prior,
    } = facts.clone();
    forebay_fleet::EngineFacts {
        engine,
        incarnation,
        model,
        role,
        dp_ranks: 1,
        block_size_tokens,
        block_bytes,
        blocks_total,
        step_tokens_max,
        context_tokens_max,
        waiting_max,
        kv_layout,
        can_export: true,
        can_import: true,
        step_prior: prior,
    }
}
