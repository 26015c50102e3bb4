//! What an in-process engine is told: one mailbox, taken whole between two steps.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Poll, Waker},
};

use forebay_kv_move::Outcome;
use forebay_types::LegId;
use parking_lot::Mutex;

use crate::{
    driver::{Leg, StartError},
    stream::{LegControl, Outbox},
};

/// One thing to do before the next step.
pub(crate) enum Command {
    /// Take a leg.
    Submit(Box<Leg>, Outbox),
    /// Forget a leg.
    Cancel(LegId),
    /// End one choice of a leg.
    StopChoice(LegId, u32),
    /// Free the KV that a prefill leg holds.
    Release(LegId),
    /// A hand-over ended.
    Imported(LegId, Outcome),
    /// Report the whole cache.
    Snapshot,
    /// End this life.
    Stop,
    /// Panic, as a bug in the engine would.
    Crash,
}

/// The mailbox. Submissions are bounded by `waiting_max`; every other command belongs to a leg that was taken, so
/// those are bounded with it.
pub(crate) struct Inbox {
    waiting_max: u32,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    commands: VecDeque<Command>,
    /// Submissions in `commands`.
    submitted: u32,
    /// Legs waiting in the scheduler when it last said so.
    waiting: u32,
    closed: bool,
    engine: Option<Waker>,
}

impl Inbox {
    pub(crate) fn new(waiting_max: u32) -> Self {
        Self { waiting_max, inner: Mutex::new(Inner::default()) }
    }

    /// Queues a leg, if there is room and the engine lives.
    pub(crate) fn submit(&self, leg: Leg, outbox: Outbox) -> Result<(), (StartError, Outbox)> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err((StartError::Gone, outbox));
        }
        if inner.submitted + inner.waiting >= self.waiting_max {
            return Err((StartError::QueueFull { waiting_max: self.waiting_max }, outbox));
        }
        inner.submitted += 1;
        inner.push(Command::Submit(Box::new(leg), outbox));
        Ok(())
    }

    /// Queues anything else; dropped if the engine is gone, and everything of its with it.
    pub(crate) fn tell(&self, command: Command) {
        let mut inner = self.inner.lock();
        if !inner.closed {
            inner.push(command);
        }
    }

    /// Moves all commands to `into`; `waiting` is what the scheduler holds now.
    pub(crate) fn take(&self, waiting: u32, into: &mut Vec<Command>) {
        let mut inner = self.inner.lock();
        inner.submitted = 0;
        inner.waiting = waiting;
        into.extend(inner.commands.drain(..));
    }

    /// Ends when there is something to take.
    pub(crate) async fn wait(&self) {
        poll_fn(|cx| {
            let mut inner = self.inner.lock();
            if !inner.commands.is_empty() {
                return Poll::Ready(());
            }
            inner.engine = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// No more commands are taken; what waits is dropped, which tells its readers.
    pub(crate) fn close(&self) {
        let rest = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            std::mem::take(&mut inner.commands)
        };
        drop(rest); // outside the lock: dropping an outbox wakes its reader
    }
}

impl Inner {
    fn push(&mut self, command: Command) {
        self.commands.push_back(command);
        if let Some(waker) = self.engine.take() {
            waker.wake();
        }
    }
}

/// Streams talk back through the inbox.
pub(crate) struct InboxControl(pub(crate) Arc<Inbox>);

impl LegControl for InboxControl {
    fn cancel(&self, leg: LegId) {
        self.0.tell(Command::Cancel(leg));
    }
    fn stop_choice(&self, leg: LegId, choice: u32) {
        self.0.tell(Command::StopChoice(leg, choice));
    }
}
