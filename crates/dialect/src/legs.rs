//! Running legs: their streams, read by whoever comes first, the client's task or the watcher of the engine's reports.
//!
//! Start at [`Legs::start`], which gives a [`LegReader`]. Whatever is read from a leg's stream is counted and entered in the
//! ledger at once, then waits for the reader; so what is known does not depend on how fast a client reads.
//!
//! Invariants: a leg stays here until its last event, also when its client has gone, and is then told to stop, so that
//! every token that the engine drew is known; what a prefill leg holds for a client that has gone is freed; what waits
//! for a reader is bounded by the leg's own `output_tokens_max`.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Instant,
};

use forebay_engines::{Driver, Leg, LegEvent, LegStream, StartError};
use forebay_types::{FinishReason, LegId, TokenId};
use parking_lot::Mutex;

use crate::{
    events::{Chain, Ledger},
    metrics::{Metrics, PromptSources},
};

/// All running legs of one engine.
pub(crate) struct Legs {
    driver: Arc<dyn Driver>,
    metrics: Arc<Metrics>,
    ledger: Mutex<Ledger>,
    live: Mutex<HashMap<LegId, Arc<Mutex<Live>>>>,
    next: AtomicU64,
}

/// One running leg.
struct Live {
    stream: LegStream,
    /// Read from the stream, not yet by the client's task.
    waiting: Vec<LegEvent>,
    /// The last event was read.
    over: bool,
    /// Nobody will take what waits.
    abandoned: bool,
    /// Of the client's task.
    reader: Option<Waker>,
    account: Account,
}

/// What is counted of one leg.
struct Account {
    leg: LegId,
    prompt_tokens: u32,
    /// Its KV is to come from another engine.
    fetches: bool,
    chain: Option<Chain>,
    answers: Vec<AnswerSoFar>,
    cached_tokens: u32,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

struct AnswerSoFar {
    choice: u32,
    chain: Chain,
    last_token: Option<Instant>,
    open: bool,
}

/// One leg as its client's task reads it. Dropped before the end, it ends the leg.
pub(crate) struct LegReader {
    id: LegId,
    live: Arc<Mutex<Live>>,
    legs: Arc<Legs>,
}

/// A leg that is to be started; `leg.id` is given by [`Legs::start`].
pub(crate) struct Order {
    pub(crate) leg: Leg,
    /// The whole prompt, where the leg is given a part of it.
    pub(crate) whole_prompt: Option<WholePrompt>,
}

/// The prompt of a decode leg, whose last token the engine takes for the first of the answer.
pub(crate) struct WholePrompt {
    pub(crate) tokens: Arc<[TokenId]>,
    pub(crate) hashes: Arc<[forebay_types::BlockHash]>,
}

impl Legs {
    pub(crate) fn new(driver: Arc<dyn Driver>, metrics: Arc<Metrics>, ledger: Ledger) -> Arc<Self> {
        let (ledger, live, next) = (Mutex::new(ledger), Mutex::default(), AtomicU64::new(1));
        Arc::new(Self { driver, metrics, ledger, live, next })
    }

    pub(crate) fn ledger(&self) -> &Mutex<Ledger> {
        &self.ledger
    }

    /// Hands a leg to the engine.
    ///
    /// # Errors
    /// As [`Driver::start`].
    pub(crate) fn start(self: &Arc<Self>, order: Order) -> Result<LegReader, StartError> {
        let Order { mut leg, whole_prompt } = order;
        // Relaxed: only uniqueness is asked of the counter.
        leg.id = LegId(self.next.fetch_add(1, Relaxed));
        let (id, fetches, choices) = (leg.id, whole_prompt.is_some(), leg.choices.clone());
        let (tokens, hashes) = match &whole_prompt {
            Some(whole) => (whole.tokens.clone(), whole.hashes.clone()),
            None => (leg.prompt.tokens.clone(), leg.prompt.hashes.clone()),
        };
        let chain = self.ledger.lock().begin(leg.prompt.root, &leg.prompt.salt, &tokens, &hashes);
        let answer =
            |&choice: &u32| AnswerSoFar { choice, chain: Ledger::fork(&chain), last_token: None, open: true };
        let mut account = Account {
            leg: id,
            prompt_tokens: tokens.len() as u32,
            fetches,
            answers: choices.iter().map(answer).collect(),
            chain: Some(chain),
            cached_tokens: 0,
            submitted: Instant::now(),
            started: None,
            first_token: None,
        };
        // The watcher drains under this lock, so it sees every leg whose events it reads of.
        let mut live = self.live.lock();
        match self.driver.start(leg) {
            Ok(stream) => {
                let entry = Live {
                    stream,
                    waiting: Vec::new(),
                    over: false,
                    abandoned: false,
                    reader: None,
                    account,
                };
                let entry = Arc::new(Mutex::new(entry));
                live.insert(id, entry.clone());
                drop(live);
                if fetches {
                    self.metrics.update(|counters| counters.fetching += 1);
                }
                Ok(LegReader { id, live: entry, legs: self.clone() })
            }
            Err(error) => {
                drop(live);
                let full = matches!(error, StartError::QueueFull { .. });
                self.metrics.update(|counters| counters.rejected += u64::from(full));
                account.close(&mut self.ledger.lock());
                Err(error)
            }
        }
    }

    /// Reads everything that the engine has handed out.
    pub(crate) fn drain(&self) {
        for (id, live) in self.all() {
            let mut live = live.lock();
            // The reader's own waker: registering another one would leave the reader asleep.
            let waker = live.reader.clone().unwrap_or_else(|| Waker::noop().clone());
            self.read(&mut live, &mut Context::from_waker(&waker));
            let done = live.over && live.abandoned;
            drop(live); // never held while the list is locked
            if done {
                self.live.lock().remove(&id);
            }
        }
    }

    /// Legs that have not ended, those without a client included.
    pub(crate) fn running(&self) -> usize {
        self.all().iter().filter(|(_, live)| !live.lock().over).count()
    }

    fn all(&self) -> Vec<(LegId, Arc<Mutex<Live>>)> {
        self.live.lock().iter().map(|(id, live)| (*id, live.clone())).collect()
    }

    /// Moves what is in the stream to what waits.
    fn read(&self, live: &mut Live, cx: &mut Context<'_>) {
        if live.over {
            return;
        }
        let from = live.waiting.len();
        loop {
            match live.stream.poll_batch(cx, &mut live.waiting) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => {
                    live.over = true;
                    break;
                }
                Poll::Pending => break,
            }
        }
        let Live { waiting, account, .. } = live;
        if waiting.len() > from || live.over {
            self.enter(account, &waiting[from..], live.over);
        }
        if live.abandoned {
            if waiting.iter().any(|event| matches!(event, LegEvent::Prefilled(_))) {
                self.driver.release_kv(account.leg);
            }
            waiting.clear();
        }
    }

    fn enter(&self, account: &mut Account, events: &[LegEvent], over: bool) {
        let now = Instant::now();
        let mut ledger = self.ledger.lock();
        self.metrics.update(|counters| {
            account.enter_tokens(events, now, &mut ledger, counters);
            for event in events {
                account.enter_event(event, now, counters);
            }
        });
        if over {
            account.close(&mut ledger);
        }
    }
}

impl Account {
    fn enter_tokens(
        &mut self,
        events: &[LegEvent],
        now: Instant,
        ledger: &mut Ledger,
        counters: &mut crate::metrics::Counters,
    ) {
        for answer in &mut self.answers {
            let mut came = 0;
            for event in events {
                if let LegEvent::Token(token) = event
                    && token.choice == answer.choice
                {
                    ledger.push(&mut answer.chain, token.token);
                    came += u32::from(answer.open);
                }
            }
            if came == 0 {
                continue;
            }
            counters.generated += u64::from(came);
            match answer.last_token.replace(now) {
                Some(before) => counters.tokens_came(came, now - before),
                None if came > 1 => counters.tokens_came(came - 1, std::time::Duration::ZERO),
                None => {}
            }
            if self.first_token.is_none() {
                self.first_token = Some(now);
                counters.first_token_seconds.observe((now - self.submitted).as_secs_f64());
                let started = self.started.unwrap_or(now);
                counters.prefill_seconds.observe((now - started).as_secs_f64());
            }
        }
    }

    fn enter_event(&mut self, event: &LegEvent, now: Instant, counters: &mut crate::metrics::Counters) {
        let mut ready = |cached: u32, fetched: Option<bool>| {
            counters.prompt_ready(PromptSources { prompt: self.prompt_tokens, cached, fetched });
        };
        match event {
            LegEvent::Started { cached_tokens } => {
                self.started = Some(now);
                self.cached_tokens = *cached_tokens;
                if !self.fetches {
                    ready(*cached_tokens, None);
                }
                counters.queue_seconds.observe((now - self.submitted).as_secs_f64());
            }
            LegEvent::KvArrived(_) | LegEvent::KvFailed { .. } if self.fetches => {
                ready(self.cached_tokens, Some(matches!(event, LegEvent::KvArrived(_))));
                self.fetches = false;
                counters.fetching -= 1;
            }
            LegEvent::Finished { choice, reason } => {
                self.finish(*choice, Some(*reason), now, counters);
            }
            LegEvent::Refused(error) => {
                counters.rejected += u64::from(matches!(error, StartError::QueueFull { .. }));
                self.finish_all(now, counters, |counters| &mut counters.ended_error);
            }
            LegEvent::Lost { .. } => self.finish_all(now, counters, |counters| &mut counters.ended_error),
            LegEvent::Ended => self.finish_all(now, counters, |counters| &mut counters.ended_abort),
            LegEvent::Token(_)
            | LegEvent::Prefilled(_)
            | LegEvent::KvArrived(_)
            | LegEvent::KvFailed { .. }
            | LegEvent::Reply(_)
            | LegEvent::Usage(_) => {}
        }
    }

    /// One choice is complete.
    fn finish(
        &mut self,
        choice: u32,
        reason: Option<FinishReason>,
        now: Instant,
        counters: &mut crate::metrics::Counters,
    ) {
        let Some(answer) = self.answers.iter_mut().find(|answer| answer.choice == choice && answer.open)
        else {
            return;
        };
        answer.open = false;
        match reason {
            Some(reason) => counters.ended(reason),
            None => counters.ended_abort += 1,
        }
        counters.request_seconds.observe((now - self.submitted).as_secs_f64());
        if let Some(first) = self.first_token {
            counters.decode_seconds.observe((now - first).as_secs_f64());
        }
    }

    /// The leg is over whatever its choices were at.
    fn finish_all(
        &mut self,
        now: Instant,
        counters: &mut crate::metrics::Counters,
        counter: impl Fn(&mut crate::metrics::Counters) -> &mut u64,
    ) {
        for answer in self.answers.iter_mut().filter(|answer| answer.open) {
            answer.open = false;
            *counter(counters) += 1;
            counters.request_seconds.observe((now - self.submitted).as_secs_f64());
        }
        if std::mem::replace(&mut self.fetches, false) {
            counters.fetching -= 1;
        }
    }

    fn close(&mut self, ledger: &mut Ledger) {
        self.chain.take().into_iter().for_each(|chain| ledger.end(chain));
        self.answers.drain(..).for_each(|answer| ledger.end(answer.chain));
    }
}

impl LegReader {
    /// Appends everything that has arrived to `batch`; pending while nothing has. `false` after the last event.
    pub(crate) fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<LegEvent>) -> Poll<bool> {
        let mut live = self.live.lock();
        if live.waiting.is_empty() {
            if !live.reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                live.reader = Some(cx.waker().clone());
            }
            self.legs.read(&mut live, cx);
        }
        if !live.waiting.is_empty() {
            batch.append(&mut live.waiting);
            return Poll::Ready(true);
        }
        if live.over { Poll::Ready(false) } else { Poll::Pending }
    }

    /// Ends one choice: its stop string matched.
    pub(crate) fn stop_choice(&self, choice: u32) {
        let mut live = self.live.lock();
        self.legs.metrics.update(|counters| {
            live.account.finish(choice, Some(FinishReason::Stop), Instant::now(), counters);
        });
        live.stream.stop_choice(choice);
    }
}

impl Drop for LegReader {
    fn drop(&mut self) {
        let mut live = self.live.lock();
        live.abandoned = true;
        live.reader = None;
        // What the client never took may be KV that is held for it.
        if live.waiting.iter().any(|event| matches!(event, LegEvent::Prefilled(_))) {
            self.legs.driver.release_kv(self.id);
        }
        live.waiting = Vec::new();
        if live.over {
            drop(live);
            self.legs.live.lock().remove(&self.id);
            return;
        }
        // Not by dropping the stream: tokens that were drawn meanwhile would be lost to the ledger, and a block that they
        // fill may be announced in the same step. The watcher reads on until the engine has stopped.
        let open: Vec<u32> =
            live.account.answers.iter().filter(|answer| answer.open).map(|answer| answer.choice).collect();
        self.legs.metrics.update(|counters| {
            for &choice in &open {
                live.account.finish(choice, None, Instant::now(), counters);
            }
        });
        open.into_iter().for_each(|choice| live.stream.stop_choice(choice));
    }
}
