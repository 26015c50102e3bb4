//! The stream of one leg: the engine's [`Outbox`] and the reader's [`LegStream`].

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use forebay_types::LegId;
use parking_lot::Mutex;

use crate::driver::LegEvent;

/// What a stream says back to the engine.
pub trait LegControl: Send + Sync {
    /// Nobody reads this leg any more.
    fn cancel(&self, leg: LegId);
    /// End one choice: its stop string matched.
    fn stop_choice(&self, leg: LegId, choice: u32);
}

#[derive(Default)]
struct State {
    events: VecDeque<LegEvent>,
    reader: Option<Waker>,
    /// An engine that waits for the reader.
    writer: Option<Waker>,
    /// The last event was put; nothing follows.
    closed: bool,
}

/// The engine's half. Dropped without a last event, it tells the reader that the engine was lost.
pub struct Outbox {
    state: Arc<Mutex<State>>,
}

impl State {
    fn put(&mut self, event: LegEvent) {
        if !self.closed {
            self.closed = matches!(event, LegEvent::Ended | LegEvent::Refused(_) | LegEvent::Lost { .. });
            self.events.push_back(event);
        }
    }
}

impl Outbox {
    /// Puts an event and wakes the reader. What waits is bounded by the leg's own `output_tokens_max`.
    pub fn put(&self, event: LegEvent) {
        let mut state = self.state.lock();
        state.put(event);
        if let Some(waker) = state.reader.take() {
            waker.wake();
        }
    }

    /// Puts several events, in order, and wakes the reader once. Leaves `events` empty.
    pub fn put_all(&self, events: &mut Vec<LegEvent>) {
        if events.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        events.drain(..).for_each(|event| state.put(event));
        if let Some(waker) = state.reader.take() {
            waker.wake();
        }
    }

    /// Ends when fewer than `events_max` events wait, or nobody reads any more: for answers that are not bounded by a
    /// number of tokens.
    pub async fn room(&self, events_max: usize) {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.closed || state.events.len() < events_max {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.put(LegEvent::Lost { reason: "the engine ended while the request ran".into() });
    }
}

/// The reader's half. Dropped before the leg's last event, it cancels the leg.
pub struct LegStream {
    leg: LegId,
    state: Arc<Mutex<State>>,
    control: Arc<dyn LegControl>,
}

impl fmt::Debug for LegStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegStream").field("leg", &self.leg).finish_non_exhaustive()
    }
}

/// Both halves of one leg's stream.
pub fn leg_stream(leg: LegId, control: Arc<dyn LegControl>) -> (Outbox, LegStream) {
    let state = Arc::new(Mutex::new(State::default()));
    (Outbox { state: state.clone() }, LegStream { leg, state, control })
}

impl LegStream {
    /// The leg.
    pub fn leg(&self) -> LegId {
        self.leg
    }

    /// Appends everything that has arrived to `batch`; pending while nothing has. `false` after the last event.
    pub fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<LegEvent>) -> Poll<bool> {
        let mut state = self.state.lock();
        if !state.events.is_empty() {
            batch.extend(state.events.drain(..));
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            return Poll::Ready(true);
        }
        if state.closed {
            return Poll::Ready(false);
        }
        if !state.reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.reader = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// As [`LegStream::poll_batch`], to await.
    pub async fn next_batch(&mut self, batch: &mut Vec<LegEvent>) -> bool {
        poll_fn(|cx| self.poll_batch(cx, batch)).await
    }

    /// Ends one choice: its stop string matched.
    pub fn stop_choice(&self, choice: u32) {
        self.control.stop_choice(self.leg, choice);
    }
}

impl Drop for LegStream {
    fn drop(&mut self) {
        let (closed, held) = {
            let mut state = self.state.lock();
            // KV that was held for a reader who never read of it would else stay until its lease ends.
            let held = state.events.iter().any(|event| matches!(event, LegEvent::Prefilled(_)));
            state.events.clear();
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            (std::mem::replace(&mut state.closed, true), held)
        };
        if !closed || held {
            self.control.cancel(self.leg);
        }
    }
}
