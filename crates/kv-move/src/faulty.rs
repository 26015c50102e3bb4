//! A mover that goes wrong on demand, around any other mover.
//!
//! In: a script, asked once for each plan. Out: that fault, or the inner mover's doing. For tests of whatever uses movers:
//! that a failed transfer means recompute, that blocks stay in quarantine while one is held, and that wrong bytes which
//! a mover calls `Done` do change the tokens (so a test that compares tokens can fail).
//!
//! ```
//! # use forebay_kv_move::*;
//! # use std::{sync::Arc, time::{Duration, Instant}};
//! # let layout = Layout { block_bytes: 64, blocks: 4 };
//! # let (from, to) = (Region::create("a", layout).unwrap(), Region::create("b", layout).unwrap());
//! # from.copy_in(1, &[7; 64]);
//! # let block = |block| BlockRef { block, generation: 0 };
//! # let pairs = vec![BlockPair { source: block(1), destination: block(2) }];
//! # let plan = CopyPlan::new(from, to.clone(), pairs).unwrap();
//! # let options = Options::until(Instant::now() + Duration::from_secs(10));
//! let real = Arc::new(SharedMemoryMover::new(SharedMemorySettings::default()).unwrap());
//! let mover = FaultyMover::new(real, Arc::new(|plan| (plan.blocks() > 0).then_some(Fault::ZeroBlock(0))));
//! assert!(matches!(block_on_move(&mover, plan, options), Ok(Outcome::Done(_))));
//! # let mut bytes = [1; 64];
//! # to.copy_out(2, &mut bytes);
//! # assert_eq!(bytes, [0; 64]);
//! ```
//!
//! The contract of [`Mover`] holds for it too: faults end a ticket once, by a callback on a thread of its own, and a
//! held ticket keeps its deadline.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering::Relaxed},
    thread::{self, JoinHandle},
    time::Instant,
};

use crate::{
    mover::{Callback, Cancel, Completion, MoveError, Mover, Options, Outcome, SubmitError, Ticket},
    plan::CopyPlan,
    region::Region,
};

/// Tickets that may be held at gates at one time. Far more than a test has requests in flight; a bound all the same.
const HELD_TICKETS_MAX: usize = 1024;

/// What goes wrong with one plan.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Ends as `Failed` with this; nothing is copied.
    Fail(MoveError),
    /// Ends as `TimedOut` at once, as if the deadline had passed; nothing is copied.
    TimeOut,
    /// Waits at the gate before anything is copied. Deadline and cancellation hold meanwhile.
    Hold(Gate),
    /// Is copied; then the destination block of that pair (an index into [`CopyPlan::pairs`]) is set to zeros. Ends as
    /// `Done`: the silent fault that only the tokens can show.
    ZeroBlock(usize),
    /// Is copied; then the contents of two pairs' destination blocks change places. Ends as `Done`.
    SwapBlocks(usize, usize),
}

/// Chooses the fault of a plan; `None` leaves it alone.
pub type Faults = Arc<dyn Fn(&CopyPlan) -> Option<Fault> + Send + Sync>;

/// Where [`Fault::Hold`] waits. Clones are the same gate; once open it stays open.
#[derive(Clone, Default)]
pub struct Gate {
    inner: Arc<GateInner>,
}

#[derive(Default)]
struct GateInner {
    state: Mutex<GateState>,
    arrived: Condvar,
}

#[derive(Default)]
struct GateState {
    open: bool,
    arrivals: usize,
    movers: Vec<Weak<Shared>>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("open", &self.is_open()).finish()
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets everything through, now and from now on.
    pub fn release(&self) {
        let movers = {
            let mut state = self.lock();
            state.open = true;
            std::mem::take(&mut state.movers)
        };
        for shared in movers.iter().filter_map(Weak::upgrade) {
            shared.wake();
        }
    }

    /// Whether it was released.
    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    /// Blocks until `count` plans in all have come to this gate, so that a test knows that its transfer is under way.
    pub fn wait_for_arrivals(&self, count: usize) {
        let mut state = self.lock();
        while state.arrivals < count {
            state = self.inner.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn arrive(&self, shared: &Arc<Shared>) {
        let mut state = self.lock();
        state.arrivals += 1;
        state.movers.push(Arc::downgrade(shared));
        self.inner.arrived.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the [module](self).
pub struct FaultyMover {
    inner: Arc<dyn Mover>,
    faults: Faults,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread that ends faulty tickets works on.
struct Shared {
    inner: Arc<dyn Mover>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    closing: bool,
}

/// A ticket whose fault decides, not (yet) the inner mover.
struct Held {
    plan: CopyPlan,
    options: Options,
    control: Arc<Control>,
    completion: Completion,
    fate: Fate,
}

enum Fate {
    EndAs(Outcome),
    WaitAt(Gate),
}

/// Cancels here while the ticket is held, and there once it was passed on.
struct Control {
    shared: Weak<Shared>,
    stage: Mutex<Stage>,
}

enum Stage {
    Held,
    Cancelled,
    PassedOn(Ticket),
}

impl Cancel for Control {
    fn cancel(&self) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        match &*stage {
            Stage::Held => *stage = Stage::Cancelled,
            Stage::Cancelled => return,
            Stage::PassedOn(ticket) => return ticket.cancel(),
        }
        drop(stage);
        if let Some(shared) = self.shared.upgrade() {
            shared.wake();
        }
    }
}

impl FaultyMover {
    /// Wraps `inner`; `faults` is asked in [`submit`](Mover::submit), on the caller's thread.
    ///
    /// # Panics
    /// If the system has no thread left to give.
    pub fn new(inner: Arc<dyn Mover>, faults: Faults) -> Self {
        let shared =
            Arc::new(Shared { inner: Arc::clone(&inner), state: Mutex::default(), changed: Condvar::new() });
        let thread = thread::Builder::new()
            .name("kv-move-faulty".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.work()
            })
            .expect("a test can have one more thread");
        Self { inner, faults, shared, thread: Some(thread) }
    }
}

impl Mover for FaultyMover {
    /// # Panics
    /// If the script names a pair that the plan does not have: a test that damages nothing would prove nothing.
    fn submit(&self, plan: CopyPlan, options: Options, done: Callback) -> Result<Ticket, SubmitError> {
        match (self.faults)(&plan) {
            None => self.inner.submit(plan, options, done),
            Some(Fault::Fail(error)) => {
                self.shared.hold(plan, options, done, Fate::EndAs(Outcome::Failed(error)))
            }
            Some(Fault::TimeOut) => self.shared.hold(plan, options, done, Fate::EndAs(Outcome::TimedOut)),
            Some(Fault::Hold(gate)) => self.shared.hold(plan, options, done, Fate::WaitAt(gate)),
            Some(Fault::ZeroBlock(pair)) => {
                let (region, block) = (plan.destination().clone(), destination_block(&plan, pair));
                let damage = move || region.words(block, 1).iter().for_each(|word| word.store(0, Relaxed));
                self.inner.submit(plan, options, damaging(damage, done))
            }
            Some(Fault::SwapBlocks(one, other)) => {
                let blocks = (destination_block(&plan, one), destination_block(&plan, other));
                let region = plan.destination().clone();
                self.inner.submit(plan, options, damaging(move || swap(&region, blocks), done))
            }
        }
    }
}

impl Drop for FaultyMover {
    /// Held tickets end as `Cancelled`.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        {
            thread.join().expect("callbacks' panics are caught");
        }
    }
}

fn destination_block(plan: &CopyPlan, pair: usize) -> u32 {
    let pairs = plan.pairs();
    assert!(pair < pairs.len(), "the fault names pair {pair} of a plan of {} pairs", pairs.len());
    pairs[pair].destination.block
}

fn swap(region: &Region, (one, other): (u32, u32)) {
    for (one, other) in region.words(one, 1).iter().zip(region.words(other, 1)) {
        let word = one.load(Relaxed);
        one.store(other.load(Relaxed), Relaxed);
        other.store(word, Relaxed);
    }
}

/// Does the damage between the copy and the callback, where the blocks still belong to the transfer.
fn damaging(damage: impl FnOnce() + Send + 'static, done: Callback) -> Callback {
    Box::new(move |outcome| {
        if matches!(outcome, Outcome::Done(_)) {
            damage();
        }
        done(outcome);
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock, so that the thread is either before its check of what changed or already waiting.
    fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    fn hold(
        self: &Arc<Self>,
        plan: CopyPlan,
        options: Options,
        done: Callback,
        fate: Fate,
    ) -> Result<Ticket, SubmitError> {
        let control = Arc::new(Control { shared: Arc::downgrade(self), stage: Mutex::new(Stage::Held) });
        let ticket = Ticket::new(Arc::clone(&control) as Arc<dyn Cancel>);
        let gate = match &fate {
            Fate::WaitAt(gate) => Some(gate.clone()),
            Fate::EndAs(_) => None,
        };
        {
            let mut state = self.lock();
            if state.held.len() >= HELD_TICKETS_MAX {
                return Err(SubmitError::QueueFull { queue_tickets_max: HELD_TICKETS_MAX });
            }
            state.held.push(Held { plan, options, control, completion: Completion::new(done), fate });
        }
        self.changed.notify_all();
        if let Some(gate) = gate {
            gate.arrive(self);
        }
        // The gate may have opened before it knew of this mover.
        self.wake();
        Ok(ticket)
    }

    fn work(&self) {
        loop {
            let mut state = self.lock();
            let now = Instant::now();
            let closing = state.closing;
            let ready: Vec<Held> = state.held.extract_if(.., |held| closing || held.is_ready(now)).collect();
            if ready.is_empty() {
                if closing {
                    return;
                }
                let wait =
                    state.held.iter().map(|held| held.options.deadline.saturating_duration_since(now)).min();
                // Woken or timed out, early or late: the loop looks again.
                match wait {
                    Some(wait) => drop(self.changed.wait_timeout(state, wait)),
                    None => drop(self.changed.wait(state)),
                }
                continue;
            }
            drop(state);
            for held in ready {
                self.settle(held, closing, now);
            }
        }
    }

    fn settle(&self, held: Held, closing: bool, now: Instant) {
        let Held { plan, options, control, completion, fate } = held;
        let mut stage = control.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match fate {
            Fate::EndAs(outcome) => outcome,
            Fate::WaitAt(_) if closing || matches!(*stage, Stage::Cancelled) => Outcome::Cancelled,
            Fate::WaitAt(_) if options.deadline <= now => Outcome::TimedOut,
            Fate::WaitAt(_) => {
                let completion = Arc::new(Mutex::new(Some(completion)));
                let done = Box::new({
                    let completion = Arc::clone(&completion);
                    move |outcome| {
                        let taken = completion.lock().unwrap_or_else(PoisonError::into_inner).take();
                        taken.expect("an accepted ticket ends once").end(outcome);
                    }
                });
                // Under the ticket's lock, so that a cancellation goes either before this or to the inner ticket. The
                // inner mover neither blocks nor calls back from here.
                match self.inner.submit(plan, options, done) {
                    Ok(ticket) => *stage = Stage::PassedOn(ticket),
                    Err(error) => {
                        drop(stage);
                        let taken = completion.lock().unwrap_or_else(PoisonError::into_inner).take();
                        taken
                            .expect("a refused ticket was not ended")
                            .end(Outcome::Failed(MoveError::Refused(error)));
                    }
                }
                return;
            }
        };
        drop(stage);
        completion.end(outcome);
    }
}

impl Held {
    fn is_ready(&self, now: Instant) -> bool {
        let cancelled =
            || matches!(*self.control.stage.lock().unwrap_or_else(PoisonError::into_inner), Stage::Cancelled);
        match &self.fate {
            Fate::EndAs(_) => true,
            Fate::WaitAt(gate) => gate.is_open() || self.options.deadline <= now || cancelled(),
        }
    }
}

#[cfg(test)]
mod tests;
