//! What every back end promises: [`Mover`].
//!
//! In: a [`CopyPlan`], a deadline and a callback. Out: a [`Ticket`] at once and an [`Outcome`] later.
//!
//! Invariants, checked for each back end by [`conformance`](crate::conformance):
//! - `submit` never blocks on a copy, a peer or a full queue, and never runs the callback itself.
//! - Each accepted ticket ends exactly once; a refused one never runs its callback.
//! - *When the callback runs, no write of that ticket can land any more.* Until then the owner of the destination keeps
//!   its blocks in quarantine: not computed on, not given away, whatever it has cancelled or given up waiting for.
//! - `Done` means that each source block had its generation before and after it was read, and each destination block
//!   before and after it was written. Any other outcome says nothing about the destination's bytes: recompute.
//! - A ticket does not outlive its deadline by more than the time of one slice of copying and of the callbacks that
//!   run before it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    time::Instant,
};

use crate::{plan::CopyPlan, region::RegionKey};

/// A back end that copies blocks between pools.
pub trait Mover: Send + Sync {
    /// Accepts a plan, or refuses it at once.
    ///
    /// `done` runs once, on a thread of the mover or of whoever closes it, and should only pass the outcome on: while
    /// it runs, that thread copies nothing. It may submit, cancel, or drop the mover.
    ///
    /// # Errors
    /// `QueueFull`, `Closed`, `Unreachable`. `done` is then dropped without being run.
    fn submit(&self, plan: CopyPlan, options: Options, done: Callback) -> Result<Ticket, SubmitError>;
}

/// Runs when a ticket ends.
pub type Callback = Box<dyn FnOnce(Outcome) + Send>;

/// How to copy.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// When to give up. Never later than the end of the lease on the source blocks, as this process knows it: after
    /// that the owner may rewrite them, and the generations would only turn the waste into an error.
    pub deadline: Instant,
    /// Whether content is checked too.
    pub checksum: Checksum,
}

impl Options {
    /// Without checksums.
    pub fn until(deadline: Instant) -> Self {
        Self { deadline, checksum: Checksum::Skip }
    }

    /// With checksums that the source's owner published.
    pub fn verified_until(deadline: Instant) -> Self {
        Self { deadline, checksum: Checksum::Published }
    }
}

/// What a checksum is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// Nothing: the generations alone.
    #[default]
    Skip,
    /// The bytes that arrived are hashed *in the destination* and compared with what the source's owner published when
    /// it finished the block ([`Region::publish_checksum`](crate::Region::publish_checksum)). So it covers the whole
    /// way: a writer that broke the rules, memory damaged since, the mover's own mistakes. (Comparing source and
    /// destination after the copy would show only the last of these.)
    Published,
}

/// How a ticket ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Every block arrived and is what its reference says.
    Done(Report),
    /// Something is wrong with a block or a peer.
    Failed(MoveError),
    /// The deadline passed first.
    TimedOut,
    /// [`Ticket::cancel`], or the mover was dropped.
    Cancelled,
}

/// What a finished transfer moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Blocks copied.
    pub blocks: u32,
    /// Payload bytes copied.
    pub bytes: u64,
    /// Contiguous copies that it took; `pieces / blocks` tells how scattered the pools are.
    pub pieces: u32,
    /// From the first check to the last, in seconds; the wait in the queue is not in it.
    pub seconds: f64,
}

/// Why a transfer failed. For the caller all mean the same: do not use the destination blocks, recompute.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// The source block holds something else than was promised: its lease was over, or its owner broke it.
    #[error(
        "source block {block} has generation {found}, not {expected}: it was reused, recompute its tokens"
    )]
    Stale {
        /// Index in the source.
        block: u32,
        /// By the plan.
        expected: u64,
        /// In the region.
        found: u64,
    },
    /// The destination block belongs to someone else now: its owner did not keep it in quarantine.
    #[error(
        "destination block {block} has generation {found}, not {expected}: it was given away during a transfer"
    )]
    DestinationReallocated {
        /// Index in the destination.
        block: u32,
        /// By the plan.
        expected: u64,
        /// In the region.
        found: u64,
    },
    /// The bytes that arrived are not those that the owner published.
    #[error("source block {block} does not match its published checksum: recompute, and suspect its engine")]
    ChecksumMismatch {
        /// Index in the source.
        block: u32,
    },
    /// Verification was asked for, and there is nothing to verify against.
    #[error(
        "source block {block} has no published checksum: let its engine publish them, or do not ask for them"
    )]
    ChecksumMissing {
        /// Index in the source.
        block: u32,
    },
    /// The process behind the source is gone or out of reach. Fence it.
    #[error("the owner of the source pool is gone: place the request elsewhere")]
    PeerGone,
    /// Another mover, to which this one had passed the plan, refused it.
    #[error("the mover behind this one refused the plan")]
    Refused(#[source] SubmitError),
    /// The mover's thread broke off, by a panic. A bug of the mover; nothing more is written.
    #[error("the transfer broke off inside the mover: see the panic in the log")]
    BrokenOff,
}

/// Why a plan was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many tickets wait as may.
    #[error(
        "all {queue_tickets_max} places in the transfer queue are taken: recompute, or retry when one ends"
    )]
    QueueFull {
        /// The setting.
        queue_tickets_max: usize,
    },
    /// The mover is shutting down.
    #[error("the mover is shutting down: recompute")]
    Closed,
    /// This back end has no way to that pool.
    #[error("no way from here to pool {key}: choose another back end, or exchange the region first")]
    Unreachable {
        /// Which.
        key: RegionKey,
    },
}

/// Identity of one transfer, unique in the process and over all movers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TicketId(pub u64);

/// How a back end hears that a ticket was cancelled.
pub trait Cancel: Send + Sync {
    /// May be called at any time, any number of times, also after the end. Must not block, nor run the callback.
    fn cancel(&self);
}

/// An accepted transfer. Dropping it changes nothing: the transfer goes on and its callback runs.
pub struct Ticket {
    id: TicketId,
    control: Arc<dyn Cancel>,
}

impl Ticket {
    /// For back ends: a ticket with a new id.
    pub fn new(control: Arc<dyn Cancel>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only uniqueness is asked of the counter.
        Self { id: TicketId(NEXT.fetch_add(1, Relaxed)), control }
    }

    /// Its identity.
    pub fn id(&self) -> TicketId {
        self.id
    }

    /// Asks for the end. The outcome may still be any of the four (the copy may just have finished), and it comes by
    /// the callback: the destination blocks are not free before that.
    pub fn cancel(&self) {
        self.control.cancel();
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ticket").field(&self.id.0).finish()
    }
}

/// For back ends: a callback that runs exactly once whatever happens. If it is dropped unused (a panic unwound through
/// the copying thread), the ticket ends as [`MoveError::BrokenOff`]; so it must be dropped only when no write can land.
pub struct Completion {
    done: Option<Callback>,
}

impl Completion {
    /// Takes charge of the callback.
    pub fn new(done: Callback) -> Self {
        Self { done: Some(done) }
    }

    /// Runs the callback. A panic in it is its own: the process's panic hook reports it, and the mover's thread lives.
    pub fn end(mut self, outcome: Outcome) {
        self.run(outcome);
    }

    fn run(&mut self, outcome: Outcome) {
        if let Some(done) = self.done.take() {
            // The callback is consumed, so no broken state of it can be seen afterwards.
            let _reported_by_the_panic_hook = catch_unwind(AssertUnwindSafe(|| done(outcome)));
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.run(Outcome::Failed(MoveError::BrokenOff));
    }
}

/// Submits and waits for the end, for tools and tests. Not for a thread of an async runtime.
///
/// # Errors
/// As [`Mover::submit`].
pub fn block_on_move(mover: &dyn Mover, plan: CopyPlan, options: Options) -> Result<Outcome, SubmitError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    mover.submit(
        plan,
        options,
        Box::new(move |outcome| {
            // The receiver is below and waits.
            let _ = sender.send(outcome);
        }),
    )?;
    Ok(receiver.recv().unwrap_or(Outcome::Failed(MoveError::BrokenOff)))
}
