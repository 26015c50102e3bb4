//! The suite that every back end passes: the contract of [`Mover`] as tests.
//!
//! In: a [`Harness`] around a mover. Out: a panic that says what was broken. [`conformance_tests!`](crate::conformance_tests)
//! makes one `#[test]` of each check:
//!
//! ```
//! # use forebay_kv_move::{conformance::Harness, *};
//! # use std::sync::Arc;
//! fn harness() -> Harness {
//!     let settings = SharedMemorySettings { threads: 2, ..Default::default() };
//!     Harness::mapped(Arc::new(SharedMemoryMover::new(settings).unwrap()), 2)
//! }
//! forebay_kv_move::conformance_tests!(harness());
//! # forebay_kv_move::conformance::bytes_arrive(&harness());
//! ```
//!
//! Races are tested by invariants that hold whoever wins ("done means the promised bytes"), repeated until both ways
//! were seen where a check says so. Nothing sleeps; a mover that hangs fails by [`PATIENCE`].

mod basics;
mod endings;
mod races;

use std::{
    sync::{
        Arc, Mutex,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

pub use basics::*;
pub use endings::*;
pub use races::*;

use crate::{
    mover::{Mover, Options, Outcome, SubmitError, Ticket},
    plan::{BlockPair, BlockRef, CopyPlan, Source},
    region::{Layout, Region},
};

/// How long a ticket may take that nothing delays, on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A back end under test.
pub struct Harness {
    /// The mover.
    pub mover: Arc<dyn Mover>,
    /// Threads of it that run callbacks. The suite blocks all of them to make tickets wait.
    pub threads: usize,
    /// Makes a pool that the suite fills reachable for the mover: behind a socket, in a file, or as it is.
    pub reach: Box<dyn Fn(&Region) -> Source + Send + Sync>,
}

impl Harness {
    /// For movers that read mapped regions.
    pub fn mapped(mover: Arc<dyn Mover>, threads: usize) -> Self {
        Self { mover, threads, reach: Box::new(|region| Source::Mapped(region.clone())) }
    }

    fn plan(&self, source: &Region, destination: &Region, blocks: &[(u32, u32)]) -> CopyPlan {
        CopyPlan::new((self.reach)(source), destination.clone(), pairs(source, destination, blocks))
            .expect("the suite makes valid plans")
    }

    fn submit(&self, plan: CopyPlan, options: Options) -> (Ticket, Ending) {
        self.try_submit(plan, options).expect("a mover with room accepts a valid plan")
    }

    fn try_submit(&self, plan: CopyPlan, options: Options) -> Result<(Ticket, Ending), SubmitError> {
        // Room for a second outcome, so that one would be seen.
        let (sender, receiver) = sync_channel(2);
        let done = Box::new(move |outcome| sender.try_send(outcome).expect("the suite takes every outcome"));
        let ticket = self.mover.submit(plan, options, done)?;
        Ok((ticket, Ending { receiver }))
    }

    fn end(&self, plan: CopyPlan, options: Options) -> Outcome {
        self.submit(plan, options).1.wait()
    }

    /// Returns when every thread of the mover has begun something new since: whatever a thread did for an earlier
    /// ticket is over.
    fn flush(&self) {
        drop(self.occupy());
    }

    /// Keeps every thread of the mover in a callback until the value is dropped. (Real callbacks must not block; this is
    /// the one way to make any mover's tickets wait without knowing the mover.)
    fn occupy(&self) -> Occupied {
        let (began, begun) = sync_channel(self.threads);
        let mut release = Vec::new();
        for _ in 0..self.threads {
            let (hold, held) = sync_channel::<()>(0);
            release.push(hold);
            let (began, held) = (began.clone(), Mutex::new(held));
            let empty = small();
            let done = Box::new(move |_outcome| {
                let _ = began.send(());
                // Ends with an error when the other end is dropped.
                let _ = held.lock().expect("locked once").recv();
            });
            self.mover
                .submit(self.plan(&empty.0, &empty.1, &[]), soon(), done)
                .expect("a mover with room accepts an empty plan");
        }
        for _ in 0..self.threads {
            begun.recv_timeout(PATIENCE).expect("each thread runs a callback of its own");
        }
        Occupied { _release: release }
    }
}

struct Occupied {
    _release: Vec<SyncSender<()>>,
}

/// The one outcome of a ticket.
struct Ending {
    receiver: Receiver<Outcome>,
}

impl Ending {
    /// Waits for it and for the callback to be gone, so that a second call is impossible.
    fn wait(self) -> Outcome {
        let outcome = self.receiver.recv_timeout(PATIENCE).expect("every ticket ends");
        assert!(self.receiver.recv_timeout(PATIENCE).is_err(), "a ticket ends once");
        outcome
    }

    fn try_wait(&self) -> Option<Outcome> {
        self.receiver.try_recv().ok()
    }
}

/// A deadline that nothing in a check should reach.
pub(crate) fn soon() -> Options {
    Options::until(Instant::now() + PATIENCE)
}

pub(crate) fn passed() -> Options {
    Options::until(Instant::now())
}

/// What block `block` of a source holds as generation `generation`: other words in every block and generation.
fn pattern(block: u32, generation: u64) -> impl Iterator<Item = u64> {
    let seed = (u64::from(block) << 32 ^ generation).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..).map(move |word: u64| seed.wrapping_mul(word.wrapping_mul(2) | 1))
}

/// As an owner does: the generation, then the bytes.
pub(crate) fn write(region: &Region, block: u32, generation: u64) {
    region.set_generation(block, generation);
    for (word, value) in region.words(block, 1).iter().zip(pattern(block, generation)) {
        word.store(value, Relaxed);
    }
}

const EMPTY: u64 = 0xEEEE_EEEE_EEEE_EEEE;

/// A word that no pattern holds, so that one written word shows.
pub(crate) fn clear(region: &Region, block: u32) {
    region.words(block, 1).iter().for_each(|word| word.store(EMPTY, Relaxed));
}

pub(crate) fn is_clear(region: &Region, block: u32) -> bool {
    region.words(block, 1).iter().all(|word| word.load(Relaxed) == EMPTY)
}

pub(crate) fn holds(destination: &Region, at: u32, block: u32, generation: u64) -> bool {
    destination
        .words(at, 1)
        .iter()
        .zip(pattern(block, generation))
        .all(|(word, value)| word.load(Relaxed) == value)
}

/// A source whose blocks hold their patterns, each under a generation of its own, and a destination of cleared blocks.
pub(crate) fn pools(blocks: u32, block_bytes: u64) -> (Region, Region) {
    let layout = Layout { block_bytes, blocks };
    let create = |name| Region::create(name, layout).expect("the suite's pools are small");
    let (source, destination) = (create("kv-source"), create("kv-destination"));
    for block in 0..blocks {
        write(&source, block, 100 + u64::from(block));
        destination.set_generation(block, 7);
        clear(&destination, block);
    }
    (source, destination)
}

pub(crate) fn small() -> (Region, Region) {
    pools(8, 192)
}

/// References to the present content of both sides.
pub(crate) fn pairs(source: &Region, destination: &Region, blocks: &[(u32, u32)]) -> Vec<BlockPair> {
    let reference = |region: &Region, block| BlockRef { block, generation: region.generation(block) };
    blocks
        .iter()
        .map(|(s, d)| BlockPair { source: reference(source, *s), destination: reference(destination, *d) })
        .collect()
}

pub(crate) fn straight(blocks: u32) -> Vec<(u32, u32)> {
    (0..blocks).map(|block| (block, block)).collect()
}

/// One `#[test]` for each check of [`conformance`](crate::conformance), each with a mover of its own. Takes an expression
/// that makes a [`Harness`](crate::conformance::Harness).
#[macro_export]
macro_rules! conformance_tests {
    ($harness:expr) => {
        $crate::conformance_tests!(@each $harness;
            bytes_arrive, report_counts, an_empty_plan_is_done, ten_thousand_blocks_arrive,
            other_block_sizes_are_refused, checksums_are_verified, the_caller_never_runs_the_callback,
            a_stale_block_fails, a_reallocated_destination_is_not_written, a_passed_deadline_copies_nothing,
            a_waiting_ticket_times_out, a_waiting_ticket_is_cancelled, cancelling_after_the_end_changes_nothing,
            a_dropped_ticket_goes_on, a_panicking_callback_stops_nothing,
            a_block_rewritten_during_the_copy_is_never_done,
            a_block_torn_during_its_own_copy_is_never_done, nothing_is_written_after_the_callback,
            a_deadline_during_the_copy_is_kept, every_ticket_ends_once
        );
    };
    (@each $harness:expr; $($check:ident),+) => {
        $(
            #[test]
            fn $check() {
                $crate::conformance::$check(&$harness);
            }
        )+
    };
}
