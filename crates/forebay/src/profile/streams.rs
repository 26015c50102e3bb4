//! Requests that run at the engine, and when their tokens came.
//!
//! Dropping a [`Streams`] cancels what runs.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use forebay_engines::{Driver, KvHandle, Leg, LegEvent, StartError};
use tokio::{sync::Notify, task::JoinSet};

/// How long the tokens that count take together, at least: those of a small model are read several at once.
const WINDOW_SECONDS: f64 = 0.03;
/// Tokens that must follow what was sent beside a batch: so few say nothing of the time of a step.
pub(super) const TRAIL: usize = 2;

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// As it should.
    Finished,
    /// The engine did not take it.
    Refused(StartError),
    /// The engine is gone.
    Lost(Arc<str>),
}

/// What one request has brought so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Heard {
    /// Times of its tokens, in seconds since the streams' origin.
    pub(super) arrivals: Vec<f64>,
    /// Prompt tokens that were cached, if the engine said so.
    pub(super) cached_tokens: u32,
    /// KV that it holds for another engine.
    pub(super) kv: Option<KvHandle>,
    /// The KV that it was to go on from did not arrive.
    pub(super) kv_failed: bool,
    pub(super) end: Option<End>,
}

#[derive(Default)]
struct Board {
    heard: Mutex<Vec<Heard>>,
    news: Notify,
}

/// Requests that run beside each other.
pub(super) struct Streams {
    board: Arc<Board>,
    origin: Instant,
    readers: JoinSet<()>,
}

impl Streams {
    /// None yet; times are counted from `origin`.
    pub(super) fn new(origin: Instant) -> Self {
        Self { board: Arc::default(), origin, readers: JoinSet::new() }
    }

    /// Sends one more; its number.
    pub(super) fn send(&mut self, driver: &dyn Driver, leg: Leg) -> usize {
        let started = driver.start(leg);
        let number = {
            let mut heard = self.board.heard.lock().expect("nobody panics with it");
            heard.push(Heard::default());
            heard.len() - 1
        };
        let (board, origin) = (self.board.clone(), self.origin);
        match started {
            Err(error) => board.note(number, |heard| heard.end = Some(of_refusal(error))),
            Ok(mut stream) => {
                self.readers.spawn(async move {
                    let mut batch = Vec::new();
                    while stream.next_batch(&mut batch).await {
                        let at = origin.elapsed().as_secs_f64();
                        board.note(number, |heard| batch.drain(..).for_each(|event| heard.take(event, at)));
                    }
                });
            }
        }
        number
    }

    /// Waits until `wanted` finds what it looks for in all that was heard.
    pub(super) async fn until<T>(&self, mut wanted: impl FnMut(&[Heard]) -> Option<T>) -> T {
        loop {
            let news = self.board.news.notified();
            if let Some(found) = wanted(&self.board.heard.lock().expect("nobody panics with it")) {
                return found;
            }
            news.await;
        }
    }

    /// Waits for the end of one.
    pub(super) async fn ended(&self, number: usize) -> Heard {
        self.until(|heard| heard[number].end.is_some().then(|| heard[number].clone())).await
    }

    /// The times of the tokens of the first `count`.
    pub(super) fn arrivals(&self, count: usize) -> Vec<Vec<f64>> {
        let heard = self.board.heard.lock().expect("nobody panics with it");
        heard[..count].iter().map(|heard| heard.arrivals.clone()).collect()
    }

    pub(super) fn now(&self) -> f64 {
        self.origin.elapsed().as_secs_f64()
    }
}

impl Board {
    fn note(&self, number: usize, change: impl FnOnce(&mut Heard)) {
        change(&mut self.heard.lock().expect("nobody panics with it")[number]);
        self.news.notify_one();
    }
}

impl Heard {
    fn take(&mut self, event: LegEvent, at: f64) {
        match event {
            LegEvent::Token(_) => self.arrivals.push(at),
            LegEvent::Started { cached_tokens } => self.cached_tokens = self.cached_tokens.max(cached_tokens),
            LegEvent::Usage(usage) => self.cached_tokens = self.cached_tokens.max(usage.cached_tokens),
            LegEvent::Prefilled(kv) => self.kv = Some(kv),
            LegEvent::KvFailed { .. } => self.kv_failed = true,
            LegEvent::Ended => self.end = Some(End::Finished),
            LegEvent::Refused(error) => self.end = Some(of_refusal(error)),
            LegEvent::Lost { reason } => self.end = Some(End::Lost(reason)),
            LegEvent::Finished { .. } | LegEvent::KvArrived(_) | LegEvent::Reply(_) => {}
        }
    }
}

fn of_refusal(error: StartError) -> End {
    match error {
        StartError::Gone => End::Lost("it is gone".into()),
        error => End::Refused(error),
    }
}

/// When each of some sequences has got `tokens` since `from`, and for long enough to tell; or one has ended.
pub(super) fn enough(heard: &[Heard], from: f64, tokens: usize) -> Option<f64> {
    let since = |heard: &Heard| heard.arrivals.len() - heard.arrivals.partition_point(|at| *at < from);
    let last = |heard: &Heard| heard.arrivals.last().copied().unwrap_or(from);
    let until = if tokens > TRAIL { from + WINDOW_SECONDS } else { from };
    let done = heard.iter().all(|heard| since(heard) >= tokens && last(heard) >= until);
    let over = done || heard.iter().any(|heard| heard.end.is_some());
    over.then(|| heard.iter().map(last).fold(from, f64::max))
}

pub(super) fn ended(heard: &Heard) -> Option<Heard> {
    heard.end.is_some().then(|| heard.clone())
}
