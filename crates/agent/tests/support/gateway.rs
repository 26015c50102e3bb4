//! A gateway without a mind of its own: a test plays it, stream by stream, message by message.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use forebay_proto::{
    HashKey, Hello, Life, Progress, SnapshotReader, Welcome, fleet_server,
    tls::TlsFiles,
    v1::{self, fleet_server::Fleet, from_agent::Body as Said, from_gateway::Body as Heard},
};
use forebay_registry::GatewayRecord;
use forebay_types::{BlockHash, KvEvent, RankLoad, device_blocks};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What the fleet's blocks are named by.
pub(crate) const KEY: HashKey = HashKey { key: [7; 16], block_size_tokens: 16 };
/// The shortest that agents accept.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(50);
/// Long enough for a busy machine.
pub(crate) const LEASE: Duration = Duration::from_secs(5);
/// For anything that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// The most ranks that an engine of these tests has.
pub(crate) const RANKS: u16 = 2;

/// A stream that an agent has opened, to be played by a test.
pub(crate) struct Attached {
    pub(crate) hello: Hello,
    pub(crate) inbound: Streaming<v1::FromAgent>,
    pub(crate) outbound: mpsc::Sender<Result<v1::FromGateway, Status>>,
}

pub(crate) struct Service {
    streams: mpsc::Sender<Attached>,
}

#[tonic::async_trait]
impl Fleet for Service {
    type AttachStream = ReceiverStream<Result<v1::FromGateway, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::FromAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut inbound = request.into_inner();
        let Some(v1::FromAgent { body: Some(Said::Hello(hello)) }) = inbound.message().await? else {
            return Err(Status::invalid_argument("the first message is Hello"));
        };
        let hello = Hello::try_from(hello).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let (outbound, answer) = mpsc::channel(64);
        let attached = Attached { hello, inbound, outbound };
        self.streams.send(attached).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(answer)))
    }
}

/// A gateway without a mind of its own.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    streams: mpsc::Receiver<Attached>,
    _server: tokio::task::JoinHandle<()>,
}

impl Gateway {
    pub(crate) async fn start(tls: Option<&TlsFiles>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (sender, streams) = mpsc::channel(8);
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls.server().expect("an identity")).expect("a configuration");
        }
        let serving = server
            .add_service(fleet_server(Service { streams: sender }))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { drop(serving.await) });
        Self { address, streams, _server: server }
    }

    pub(crate) fn record(&self) -> GatewayRecord {
        GatewayRecord::new(self.address.to_string().replace(':', "-"), self.address.into())
            .expect("an address")
    }

    pub(crate) async fn attached(&mut self) -> Attached {
        timeout(SOON, self.streams.recv()).await.expect("an agent comes soon").expect("the server runs")
    }

    /// The next stream, welcomed.
    pub(crate) async fn welcomed(&mut self, name: &str, lease: Duration) -> Peer {
        let attached = self.attached().await;
        attached.say(Heard::Welcome(welcome(name, lease).into())).await;
        Peer::new(attached)
    }
}

impl Attached {
    pub(crate) async fn say(&self, body: Heard) {
        self.outbound.send(Ok(body.into())).await.expect("the agent listens");
    }
}

/// A gateway's side of a welcomed stream, with what it has learned.
pub(crate) struct Peer {
    pub(crate) stream: Attached,
    pub(crate) life: Life,
    pub(crate) readers: [SnapshotReader; RANKS as usize],
    pub(crate) ranks: [Option<(u64, BTreeSet<BlockHash>)>; RANKS as usize],
    pub(crate) snapshots: usize,
    pub(crate) messages: usize,
    /// Answer heartbeats.
    pub(crate) acks: bool,
    pub(crate) progress: Option<Progress>,
    pub(crate) loads: BTreeMap<u16, RankLoad>,
    pub(crate) notes: Vec<String>,
    pub(crate) other: Vec<Said>,
}

impl Peer {
    pub(crate) fn new(stream: Attached) -> Self {
        let dp_ranks = stream.hello.facts.as_ref().map_or(0, |facts| facts.dp_ranks);
        let life = Life { incarnation: stream.hello.incarnation, dp_ranks };
        let progress = Some(stream.hello.progress.clone());
        Self {
            stream,
            life,
            readers: Default::default(),
            ranks: Default::default(),
            snapshots: 0,
            messages: 0,
            acks: true,
            progress,
            loads: BTreeMap::new(),
            notes: Vec::new(),
            other: Vec::new(),
        }
    }

    /// Reads one message; false at the end of the stream.
    pub(crate) async fn read(&mut self) -> bool {
        let message = timeout(SOON, self.stream.inbound.message()).await.expect("something is said soon");
        let Ok(Some(message)) = message else {
            return false;
        };
        self.messages += 1;
        match message.body.expect("a body") {
            Said::Heartbeat(v1::Heartbeat { counter }) => {
                if self.acks {
                    // A full queue is as good as a slow network.
                    let _ = self.stream.outbound.try_send(Ok(Heard::Ack(v1::Ack { counter }).into()));
                }
            }
            Said::Progress(progress) => self.progress = Some(progress.try_into().expect("valid")),
            Said::Ready(ready) => {
                let ready = forebay_proto::Ready::try_from(ready).expect("valid");
                self.life.dp_ranks = ready.facts.dp_ranks;
                self.notes = ready.facts.notes;
            }
            Said::Load(load) => {
                let report = self.life.load(load).expect("valid");
                self.loads.insert(report.rank.dp_rank, report.load);
            }
            Said::KvSnapshot(piece) => {
                let rank = piece.dp_rank as usize;
                if let Some(whole) = self.readers[rank].take(&self.life, piece).expect("pieces that fit") {
                    self.snapshots += 1;
                    self.ranks[rank] = Some((whole.sequence_next, device_blocks(&whole.contents).collect()));
                }
            }
            Said::KvDeltas(v1::KvDeltas { deltas }) => {
                for delta in deltas {
                    let batch = self.life.kv_batch(delta).expect("valid");
                    let rank = usize::from(batch.rank.dp_rank);
                    assert!(!self.readers[rank].is_under_way(), "a delta parts the pieces of a snapshot");
                    let known = self.ranks[rank].as_mut().expect("a snapshot comes first");
                    assert_eq!(batch.sequence, known.0, "no gap");
                    known.0 += 1;
                    batch.events.iter().for_each(|event| apply(&mut known.1, event));
                }
            }
            other => self.other.push(other),
        }
        true
    }

    /// Reads until the state holds.
    pub(crate) async fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let reading = async {
            while !holds(self) {
                assert!(self.read().await, "the stream ended before {what}");
            }
        };
        timeout(SOON, reading).await.unwrap_or_else(|_| panic!("{what} within {SOON:?}"));
    }

    /// Reads to the end of the stream.
    pub(crate) async fn until_its_end(&mut self) {
        timeout(SOON, async { while self.read().await {} }).await.expect("the stream ends soon");
    }

    pub(crate) fn died(&self) -> Option<&v1::Died> {
        self.other.iter().find_map(|said| if let Said::Died(died) = said { Some(died) } else { None })
    }
}

pub(crate) fn apply(blocks: &mut BTreeSet<BlockHash>, event: &KvEvent) {
    match event {
        KvEvent::Stored { hashes, .. } => blocks.extend(hashes),
        KvEvent::Removed { hashes, .. } => hashes.iter().for_each(|hash| {
            blocks.remove(hash);
        }),
        KvEvent::Groups(_) => {}
        KvEvent::Cleared => blocks.clear(),
    }
}

/// A gateway's answer to Hello.
pub(crate) fn welcome(name: &str, lease: Duration) -> Welcome {
    Welcome { wire_version: 1, gateway: name.to_owned(), hash_key: KEY, heartbeat_interval: HEARTBEAT, lease }
}
