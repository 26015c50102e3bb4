//! A gateway with a door, and agents that do what a test says.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use forebay_engines::remote::{
    Abort, Dialect as Kind, HandOver, HeldKv, RankPin, Speech, TokenizerProbe,
    client::{ClientSettings, HttpClient},
};
use forebay_gateway::{
    cluster::{self, ClusterParts, ClusterSettings, Outbound, Tokenizers},
    metrics::Metrics,
    orchestrator::{
        Orchestrator, OrchestratorSettings,
        api::{EngineStatus, Orchestrate},
    },
};
use forebay_kv_hash::{BlockHasher, HashKey as BlockKey};
use forebay_proto::{
    Accepts, CacheSight, DataPlane, Dialect, EngineFacts, EngineState, HashKey, Hello, KvAbilities, Progress,
    Secret, TokenizerFile, WIRE_VERSION, Welcome, fleet_client, snapshot_chunks,
    v1::{self, from_agent::Body, from_gateway::Body as Answer},
};
use forebay_testkit::tokenizer;
use forebay_types::{BlockHash, Incarnation, KvEvent, Role, Tier, TokenId};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

/// Bound on hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);
const HEARTBEAT: Duration = Duration::from_millis(200);
const SILENCE: Duration = Duration::from_millis(1_500);
pub(crate) const LEASE: Duration = Duration::from_secs(4);

pub(crate) fn key() -> HashKey {
    HashKey { key: *b"0123456789abcdef", block_size_tokens: 16 }
}

pub(crate) fn hello(engine: &str, incarnation: u64) -> Hello {
    Hello {
        wire_version: WIRE_VERSION,
        agent_version: "test".to_owned(),
        engine: engine.into(),
        kind: "vllm".to_owned(),
        incarnation: Incarnation(incarnation),
        role: Role::Both,
        progress: Progress { state: EngineState::Ready, sentence: String::new() },
        facts: Some(EngineFacts {
            model: "m".to_owned(),
            served_aliases: vec![],
            dp_ranks: 1,
            block_size_tokens: 16,
            block_bytes: 0,
            blocks_total: 100,
            step_tokens_max: 2048,
            context_tokens_max: 4096,
            waiting_max: 64,
            kv: KvAbilities { layout: 1, can_export: false, can_import: false, needs_warming: true },
            accepts: Accepts { tokens: false, body: true },
            continues_sampling: false,
            dialect: Dialect {
                version: "0".to_owned(),
                speech: Speech {
                    dialect: Kind::Vllm,
                    model: "m".into(),
                    tokens: None,
                    hand_over: HandOver::None,
                    ranks: RankPin::None,
                    salts_cache: false,
                    abort: Abort::Close,
                },
            },
            step_prior: forebay_perf_model::StepCoefficients::H100_8B,
            notes: vec![],
        }),
        data_plane: DataPlane { url: "http://127.0.0.1:9".to_owned(), api_key: Some(Secret::new("k")) },
        labels: [].into(),
        cache_sight: CacheSight::Events,
    }
}

/// Tokenizers that are the doubles', once any file of them was sent.
#[derive(Default)]
struct Learned(Mutex<BTreeSet<String>>);

impl Tokenizers for Learned {
    fn of(&self, model: &str) -> Option<Arc<dyn TokenizerProbe>> {
        self.0.lock().contains(model).then(|| Arc::new(Probe) as Arc<dyn TokenizerProbe>)
    }

    fn learn(&self, model: &str, files: &[TokenizerFile]) -> Result<(), String> {
        assert_eq!(files[0].name, "tokenizer.json");
        if files[0].bytes.is_empty() {
            return Err("it is empty".to_owned());
        }
        self.0.lock().insert(model.to_owned());
        Ok(())
    }
}

struct Probe;

impl TokenizerProbe for Probe {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Ok(tokenizer::encode(text))
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        let owned = |(role, content): &(&str, &str)| ((*role).to_owned(), (*content).to_owned());
        let messages: Vec<_> = messages.iter().map(owned).collect();
        Ok(tokenizer::encode(&tokenizer::render_chat(&messages, true)))
    }
}

/// A gateway without engines of its own.
pub(crate) struct Rig {
    pub(crate) orchestrator: Orchestrator,
    pub(crate) metrics: Arc<Metrics>,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Rig {
    pub(crate) async fn start() -> Self {
        Self::start_with_settings(OrchestratorSettings::default()).await
    }

    pub(crate) async fn start_with_settings(settings: OrchestratorSettings) -> Self {
        let cluster = ClusterSettings {
            gateway: "gw".to_owned(),
            hash_key: key(),
            heartbeat: HEARTBEAT,
            silence_max: SILENCE,
            lease: LEASE,
            engines_max: 8,
        };
        Self::start_all(cluster, settings).await
    }

    pub(crate) async fn start_with(cluster: ClusterSettings) -> Self {
        Self::start_all(cluster, OrchestratorSettings::default()).await
    }

    async fn start_all(cluster: ClusterSettings, settings: OrchestratorSettings) -> Self {
        let hasher = BlockHasher::new(BlockKey(key().key), key().block_size_tokens);
        let metrics = Arc::new(Metrics::new());
        let orchestrator =
            Orchestrator::start(settings, Vec::new(), hasher, metrics.clone(), &Handle::current());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let parts = ClusterParts {
            orchestrator: orchestrator.clone(),
            settings: cluster,
            outbound: Outbound {
                http: HttpClient::new(&ClientSettings::default()).expect("a client"),
                held: HeldKv::new(),
                draw: Arc::new(|| 4),
                tokenizers: Arc::new(Learned::default()),
            },
            tls: None,
        };
        let serving = tokio::spawn(async move {
            cluster::serve(listener, parts, std::future::pending()).await.expect("it serves");
        });
        Self { orchestrator, metrics, address, serving }
    }

    /// Waits for a state of the fleet.
    pub(crate) async fn until(&self, reached: impl Fn(&Vec<EngineStatus>) -> bool) {
        let look = async {
            let mut tick = interval(Duration::from_millis(5));
            while !reached(&self.orchestrator.engines()) {
                tick.tick().await;
            }
        };
        assert!(timeout(PATIENCE, look).await.is_ok(), "not reached: {:?}", self.orchestrator.engines());
    }

    async fn open(&self) -> (mpsc::Sender<v1::FromAgent>, Streaming<v1::FromGateway>) {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("a URL");
        let channel = endpoint.connect().await.expect("the door is open");
        let (sender, receiver) = mpsc::channel(64);
        let mut client = fleet_client(channel);
        let asked = client.attach(ReceiverStream::new(receiver));
        let answers = timeout(PATIENCE, asked).await.expect("in time").expect("a stream").into_inner();
        (sender, answers)
    }

    /// An agent that keeps its lease.
    pub(crate) async fn attach(&self, hello: Hello) -> Agent {
        let mut agent = self.attach_without_heartbeat(hello).await;
        let sender = agent.sender.clone();
        agent.heartbeat = Some(tokio::spawn(async move {
            let mut tick = interval(HEARTBEAT);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for counter in 1.. {
                tick.tick().await;
                let beat = Body::Heartbeat(v1::Heartbeat { counter });
                if sender.send(beat.into()).await.is_err() {
                    return;
                }
            }
        }));
        agent
    }

    pub(crate) async fn attach_without_heartbeat(&self, hello: Hello) -> Agent {
        let (sender, mut answers) = self.open().await;
        sender.send(Body::Hello(hello.into()).into()).await.expect("it listens");
        let first = timeout(PATIENCE, answers.message()).await.expect("in time").expect("sound");
        let Some(v1::FromGateway { body: Some(Answer::Welcome(welcome)) }) = first else {
            panic!("not welcome: {first:?}");
        };
        Agent { welcome: welcome.try_into().expect("a good Welcome"), sender, answers, heartbeat: None }
    }

    pub(crate) async fn rejected(&self, hello: Hello) -> v1::Reject {
        self.rejected_first(Body::Hello(hello.into())).await
    }

    pub(crate) async fn rejected_first(&self, first: Body) -> v1::Reject {
        let (sender, mut answers) = self.open().await;
        sender.send(first.into()).await.expect("it listens");
        match timeout(PATIENCE, answers.message()).await.expect("in time").expect("sound") {
            Some(v1::FromGateway { body: Some(Answer::Reject(reject)) }) => reject,
            other => panic!("not rejected: {other:?}"),
        }
    }
}

/// One stream to the gateway. Dropped, it breaks.
pub(crate) struct Agent {
    pub(crate) welcome: Welcome,
    sender: mpsc::Sender<v1::FromAgent>,
    answers: Streaming<v1::FromGateway>,
    heartbeat: Option<JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.abort();
        }
    }
}

impl Agent {
    pub(crate) fn send(&mut self, body: Body) {
        self.sender.try_send(body.into()).expect("room");
    }

    pub(crate) async fn snapshot(&mut self, dp_rank: u16, sequence_next: u64, blocks: &[u64]) {
        let hashes = blocks.iter().map(|&hash| BlockHash(hash)).collect();
        let stored = KvEvent::Stored { parent: None, hashes, tier: Tier::Device, group: 0 };
        for piece in snapshot_chunks(dp_rank, sequence_next, vec![stored]) {
            self.sender.send(Body::KvSnapshot(piece).into()).await.expect("it listens");
        }
    }

    pub(crate) async fn delta(&mut self, dp_rank: u32, sequence: u64, hashes: &[u64]) {
        let stored =
            v1::KvStored { parent: None, hashes: hashes.to_vec(), tier: v1::Tier::Device.into(), group: 0 };
        let event = v1::KvEvent { event: Some(v1::kv_event::Event::Stored(stored)) };
        let delta = v1::KvDelta { dp_rank, sequence, events: vec![event] };
        let body = Body::KvDeltas(v1::KvDeltas { deltas: vec![delta] });
        self.sender.send(body.into()).await.expect("it listens");
    }

    /// The next answer of a kind; others are passed over.
    pub(crate) async fn expect(&mut self, wanted: impl Fn(&Answer) -> bool) -> Answer {
        let answer = async {
            loop {
                let message = self.answers.message().await.expect("sound").expect("the stream stands");
                if let Some(body) = message.body.filter(&wanted) {
                    return body;
                }
            }
        };
        timeout(PATIENCE, answer).await.expect("in time")
    }

    pub(crate) async fn ended(&mut self) -> bool {
        let end = async { while let Ok(Some(_)) = self.answers.message().await {} };
        timeout(PATIENCE, end).await.is_ok()
    }
}
