//! `ConcurrentRadixTreeCompressed`, Dynamo's default.
//!
//! Its events can only be applied by `SyncIndexer::worker`, a loop that takes them from a queue and keeps a table of its
//! own for as long as it runs. [`Compressed`] runs that loop on a thread of its own and stops it between phases, so
//! that the queue is filled while nothing is timed, and a timed phase is the loop emptying it: besides the tree, one
//! receive from an uncontended queue an event and two thread switches a phase. [`Pooled`] is the crate's own pool, with
//! what that costs. The tree's clean-up is due after five minutes: no run of this bench reaches it, with either.

use std::{
    future::Future,
    hint::black_box,
    pin::pin,
    sync::{Arc, Condvar, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
    thread::JoinHandle,
};

use dynamo_kv_router::{
    ConcurrentRadixTreeCompressed, LocalBlockHash,
    indexer::{KvIndexerInterface, SyncIndexer, ThreadPoolIndexer, WorkerTask},
};
use tokio::sync::oneshot;

use super::{Queue, local_hashes, local_queries, sorted};
use crate::{
    contender::Contender,
    workload::{Event, Query, Workload},
};

/// Stops the loop: it answers `WorkerTask::Flush` by waking whoever waits for the answer, on its own thread. What it
/// wakes is this gate, and waking it does not return until the gate is opened.
#[derive(Default)]
struct Gate {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Default)]
struct Counts {
    arrived: u64,
    opened: u64,
}

impl Gate {
    /// Lets the loop go on, and returns once it has come to the gate again.
    fn pass(&self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.opened += 1;
        self.changed.notify_all();
        while counts.arrived <= counts.opened {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn open_for_good(&self) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).opened = u64::MAX;
        self.changed.notify_all();
    }
}

impl Wake for Gate {
    fn wake(self: Arc<Self>) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.arrived += 1;
        self.changed.notify_all();
        let arrival = counts.arrived;
        while counts.opened < arrival {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The tree and its loop, which stands at the gate except inside `apply`.
pub struct Compressed {
    tree: Arc<ConcurrentRadixTreeCompressed>,
    tasks: flume::Sender<WorkerTask>,
    gate: Arc<Gate>,
    /// Whoever waits for a flush must exist when the loop answers it.
    flushes: Vec<oneshot::Receiver<()>>,
    queue: Queue,
    queries: Vec<Vec<LocalBlockHash>>,
    worker: Option<JoinHandle<()>>,
}

impl Compressed {
    pub fn new() -> Self {
        let tree = Arc::new(ConcurrentRadixTreeCompressed::new());
        let (tasks, receiver) = flume::unbounded();
        let worker = std::thread::spawn({
            let tree = Arc::clone(&tree);
            move || tree.worker(receiver, None).expect("the loop ends without an error")
        });
        let gate = Arc::default();
        let mut this = Self {
            tree,
            tasks,
            gate,
            flushes: vec![],
            queue: Queue::default(),
            queries: vec![],
            worker: Some(worker),
        };
        this.send_gate();
        this
    }

    fn send(&self, task: WorkerTask) {
        assert!(self.tasks.send(task).is_ok(), "the loop runs until it is told to stop");
    }

    fn send_gate(&mut self) {
        let (answer, mut flush) = oneshot::channel();
        let waker = Waker::from(Arc::clone(&self.gate));
        let poll = pin!(&mut flush).poll(&mut Context::from_waker(&waker));
        assert!(matches!(poll, Poll::Pending), "nothing was sent yet");
        self.flushes.push(flush);
        self.send(WorkerTask::Flush(answer));
    }
}

impl Drop for Compressed {
    fn drop(&mut self) {
        self.send(WorkerTask::Terminate);
        self.gate.open_for_good();
        if let Some(worker) = self.worker.take() {
            worker.join().expect("the loop does not panic");
        }
    }
}

impl Contender for Compressed {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
        for event in std::mem::take(&mut self.queue.events) {
            self.send(WorkerTask::Event(event));
        }
        self.send_gate();
    }

    fn apply(&mut self) {
        self.gate.pass();
        self.flushes.drain(..self.flushes.len() - 1);
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = local_queries(workload, queries);
    }

    fn look_up(&mut self) -> u64 {
        let find = |query| black_box(self.tree.find_matches_impl(query, false)).scores.len() as u64;
        self.queries.iter().map(|query| find(query)).sum()
    }

    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>> {
        Some(sorted(&self.tree.find_matches_impl(&local_hashes(workload.query_local(query)), false)))
    }

    /// The loop only logs what failed: the comparison of answers would show it.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// The tree in the crate's pool, with one thread.
pub struct Pooled {
    pool: ThreadPoolIndexer<ConcurrentRadixTreeCompressed>,
    runtime: tokio::runtime::Runtime,
    queue: Queue,
    queries: Vec<Vec<LocalBlockHash>>,
}

impl Pooled {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without I/O");
        let pool = ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), 1, 16);
        Self { pool, runtime, queue: Queue::default(), queries: vec![] }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.shutdown();
    }
}

impl Contender for Pooled {
    fn prepare(&mut self, workload: &Workload, events: &[Event]) {
        self.queue.push(workload, events);
    }

    fn apply(&mut self) {
        let events = std::mem::take(&mut self.queue.events);
        self.runtime.block_on(async {
            for event in events {
                self.pool.apply_event(event).await;
            }
            self.pool.flush().await;
        });
    }

    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]) {
        self.queries = local_queries(workload, queries);
    }

    fn look_up(&mut self) -> u64 {
        let tree = self.pool.backend();
        self.queries
            .iter()
            .map(|query| black_box(tree.find_matches_impl(query, false)).scores.len() as u64)
            .sum()
    }

    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>> {
        Some(sorted(
            &self.pool.backend().find_matches_impl(&local_hashes(workload.query_local(query)), false),
        ))
    }

    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}
