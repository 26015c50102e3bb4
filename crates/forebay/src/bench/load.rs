//! One slice of load on one target: which sessions start when. One task a session.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use forebay_loadgen::{Arrivals, Outcome, Prompts, Recorder, derived_seed};
use tokio::{sync::mpsc::Sender, task::JoinSet, time::sleep_until};

use super::{
    body::{Message, body, failure},
    target::{Clock, Target},
};

/// Sessions of an open loop at once. A server this far behind is overloaded; what more is due fails without being sent.
const SESSIONS_MAX: usize = 10_000;
/// The part of a seed that arrivals are drawn from; prompts have their own.
const ARRIVALS_PART: u64 = 3;

/// When requests are sent.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    /// So many at once, the next when one has ended.
    Closed { concurrency: u32 },
    /// So many a second, whatever the server does.
    Open { rate: f64 },
}

/// A slice.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) target: Arc<Target>,
    pub(super) clock: Clock,
    pub(super) pace: Pace,
    pub(super) prompts: Prompts,
    pub(super) seed: u64,
    pub(super) turns: u32,
    pub(super) think: Duration,
    pub(super) output_tokens: u32,
    pub(super) stream: bool,
    /// Requests in all, if that ends it.
    pub(super) requests: Option<u64>,
    /// When the last may start, if that ends it.
    pub(super) until: Option<f64>,
}

impl Load {
    /// Turns of a session: which requests are sent depends on no timing, only who is last to send.
    fn turns_of(&self, session: u64) -> u32 {
        let before = session.saturating_mul(u64::from(self.turns));
        let left = self.requests.map_or(u64::MAX, |requests| requests.saturating_sub(before));
        u32::try_from(left).unwrap_or(u32::MAX).min(self.turns)
    }

    fn is_over(&self, at: f64) -> bool {
        self.until.is_some_and(|until| at >= until)
    }

    /// One conversation. A turn that fails ends it: there is no answer to go on from.
    async fn session(&self, session: u64, arrival: Option<f64>, outcomes: &Sender<Outcome>) {
        let system = self.prompts.system(session).map(|content| Message { role: "system", content });
        let mut messages: Vec<Message> = system.into_iter().collect();
        let turns = self.turns_of(session);
        let mut due = arrival;
        for turn in 0..turns {
            messages.push(Message { role: "user", content: self.prompts.user(session, turn) });
            let body = body(&self.target.model, &messages, self.output_tokens, self.stream);
            if let Some(due) = due.filter(|_| turn > 0) {
                sleep_until(self.clock.at(due)).await;
            }
            let now = self.clock.now();
            if self.is_over(now) && arrival.is_none_or(|_| turn > 0) {
                return;
            }
            let goes_on = turn + 1 < turns;
            let (outcome, text) = self.target.exchange(body, due.unwrap_or(now), goes_on, self.clock).await;
            let failed = outcome.failure.is_some();
            due = Some(outcome.ended + self.think.as_secs_f64()).filter(|_| !self.think.is_zero());
            if outcomes.send(outcome).await.is_err() || failed {
                return;
            }
            messages.push(Message { role: "assistant", content: text });
        }
    }
}

/// Sends all of it; each request's outcome goes into `outcomes`. Dropping this cancels what runs.
pub(super) async fn drive(load: Arc<Load>, outcomes: Sender<Outcome>) {
    let mut sessions = JoinSet::new();
    match load.pace {
        Pace::Closed { concurrency } => {
            let next = Arc::new(AtomicU64::new(0));
            for _ in 0..concurrency {
                let (load, next, outcomes) = (load.clone(), next.clone(), outcomes.clone());
                sessions.spawn(async move {
                    loop {
                        // A ticket: it orders nothing else.
                        let session = next.fetch_add(1, Ordering::Relaxed);
                        if load.turns_of(session) == 0 || load.is_over(load.clock.now()) {
                            return;
                        }
                        load.session(session, None, &outcomes).await;
                    }
                });
            }
        }
        Pace::Open { rate } => {
            let began = load.clock.now();
            let arrivals = Arrivals::new(rate, derived_seed(load.seed, ARRIVALS_PART));
            for (session, at) in (0..).zip(arrivals) {
                let due = began + at;
                if load.turns_of(session) == 0 || load.is_over(due) {
                    break;
                }
                sleep_until(load.clock.at(due)).await;
                while sessions.try_join_next().is_some() {}
                if sessions.len() >= SESSIONS_MAX {
                    let message = format!("{SESSIONS_MAX} sessions ran when it was due");
                    let now = load.clock.now();
                    let refused = failure("too many at once", &message);
                    let _ = outcomes.send(Recorder::new(due, now).end(now, None, Some(refused))).await;
                    continue;
                }
                let (load, outcomes) = (load.clone(), outcomes.clone());
                sessions.spawn(async move { load.session(session, Some(due), &outcomes).await });
            }
        }
    }
    drop(outcomes);
    while sessions.join_next().await.is_some() {}
}
