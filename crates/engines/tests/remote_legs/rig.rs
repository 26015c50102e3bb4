//! An engine that a test plays, and a driver attached to it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_wire::object::Object;
use forebay_engines::{
    Accepts, CacheSight, ClientBody, ClientRoute, Driver, EngineFacts, KvAbilities, Leg, LegEvent, LegStream,
    Notice, Prompt, Reports, StartError, Work,
    remote::{
        Abort, Dialect, HandOver, HeldKv, RankPin, RemoteEngine, RemoteLimits, RemoteParts, Speech,
        TokenRoute,
        client::{ClientSettings, Endpoint, HttpClient, Secret},
    },
};
use forebay_perf_model::StepCoefficients;
use forebay_types::{BlockHash, Incarnation, LegId, Role, Sampling, TokenId};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{Notify, mpsc, oneshot},
    time::timeout,
};

/// Nothing here takes nearly so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it came in time")
}

/// A server that a test plays, request by request.
pub(crate) struct Double {
    pub(crate) url: String,
    asked: mpsc::Receiver<(Asked, Line)>,
}

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Bytes,
    /// Which connection it came on, from 0.
    pub(crate) connection: u64,
}

impl Asked {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }
}

impl Double {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (send, asked) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut connection = 0;
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, connection, send.clone()));
                connection += 1;
            }
        });
        Self { url, asked }
    }

    /// The next request and the line to its sender.
    pub(crate) async fn asked(&mut self) -> (Asked, Line) {
        soon(self.asked.recv()).await.expect("the server runs")
    }

    /// Whether no request has come that was not taken.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.asked.try_recv().is_err()
    }
}

async fn serve(mut stream: TcpStream, connection: u64, asked: mpsc::Sender<(Asked, Line)>) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer, connection).await {
        let (back, again) = oneshot::channel();
        if asked.send((request, Line { stream: Some(stream), back: Some(back) })).await.is_err() {
            return;
        }
        match again.await {
            Ok(returned) => stream = returned,
            Err(_) => return,
        }
    }
}

async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>, connection: u64) -> Option<Asked> {
    let head = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(buffer[..head].to_vec()).expect("a head is text");
    let mut lines = text.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").map_or(0, |length| length.parse().expect("a length"));
    while buffer.len() < head + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = Bytes::copy_from_slice(&buffer[head + 4..head + 4 + length]);
    buffer.drain(..head + 4 + length);
    Some(Asked { path, headers, body, connection })
}

/// The line to whoever sent a request. Dropped, it closes the connection.
pub(crate) struct Line {
    stream: Option<TcpStream>,
    back: Option<oneshot::Sender<TcpStream>>,
}

impl Line {
    fn stream(&mut self) -> &mut TcpStream {
        self.stream.as_mut().expect("the line is open")
    }

    /// Bytes as they are.
    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        soon(self.stream().write_all(bytes)).await.expect("the client listens");
    }

    /// As [`raw`](Self::raw), of a client that may have left.
    pub(crate) async fn try_raw(&mut self, bytes: &[u8]) -> bool {
        self.stream().write_all(bytes).await.is_ok()
    }

    /// The head of an answer of events.
    pub(crate) async fn events(&mut self) {
        self.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
            .await;
    }

    /// A piece of a chunked body.
    pub(crate) async fn piece(&mut self, bytes: &[u8]) {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.raw(&chunk).await;
    }

    /// An event.
    pub(crate) async fn event(&mut self, data: &str) {
        self.piece(format!("data: {data}\n\n").as_bytes()).await;
    }

    /// Events in pieces of their own, and the end of the answer: all in one write.
    pub(crate) async fn events_at_once(mut self, data: impl Iterator<Item = String>) {
        let mut bytes = Vec::new();
        for data in data.chain(["[DONE]".to_owned()]) {
            let event = format!("data: {data}\n\n");
            bytes.extend_from_slice(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes());
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        self.raw(&bytes).await;
        self.hand_back();
    }

    /// The end of an answer of events; the connection goes on.
    pub(crate) async fn done(mut self) {
        self.event("[DONE]").await;
        self.raw(b"0\r\n\r\n").await;
        self.hand_back();
    }

    /// A whole answer; the connection goes on.
    pub(crate) async fn document(mut self, status: u16, content_type: &str, body: &str) {
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.raw(head.as_bytes()).await;
        self.hand_back();
    }

    /// A whole JSON answer.
    pub(crate) async fn json(self, status: u16, body: &str) {
        self.document(status, "application/json", body).await;
    }

    fn hand_back(mut self) {
        if let (Some(back), Some(stream)) = (self.back.take(), self.stream.take()) {
            let _ = back.send(stream);
        }
    }

    /// Ends when the client has closed the connection.
    pub(crate) async fn closed(mut self) {
        let mut rest = [0; 64];
        soon(async { while self.stream().read(&mut rest).await.is_ok_and(|read| read > 0) {} }).await;
    }
}

/// An address where nobody listens.
pub(crate) async fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}

/// What a test changes about an engine.
pub(crate) struct Plan {
    pub(crate) incarnation: u64,
    pub(crate) role: Role,
    pub(crate) dp_ranks: u16,
    pub(crate) speech: Speech,
    pub(crate) limits: RemoteLimits,
    pub(crate) waiting_max: u32,
    pub(crate) held: Arc<HeldKv>,
}

pub(crate) fn vllm() -> Plan {
    Plan {
        incarnation: 1,
        role: Role::Both,
        dp_ranks: 1,
        speech: Speech {
            dialect: Dialect::Vllm,
            model: "served".into(),
            tokens: Some(TokenRoute::Completions),
            hand_over: HandOver::TransferParams,
            ranks: RankPin::None,
            salts_cache: true,
            abort: Abort::Close,
        },
        limits: RemoteLimits { vocabulary: Some(50_000), ..RemoteLimits::default() },
        waiting_max: 8,
        held: HeldKv::new(),
    }
}

pub(crate) fn sglang() -> Plan {
    let plan = vllm();
    let speech = Speech {
        dialect: Dialect::Sglang,
        tokens: Some(TokenRoute::SglangGenerate),
        hand_over: HandOver::None,
        abort: Abort::SglangAbortRequest,
        ..plan.speech
    };
    Plan { speech, ..plan }
}

/// A driver, and what is shared with whoever watches its engine.
pub(crate) struct Attached {
    pub(crate) engine: Arc<RemoteEngine>,
    pub(crate) reports: Arc<Reports>,
    pub(crate) trouble: Arc<Notify>,
}

pub(crate) const BLOCK: u32 = 16;

impl Plan {
    pub(crate) fn attach(self, url: &str) -> Attached {
        let Plan { incarnation, role, dp_ranks, speech, limits, waiting_max, held } = self;
        let facts = EngineFacts {
            engine: "double".into(),
            kind: speech.dialect.name(),
            incarnation: Incarnation(incarnation),
            model: "model".into(),
            role,
            dp_ranks,
            block_size_tokens: BLOCK,
            block_bytes: 1000,
            blocks_total: 100,
            step_tokens_max: 512,
            context_tokens_max: 4096,
            waiting_max,
            kv: KvAbilities { layout: 7, can_export: true, can_import: true, needs_warming: true },
            accepts: Accepts { tokens: true, body: true },
            continues_sampling: false,
            cache_sight: CacheSight::Events,
            notes: Vec::new(),
            prior: StepCoefficients::from_array([0.0; 5]),
        };
        let client = HttpClient::new(&ClientSettings::default()).expect("a client");
        let endpoint = Endpoint::new(url, client, Some(&Secret::new("the-key"))).expect("an address");
        let reports = Arc::new(Reports::default());
        let trouble = Arc::new(Notify::new());
        let numbers = AtomicU64::new(1);
        let engine = RemoteEngine::new(RemoteParts {
            facts,
            speech,
            endpoint,
            reports: reports.clone(),
            limits,
            runtime: Handle::current(),
            snapshots: Arc::new(|_| {}),
            on_trouble: trouble.clone(),
            rooms: Arc::new(move || numbers.fetch_add(1, Ordering::Relaxed)),
            held,
        });
        Attached { engine, reports, trouble }
    }
}

impl Attached {
    pub(crate) fn start(&self, leg: Leg) -> LegStream {
        self.engine.start(leg).expect("the leg is taken")
    }

    /// Whether a leg has found the engine in trouble since it was last asked.
    pub(crate) async fn was_in_trouble(&self) -> bool {
        let mut noticed = std::pin::pin!(self.trouble.notified());
        matches!(noticed.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(()))
    }

    /// Notices since it was last asked.
    pub(crate) fn notices(&self) -> Vec<Notice> {
        match self.reports.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(report) => report.notices,
            Poll::Pending => Vec::new(),
        }
    }

    /// Ends when no leg is left on the engine's table.
    pub(crate) async fn idle(&self) {
        soon(async {
            while self.engine.legs_running() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// A leg of both phases for one choice.
pub(crate) fn leg(id: u64, prompt: &[TokenId], output_tokens_max: u32) -> Leg {
    let sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 5,
        output_tokens_max,
        stop_tokens: Arc::new([2]),
        logprobs: None,
    };
    Leg {
        id: LegId(id),
        request: "req".into(),
        dp_rank: 0,
        prompt: Prompt {
            tokens: prompt.into(),
            hashes: Arc::new([]),
            root: BlockHash(1),
            salt: "tenant".into(),
        },
        choices: vec![0],
        sampling: Arc::new(sampling),
        work: Work::Aggregated,
        body: None,
        deadline: Instant::now() + PATIENCE,
    }
}

/// A leg in the client's own words.
pub(crate) fn client_leg(id: u64, json: &str, streams: bool) -> Leg {
    let json = Object::parse(Bytes::copy_from_slice(json.as_bytes())).expect("an object");
    let body = ClientBody { route: ClientRoute::Chat, json, streams };
    Leg { body: Some(Arc::new(body)), ..leg(id, &[], 10) }
}

/// All events of a leg, to its last.
pub(crate) async fn read(stream: &mut LegStream) -> Vec<LegEvent> {
    let mut events = Vec::new();
    soon(async { while stream.next_batch(&mut events).await {} }).await;
    events
}

/// Events of a leg until there is one of a kind.
pub(crate) async fn read_until(stream: &mut LegStream, is_it: impl Fn(&LegEvent) -> bool) -> Vec<LegEvent> {
    let mut events = Vec::new();
    soon(async {
        while !events.iter().any(&is_it) {
            assert!(stream.next_batch(&mut events).await, "the leg ended: {}", told(&events));
        }
    })
    .await;
    events
}

/// Events, short enough to be read in a test.
pub(crate) fn told(events: &[LegEvent]) -> String {
    let mut words = Vec::new();
    for event in events {
        words.push(match event {
            LegEvent::Started { cached_tokens } => format!("started({cached_tokens})"),
            LegEvent::Token(token) => format!("{}@{}={}", token.choice, token.position, token.token),
            LegEvent::Finished { choice, reason } => format!("{choice}:{reason:?}"),
            LegEvent::Prefilled(_) => "prefilled".to_owned(),
            LegEvent::KvArrived(report) => {
                format!("arrived({} blocks, {} bytes)", report.blocks, report.bytes)
            }
            LegEvent::KvFailed { outcome } => format!("kv failed: {outcome}"),
            LegEvent::Reply(forebay_engines::Reply::Head { status, content_type }) => {
                format!("head({status}, {content_type})")
            }
            LegEvent::Reply(forebay_engines::Reply::Data(data)) => {
                format!("data({:?})", String::from_utf8_lossy(data))
            }
            LegEvent::Usage(usage) => {
                format!("usage({},{},{})", usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)
            }
            LegEvent::Ended => "ended".to_owned(),
            LegEvent::Refused(StartError::Failed { .. }) => "failed".to_owned(),
            LegEvent::Refused(StartError::QueueFull { .. }) => "full".to_owned(),
            LegEvent::Refused(StartError::Rejected { status, message }) => {
                format!("rejected({status}, {message})")
            }
            LegEvent::Refused(error) => format!("refused: {error}"),
            LegEvent::Lost { .. } => "lost".to_owned(),
        });
    }
    words.join(" ")
}

/// A chunk of `/v1/completions`.
pub(crate) fn chunk(index: u32, tokens: &[TokenId], finish: Option<&str>) -> String {
    serde_json::json!({"id": "cmpl-x", "object": "text_completion", "choices": [
        {"index": index, "text": "t", "token_ids": tokens, "finish_reason": finish, "stop_reason": null}]})
    .to_string()
}

/// The count at the end of a stream.
pub(crate) fn usage(prompt: u32, cached: u32, output: u32) -> String {
    serde_json::json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output,
        "total_tokens": prompt + output, "prompt_tokens_details": {"cached_tokens": cached}}})
    .to_string()
}
