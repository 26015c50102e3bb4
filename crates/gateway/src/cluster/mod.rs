//! The door for agents: engines on other hosts, one gRPC stream each. The stream is the lease.
//!
//! In: what agents say of their engines (`forebay-proto`). Out: members of the [`Orchestrator`], whose drivers send legs
//! straight to the engines and whose reports come from the streams. Start at [`serve`]; one stream's life is in
//! `session`, what outlives a stream (an agent may be restarted under its engine) in `seat`.
//!
//! Invariants: a name has one life at a time; a silent agent's engine gets nothing new after `silence_max`, its life is
//! over after `lease`; what a stream says after another has taken its seat changes nothing.

mod connect;
mod keeper;
mod seat;
mod session;

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use forebay_proto::{
    fleet_server,
    tls::TlsFiles,
    v1::{self, fleet_server::Fleet},
};
use forebay_types::Incarnation;
use futures::Stream;
use parking_lot::Mutex;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

pub use self::connect::{Outbound, Tokenizers};
use self::{seat::Seat, session::Session};
use crate::orchestrator::Orchestrator;

/// What the door tells agents, and how long it waits for them.
#[derive(Clone)]
pub struct ClusterSettings {
    /// This gateway's name, for agents' logs.
    pub gateway: String,
    /// How the fleet names KV blocks; agents hash with it.
    pub hash_key: forebay_proto::HashKey,
    /// Between two heartbeats of an agent.
    pub heartbeat: Duration,
    /// Silence after which nothing new goes to an engine. At least two heartbeats.
    pub silence_max: Duration,
    /// Silence after which a life is over.
    pub lease: Duration,
    /// Engines at once.
    pub engines_max: usize,
}

/// Messages that wait for one agent. It is asked for little: beyond this it is not listening.
const OUTBOX_MAX: usize = 64;

/// Everything that the door's streams share.
pub(crate) struct Cluster {
    orchestrator: Orchestrator,
    settings: ClusterSettings,
    outbound: Outbound,
    /// By engine name. A seat is dropped when its life is over and no stream holds it.
    seats: Mutex<HashMap<String, Arc<Seat>>>,
    /// Lives that are over here, the latest last: none of them comes back.
    over: Mutex<VecDeque<Incarnation>>,
    /// Whose stream may fetch a tokenizer.
    fetches: Arc<Semaphore>,
}

/// Lives that are remembered to be over.
const OVER_MAX: usize = 4_096;

impl Cluster {
    /// A life is over at this gateway.
    fn is_over(&self, incarnation: Incarnation) {
        let mut over = self.over.lock();
        if over.len() == OVER_MAX {
            over.pop_front();
        }
        over.push_back(incarnation);
    }
}

/// What a door is made of.
pub struct ClusterParts {
    /// Where the engines join.
    pub orchestrator: Orchestrator,
    /// What agents are told.
    pub settings: ClusterSettings,
    /// What speaks to engines.
    pub outbound: Outbound,
    /// Certificates; `None`: in the clear.
    pub tls: Option<TlsFiles>,
}

/// Serves agents until `shutdown`, whose streams then end.
///
/// # Errors
/// The certificates cannot be used, or the listener fails.
pub async fn serve(
    listener: TcpListener,
    parts: ClusterParts,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let ClusterParts { orchestrator, settings, outbound, tls } = parts;
    let mut server = Server::builder()
        // A host that vanished without a word is noticed by its lease; this frees its socket.
        .http2_keepalive_interval(Some(settings.lease))
        .http2_keepalive_timeout(Some(settings.lease))
        .tcp_nodelay(true);
    if let Some(tls) = tls {
        server = server.tls_config(tls.server()?)?;
    }
    let cluster = Arc::new(Cluster {
        orchestrator,
        settings,
        outbound,
        seats: Mutex::default(),
        over: Mutex::default(),
        fetches: Arc::new(Semaphore::new(1)),
    });
    server
        .add_service(fleet_server(Door(cluster)))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), shutdown)
        .await?;
    Ok(())
}

/// The gRPC service.
struct Door(Arc<Cluster>);

#[tonic::async_trait]
impl Fleet for Door {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::FromGateway, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::FromAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let peer = request.remote_addr().map_or_else(|| "unknown".to_owned(), |address| address.to_string());
        let (sender, receiver) = tokio::sync::mpsc::channel(OUTBOX_MAX);
        let session = Session::new(self.0.clone(), request.into_inner(), sender, peer);
        tokio::spawn(session.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
