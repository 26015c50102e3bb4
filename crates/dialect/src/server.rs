//! One engine behind one listener: sockets, tasks, life and end.
//!
//! Start at [`DialectServer::bind`], then [`DialectServer::serve`].

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::Router;
use forebay_engines::Driver;
use forebay_kv_hash::BlockHasher;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinHandle, JoinSet},
};

use crate::{
    app::{App, random_hex, router, unix_time},
    events::{self, Ledger, Publisher},
    hand_over::{Exchange, KvConnector},
    legs::Legs,
    metrics::Metrics,
    options::{ApiKey, EventOptions, HttpLimits, ModelText},
};

/// Time to wait after an accept that failed for want of a resource.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What a server is made of.
pub struct DialectParts {
    /// The engine. Nobody else reads its reports. Where there is a connector, it was built with
    /// [`KvConnector::mover`].
    pub driver: Arc<dyn Driver>,
    /// The engine's own block hash function: its events are looked up by it.
    pub hasher: BlockHasher,
    /// Text of its model.
    pub text: ModelText,
    /// What clients of `/v1` must send. `None` lets everybody in.
    pub api_key: Option<ApiKey>,
    /// Hand-over of KV; `None` ignores `kv_transfer_params`, as vLLM does without a connector.
    pub connector: Option<KvConnector>,
    /// KV events; `None` publishes none.
    pub events: Option<EventOptions>,
    /// Bounds.
    pub limits: HttpLimits,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The HTTP listener's address cannot be had.
    #[error("the listener has no address")]
    Listener(#[source] io::Error),
    /// The sockets of KV events.
    #[error("the sockets for KV events cannot be bound: choose other ports, or 0")]
    Events(#[source] zeromq::ZmqError),
    /// The side channel.
    #[error("the side channel of KV hand-overs cannot be bound: choose another port, or 0")]
    SideChannel(#[source] io::Error),
}

/// Where a server is found. As JSON, one line: what `forebay engine` prints when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Addresses {
    /// HTTP.
    pub http: SocketAddr,
    /// KV events (PUB).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_events_port: Option<u16>,
    /// Replay of KV events (ROUTER).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_replay_port: Option<u16>,
    /// Side channel of KV hand-overs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side_channel: Option<SocketAddr>,
    /// This life, as `remote_engine_id` names it.
    pub engine_id: String,
    /// Model id that requests name.
    pub model: String,
}

/// How a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Shutdown {
        /// Connections that were still answering after `shutdown_max`, and were cut.
        cut: usize,
    },
    /// The engine died, and the server with it, as a vLLM process does.
    EngineDied {
        /// Its last words.
        reason: Arc<str>,
    },
}

/// See the module.
pub struct DialectServer {
    listener: TcpListener,
    app: Arc<App>,
    addresses: Addresses,
    engine: StopsEngine,
    /// Closed when the side channel and the replay socket shall end.
    stop: watch::Sender<()>,
    watcher: JoinHandle<()>,
}

impl DialectServer {
    /// Binds everything beside the listener and begins to read the engine's reports.
    ///
    /// # Errors
    /// If an address cannot be bound. The engine is stopped then.
    pub async fn bind(listener: TcpListener, parts: DialectParts) -> Result<Self, BindError> {
        let DialectParts { driver, hasher, text, api_key, connector, events, limits } = parts;
        let engine = StopsEngine(driver.clone());
        let http = listener.local_addr().map_err(BindError::Listener)?;
        let (stop, stopping) = watch::channel(());
        let engine_id = engine_id();
        let exchange = match connector {
            Some(connector) => {
                let opened =
                    Exchange::open(connector, driver.clone(), engine_id.clone(), stopping.clone()).await;
                Some(opened.map_err(BindError::SideChannel)?)
            }
            None => None,
        };
        let (publisher, events) = match events {
            Some(options) => {
                let (publisher, ports) =
                    Publisher::bind(&options, stopping).await.map_err(BindError::Events)?;
                (Some(publisher), Some((options, ports)))
            }
            None => (None, None),
        };
        let facts = driver.facts();
        let addresses = Addresses {
            http,
            kv_events_port: events.as_ref().map(|(_, ports)| ports.publish),
            kv_replay_port: events.as_ref().map(|(_, ports)| ports.replay),
            side_channel: exchange.as_ref().map(Exchange::address),
            engine_id,
            model: facts.model.to_string(),
        };
        let metrics = Arc::new(Metrics::default());
        // What was given up may be announced late: room for a whole pool's blocks.
        let ledger = Ledger::new(hasher, facts.blocks_total as usize);
        let legs = Legs::new(driver.clone(), metrics.clone(), ledger);
        let (death, dead) = watch::channel(None);
        let watcher =
            tokio::spawn(events::run(driver.clone(), legs.clone(), metrics.clone(), publisher, death));
        let app = Arc::new(App {
            driver,
            hasher,
            text,
            legs,
            slots: Arc::new(Semaphore::new(limits.requests_max.min(Semaphore::MAX_PERMITS))),
            limits,
            exchange,
            metrics,
            api_key,
            events,
            death: dead,
            started_seconds: unix_time().as_secs_f64(),
            load: Arc::new(AtomicU64::new(0)),
        });
        Ok(Self { listener, app, addresses, engine, stop, watcher })
    }

    /// Where it is found.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `shutdown` resolves or the engine dies, lets running answers finish, and stops the engine.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Ended {
        let Self { listener, app, addresses: _, engine, stop, watcher } = self;
        let limits = app.limits.clone();
        let server = Server {
            http: protocol(&limits),
            router: router(app.clone()),
            slots: Arc::new(Semaphore::new(limits.connections_max.min(Semaphore::MAX_PERMITS))),
        };
        let (finish, finishing) = watch::channel(());
        let mut connections = JoinSet::new();
        let mut death = app.death.clone();
        let mut shutdown = pin!(shutdown);
        let died = loop {
            tokio::select! {
                () = &mut shutdown => break None,
                Ok(reason) = dead(&mut death) => break Some(reason),
                Some(ended) = connections.join_next() => reap(ended),
                accepted = accept(&listener, &server.slots, &limits) => match accepted {
                    Ok((stream, slot)) => {
                        connections.spawn(server.connection(stream, slot, finishing.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accepting failed");
                        let _pause = tokio::time::timeout(ACCEPT_RETRY, std::future::pending::<()>()).await;
                    }
                },
            }
        };
        drop(listener);
        drop(finish); // every connection finishes its answer and closes
        let finished = async { while connections.join_next().await.is_some() {} };
        let in_time = tokio::time::timeout(limits.shutdown_max, finished).await.is_ok();
        let cut = if in_time { 0 } else { connections.len() };
        connections.shutdown().await;
        drop(engine);
        drop(stop);
        // The engine says its last words at the end of its step.
        let _watched = tokio::time::timeout(limits.shutdown_max, watcher).await;
        match died {
            Some(reason) => Ended::EngineDied { reason },
            None => Ended::Shutdown { cut },
        }
    }
}

/// The engine lives no longer than its server.
struct StopsEngine(Arc<dyn Driver>);

impl Drop for StopsEngine {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn dead(death: &mut watch::Receiver<Option<Arc<str>>>) -> Result<Arc<str>, watch::error::RecvError> {
    let reason = death.wait_for(Option::is_some).await?;
    Ok(reason.clone().unwrap_or_default())
}

/// A random UUID: another one for each life.
fn engine_id() -> String {
    let hex = random_hex(16);
    format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}

/// The next connection, once there is a slot for it. Safe to drop and call again.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    limits: &HttpLimits,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
    loop {
        let (stream, _) = listener.accept().await?;
        let millis = u32::try_from(limits.write_stall_timeout.as_millis()).unwrap_or(u32::MAX);
        let tuned = stream.set_nodelay(true).and_then(|()| {
            rustix::net::sockopt::set_tcp_user_timeout(&stream, millis).map_err(io::Error::from)
        });
        match tuned {
            Ok(()) => return Ok((stream, slot)),
            Err(error) => tracing::debug!(%error, "a connection could not be set up"),
        }
    }
}

fn reap(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}

fn protocol(limits: &HttpLimits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_read_timeout)
        .max_header_size(limits.header_bytes_max);
    http
}

struct Server {
    http: http1::Builder,
    router: Router,
    slots: Arc<Semaphore>,
}

impl Server {
    /// Serves one connection to its end, or to the end of its current answer once `finishing` closes.
    fn connection(
        &self,
        stream: TcpStream,
        slot: OwnedSemaphorePermit,
        mut finishing: watch::Receiver<()>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let service = TowerToHyperService::new(self.router.clone());
        let connection = self.http.serve_connection(TokioIo::new(stream), service);
        async move {
            let _until_closed = slot;
            let mut connection = pin!(connection);
            let result = tokio::select! {
                result = &mut connection => result,
                _ = finishing.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%error, "a connection ended early");
            }
        }
    }
}
