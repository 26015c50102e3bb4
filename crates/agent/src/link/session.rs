//! One stream that a gateway has welcomed: heartbeats, news, answers.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use forebay_proto::{
    Welcome, logs, tokenizer_unavailable,
    v1::{self, from_agent::Body as Said, from_gateway::Body as Heard},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout_at},
};

use super::{Ended, Inbound, LinkError, Shared, broken, rejected};
use crate::{
    board::{LAST_WORDS_MAX, NextMessage, Told},
    tokenizer,
};

/// Answers that wait; beyond it a gateway's questions are dropped. Two tokenizers of the largest size, in pieces.
const ANSWERS_MAX: usize = 2_048;

/// The state of a stream.
pub(super) struct Session {
    shared: Arc<Shared>,
    sender: Option<mpsc::Sender<v1::FromAgent>>,
    heartbeat_interval: Duration,
    lease: Duration,
    heartbeat_due: Instant,
    heartbeats: u64,
    /// One is due and was not sent yet.
    beat: bool,
    heard: Instant,
    answers: VecDeque<Said>,
    /// A tokenizer that is being read.
    reading: Option<oneshot::Receiver<Vec<v1::Tokenizer>>>,
    /// When the stream is cut, once the last words were said.
    cut_at: Option<Instant>,
}

/// What the session does next.
enum Turn {
    Heard(Result<Option<v1::FromGateway>, tonic::Status>),
    Sent,
    Gone,
    News,
    Due,
    Read(Vec<v1::Tokenizer>),
    Silent,
}

impl Session {
    pub(super) fn new(shared: &Arc<Shared>, welcome: &Welcome, sender: mpsc::Sender<v1::FromAgent>) -> Self {
        let now = Instant::now();
        Self {
            shared: shared.clone(),
            sender: Some(sender),
            heartbeat_interval: welcome.heartbeat_interval,
            lease: welcome.lease,
            heartbeat_due: now,
            heartbeats: 0,
            beat: false,
            heard: now,
            answers: VecDeque::new(),
            reading: None,
            cut_at: None,
        }
    }

    /// When the gateway last said something.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Until the stream ends.
    pub(super) async fn run(&mut self, told: &mut Told, inbound: &mut Inbound) -> Result<Ended, LinkError> {
        let mut changes = self.shared.board.changes();
        let mut outgoing: Option<v1::FromAgent> = None;
        loop {
            changes.mark_unchanged();
            if outgoing.is_none() && self.sender.is_some() {
                match self.choose(told) {
                    NextMessage::Say(body) => outgoing = Some((*body).into()),
                    NextMessage::Nothing if !told.is_over() => {}
                    // All is said: close this side and let the gateway close the other.
                    NextMessage::Nothing | NextMessage::Over => self.hang_up(),
                }
            }
            let turn = {
                let Self { sender, reading, heard, lease, heartbeat_due, cut_at, .. } = self;
                let silent_at = cut_at.unwrap_or(*heard + *lease);
                tokio::select! {
                    biased;
                    message = inbound.message() => Turn::Heard(message),
                    permit = reserve(sender.as_ref()), if outgoing.is_some() => match permit {
                        Some(permit) => {
                            permit.send(outgoing.take().expect("checked"));
                            Turn::Sent
                        }
                        None => Turn::Gone,
                    },
                    pieces = read(reading), if reading.is_some() => Turn::Read(pieces),
                    changed = changes.changed() => if changed.is_ok() { Turn::News } else { Turn::Gone },
                    () = sleep_until(*heartbeat_due), if sender.is_some() => Turn::Due,
                    () = sleep_until(silent_at) => Turn::Silent,
                }
            };
            match turn {
                Turn::Heard(Ok(Some(message))) => self.take(message, told)?,
                Turn::Heard(Ok(None)) if self.sender.is_none() => return Ok(Ended::Said),
                Turn::Heard(Ok(None)) | Turn::Gone => return Err(self.why_gone(inbound).await),
                Turn::Heard(Err(_)) if self.sender.is_none() => return Ok(Ended::Said),
                Turn::Heard(Err(status)) => return Err(broken(status)),
                Turn::Silent if self.cut_at.is_some() => return Ok(Ended::Said),
                Turn::Silent => return Err(LinkError::Silent(self.lease)),
                Turn::Read(pieces) => {
                    self.reading = None;
                    self.answers.extend(pieces.into_iter().map(Said::Tokenizer));
                }
                Turn::Due => {
                    self.beat = true;
                    self.heartbeat_due = Instant::now() + self.heartbeat_interval;
                }
                Turn::Sent | Turn::News => {}
            }
            if self.shared.board.is_over(told) {
                // A gateway that does not take the last words is told by the end of the stream.
                self.cut_at.get_or_insert_with(|| Instant::now() + LAST_WORDS_MAX);
            }
        }
    }

    /// A stream that ended on this side may have a reason waiting on the other.
    async fn why_gone(&mut self, inbound: &mut Inbound) -> LinkError {
        match timeout_at(Instant::now() + LAST_WORDS_MAX, inbound.message()).await {
            Ok(Ok(Some(v1::FromGateway { body: Some(Heard::Reject(reject)) }))) => rejected(&reject),
            Ok(Err(status)) => broken(status),
            _ => LinkError::Closed,
        }
    }

    fn hang_up(&mut self) {
        self.sender = None;
        self.cut_at.get_or_insert_with(|| Instant::now() + LAST_WORDS_MAX);
    }

    /// Heartbeats first: the lease hangs on them. Then news, for they are what a stream is for; answers last.
    fn choose(&mut self, told: &mut Told) -> NextMessage {
        if std::mem::take(&mut self.beat) {
            self.heartbeats += 1;
            return NextMessage::Say(Box::new(Said::Heartbeat(v1::Heartbeat { counter: self.heartbeats })));
        }
        match self.shared.board.next(told, std::time::Instant::now()) {
            NextMessage::Nothing if !told.is_over() => match self.answers.pop_front() {
                Some(answer) => NextMessage::Say(Box::new(answer)),
                None => NextMessage::Nothing,
            },
            next => next,
        }
    }

    fn take(&mut self, message: v1::FromGateway, told: &mut Told) -> Result<(), LinkError> {
        self.heard = Instant::now();
        match message.body {
            Some(Heard::RequestSnapshot(v1::RequestSnapshot { dp_rank })) => {
                if let Ok(dp_rank) = u16::try_from(dp_rank) {
                    told.forget(dp_rank);
                }
            }
            Some(Heard::RequestLogs(v1::RequestLogs { request_id, lines }))
                if self.answers.len() < ANSWERS_MAX =>
            {
                let lines = lines as usize;
                let tail = self.shared.log.tail(lines);
                let tail: Vec<String> = tail.iter().map(|line| line.to_string()).collect();
                self.answers.push_back(Said::Logs(logs(request_id, lines, tail)));
            }
            Some(Heard::RequestTokenizer(v1::RequestTokenizer { request_id })) => {
                self.read_tokenizer(request_id)
            }
            Some(Heard::DrainEngine(v1::DrainEngine {})) => {
                // A full queue holds an order to drain already.
                let _ = self.shared.drains.try_send("an operator asked for it at a gateway".to_owned());
            }
            Some(Heard::Reject(reject)) => return Err(rejected(&reject)),
            Some(Heard::Welcome(_) | Heard::Ack(_) | Heard::RequestLogs(_)) | None => {}
        }
        Ok(())
    }

    fn read_tokenizer(&mut self, request_id: u64) {
        if self.reading.is_some() || self.answers.len() >= ANSWERS_MAX {
            let busy = tokenizer_unavailable(request_id, "an earlier request for it is still being answered");
            self.answers.push_back(Said::Tokenizer(busy));
            return;
        }
        let source = self.shared.tokenizer.borrow().clone();
        let (done, reading) = oneshot::channel();
        self.reading = Some(reading);
        tokio::task::spawn_blocking(move || drop(done.send(tokenizer::answer(&source, request_id))));
    }
}

async fn reserve(sender: Option<&mpsc::Sender<v1::FromAgent>>) -> Option<mpsc::Permit<'_, v1::FromAgent>> {
    sender?.reserve().await.ok()
}

async fn read(reading: &mut Option<oneshot::Receiver<Vec<v1::Tokenizer>>>) -> Vec<v1::Tokenizer> {
    match reading {
        // The reader always answers; it can only be cut with the process.
        Some(reading) => reading.await.unwrap_or_default(),
        None => Vec::new(),
    }
}
