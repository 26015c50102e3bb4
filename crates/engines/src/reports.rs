//! What an engine says about itself: load, step times, cache changes, death. One mailbox an engine, one reader.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use forebay_types::{BlockHash, KvEventBatch, RankId, RankLoad, StepObservation};
use parking_lot::Mutex;

/// Step observations kept for a slow reader; older ones go first, for each only refines the perf model.
const STEPS_MAX: usize = 256;
/// Event batches kept for a slow reader. Beyond it they are dropped: the gap in their numbers makes the reader ask
/// for a snapshot.
const KV_BATCHES_MAX: usize = 4096;
/// Steps after which a reader is woken though nothing else happened.
const STEPS_WAKE: usize = 32;

/// Everything since the last read.
#[derive(Debug, Default)]
pub struct Report {
    /// The latest load of the rank, if it changed.
    pub load: Option<RankLoad>,
    /// Steps as measured.
    pub steps: Vec<StepObservation>,
    /// Cache changes, numbered.
    pub kv: Vec<KvEventBatch>,
    /// The whole cache, when it was asked for. Goes before `kv`.
    pub snapshot: Option<KvSnapshot>,
    /// The engine's last words. Nothing follows.
    pub died: Option<Arc<str>>,
}

/// Everything that one rank caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSnapshot {
    /// Whose.
    pub rank: RankId,
    /// Number of the next event batch.
    pub sequence_next: u64,
    /// Hashes of all cached blocks.
    pub blocks: Vec<BlockHash>,
}

/// The mailbox.
#[derive(Debug, Default)]
pub struct Reports {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    load: Option<RankLoad>,
    steps: VecDeque<StepObservation>,
    kv: Vec<KvEventBatch>,
    snapshot: Option<KvSnapshot>,
    died: Option<Arc<str>>,
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
}

impl Reports {
    /// One step's worth. `notable`: the load changed by more than a decoded token.
    pub(crate) fn put_step(
        &self,
        load: RankLoad,
        step: Option<StepObservation>,
        kv: Option<KvEventBatch>,
        notable: bool,
    ) {
        let mut inner = self.inner.lock();
        inner.load = Some(load);
        if let Some(step) = step {
            if inner.steps.len() == STEPS_MAX {
                inner.steps.pop_front();
            }
            inner.steps.push_back(step);
        }
        let events = kv.is_some();
        if let Some(batch) = kv
            && inner.kv.len() < KV_BATCHES_MAX
        {
            inner.kv.push(batch);
        }
        if events || notable || inner.steps.len() >= STEPS_WAKE {
            inner.wake();
        }
    }

    /// Answers a request for a snapshot; it replaces the batches that wait.
    pub(crate) fn put_snapshot(&self, snapshot: KvSnapshot) {
        let mut inner = self.inner.lock();
        inner.kv.clear();
        inner.snapshot = Some(snapshot);
        inner.wake();
    }

    /// The engine's last words.
    pub(crate) fn put_death(&self, reason: Arc<str>) {
        let mut inner = self.inner.lock();
        if inner.died.is_none() {
            inner.died = Some(reason);
        }
        inner.wake();
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
            load: inner.load.take(),
            steps: inner.steps.drain(..).collect(),
            kv: std::mem::take(&mut inner.kv),
            snapshot: inner.snapshot.take(),
            died: inner.died.clone(),
        })
    }

    /// As [`Reports::poll_next`], to await.
    pub async fn next(&self) -> Report {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}
