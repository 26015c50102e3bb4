//! The double of an SGLang server.
//!
//! In: [`SglangOptions`]. Out: a server on loopback, as `vllm`'s. Start at [`SglangDouble::start`]; the HTTP surface is
//! in `http`, prefill and decode servers meet in `bootstrap`.
//!
//! Everything here is read in SGLang 0.5.23's source. No double was ever compared with a real SGLang server, which
//! needs a GPU.

mod bootstrap;
mod http;
mod options;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::task::JoinSet;

pub use self::options::{SglangEventOptions, SglangMode, SglangOptions};
use crate::double::net::{Port, Server};
use crate::double::ports::{PortPlan, RankPorts};
use crate::double::{Body, BodyOptions, Life, Running, Species};
use crate::engine::pool::Style;
use crate::engine::rank::{EventFormat, Neighbours, Rank};
use crate::engine::{Core, Settings};
use crate::events::publisher::{Options as PublisherOptions, Publisher};
use crate::events::wire::{HashFormat, Shape};
use crate::kv::Model;
use bootstrap::{Partner, Rooms};

/// Where hash chains start: in SGLang they start from nothing, so that equal prefixes have equal hashes everywhere.
const HASH_ROOT: u64 = 0x5347_4c61_6e67;
/// The topic of the load socket.
const LOAD_TOPIC: &str = "load";

/// What lives as long as the double.
#[derive(Debug)]
pub(crate) struct Sglang {
    pub(crate) options: SglangOptions,
    pub(crate) body: Arc<Body>,
    bootstrap: Option<Port>,
}

impl Sglang {
    fn model_path(&self) -> &str {
        self.options.model_path.as_deref().unwrap_or(&self.options.model)
    }

    /// A scheduler raised: its parent is sent SIGQUIT and the whole server goes down at once.
    fn died(&self) {
        self.body.engine_died(Duration::ZERO);
    }

    async fn start_ranks(self: &Arc<Self>) -> io::Result<Life> {
        let rooms = self.bootstrap.as_ref().map(|_| Rooms::new());
        let mut tasks = JoinSet::new();
        let mut ranks = Vec::new();
        for (index, ports) in self.body.ports.iter().enumerate() {
            let rank = Arc::new(Rank {
                index: index as u32,
                core: Mutex::new(Core::new(self.settings())),
                wake: tokio::sync::Notify::new(),
                pace: self.body.pace.clone(),
                lies: self.body.lies.clone(),
                publisher: self.publisher(ports).await?,
                load_publisher: load_publisher(ports).await?,
                last_load: Mutex::new(None),
                format: EventFormat { shape: Shape::Sglang, hashes: HashFormat::Signed },
                stepped: self.body.stepped.clone(),
            });
            let partner: Arc<dyn Neighbours> = Arc::new(Partner::new(self, rooms.clone(), index as u32));
            tasks.spawn(rank.clone().run(partner));
            ranks.push(rank);
        }
        let mut servers = Vec::new();
        if let Some((port, rooms)) = self.bootstrap.as_ref().zip(rooms) {
            servers.push(Server::start(port.listen()?, bootstrap::router(self, rooms)));
        }
        Ok(Life::new(ranks, Vec::new(), tasks, servers))
    }

    fn settings(&self) -> Settings {
        let options = &self.options;
        Settings {
            block_size: options.page_size,
            blocks: options.pages + 1,
            prefix_caching: true,
            style: Style::Tree,
            running_max: options.running_max,
            by_priority: false,
            model: Model::new(options.model_seed, options.eos_one_in),
            hash_root: HASH_ROOT,
            connector: None,
        }
    }

    async fn publisher(&self, ports: &RankPorts) -> io::Result<Option<Publisher>> {
        let Some((config, events)) = self.options.kv_events.as_ref().zip(ports.events.as_ref()) else {
            return Ok(None);
        };
        let replay = ports.replay.as_ref().map(Port::listen_std).transpose()?;
        let options = PublisherOptions {
            topic: config.topic.clone(),
            buffer_steps: config.buffer_steps,
            replay_topic: config.replay_topic,
        };
        Publisher::start(events.listen_std()?, replay, options).await.map(Some)
    }
}

async fn load_publisher(ports: &RankPorts) -> io::Result<Option<Publisher>> {
    let Some(port) = &ports.other else { return Ok(None) };
    let options = PublisherOptions { topic: LOAD_TOPIC.into(), buffer_steps: 1, replay_topic: true };
    Publisher::start(port.listen_std()?, None, options).await.map(Some)
}

impl Species for Sglang {
    fn body(&self) -> &Arc<Body> {
        &self.body
    }

    fn start_life(self: Arc<Self>, _number: u64) -> BoxFuture<'static, io::Result<Life>> {
        async move { self.start_ranks().await }.boxed()
    }

    fn router(self: Arc<Self>) -> Router {
        http::router(&self)
    }
}

/// An SGLang server that is none. Derefs to [`Running`]; stops when dropped.
#[derive(Debug)]
pub struct SglangDouble {
    running: Running,
    sglang: Arc<Sglang>,
}

impl SglangDouble {
    /// Starts a server on loopback; returns when it answers.
    ///
    /// # Panics
    /// If a port is taken, or the pool cannot hold `context_length` tokens.
    pub async fn start(options: SglangOptions) -> Self {
        Self::try_start(options).await.expect("a double needs loopback ports")
    }

    /// As [`SglangDouble::start`].
    ///
    /// # Errors
    /// If a port is taken.
    ///
    /// # Panics
    /// If the pool cannot hold `context_length` tokens.
    pub async fn try_start(options: SglangOptions) -> io::Result<Self> {
        assert!(options.dp > 0 && options.page_size > 0, "an engine has at least one rank, a page one token");
        assert!(
            options.pages * options.page_size >= options.context_length,
            "the KV pool must hold one request of context_length tokens"
        );
        let events = options.kv_events.as_ref();
        let plan = PortPlan {
            ranks: options.dp,
            events: events.map(|events| events.port),
            replay: events.is_some_and(|events| events.replay),
            scattered: false,
            other: events.filter(|_| options.load_socket).map(|_| 0),
        };
        let body = Body::new(BodyOptions {
            port: options.port,
            ports: plan.take()?,
            block_size: options.page_size,
            topic: events.map(|events| events.topic.clone()).unwrap_or_default(),
            death_linger: Duration::ZERO,
            step: options.step,
            prompt_token: options.prompt_token,
        })?;
        let bootstrap = match options.mode {
            SglangMode::Prefill => Some(Port::take(options.bootstrap_port)?),
            SglangMode::Null | SglangMode::Decode => None,
        };
        let sglang = Arc::new(Sglang { options, body: Arc::new(body), bootstrap });
        Ok(Self { running: Running::start(sglang.clone()).await?, sglang })
    }

    /// What it was started with.
    pub fn options(&self) -> &SglangOptions {
        &self.sglang.options
    }

    /// The port of the bootstrap server, on a prefill server.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.sglang.bootstrap.as_ref().map(Port::number)
    }

    /// `tcp://127.0.0.1:PORT` of each rank's load socket; empty without `load_socket`.
    pub fn load_endpoints(&self) -> Vec<String> {
        let ports = self.sglang.body.ports.iter().filter_map(|ports| ports.other.as_ref());
        ports.map(|port| format!("tcp://127.0.0.1:{}", port.number())).collect()
    }
}

impl Deref for SglangDouble {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}
