//! The back end for pools of one host: threads that copy from mapped region to mapped region, once.
//!
//! In: plans whose source is mapped. Out: outcomes. Start at [`SharedMemoryMover::submit`](Mover::submit) and `work`.
//!
//! Invariants: a thread writes to a destination only between taking a ticket from the queue and ending it, and ends it
//! itself, so no write follows a callback; callbacks run without the lock; a ticket is owned by the queue or by one
//! thread, so it ends once.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use crate::{
    mover::{Callback, Cancel, Completion, MoveError, Mover, Options, Outcome, Report, SubmitError, Ticket},
    plan::{CopyPlan, Source},
    transfer::Transfer,
};

/// Bounds of a [`SharedMemoryMover`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemorySettings {
    /// Threads that copy; at least one runs. One thread of a server reaches a good half of its memory's bandwidth.
    pub threads: usize,
    /// Tickets that may wait for a thread; more are refused.
    pub queue_tickets_max: usize,
    /// Bytes copied between two looks at deadlines, cancellation and shutdown (but at least one block).
    pub slice_bytes_max: u64,
}

impl Default for SharedMemorySettings {
    /// One thread, 256 tickets (a request has at most one transfer at a time), slices of 1 MiB (0.1 to 0.2 ms).
    fn default() -> Self {
        Self { threads: 1, queue_tickets_max: 256, slice_bytes_max: 1 << 20 }
    }
}

/// What a mover has done since it was made, and what it has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MoverStats {
    /// Tickets that wait for a thread.
    pub queued: u64,
    /// Tickets that a thread copies.
    pub running: u64,
    /// Tickets ended as done.
    pub done: u64,
    /// Tickets ended as failed.
    pub failed: u64,
    /// Tickets ended by their deadline.
    pub timed_out: u64,
    /// Tickets ended by cancellation or shutdown.
    pub cancelled: u64,
    /// Plans that were not accepted.
    pub refused: u64,
    /// Blocks of the done tickets.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The contiguous pieces that they took.
    pub pieces: u64,
}

/// Copies between mapped regions on threads of its own. Dropping it [closes](Self::close) it.
pub struct SharedMemoryMover {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    settings: SharedMemorySettings,
    queue: Mutex<VecDeque<Job>>,
    wake: Condvar,
    /// Read between slices. Its change is ordered by nothing but its own value.
    closing: AtomicBool,
    counters: Counters,
}

struct Job {
    plan: CopyPlan,
    options: Options,
    control: Arc<Control>,
    completion: Completion,
}

/// Whether the ticket was cancelled: looked at between slices, ordered by nothing but its own value.
#[derive(Default)]
struct Control(AtomicBool);

impl Cancel for Control {
    fn cancel(&self) {
        self.0.store(true, Relaxed);
    }
}

/// Relaxed throughout: each is read alone, for people.
#[derive(Default)]
struct Counters {
    running: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    cancelled: AtomicU64,
    refused: AtomicU64,
    blocks: AtomicU64,
    bytes: AtomicU64,
    pieces: AtomicU64,
}

impl SharedMemoryMover {
    /// Starts the threads, named `kv-move-0`, `kv-move-1` and so on.
    ///
    /// # Errors
    /// If the system has no thread left to give.
    pub fn new(settings: SharedMemorySettings) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            settings,
            queue: Mutex::default(),
            wake: Condvar::new(),
            closing: AtomicBool::new(false),
            counters: Counters::default(),
        });
        // Made before its threads: if one cannot be had, dropping `mover` ends those that were.
        let mover = Self { shared, threads: Mutex::default() };
        for index in 0..settings.threads.max(1) {
            let shared = Arc::clone(&mover.shared);
            let thread =
                thread::Builder::new().name(format!("kv-move-{index}")).spawn(move || shared.work())?;
            mover.lock_threads().push(thread);
        }
        Ok(mover)
    }

    /// Ends every ticket, those that are not finished as `Cancelled`, and stops the threads; later plans are refused as
    /// `Closed`. Callbacks of waiting tickets run here, on the caller's thread: hold no lock that they take.
    ///
    /// Blocks until no write can land any more: for one slice of copying and the callbacks that run. (Called
    /// from a callback, it cannot wait for the thread that it is on; that one only returns from the callback.)
    pub fn close(&self) {
        let waiting = {
            let mut queue = self.shared.lock();
            // Under the lock, so no submission comes after the queue was emptied.
            self.shared.closing.store(true, Relaxed);
            std::mem::take(&mut *queue)
        };
        self.shared.wake.notify_all();
        for job in waiting {
            self.shared.end(job, Outcome::Cancelled);
        }
        // Taken out first: a callback that closes too, on a thread that is joined here, finds nothing left to join.
        let threads = std::mem::take(&mut *self.lock_threads());
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != thread::current().id()) {
            thread.join().expect("a copying thread catches every panic");
        }
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters, for metrics.
    pub fn stats(&self) -> MoverStats {
        let counters = &self.shared.counters;
        MoverStats {
            queued: self.shared.lock().len() as u64,
            running: counters.running.load(Relaxed),
            done: counters.done.load(Relaxed),
            failed: counters.failed.load(Relaxed),
            timed_out: counters.timed_out.load(Relaxed),
            cancelled: counters.cancelled.load(Relaxed),
            refused: counters.refused.load(Relaxed),
            blocks: counters.blocks.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            pieces: counters.pieces.load(Relaxed),
        }
    }
}

impl Mover for SharedMemoryMover {
    fn submit(&self, plan: CopyPlan, options: Options, done: Callback) -> Result<Ticket, SubmitError> {
        let accepted = self.shared.accept(plan, options, done);
        if accepted.is_err() {
            self.shared.counters.refused.fetch_add(1, Relaxed);
        }
        accepted
    }
}

impl Drop for SharedMemoryMover {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Job>> {
        // Nothing that can panic runs under the lock, so a poisoned queue is still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, plan: CopyPlan, options: Options, done: Callback) -> Result<Ticket, SubmitError> {
        if let Source::Remote { key, .. } = plan.source() {
            return Err(SubmitError::Unreachable { key: *key });
        }
        let control = Arc::new(Control::default());
        let ticket = Ticket::new(Arc::clone(&control) as Arc<dyn Cancel>);
        let mut queue = self.lock();
        if self.closing.load(Relaxed) {
            return Err(SubmitError::Closed);
        }
        let queue_tickets_max = self.settings.queue_tickets_max;
        if queue.len() >= queue_tickets_max {
            return Err(SubmitError::QueueFull { queue_tickets_max });
        }
        queue.push_back(Job { plan, options, control, completion: Completion::new(done) });
        drop(queue);
        self.wake.notify_one();
        Ok(ticket)
    }

    /// A copying thread.
    fn work(&self) {
        while let Some(job) = self.next_job() {
            // A panic in the copying itself would be a bug; the ticket must end all the same, and does: unwinding drops
            // the job, and with it the `Completion`.
            if catch_unwind(AssertUnwindSafe(|| self.run(job))).is_err() {
                self.counters.running.fetch_sub(1, Relaxed);
                self.counters.failed.fetch_add(1, Relaxed);
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if self.closing.load(Relaxed) {
                return None;
            }
            if let Some(job) = queue.pop_front() {
                self.counters.running.fetch_add(1, Relaxed);
                return Some(job);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, job: Job) {
        let outcome = self.copy(&job);
        self.counters.running.fetch_sub(1, Relaxed);
        self.end(job, outcome);
    }

    /// Copies until the ticket ends, one way or another. When it returns, this thread writes no more.
    fn copy(&self, job: &Job) -> Outcome {
        let Source::Mapped(source) = job.plan.source() else {
            return Outcome::Failed(MoveError::PeerGone); // refused by `accept`
        };
        let begun = Instant::now();
        let mut transfer =
            Transfer::new(&job.plan, source, job.options.checksum, self.settings.slice_bytes_max);
        let mut now = begun;
        loop {
            if let Some(outcome) = self.interrupted(job, now) {
                return outcome;
            }
            let Some(slice) = transfer.next_slice() else { break };
            if let Err(error) = transfer.copy_slice(slice) {
                return Outcome::Failed(error);
            }
            now = Instant::now();
            self.sweep(now);
        }
        Outcome::Done(Report {
            blocks: job.plan.blocks(),
            bytes: job.plan.bytes(),
            pieces: job.plan.pieces().len() as u32,
            seconds: now.duration_since(begun).as_secs_f64(),
        })
    }

    /// The outcome of a ticket that must not go on.
    fn interrupted(&self, job: &Job, now: Instant) -> Option<Outcome> {
        if job.control.0.load(Relaxed) || self.closing.load(Relaxed) {
            Some(Outcome::Cancelled)
        } else if job.options.deadline <= now {
            Some(Outcome::TimedOut)
        } else {
            None
        }
    }

    /// Ends waiting tickets that are cancelled or late, so that they need not wait for a thread to become free: tickets
    /// wait only while all threads copy, and each comes by here after every slice. Walks the queue under the lock:
    /// under a microsecond for the default bound, against 0.1 ms and more for the slice.
    fn sweep(&self, now: Instant) {
        let mut ended = Vec::new();
        {
            let mut queue = self.lock();
            let mut at = 0;
            while let Some(job) = queue.get(at) {
                match self.interrupted(job, now) {
                    Some(outcome) => ended.extend(queue.remove(at).map(|job| (job, outcome))),
                    None => at += 1,
                }
            }
        }
        for (job, outcome) in ended {
            self.end(job, outcome);
        }
    }

    fn end(&self, job: Job, outcome: Outcome) {
        let counters = &self.counters;
        let counter = match &outcome {
            Outcome::Done(report) => {
                counters.blocks.fetch_add(u64::from(report.blocks), Relaxed);
                counters.bytes.fetch_add(report.bytes, Relaxed);
                counters.pieces.fetch_add(u64::from(report.pieces), Relaxed);
                &counters.done
            }
            Outcome::Failed(_) => &counters.failed,
            Outcome::TimedOut => &counters.timed_out,
            Outcome::Cancelled => &counters.cancelled,
        };
        counter.fetch_add(1, Relaxed);
        let Job { plan, completion, .. } = job;
        // Before the callback: once it ran, this mover holds on to no region.
        drop(plan);
        completion.end(outcome);
    }
}

#[cfg(test)]
mod tests;
