//! One stream of an agent, from Hello to its end.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use forebay_engines::{KvSnapshot, LoadReport, Notice, Reports};
use forebay_proto::{
    self as proto, EngineState, Hello, Life as WireLife, Ready, SnapshotReader, StepsReport, TokenizerReader,
    WIRE_VERSION, Welcome, WireError, agree,
    v1::{self, RejectReason, from_agent::Body, from_gateway::Body as Answer},
};
use tokio::{
    sync::OwnedSemaphorePermit,
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use tonic::{Status, Streaming};

use super::{
    Cluster, connect,
    keeper::Outbox,
    seat::{Occupied, Over, Seat, Serving},
};

/// How long a new stream may take to say who is there.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

pub(super) struct Session {
    cluster: Arc<Cluster>,
    stream: Streaming<v1::FromAgent>,
    outbox: Outbox,
    peer: String,
}

/// What a stream that has a seat knows.
struct Seated {
    cluster: Arc<Cluster>,
    seat: Arc<Seat>,
    /// This stream's number at the seat.
    number: u64,
    hello: Hello,
    outbox: Outbox,
    wire: WireLife,
    /// Pieces of snapshots under way, by rank.
    snapshots: Vec<SnapshotReader>,
    /// The engine serves and has not joined yet.
    pending: Option<Pending>,
    /// Tokenizers asked for.
    fetches: u64,
}

/// How long an engine waits for its tokenizer before it is given text.
const TOKENIZER_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks for whether another stream has brought it.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// An engine that joins once the tokenizer of its model is here.
struct Pending {
    ready: Ready,
    /// One stream of all fetches at a time: a tokenizer takes tens of megabytes, and a model often has many engines.
    asked: Option<Fetch>,
    look_at: Instant,
    until: Instant,
    /// What was said of it meanwhile, the latest at most.
    notices: VecDeque<Notice>,
}

/// Notices that are kept for an engine that has not joined yet.
const NOTICES_MAX: usize = 64;

struct Fetch {
    request_id: u64,
    reader: TokenizerReader,
    _turn: OwnedSemaphorePermit,
}

/// How a stream came to its end.
enum End {
    /// The engine is dead, for this reason.
    Died(String),
    /// The stream broke or was closed; the engine may serve on.
    Broken(String),
    /// Another stream took the seat.
    Superseded,
    /// The lease lapsed while the stream stood.
    Lapsed,
}

impl Session {
    pub(super) fn new(
        cluster: Arc<Cluster>,
        stream: Streaming<v1::FromAgent>,
        outbox: Outbox,
        peer: String,
    ) -> Self {
        Self { cluster, stream, outbox, peer }
    }

    pub(super) async fn run(mut self) {
        let hello = match timeout(HELLO_WITHIN, self.hello()).await {
            Ok(Ok(hello)) => hello,
            Ok(Err((reason, sentence))) => return self.reject(reason, sentence).await,
            Err(_) => return self.reject(RejectReason::Malformed, "no Hello came in time".to_owned()).await,
        };
        let seat = match self.seat(&hello) {
            Ok(seat) => seat,
            Err((reason, sentence)) => return self.reject(reason, sentence).await,
        };
        let number = match seat.take(hello.incarnation, Instant::now()) {
            Ok(number) => number,
            Err(Occupied::NameTaken) => {
                let sentence = format!(
                    "another engine called {} is attached and alive; give this one another name",
                    hello.engine
                );
                return self.reject(RejectReason::NameTaken, sentence).await;
            }
        };
        let Self { cluster, stream, outbox, peer } = self;
        tracing::info!(engine = %hello.engine, incarnation = %hello.incarnation, %peer, "agent attached");
        let wire = WireLife { incarnation: hello.incarnation, dp_ranks: 0 };
        let seated = Seated {
            cluster,
            seat,
            number,
            hello,
            outbox,
            wire,
            snapshots: Vec::new(),
            pending: None,
            fetches: 0,
        };
        seated.run(stream).await;
    }

    async fn hello(&mut self) -> Result<Hello, (RejectReason, String)> {
        let malformed = |sentence: String| (RejectReason::Malformed, sentence);
        let message = self.stream.message().await.map_err(|status| malformed(status.to_string()))?;
        let Some(v1::FromAgent { body: Some(Body::Hello(hello)) }) = message else {
            return Err(malformed("the first message of a stream is Hello".to_owned()));
        };
        agree(WIRE_VERSION, hello.wire_version)
            .map_err(|error| (RejectReason::WireVersion, error.to_string()))?;
        Hello::try_from(hello).map_err(|error| malformed(error.to_string()))
    }

    /// The seat of this engine's name, a new one if there is none.
    fn seat(&self, hello: &Hello) -> Result<Arc<Seat>, (RejectReason, String)> {
        if self.cluster.over.lock().contains(&hello.incarnation) {
            let sentence = "this incarnation's lease lapsed here; come back as a new one".to_owned();
            return Err((RejectReason::Lapsed, sentence));
        }
        let mut seats = self.cluster.seats.lock();
        let name = hello.engine.as_str();
        if let Some(seat) = seats.get(name) {
            return Ok(seat.clone());
        }
        if seats.len() >= self.cluster.settings.engines_max {
            let sentence = format!("{} engines are attached, which is the limit", seats.len());
            return Err((RejectReason::TooManyEngines, sentence));
        }
        let kind = kind_name(&hello.kind);
        let member = self.cluster.orchestrator.member(hello.engine.clone(), kind, hello.role);
        let seat = Arc::new(Seat::new(member));
        seats.insert(name.to_owned(), seat.clone());
        Ok(seat)
    }

    async fn reject(self, reason: RejectReason, sentence: String) {
        tracing::warn!(peer = %self.peer, %sentence, "agent rejected");
        let reject = v1::Reject { sentence, reason: reason.into() };
        let _ = self.outbox.send(Ok(Answer::Reject(reject).into())).await; // it may be gone already
    }
}

impl Seated {
    async fn run(mut self, mut stream: Streaming<v1::FromAgent>) {
        let end = match self.welcome().await {
            Ok(()) => self.listen(&mut stream).await,
            Err(why) => End::Broken(why),
        };
        self.leave(end).await;
    }

    async fn welcome(&mut self) -> Result<(), String> {
        self.seat.asker.speak_to(Some(self.outbox.clone()));
        let settings = &self.cluster.settings;
        let welcome = Welcome {
            wire_version: agree(WIRE_VERSION, self.hello.wire_version).unwrap_or(WIRE_VERSION),
            gateway: settings.gateway.clone(),
            hash_key: settings.hash_key.clone(),
            heartbeat_interval: settings.heartbeat,
            lease: settings.lease,
        };
        let sent = self.outbox.send(Ok(Answer::Welcome(welcome.into()).into())).await;
        sent.map_err(|_| "the stream broke before Welcome".to_owned())?;
        let facts = self.hello.facts.clone();
        if let Some(facts) = facts {
            let cache_sight = self.hello.cache_sight.clone();
            self.ready(Ready { facts, cache_sight }).await?;
        }
        let progress = self.hello.progress.clone();
        self.progress(&progress);
        self.seat.heard(Instant::now());
        Ok(())
    }

    /// Takes messages until the stream, the lease or the engine ends.
    async fn listen(&mut self, stream: &mut Streaming<v1::FromAgent>) -> End {
        let (silence_max, lease) = (self.cluster.settings.silence_max, self.cluster.settings.lease);
        let mut heard = Instant::now();
        let mut is_silent = false;
        loop {
            let due = heard + if is_silent { lease } else { silence_max };
            let look_at = self.pending.as_ref().map(|pending| pending.look_at);
            let message = tokio::select! {
                message = stream.message() => message,
                () = sleep_until(look_at.unwrap_or(due)), if look_at.is_some() => {
                    match self.look_for_tokenizer().await {
                        Ok(()) => continue,
                        Err(wrong) => return End::Broken(wrong),
                    }
                }
                () = sleep_until(due) => {
                    if !self.seat.is_held_by(self.number) {
                        return End::Superseded;
                    }
                    if is_silent {
                        return End::Lapsed;
                    }
                    is_silent = true;
                    self.seat.silent("nothing was heard of its agent");
                    continue;
                }
            };
            let body = match message {
                Ok(Some(v1::FromAgent { body })) => body,
                Ok(None) => return End::Broken("its agent closed the stream".to_owned()),
                Err(status) => {
                    return End::Broken(format!("the stream of its agent broke: {}", status.message()));
                }
            };
            if !self.seat.is_held_by(self.number) {
                return End::Superseded;
            }
            (heard, is_silent) = (Instant::now(), false);
            self.seat.heard(heard);
            let Some(body) = body else { continue };
            let taken = self.take(body).await;
            // What it took to take is not the agent's silence.
            heard = Instant::now();
            match taken {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(error) => {
                    let sentence = error.to_string();
                    tracing::warn!(engine = %self.hello.engine, %sentence, "agent sent what cannot be");
                    let reject = v1::Reject { sentence, reason: RejectReason::Malformed.into() };
                    let _ = self.outbox.try_send(Ok(Answer::Reject(reject).into())); // it is being left anyway
                    return End::Broken("its agent sent a malformed message".to_owned());
                }
            }
        }
    }

    /// Takes one message; the end, if it is the last.
    async fn take(&mut self, body: Body) -> Result<Option<End>, WireError> {
        match body {
            Body::Hello(_) => {
                return Err(WireError::Sequence { what: "a stream", wrong: "Hello came twice".to_owned() });
            }
            Body::Progress(progress) => self.progress(&progress.try_into()?),
            Body::Ready(ready) => {
                let ready = Ready::try_from(ready)?;
                if let Err(wrong) = self.ready(ready).await {
                    return Ok(Some(End::Broken(wrong)));
                }
            }
            Body::Heartbeat(v1::Heartbeat { counter }) => self.say(Answer::Ack(v1::Ack { counter })),
            Body::Load(load) => {
                let proto::LoadReport { rank, load, age } = self.wire.load(load)?;
                // By its age: hosts' clocks need not agree. What the way took is taken for nothing.
                let now = Instant::now();
                let as_of = now.checked_sub(age).unwrap_or(now);
                self.report(|reports| reports.put_load(LoadReport { dp_rank: rank.dp_rank, load, as_of }));
            }
            Body::Steps(steps) => {
                let StepsReport { rank, steps } = self.wire.steps(steps)?;
                self.report(|reports| reports.put_steps(rank.dp_rank, steps));
            }
            Body::KvSnapshot(piece) => self.snapshot(piece)?,
            Body::KvDeltas(v1::KvDeltas { deltas }) => {
                let batches: Result<Vec<_>, _> =
                    deltas.into_iter().map(|delta| self.wire.kv_batch(delta)).collect();
                let batches = batches?;
                self.report(|reports| reports.put_kv(batches));
            }
            Body::Drain(_) => self.notice(Notice::Draining),
            Body::Died(died) => {
                let died = proto::Died::from(died);
                if !died.log_tail.is_empty() {
                    tracing::warn!(engine = %self.hello.engine, log = %died.log_tail.join("\n"), "last log lines");
                }
                return Ok(Some(End::Died(died.last_words)));
            }
            Body::Logs(logs) => {
                self.seat.asker.logs_came(logs);
            }
            Body::Tokenizer(piece) => {
                if let Err(wrong) = self.tokenizer(piece).await? {
                    return Ok(Some(End::Broken(wrong)));
                }
            }
            Body::Notice(notice) => {
                let notice = match proto::Notice::try_from(notice)? {
                    proto::Notice::Silent { why } => Notice::Silent { why: why.into() },
                    proto::Notice::Heard => Notice::Heard,
                    proto::Notice::Fenced { why } => Notice::Fenced { why: why.into() },
                    proto::Notice::CacheSight(sight) => Notice::CacheSight(connect::sight(sight)),
                    proto::Notice::Note(text) => Notice::Note(text.into()),
                };
                self.notice(notice);
            }
        }
        Ok(None)
    }

    fn say(&self, answer: Answer) {
        // An agent that does not read its acks will be found silent by itself.
        let _: Result<(), _> = self.outbox.try_send(Ok::<_, Status>(answer.into()));
    }

    fn serving(&self) -> Option<Serving> {
        self.seat.life.lock().as_ref().and_then(|life| life.serving.clone())
    }

    fn report(&self, put: impl FnOnce(&Reports)) {
        if let Some(serving) = self.serving() {
            put(&serving.reports);
        }
    }

    fn progress(&mut self, progress: &proto::Progress) {
        match progress.state {
            EngineState::Ready => {}
            EngineState::Draining => self.notice(Notice::Draining),
            state => {
                let dash = if progress.sentence.is_empty() { "" } else { ": " };
                self.seat.member.starting(&format!("{state}{dash}{}", progress.sentence));
            }
        }
    }

    /// The engine serves: a driver joins, unless this very life serves already.
    async fn ready(&mut self, ready: Ready) -> Result<(), String> {
        self.wire.dp_ranks = ready.facts.dp_ranks;
        self.snapshots.clear();
        self.snapshots.resize_with(ready.facts.dp_ranks.into(), SnapshotReader::default);
        if let Some(serving) = self.serving() {
            if serving.dp_ranks != ready.facts.dp_ranks {
                return Err("its ranks changed within one life".to_owned());
            }
            return Ok(());
        }
        let known = self.cluster.outbound.tokenizers.of(&ready.facts.model).is_some();
        if known || !ready.facts.accepts.tokens {
            return self.join(ready).await;
        }
        let now = Instant::now();
        self.seat.member.starting("the tokenizer of its model is fetched");
        self.pending = Some(Pending {
            ready,
            asked: None,
            look_at: now,
            until: now + TOKENIZER_WITHIN,
            notices: VecDeque::new(),
        });
        Ok(())
    }

    /// Asks for the tokenizer when it is this stream's turn; joins if another stream has brought it, or the time is over.
    async fn look_for_tokenizer(&mut self) -> Result<(), String> {
        let Some(mut pending) = self.pending.take() else { return Ok(()) };
        let now = Instant::now();
        if self.cluster.outbound.tokenizers.of(&pending.ready.facts.model).is_some() {
            return self.join_late(pending).await;
        }
        if now >= pending.until {
            return self.join_without(pending, "it did not come in time").await;
        }
        if pending.asked.is_none()
            && let Ok(turn) = self.cluster.fetches.clone().try_acquire_owned()
        {
            self.fetches += 1;
            let request_id = self.fetches;
            pending.asked = Some(Fetch { request_id, reader: TokenizerReader::default(), _turn: turn });
            self.say(Answer::RequestTokenizer(v1::RequestTokenizer { request_id }));
        }
        pending.look_at = (now + LOOK_EVERY).min(pending.until);
        self.pending = Some(pending);
        Ok(())
    }

    /// Takes a piece of the tokenizer; the engine joins with the last one.
    async fn tokenizer(&mut self, piece: v1::Tokenizer) -> Result<Result<(), String>, WireError> {
        let fetch = self.pending.as_mut().and_then(|pending| pending.asked.as_mut());
        let Some(fetch) = fetch.filter(|fetch| fetch.request_id == piece.request_id) else {
            return Ok(Ok(())); // too late
        };
        let Some(files) = fetch.reader.take(piece)? else { return Ok(Ok(())) };
        let Some(pending) = self.pending.take() else { return Ok(Ok(())) };
        let learned = match files {
            Err(why) => Err(why),
            Ok(files) => {
                let (tokenizers, model) =
                    (self.cluster.outbound.tokenizers.clone(), pending.ready.facts.model.clone());
                let learning = spawn_blocking(move || tokenizers.learn(&model, &files));
                learning.await.unwrap_or_else(|_| Err("it could not be loaded".to_owned()))
            }
        };
        Ok(match learned {
            Ok(()) => self.join_late(pending).await,
            Err(why) => self.join_without(pending, &why).await,
        })
    }

    async fn join_without(&mut self, mut pending: Pending, why: &str) -> Result<(), String> {
        let note = format!("the tokenizer of its model could not be had from its host: {why}");
        pending.ready.facts.notes.push(note);
        self.join_late(pending).await
    }

    /// Joins, and makes up for what the agent said in the meantime. Its loads come again by themselves.
    async fn join_late(&mut self, pending: Pending) -> Result<(), String> {
        let Pending { ready, notices, .. } = pending;
        let dp_ranks = ready.facts.dp_ranks;
        self.join(ready).await?;
        for notice in notices {
            self.notice(notice);
        }
        for dp_rank in 0..dp_ranks {
            self.seat.asker.request_snapshot(dp_rank);
        }
        Ok(())
    }

    fn notice(&mut self, notice: Notice) {
        let Some(pending) = &mut self.pending else {
            return self.report(|reports| reports.put_notice(notice));
        };
        if pending.notices.len() == NOTICES_MAX {
            pending.notices.pop_front();
        }
        pending.notices.push_back(notice);
    }

    async fn join(&mut self, ready: Ready) -> Result<(), String> {
        let reports = Arc::new(Reports::default());
        let dp_ranks = ready.facts.dp_ranks;
        let outbound = &self.cluster.outbound;
        let driver =
            connect::driver(&self.hello, ready, outbound, reports.clone(), self.seat.asker.clone()).await?;
        if let Some(life) = &mut *self.seat.life.lock() {
            life.serving = Some(Serving { reports, dp_ranks });
        }
        self.seat.member.join(driver);
        Ok(())
    }

    fn snapshot(&mut self, piece: v1::KvSnapshot) -> Result<(), WireError> {
        let rank = self.wire.rank(piece.dp_rank)?;
        let whole = self.snapshots[usize::from(rank.dp_rank)].take(&self.wire, piece)?;
        if let Some(proto::Snapshot { rank, sequence_next, contents }) = whole {
            self.report(|reports| reports.put_snapshot(KvSnapshot { rank, sequence_next, contents }));
        }
        Ok(())
    }

    /// The stream is over. A broken one may come back within the lease.
    async fn leave(self, end: End) {
        let Self { cluster, mut seat, number, hello, .. } = self;
        let incarnation = hello.incarnation;
        if !seat.is_held_by(number) {
            return;
        }
        match end {
            End::Superseded => return,
            End::Died(why) => {
                cluster.is_over(incarnation);
                seat.end(incarnation, &Over::Died(why));
            }
            End::Lapsed => {
                cluster.is_over(incarnation);
                seat.end(incarnation, &Over::Lapsed("its lease lapsed".to_owned()));
            }
            End::Broken(why) => {
                tracing::warn!(engine = %hello.engine, %why, "agent left; its engine has until the lease lapses");
                seat.silent(&why);
                seat.detached();
                seat.asker.speak_to(None);
                let heard = seat.life.lock().as_ref().map(|life| life.heard);
                // The cluster keeps the seat as long as it is needed, not this wait.
                let waiting = Arc::downgrade(&seat);
                drop(seat);
                if let Some(heard) = heard {
                    sleep_until(heard + cluster.settings.lease).await;
                }
                let Some(back) = waiting.upgrade().filter(|seat| seat.is_held_by(number)) else { return };
                seat = back;
                cluster.is_over(incarnation);
                seat.end(incarnation, &Over::Lapsed(format!("{why}; its lease lapsed")));
            }
        }
        let mut seats = cluster.seats.lock();
        if seat.is_held_by(number) && seat.is_free() {
            seats.remove(hello.engine.as_str());
        }
    }
}

/// The closed set of names that status and metrics show.
fn kind_name(kind: &str) -> &'static str {
    ["vllm", "sglang", "trtllm", "openai"].into_iter().find(|known| *known == kind).unwrap_or("other")
}
