//! KV that attached prefill engines hold for decode legs to come, over all engines of this process.
//!
//! A prefill engine cannot be told to free what it holds, and cannot see whether anybody comes for it. So what was handed
//! out is noted here: who took it, whether it arrived, whether the prefill side failed. From that follows what releasing it
//! means. Start at [`HeldKv`].
//!
//! Invariants: KV that a decode engine may be reading is never freed; KV that was freed is never taken.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Instant,
};

use forebay_types::{Incarnation, LegId, TokenId};
use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::sync::Notify;

use super::engine::Shared;
use crate::driver::{ClientBody, Leg};

/// Hand-overs that are remembered. Beyond it, KV that nobody comes for waits for its lease.
const HELD_MAX: usize = 32 * 1024;

/// What is held, and the engines that could say that it is not wanted. One for all engines of a process.
#[derive(Default)]
pub struct HeldKv {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    held: HashMap<LegId, Held>,
    takers: Vec<Taker>,
    /// When `held` has grown to it, what has lapsed is forgotten.
    prune_at: usize,
}

/// Fewer are not looked through.
const PRUNE_MIN: usize = 256;

struct Held {
    until: Instant,
    stage: Stage,
    what: What,
    of: Prompted,
    /// Woken when the prefill side has failed.
    failed: Arc<Notify>,
}

/// The prompt whose KV it is, as the prefill engine was given it.
#[derive(Debug, Clone)]
pub(super) struct Prompted {
    tokens: Arc<[TokenId]>,
    body: Option<Arc<ClientBody>>,
}

impl Prompted {
    pub(super) fn of(leg: &Leg) -> Self {
        Self { tokens: leg.prompt.tokens.clone(), body: leg.body.clone() }
    }

    /// Whether a decode leg asks for the very same. vLLM believes that it does: another prompt would be answered with KV of
    /// this one, and a longer one ends the engine (`assert num_decode_blocks <= len(prefill_group)`, seen with 0.32).
    fn is_of(&self, leg: &Leg) -> bool {
        match (&self.body, &leg.body) {
            (None, None) => Arc::ptr_eq(&self.tokens, &leg.prompt.tokens) || self.tokens == leg.prompt.tokens,
            (Some(ours), Some(its)) => {
                Arc::ptr_eq(ours, its) || (ours.route == its.route && ours.json == its.json)
            }
            (None, Some(_)) | (Some(_), None) => false,
        }
    }
}

/// What a prefill leg handed out.
#[derive(Debug, Clone)]
pub(super) enum What {
    /// vLLM's blocks, which the decode engine reads: `kv_transfer_params`, and the layout of those who can.
    Pulled { params: Arc<RawValue>, layout: u64, from: Incarnation },
    /// vLLM's blocks, which the prefill engine writes: nothing but its lease ends that.
    Pushed,
    /// A room at an SGLang prefill server.
    Room,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// No engine has been told of it.
    Waiting,
    /// A decode engine may have been.
    Taken,
    /// It is there.
    Arrived,
    /// Nobody may take it any more.
    Released,
    /// Nobody need wait for it any more.
    Failed(Arc<str>),
}

struct Taker {
    incarnation: Incarnation,
    layout: u64,
    engine: Weak<Shared>,
}

/// What releasing KV asks of the prefill engine's driver.
pub(super) enum Release {
    /// Nothing: it is unknown, was taken, or its lease ends it.
    Nothing,
    /// The leg that computes it is of no use.
    CancelLeg,
    /// This engine shall say that nobody comes for it.
    Discard { taker: Arc<Shared>, params: Arc<RawValue> },
}

impl HeldKv {
    /// Nothing is held yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// An engine that takes KV of this layout.
    pub(super) fn add_taker(&self, incarnation: Incarnation, layout: u64, engine: Weak<Shared>) {
        let mut inner = self.inner.lock();
        inner.takers.retain(|taker| taker.engine.strong_count() > 0);
        inner.takers.push(Taker { incarnation, layout, engine });
    }

    /// A prefill leg has handed it out.
    pub(super) fn hold(&self, leg: LegId, until: Instant, what: What, of: Prompted) {
        let mut inner = self.inner.lock();
        if inner.held.len() >= inner.prune_at {
            let now = Instant::now();
            inner.held.retain(|_, held| held.until > now);
            inner.prune_at = (inner.held.len() * 2).clamp(PRUNE_MIN, HELD_MAX);
        }
        if inner.held.len() < HELD_MAX {
            let held = Held { until, stage: Stage::Waiting, what, of, failed: Arc::default() };
            inner.held.insert(leg, held);
        }
    }

    /// A decode engine is about to be told of it. `false`: it must not be, for another was, it is gone, or it is KV of
    /// another prompt than this decode leg's.
    pub(super) fn take(&self, leg: LegId, by: &Leg) -> bool {
        let mut inner = self.inner.lock();
        // Of an unknown one, such as another process's, its own words are all there is.
        let Some(held) = inner.held.get_mut(&leg) else { return true };
        if held.stage != Stage::Waiting || !held.of.is_of(by) {
            return false;
        }
        held.stage = Stage::Taken;
        true
    }

    /// The decode engine has not been told after all.
    pub(super) fn give_back(&self, leg: LegId) {
        self.step(leg, &Stage::Taken, Stage::Waiting);
    }

    /// The decode engine has it.
    pub(super) fn arrived(&self, leg: LegId) {
        self.step(leg, &Stage::Taken, Stage::Arrived);
    }

    /// Goes from one stage to another, if it is known and at the one.
    fn step(&self, leg: LegId, from: &Stage, to: Stage) {
        if let Some(held) = self.inner.lock().held.get_mut(&leg)
            && held.stage == *from
        {
            held.stage = to;
        }
    }

    /// The prefill side came to nothing; whoever waits for its KV is told.
    pub(super) fn fail(&self, leg: LegId, why: &str) {
        if let Some(held) = self.inner.lock().held.get_mut(&leg)
            && matches!(held.stage, Stage::Waiting | Stage::Taken)
        {
            held.stage = Stage::Failed(why.into());
            held.failed.notify_waiters();
        }
    }

    /// Ends when the prefill side has failed, with why.
    pub(super) async fn failure(&self, leg: LegId) -> Arc<str> {
        loop {
            let Some(failed) = self.inner.lock().held.get(&leg).map(|held| held.failed.clone()) else {
                return std::future::pending().await;
            };
            let mut failing = std::pin::pin!(failed.notified());
            failing.as_mut().enable(); // before the look: what happens after it wakes us
            if let Some(Held { stage: Stage::Failed(why), .. }) = self.inner.lock().held.get(&leg) {
                return why.clone();
            }
            failing.await;
        }
    }

    /// Nobody needs it any more.
    pub(super) fn release(&self, leg: LegId) -> Release {
        let mut inner = self.inner.lock();
        let Inner { held, takers, .. } = &mut *inner;
        let Some(entry) = held.get_mut(&leg) else { return Release::Nothing };
        if let What::Room = entry.what {
            // Without its prefill leg a room is nothing that could be taken by mistake.
            let stage = held.remove(&leg).map(|held| held.stage);
            let is_over = matches!(stage, Some(Stage::Arrived | Stage::Released));
            return if is_over { Release::Nothing } else { Release::CancelLeg };
        }
        let before = std::mem::replace(&mut entry.stage, Stage::Released);
        // What is left until the lease ends says only that it is gone.
        let what = std::mem::replace(&mut entry.what, What::Pushed);
        entry.of = Prompted { tokens: Arc::new([]), body: None };
        let is_fresh = entry.until > Instant::now();
        match (before, what) {
            (Stage::Waiting, What::Pulled { params, layout, from }) if is_fresh => {
                let fits = |taker: &&Taker| taker.layout == layout && taker.incarnation != from;
                let taker = takers.iter().filter(fits).find_map(|taker| taker.engine.upgrade());
                taker.map_or(Release::Nothing, |taker| Release::Discard { taker, params })
            }
            (_, What::Pulled { .. } | What::Pushed | What::Room) => Release::Nothing,
        }
    }
}

impl std::fmt::Debug for HeldKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldKv").field("held", &self.inner.lock().held.len()).finish_non_exhaustive()
    }
}
