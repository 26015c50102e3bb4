//! What the tests share: a server on free ports, a client of each kind, an engine that publishes what a test says.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use forebay_engine_events::{
    EngineEvent, EngineHash, EventBatch, Removed, Stored,
    encode::{Dialect, encode},
    frames::{ReplyShape, publication, replay_end, replay_requested, replayed},
};
use forebay_index_server::{
    IndexServer, ListenLimits, serve_grpc, serve_http,
    service::{Limits, ServiceSettings},
};
use forebay_proto::index_v1::index_client::IndexClient;
use forebay_types::{Tier, TokenId};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, StatusCode};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::transport::Channel;
use zeromq::{PubSocket, RouterSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

/// Nothing here takes nearly so long, even on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const BLOCK: u32 = 4;
/// An engine that is out of reach for so long is forgotten.
pub const LEASE: Duration = Duration::from_millis(300);

/// Waits for what must come.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it came in time")
}

pub struct Server {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub text: String,
    pub json: Value,
}

impl Server {
    pub async fn start() -> Self {
        Self::with(Limits { lease: LEASE, ..Limits::default() }, ListenLimits::default()).await
    }

    pub async fn with(limits: Limits, listen: ListenLimits) -> Self {
        let settings = ServiceSettings { block_size_tokens: BLOCK, limits, ..ServiceSettings::default() };
        let server = IndexServer::new(settings);
        let (stop, stopped) = watch::channel(false);
        let listeners = [
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ];
        let [http, grpc] = [0, 1].map(|at: usize| listeners[at].local_addr().unwrap());
        let [http_listener, grpc_listener] = listeners;
        let wait = |mut stopped: watch::Receiver<bool>| async move {
            let _stopped = stopped.wait_for(|stopped| *stopped).await;
        };
        let (for_http, for_grpc) = (server.clone(), server);
        let (http_stop, grpc_stop) = (wait(stopped.clone()), wait(stopped));
        let (http_limits, grpc_limits) = (listen.clone(), listen);
        let tasks = vec![
            tokio::spawn(async move {
                assert_eq!(serve_http(http_listener, for_http, http_limits, http_stop).await.cut, 0);
            }),
            tokio::spawn(async move {
                assert_eq!(serve_grpc(grpc_listener, for_grpc, grpc_limits, grpc_stop).await.cut, 0);
            }),
        ];
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { http, grpc, stop, tasks, client }
    }

    /// Ends it as a signal does.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            soon(task).await.unwrap();
        }
    }

    pub async fn ask(&self, method: &str, path: &str, body: impl ToString) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.http))
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let response = soon(self.client.request(request)).await.unwrap();
        let status = response.status();
        let body = soon(response.into_body().collect()).await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        Answer { status, json: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "").await
    }

    pub async fn grpc(&self) -> IndexClient<Channel> {
        IndexClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    pub async fn register(&self, name: &str, engine: &Publisher) {
        let body = serde_json::json!({
            "name": name, "model": "m", "events": engine.events, "replay": engine.replay,
            "block_size_tokens": BLOCK,
        });
        let answer = self.ask("POST", "/v1/engines", body).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
    }

    /// Leading blocks of a prompt that each rank holds, best first.
    pub async fn held(&self, blocks: &[u32]) -> Vec<(String, u64, u64)> {
        let body = serde_json::json!({ "model": "m", "tokens": prompt(blocks), "with_hashes": true });
        let by_tokens = self.ask("POST", "/v1/query", body).await;
        assert_eq!(by_tokens.status, 200, "{}", by_tokens.text);
        let rank = |rank: &Value| {
            let number = |field: &str| rank[field].as_u64().unwrap();
            assert_eq!(number("tokens"), number("blocks") * u64::from(BLOCK));
            (rank["engine"].as_str().unwrap().to_owned(), number("dp_rank"), number("blocks"))
        };
        by_tokens.json["ranks"].as_array().unwrap().iter().map(rank).collect()
    }

    /// One engine as the list has it.
    pub async fn engine(&self, name: &str) -> Value {
        let list = self.get("/v1/engines").await;
        let engines = list.json["data"].as_array().unwrap().clone();
        engines.into_iter().find(|engine| engine["name"] == name).unwrap_or(Value::Null)
    }

    /// Asks again and again until `state` holds.
    pub async fn until<T: std::fmt::Debug>(
        &self,
        what: &str,
        mut look: impl AsyncFnMut(&Self) -> T,
        state: impl Fn(&T) -> bool,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = look(self).await;
            if state(&seen) {
                return seen;
            }
            assert!(Instant::now() < deadline, "{what}: not in time; last seen {seen:?}");
            tokio::task::yield_now().await;
        }
    }

    pub async fn until_held(&self, blocks: &[u32], expected: &[(&str, u64, u64)]) {
        let expected: Vec<_> =
            expected.iter().map(|(name, rank, count)| ((*name).to_owned(), *rank, *count)).collect();
        self.until(&format!("{expected:?}"), async |it| it.held(blocks).await, |held| *held == expected)
            .await;
    }

    pub async fn until_state(&self, name: &str, expected: &str) -> Value {
        self.until(expected, async |it| it.engine(name).await, |engine| engine["state"] == expected).await
    }
}

/// The tokens of these blocks.
pub fn prompt(blocks: &[u32]) -> Vec<TokenId> {
    blocks.iter().flat_map(|block| (0..BLOCK).map(move |token| block * 100 + token)).collect()
}

/// An engine's block after another one; blocks are called by their numbers.
pub fn stored(block: u32, parent: Option<u32>) -> EngineEvent {
    EngineEvent::Stored(Stored::plain(
        parent.map(|parent| EngineHash(parent.into())),
        vec![EngineHash(block.into())],
        prompt(&[block]),
        BLOCK,
    ))
}

pub fn removed(block: u32) -> EngineEvent {
    EngineEvent::Removed(Removed { hashes: vec![EngineHash(block.into())], tier: Tier::Device, group: None })
}

/// One rank of an engine: a PUB socket, and a ROUTER socket that replays. It sends what a test says, under the numbers that
/// a test says: `forebay-testkit`'s doubles have schedulers, which decide themselves.
pub struct Publisher {
    pub events: String,
    pub replay: Option<String>,
    say: mpsc::Sender<Say>,
    tasks: Vec<JoinHandle<()>>,
}

enum Say {
    Publish { number: u64, payload: Vec<u8>, lost: bool, done: oneshot::Sender<()> },
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Old batches by number.
type Ring = std::sync::Arc<parking_lot::Mutex<Vec<(u64, Vec<u8>)>>>;

impl Publisher {
    pub async fn start(replays: bool) -> Self {
        Self::listen(
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            match replays {
                true => Some(TcpListener::bind("127.0.0.1:0").await.unwrap()),
                false => None,
            },
        )
        .await
    }

    async fn listen(events: TcpListener, replay: Option<TcpListener>) -> Self {
        let tcp = |listener: &TcpListener| format!("tcp://{}", listener.local_addr().unwrap());
        let (events_at, replay_at) = (tcp(&events), replay.as_ref().map(tcp));
        let (say, said) = mpsc::channel(64);
        let ring = Ring::default();
        let mut socket = PubSocket::new();
        socket.bind_listener(events.into_std().unwrap()).await.unwrap();
        let mut tasks = vec![tokio::spawn(publish(socket, said, ring.clone()))];
        if let Some(listener) = replay {
            let mut socket = RouterSocket::new();
            socket.bind_listener(listener.into_std().unwrap()).await.unwrap();
            tasks.push(tokio::spawn(replays(socket, ring)));
        }
        Self { events: events_at, replay: replay_at, say, tasks }
    }

    /// Dies, and begins anew at the same addresses: nothing kept, numbers from 0.
    pub async fn restart(mut self) -> Self {
        for task in std::mem::take(&mut self.tasks) {
            task.abort();
            let _ended = task.await;
        }
        let (events, replay) = (self.events.clone(), self.replay.clone());
        drop(self);
        let events = again(&events).await;
        let replay = match &replay {
            Some(replay) => Some(again(replay).await),
            None => None,
        };
        Self::listen(events, replay).await
    }

    /// Publishes a batch.
    pub async fn publish(&self, number: u64, events: Vec<EngineEvent>) {
        self.send(number, events, false).await;
    }

    /// A batch that no subscriber gets; a replay has it.
    pub async fn lose(&self, number: u64, events: Vec<EngineEvent>) {
        self.send(number, events, true).await;
    }

    async fn send(&self, number: u64, events: Vec<EngineEvent>, lost: bool) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let batch = EventBatch { time_seconds: now.as_secs_f64(), events, dp_rank: Some(0) };
        let payload = encode(&batch, Dialect::VllmMap);
        let (done, sent) = oneshot::channel();
        self.say.send(Say::Publish { number, payload, lost, done }).await.unwrap();
        sent.await.unwrap();
    }
}

/// A listener at an address that was in use a moment ago.
async fn again(at: &str) -> TcpListener {
    let address: SocketAddr = at.strip_prefix("tcp://").unwrap().parse().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        tokio::task::yield_now().await;
    }
}

async fn publish(mut socket: PubSocket, mut said: mpsc::Receiver<Say>, ring: Ring) {
    while let Some(Say::Publish { number, payload, lost, done }) = said.recv().await {
        ring.lock().push((number, payload.clone()));
        if !lost {
            let frames = publication("kv", number, payload).map(Bytes::from).to_vec();
            let _nobody_may_listen = socket.send(ZmqMessage::try_from(frames).unwrap()).await;
        }
        let _asker_may_be_gone = done.send(());
    }
}

async fn replays(mut socket: RouterSocket, ring: Ring) {
    while let Ok(request) = socket.recv().await {
        let frames = request.into_vec();
        let (client, request) = frames.split_first().unwrap();
        let from = replay_requested(request).unwrap();
        let kept: Vec<_> = ring.lock().iter().filter(|(number, _)| *number >= from).cloned().collect();
        let batches = kept
            .into_iter()
            .map(|(number, payload)| replayed(ReplyShape::WithTopic, "kv", number, payload))
            .chain([replay_end(ReplyShape::WithTopic)]);
        for batch in batches {
            let frames = std::iter::once(client.clone()).chain(batch.into_iter().map(Bytes::from));
            let message = ZmqMessage::try_from(frames.collect::<Vec<_>>()).unwrap();
            if socket.send(message).await.is_err() {
                break;
            }
        }
    }
}
