//! Follows the KV events of one rank: the shell around [`Feed`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use forebay_engine_wire::discovery::{Dialled, ZmqAddress};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    EventFigures, EventsFollowed, RankShared, Shared,
    feed::{Feed, Step},
};
use crate::{
    remote::zmq::{Replay, Subscriber, ZmqError},
    reports::Notice,
};

/// Pause after a connection that failed or broke, doubling up to the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Messages that are taken before others on the runtime have their turn, and before the index is told.
const BURST_MESSAGES: usize = 64;
/// A subscription is not confirmed: what is published before the publisher knows of it is lost without a trace, until a
/// message comes. So as long as none has come the replay is asked again, after a pause that doubles up to the second.
const UNHEARD_MIN: Duration = Duration::from_millis(250);
const UNHEARD_MAX: Duration = Duration::from_secs(30);
/// For a whole replay: 10,000 batches, what vLLM keeps, take some seconds.
const REPLAY_MAX: Duration = Duration::from_secs(60);

/// Why a rank is no longer followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The publisher is another one than before: the engine restarted.
    Restarted,
}

pub(super) struct Follower {
    source: Dialled,
    feed: Feed,
    shared: Arc<Shared>,
    batches: u64,
    followed: EventsFollowed,
    /// Connections that broke.
    breaks: u64,
    /// When the newest message came.
    heard: Option<std::time::Instant>,
    /// Operators were told that there is no replay.
    told_no_replay: bool,
}

/// Leaves the loops that a message is taken in.
enum Leave {
    /// The connection is over.
    Broken(ZmqError),
    /// Nothing more of this rank is believed.
    Deaf,
    /// The engine restarted.
    Restarted,
}

impl Follower {
    pub(super) fn new(source: Dialled, feed: Feed, shared: Arc<Shared>) -> Self {
        Self {
            source,
            feed,
            shared,
            batches: 0,
            followed: EventsFollowed::Connecting,
            breaks: 0,
            heard: None,
            told_no_replay: false,
        }
    }

    fn rank(&self) -> &RankShared {
        &self.shared.ranks[&self.source.dp_rank]
    }

    fn blind(&self, why: Option<Arc<str>>) {
        self.shared.sees(self.source.dp_rank, why);
    }

    pub(super) async fn run(mut self) -> End {
        let mut pause = PAUSE_MIN;
        loop {
            let leave = match Subscriber::connect(&self.source.events, &self.source.topic).await {
                Err(error) => Leave::Broken(error),
                Ok(subscriber) => {
                    self.blind(None);
                    pause = PAUSE_MIN;
                    let leave = self.listen(subscriber).await;
                    self.breaks += u64::from(matches!(leave, Leave::Broken(_)));
                    match leave {
                        // It may only have dropped a slow subscriber: whether it is gone shows in the next attempt.
                        Leave::Broken(ZmqError::Closed { .. }) => {
                            self.is(EventsFollowed::Unreachable);
                            self.wait(pause).await;
                            continue;
                        }
                        leave => leave,
                    }
                }
            };
            match leave {
                Leave::Restarted => return End::Restarted,
                Leave::Deaf => {
                    self.is(EventsFollowed::Refused);
                    break;
                }
                Leave::Broken(error) => {
                    self.blind(Some(format!("its KV events cannot be followed: {error}").into()));
                    self.is(EventsFollowed::Unreachable);
                    self.wait(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
        loop {
            self.rank().snapshot_wanted.notified().await;
            self.answer();
        }
    }

    /// Waits, and answers for what is known meanwhile.
    async fn wait(&self, pause: Duration) {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                () = sleep_until(until) => return,
                () = self.rank().snapshot_wanted.notified() => self.answer(),
            }
        }
    }

    /// Says what is cached to those who asked.
    fn answer(&self) {
        let wanted = std::mem::take(&mut *self.rank().wanted.lock());
        for asker in wanted.askers {
            let _asker_may_be_gone =
                asker.send(forebay_types::device_blocks(&self.feed.snapshot().contents).collect());
        }
        if wanted.report {
            self.shared.reports.put_snapshot(self.feed.snapshot());
        }
    }

    fn is(&mut self, followed: EventsFollowed) {
        self.followed = followed;
        self.tell();
    }

    /// Takes what is published until the connection ends, after what was published before.
    async fn listen(&mut self, mut subscriber: Subscriber) -> Leave {
        // A new connection may be to another publisher: one that has not what was taken is.
        let from = self.feed.proof_from();
        if let Err(leave) = self.catch_up(from).await {
            return leave;
        }
        self.is(EventsFollowed::Following);
        let mut unheard = Some(UNHEARD_MIN);
        let mut ask_at = Instant::now() + UNHEARD_MIN;
        loop {
            let message = tokio::select! {
                message = subscriber.next() => message,
                () = sleep_until(ask_at), if unheard.is_some() => {
                    if let Err(leave) = self.catch_up(None).await {
                        return leave;
                    }
                    unheard = unheard.map(|pause| (pause * 2).min(UNHEARD_MAX));
                    ask_at = Instant::now() + unheard.unwrap_or_default();
                    continue;
                }
                () = self.shared.ranks[&self.source.dp_rank].snapshot_wanted.notified() => {
                    self.answer();
                    continue;
                }
            };
            let mut message = match message {
                Ok(message) => Some(message),
                Err(error) => return Leave::Broken(error),
            };
            unheard = None;
            let mut taken = 0;
            while let Some(next) = message {
                if let Err(leave) = self.published(&next).await {
                    self.tell();
                    return leave;
                }
                taken += 1;
                message = if taken < BURST_MESSAGES { subscriber.ready() } else { None };
            }
            self.tell();
            // Messages that are here already take no waiting, so nobody else would have a turn.
            tokio::task::yield_now().await;
        }
    }

    async fn published(&mut self, message: &[Bytes]) -> Result<(), Leave> {
        self.batches += 1;
        self.heard = Some(std::time::Instant::now());
        let mut step = self.feed.published(message);
        if let Step::Missing { .. } = step {
            self.catch_up(None).await?;
            step = self.feed.published(message);
        }
        if let Step::Missing { .. } = step {
            step = self.feed.give_up_gap(message);
        }
        self.verdict(step)
    }

    /// Asks for what was published since the last batch that was taken, or from `proof` on, which was. Where that fails,
    /// what is missing stays so.
    async fn catch_up(&mut self, proof: Option<u64>) -> Result<(), Leave> {
        let Some(at) = self.source.replay.clone() else {
            return Ok(());
        };
        let result = timeout(REPLAY_MAX, self.replay(&at, proof)).await;
        self.tell();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Ok(leave))) => Err(leave),
            Ok(Err(Err(error))) => {
                self.no_replay(&error);
                Ok(())
            }
            Err(_) => {
                self.no_replay(&ZmqError::TooSlow { at });
                Ok(())
            }
        }
    }

    async fn replay(&mut self, at: &ZmqAddress, proof: Option<u64>) -> Result<(), Result<Leave, ZmqError>> {
        let mut from = proof.unwrap_or_else(|| self.feed.replay_from());
        let mut is_proved = proof.is_none();
        while !self.answer_of_replay(at, from, &mut is_proved).await? {
            from = self.feed.replay_from();
        }
        if is_proved { Ok(()) } else { Err(Ok(Leave::Restarted)) }
    }

    /// Takes one answer; `false` if it has a hole or no end: of a long one the first thousand messages arrive, and some of the
    /// others.
    async fn answer_of_replay(
        &mut self,
        at: &ZmqAddress,
        from: u64,
        is_proved: &mut bool,
    ) -> Result<bool, Result<Leave, ZmqError>> {
        let mut replay = Replay::ask(at, from).await.map_err(Err)?;
        let mut is_first = true;
        loop {
            for _ in 0..BURST_MESSAGES {
                let Some(message) = replay.next().await.map_err(Err)? else { return Ok(false) };
                let Some(mut step) = self.feed.replayed(&message) else { return Ok(true) };
                if let Step::Missing { .. } = step {
                    if !is_first {
                        return Ok(false);
                    }
                    // The engine keeps its last batches only.
                    step = self.feed.give_up_gap_of_replay(&message);
                }
                (is_first, *is_proved) = (false, true);
                self.batches += 1;
                self.heard = Some(std::time::Instant::now());
                self.verdict(step).map_err(Ok)?;
            }
            self.tell();
            tokio::task::yield_now().await;
        }
    }

    fn no_replay(&mut self, error: &ZmqError) {
        if !std::mem::replace(&mut self.told_no_replay, true) {
            let note = format!("KV events that were missed cannot be had again: {error}");
            self.shared.reports.put_notice(Notice::Note(note.into()));
        }
    }

    fn verdict(&self, step: Step) -> Result<(), Leave> {
        match step {
            Step::Taken | Step::Missing { .. } => Ok(()),
            Step::Restarted => Err(Leave::Restarted),
            Step::Distrusted(why) => {
                self.blind(Some(why));
                Err(Leave::Deaf)
            }
            Step::Fenced(why) => {
                self.shared.reports.put_notice(Notice::Fenced { why: why.clone() });
                self.blind(Some(why));
                Err(Leave::Deaf)
            }
        }
    }

    /// Passes on what came of the messages taken.
    fn tell(&mut self) {
        let out = self.feed.take();
        for note in out.notes {
            self.shared.reports.put_notice(Notice::Note(note));
        }
        if !out.batches.is_empty() {
            self.shared.reports.put_kv(out.batches);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        *self.rank().figures.lock() = EventFigures {
            cache: self.feed.stats(),
            batches: self.batches,
            followed: self.followed,
            breaks: self.breaks,
            heard: self.heard,
            batches_lost: self.feed.lost(),
            history_lost: self.feed.is_lossy(),
            lag_seconds: self.feed.newest_seconds().map_or(0.0, |newest| (now - newest).max(0.0)),
        };
    }
}
