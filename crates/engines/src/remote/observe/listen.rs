//! KV events of one rank as its engine said them, in order: for those who ask what happened, not what is cached now.
//!
//! [`follow_events`](super::follow_events) keeps an index true: it says a block once however often it is stored, and leaves
//! out what comes after blocks that it never heard of. Both are lost to whoever wants to know which prompts came. Start at
//! [`listen`]; dropping the [`Listener`] ends it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_events::{EventBatch, Observed, Sequence, Via, decode, frames};
use forebay_engine_wire::discovery::{Dialled, ZmqAddress};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep_until, timeout},
};

use crate::remote::zmq::{Replay, Subscriber, ZmqError};

/// Batches that wait for a slow reader; beyond that the engine's own buffers fill, and it drops what they cannot hold.
const HEARD_MAX: usize = 1024;
/// Pause after a connection that failed or broke, doubling up to the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// For a whole replay.
const REPLAY_MAX: Duration = Duration::from_secs(60);

/// A batch, and when it came.
#[derive(Debug, Clone, PartialEq)]
pub struct HeardBatch {
    /// When it was read from the socket.
    pub at: Instant,
    /// It was published before the first connection stood, and came by replay: it happened at some time before.
    pub is_history: bool,
    /// What it says.
    pub batch: EventBatch,
}

/// What is heard of one rank.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// The connection stands, and what was published before was asked for.
    Listening,
    /// The next batch.
    Batch(HeardBatch),
    /// So many batches were missed for good, or could not be read.
    Missed(u64),
    /// The publisher began anew: all that it cached is gone.
    Restarted,
    /// There is no connection; another is tried soon.
    Unreachable(Arc<str>),
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Listener {
    heard: mpsc::Receiver<Heard>,
    task: JoinHandle<()>,
}

impl Listener {
    /// The next thing that is heard. Cancel safe.
    pub async fn next(&mut self) -> Option<Heard> {
        self.heard.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Begins to listen to one rank's events.
pub fn listen(source: Dialled) -> Listener {
    let (tell, heard) = mpsc::channel(HEARD_MAX);
    let ear = Ear { source, tell, sequence: Sequence::new(), knows_all: false, has_begun: false };
    Listener { heard, task: tokio::spawn(ear.run()) }
}

/// Nobody reads any more.
struct Gone;

struct Ear {
    source: Dialled,
    tell: mpsc::Sender<Heard>,
    sequence: Sequence,
    /// Something was taken already, so that a gap is a loss and not the time before.
    knows_all: bool,
    /// The first connection stood.
    has_begun: bool,
}

impl Ear {
    async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let error = match Subscriber::connect(&self.source.events, &self.source.topic).await {
                Err(error) => error,
                Ok(subscriber) => {
                    pause = PAUSE_MIN;
                    match self.take_all(subscriber).await {
                        Ok(error) => error,
                        Err(Gone) => return,
                    }
                }
            };
            if self.tell.send(Heard::Unreachable(error.to_string().into())).await.is_err() {
                return;
            }
            sleep_until(tokio::time::Instant::now() + pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Takes what comes over one connection; why it ended.
    async fn take_all(&mut self, mut subscriber: Subscriber) -> Result<ZmqError, Gone> {
        self.catch_up().await?;
        self.has_begun = true;
        self.say(Heard::Listening).await?;
        loop {
            let message = match subscriber.next().await {
                Ok(message) => message,
                Err(error) => return Ok(error),
            };
            let Ok(message) = frames::published(&message) else {
                self.say(Heard::Missed(1)).await?;
                continue;
            };
            if self.take(message.sequence, message.payload, Via::Published).await? {
                continue;
            }
            self.catch_up().await?;
            if !self.take(message.sequence, message.payload, Via::Published).await? {
                self.give_up(message.sequence).await?;
                self.take(message.sequence, message.payload, Via::Published).await?;
            }
        }
    }

    /// Asks for what was published since the last batch. Where that fails, what is missing stays so.
    async fn catch_up(&mut self) -> Result<(), Gone> {
        let Some(at) = self.source.replay.clone() else { return Ok(()) };
        match timeout(REPLAY_MAX, self.replay(&at)).await {
            Ok(Err(gone)) => Err(gone),
            // What a replay did not bring shows as a gap with the next batch.
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }

    async fn replay(&mut self, at: &ZmqAddress) -> Result<Result<(), ZmqError>, Gone> {
        loop {
            match self.answer_of_replay(at).await? {
                Ok(false) => {}
                ended => return Ok(ended.map(drop)),
            }
        }
    }

    /// Takes one answer; `false` if it has a hole or no end.
    async fn answer_of_replay(&mut self, at: &ZmqAddress) -> Result<Result<bool, ZmqError>, Gone> {
        let mut replay = match Replay::ask(at, self.sequence.next()).await {
            Ok(replay) => replay,
            Err(error) => return Ok(Err(error)),
        };
        let mut is_first = true;
        loop {
            let message: Vec<Bytes> = match replay.next().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(Ok(false)),
                Err(error) => return Ok(Err(error)),
            };
            match frames::reply(&message) {
                Ok(frames::Reply::Batch(message)) => {
                    if !self.take(message.sequence, message.payload, Via::Replay).await? {
                        if !is_first {
                            return Ok(Ok(false));
                        }
                        self.give_up(message.sequence).await?;
                        self.take(message.sequence, message.payload, Via::Replay).await?;
                    }
                }
                Ok(frames::Reply::End) => return Ok(Ok(true)),
                Err(_) => self.say(Heard::Missed(1)).await?,
            }
            is_first = false;
        }
    }

    /// Takes a batch; `false` if others before it are missing.
    async fn take(&mut self, number: u64, payload: &[u8], via: Via) -> Result<bool, Gone> {
        let Ok(batch) = decode(payload) else {
            if number >= self.sequence.next() {
                self.sequence.skip_to(number.saturating_add(1));
                self.say(Heard::Missed(1)).await?;
            }
            return Ok(true);
        };
        let mut observed = self.sequence.observe(number, batch.time_seconds, via);
        if observed == Observed::Restarted {
            self.knows_all = false;
            self.say(Heard::Restarted).await?;
            observed = self.sequence.observe(number, batch.time_seconds, via);
        }
        match observed {
            Observed::InOrder => {
                self.knows_all = true;
                let is_history = via == Via::Replay && !self.has_begun;
                self.say(Heard::Batch(HeardBatch { at: Instant::now(), is_history, batch })).await?;
                Ok(true)
            }
            Observed::Duplicate | Observed::Restarted => Ok(true),
            Observed::Gap { .. } => Ok(false),
        }
    }

    /// What is missing before `number` is not to be had.
    async fn give_up(&mut self, number: u64) -> Result<(), Gone> {
        let missing = number.saturating_sub(self.sequence.next());
        self.sequence.skip_to(number);
        // Who comes late has missed nothing of what came since.
        if self.knows_all { self.say(Heard::Missed(missing)).await } else { Ok(()) }
    }

    async fn say(&self, heard: Heard) -> Result<(), Gone> {
        self.tell.send(heard).await.map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use forebay_engine_events::{
        EngineEvent,
        encode::{Dialect, encode},
    };
    use zeromq::{PubSocket, Socket as _, SocketSend as _, ZmqMessage};

    use super::*;

    fn batch(seconds: f64) -> EventBatch {
        EventBatch { time_seconds: seconds, events: vec![EngineEvent::Cleared], dp_rank: Some(0) }
    }

    async fn publish(publisher: &mut PubSocket, number: u64, seconds: f64) {
        let payload = encode(&batch(seconds), Dialect::VllmMap);
        let frames = frames::publication("kv", number, payload).map(Bytes::from).to_vec();
        publisher.send(ZmqMessage::try_from(frames).unwrap()).await.unwrap();
    }

    /// The next thing that is heard, within bounds.
    async fn next(listener: &mut Listener) -> Heard {
        timeout(Duration::from_secs(30), listener.next()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn batches_come_in_order_and_losses_and_restarts_are_said() {
        let mut publisher = PubSocket::new();
        let bound = publisher.bind("tcp://127.0.0.1:0").await.unwrap();
        let events = ZmqAddress::parse(&bound.to_string()).unwrap();
        let mut listener = listen(Dialled { dp_rank: 0, events, replay: None, topic: "kv".to_owned() });
        assert_eq!(next(&mut listener).await, Heard::Listening);
        // A subscription takes a moment to arrive: what is published before is not heard.
        let mut number = 5;
        let first = loop {
            publish(&mut publisher, number, number as f64).await;
            if let Ok(heard) = timeout(Duration::from_millis(20), listener.next()).await {
                break heard.unwrap();
            }
            number += 1;
        };
        let of = |heard: Heard| match heard {
            Heard::Batch(HeardBatch { is_history: false, batch, .. }) => batch.time_seconds,
            other => panic!("{other:?}"),
        };
        // Who comes late has missed nothing; from here on every batch counts.
        let first = of(first);
        assert!((5.0..=number as f64).contains(&first), "{first}");
        let end = number + 3;
        publish(&mut publisher, end, end as f64).await;
        let mut missed = 0;
        loop {
            match next(&mut listener).await {
                Heard::Missed(batches) => missed += batches,
                Heard::Batch(heard) if heard.batch.time_seconds == end as f64 => break,
                heard => drop(of(heard)),
            }
        }
        assert_eq!(missed, 2);
        publish(&mut publisher, 0, end as f64 + 1.0).await;
        assert_eq!(next(&mut listener).await, Heard::Restarted);
        assert_eq!(of(next(&mut listener).await), end as f64 + 1.0);
        drop(publisher);
        assert!(matches!(next(&mut listener).await, Heard::Unreachable(_)));
    }
}
