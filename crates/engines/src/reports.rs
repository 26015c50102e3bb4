//! What an engine says about itself: load, step times, cache changes, death. One mailbox an engine, one reader.
//!
//! Whoever watches an engine writes it: the shell of an in-process engine, the observer of an attached one, or the end
//! of an agent's stream.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use forebay_types::{KvEvent, KvEventBatch, RankId, RankLoad, StepObservation};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::driver::CacheSight;

/// Step observations kept for a slow reader; older ones go first, for each only refines the perf model.
const STEPS_MAX: usize = 256;
/// Event batches kept for a slow reader. Beyond it they are dropped: the gap in their numbers makes the reader ask
/// for a snapshot.
const KV_BATCHES_MAX: usize = 4096;
/// Steps after which a reader is woken though nothing else happened.
const STEPS_WAKE: usize = 32;
/// Notices kept for a slow reader.
const NOTICES_MAX: usize = 64;

/// Everything since the last read.
#[derive(Debug, Default)]
pub struct Report {
    /// The latest load of each DP rank that reported.
    pub loads: Vec<LoadReport>,
    /// Steps as measured, by DP rank.
    pub steps: Vec<(u16, StepObservation)>,
    /// Whole caches, when they were asked for. Go before `kv`.
    pub snapshots: Vec<KvSnapshot>,
    /// Cache changes, numbered for each rank.
    pub kv: Vec<KvEventBatch>,
    /// What changed about the engine itself, in order.
    pub notices: Vec<Notice>,
    /// The engine's last words. Nothing follows.
    pub died: Option<Arc<str>>,
    /// It is not known to be dead: nothing was heard of it for too long.
    pub lapsed: bool,
}

/// A rank's load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadReport {
    /// Whose.
    pub dp_rank: u16,
    /// What it said.
    pub load: RankLoad,
    /// Whatever reached the engine before is in it.
    pub as_of: Instant,
}

/// News of an engine that lives on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It is silent beyond its deadline: nothing new goes there until it is heard of again.
    Silent {
        /// A sentence.
        why: Arc<str>,
    },
    /// It is heard of again, or was mended.
    Heard,
    /// It said something that cannot be true: nothing new goes there in this life.
    Fenced {
        /// A sentence.
        why: Arc<str>,
    },
    /// It finishes what runs and takes nothing new.
    Draining,
    /// How much is known of its cache has changed.
    CacheSight(CacheSight),
    /// Something an operator should read.
    Note(Arc<str>),
}

/// Everything that one rank caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSnapshot {
    /// Whose.
    pub rank: RankId,
    /// Number of the next event batch.
    pub sequence_next: u64,
    /// Events that would make it from nothing.
    pub contents: Vec<KvEvent>,
}

/// The mailbox.
#[derive(Debug, Default)]
pub struct Reports {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    loads: Vec<LoadReport>,
    steps: VecDeque<(u16, StepObservation)>,
    snapshots: Vec<KvSnapshot>,
    kv: Vec<KvEventBatch>,
    notices: Vec<Notice>,
    died: Option<Arc<str>>,
    lapsed: bool,
    /// Worth waking the reader for.
    news: bool,
    reader: Option<Waker>,
}

impl Inner {
    fn wake(&mut self) {
        self.news = true;
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn load(&mut self, report: LoadReport) {
        match self.loads.iter_mut().find(|latest| latest.dp_rank == report.dp_rank) {
            Some(latest) => *latest = report,
            None => self.loads.push(report),
        }
    }

    fn step(&mut self, dp_rank: u16, step: StepObservation) {
        if self.steps.len() == STEPS_MAX {
            self.steps.pop_front();
        }
        self.steps.push_back((dp_rank, step));
    }

    fn kv(&mut self, batch: KvEventBatch) {
        if self.kv.len() < KV_BATCHES_MAX {
            self.kv.push(batch);
        }
    }
}

impl Reports {
    /// One step's worth. `notable`: the load changed by more than a decoded token.
    pub(crate) fn put_step(
        &self,
        load: LoadReport,
        step: Option<StepObservation>,
        kv: Option<KvEventBatch>,
        notable: bool,
    ) {
        let mut inner = self.inner.lock();
        inner.load(load);
        if let Some(step) = step {
            inner.step(0, step);
        }
        let events = kv.is_some();
        if let Some(batch) = kv {
            inner.kv(batch);
        }
        if events || notable || inner.steps.len() >= STEPS_WAKE {
            inner.wake();
        }
    }

    /// A rank's load, as the engine says it.
    pub fn put_load(&self, report: LoadReport) {
        let mut inner = self.inner.lock();
        inner.load(report);
        inner.wake();
    }

    /// Steps of a rank, as measured. They wait for the next wake-up.
    pub fn put_steps(&self, dp_rank: u16, steps: impl IntoIterator<Item = StepObservation>) {
        let mut inner = self.inner.lock();
        steps.into_iter().for_each(|step| inner.step(dp_rank, step));
    }

    /// Cache changes. Beyond [`KV_BATCHES_MAX`] they are dropped, which their numbers show.
    pub fn put_kv(&self, batches: impl IntoIterator<Item = KvEventBatch>) {
        let mut inner = self.inner.lock();
        batches.into_iter().for_each(|batch| inner.kv(batch));
        inner.wake();
    }

    /// A rank's whole cache; it replaces the batches of that rank that wait.
    pub fn put_snapshot(&self, snapshot: KvSnapshot) {
        let mut inner = self.inner.lock();
        inner.kv.retain(|batch| batch.rank != snapshot.rank);
        inner.snapshots.retain(|earlier| earlier.rank != snapshot.rank);
        inner.snapshots.push(snapshot);
        inner.wake();
    }

    /// What changed about the engine itself. Beyond [`NOTICES_MAX`] unread ones the oldest goes.
    pub fn put_notice(&self, notice: Notice) {
        let mut inner = self.inner.lock();
        if inner.notices.len() == NOTICES_MAX {
            inner.notices.remove(0);
        }
        inner.notices.push(notice);
        inner.wake();
    }

    /// The engine's last words.
    pub fn put_death(&self, reason: Arc<str>) {
        let mut inner = self.inner.lock();
        if inner.died.is_none() {
            inner.died = Some(reason);
        }
        inner.wake();
    }

    /// The life is over because nothing was heard of the engine; it may live.
    pub fn put_lapse(&self, reason: Arc<str>) {
        self.inner.lock().lapsed = true;
        self.put_death(reason);
    }

    /// Whether the engine has died.
    pub fn is_dead(&self) -> bool {
        self.inner.lock().died.is_some()
    }

    /// Everything since the last call; pending while there is nothing new.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Report> {
        let mut inner = self.inner.lock();
        if !inner.news {
            if !inner.reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                inner.reader = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        inner.news = false;
        Poll::Ready(Report {
            loads: std::mem::take(&mut inner.loads),
            steps: inner.steps.drain(..).collect(),
            snapshots: std::mem::take(&mut inner.snapshots),
            kv: std::mem::take(&mut inner.kv),
            notices: std::mem::take(&mut inner.notices),
            died: inner.died.clone(),
            lapsed: inner.lapsed,
        })
    }

    /// As [`Reports::poll_next`], to await.
    pub async fn next(&self) -> Report {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}
