//! Sockets: accepting within bounds, serving, ending.
//!
//! Start at [`serve_public`]. One loop owns its connections: it accepts, reaps and, when asked, ends them. At
//! `connections_max` it makes room for a new client by closing the connection that has been idle for longest ([`peers`]):
//! clients that connect and say nothing, or say it a byte at a time, keep nobody out.

mod peers;
mod socket;

use std::{convert::Infallible, future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::{Router, http::Request};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{Id, JoinError, JoinSet},
};

use self::{
    peers::{Answer, Peer, Peers, Room},
    socket::{Socket, tune},
};
use super::{app::Gateway, limits::HttpLimits};

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were still answering when `shutdown_max` was over, and were cut.
    pub cut: usize,
}

/// Time to wait after an accept that failed for want of a resource, unless a connection closes first.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves clients until `shutdown` resolves, then lets running answers finish within
/// [`HttpLimits::shutdown_max`].
pub async fn serve_public(
    listener: TcpListener,
    gateway: Gateway,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    serve(listener, gateway.public_router(), &gateway, shutdown).await
}

/// The same for operators.
pub async fn serve_admin(
    listener: TcpListener,
    gateway: Gateway,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    serve(listener, gateway.admin_router(), &gateway, shutdown).await
}

async fn serve(
    listener: TcpListener,
    router: Router,
    gateway: &Gateway,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    let limits = &gateway.0.http_limits;
    let metrics = &gateway.0.metrics;
    let mut server = Server {
        http: protocol(limits),
        router,
        open: metrics.connections.clone(),
        closed_for_room: metrics.connections_closed_for_room.clone(),
        connections_max: limits.connections_max,
        room: Arc::new(Room::new(gateway.0.clock.clone())),
        peers: Peers::default(),
        connections: JoinSet::new(),
        waiting: None,
    };
    let (stop, stopping) = watch::channel(());
    let mut shutdown = pin!(shutdown);
    loop {
        server.admit(&stopping);
        let waits = server.waiting.is_some();
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = server.connections.join_next_with_id() => server.reap(ended),
            () = server.room.made(), if waits => {}
            accepted = accept(&listener, limits), if !waits => match accepted {
                Ok(stream) => server.waiting = Some(stream),
                Err(error) => {
                    tracing::warn!(%error, "accepting failed");
                    server.wait_after(&error).await;
                }
            },
        }
    }
    server.waiting = None;
    drop(listener);
    drop(stop); // every connection finishes its answer and closes
    let finished = async {
        while let Some(ended) = server.connections.join_next_with_id().await {
            server.reap(ended);
        }
    };
    let in_time = tokio::time::timeout(limits.shutdown_max, finished).await.is_ok();
    let cut = if in_time { 0 } else { server.connections.len() };
    server.connections.shutdown().await;
    Ended { cut }
}

/// The next connection, ready for use. Safe to drop and call again: nothing is awaited after it was accepted.
async fn accept(listener: &TcpListener, limits: &HttpLimits) -> io::Result<TcpStream> {
    loop {
        let (stream, _) = listener.accept().await?;
        match tune(&stream, limits) {
            Ok(()) => return Ok(stream),
            // The client has already gone.
            Err(error) => tracing::debug!(%error, "a connection could not be set up"),
        }
    }
}

fn protocol(limits: &HttpLimits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_read_timeout)
        .max_header_size(limits.header_bytes_max);
    http
}

/// One listener's connections.
struct Server {
    http: http1::Builder,
    router: Router,
    open: Gauge,
    closed_for_room: Counter,
    connections_max: usize,
    room: Arc<Room>,
    peers: Peers,
    connections: JoinSet<()>,
    /// Accepted, but beyond the bound: the next to be served.
    waiting: Option<TcpStream>,
}

impl Server {
    /// Serves the client that waits if there is room for it, and asks for room if there is none.
    fn admit(&mut self, stopping: &watch::Receiver<()>) {
        let Some(stream) = self.waiting.take() else { return };
        if self.connections.len() >= self.connections_max {
            self.waiting = Some(stream);
            self.peers.ask_idlest(&self.room);
            return;
        }
        let peer = Peer::new(self.room.clone());
        let connection = self.connection(stream, peer.clone(), stopping.clone());
        let id = self.connections.spawn(connection).id();
        self.peers.add(id, peer);
    }

    fn reap(&mut self, ended: Result<(Id, ()), JoinError>) {
        match ended {
            Ok((id, ())) => self.peers.remove(id),
            Err(error) => {
                self.peers.remove(error.id());
                if error.is_panic() {
                    tracing::error!(%error, "a connection's task panicked");
                }
            }
        }
    }

    /// Waits until a connection closes, or a moment. Out of descriptors, that is room for one more: one is asked to close.
    async fn wait_after(&mut self, error: &io::Error) {
        let out = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(rustix::io::Errno::raw_os_error);
        if error.raw_os_error().is_some_and(|number| out.contains(&number)) {
            self.peers.ask_idlest(&self.room);
        }
        let closed = async {
            match self.connections.join_next_with_id().await {
                Some(ended) => ended,
                None => std::future::pending().await,
            }
        };
        if let Ok(ended) = tokio::time::timeout(ACCEPT_RETRY, closed).await {
            self.reap(ended);
        }
    }

    /// Serves one connection to its end, to the end of its current answer once `stopping` closes, or until its place is
    /// wanted while it is idle.
    fn connection(
        &self,
        stream: TcpStream,
        peer: Arc<Peer>,
        mut stopping: watch::Receiver<()>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let router = TowerToHyperService::new(self.router.clone());
        let begins = peer.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let busy = begins.begin();
            let answering = router.call(request);
            async move {
                let response = answering.await?;
                Ok::<_, Infallible>(response.map(|body| Answer::new(body, busy)))
            }
        });
        let connection = self.http.serve_connection(TokioIo::new(Socket::new(stream)), service);
        let (open, closed_for_room) = (Open::new(self.open.clone()), self.closed_for_room.clone());
        async move {
            let _until_closed = open;
            let mut connection = pin!(connection);
            let result = tokio::select! {
                result = &mut connection => result,
                () = peer.asked_to_close() => {
                    closed_for_room.inc();
                    return;
                }
                _ = stopping.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                tracing::debug!(error = %error, "a connection ended early");
            }
        }
    }
}

/// Counts a connection as open while it lives.
struct Open(Gauge);

impl Open {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_accepted_connection_has_nodelay_and_a_stall_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let limits = HttpLimits { write_stall_timeout: Duration::from_secs(7), ..HttpLimits::default() };
        for _ in 0..2 {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let stream = accept(&listener, &limits).await.unwrap();
            assert!(stream.nodelay().unwrap());
            #[cfg(target_os = "linux")]
            assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream).unwrap(), 7_000);
        }
    }
}
