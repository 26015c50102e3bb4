//! Sockets: accepting within bounds, serving, ending.
//!
//! Start at [`serve_public`]. One loop owns its connections: it accepts, reaps and, when asked, ends them.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
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
    let server = Server {
        http: protocol(limits),
        router,
        open: gateway.0.metrics.connections.clone(),
        slots: Arc::new(Semaphore::new(limits.connections_max.min(Semaphore::MAX_PERMITS))),
    };
    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => reap(ended),
            accepted = accept(&listener, &server.slots, limits) => match accepted {
                Ok((stream, slot)) => {
                    connections.spawn(server.connection(stream, slot, stopping.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting failed");
                    wait_for_room(&mut connections).await;
                }
            },
        }
    }
    drop(listener);
    drop(stop); // every connection finishes its answer and closes
    let finished = async {
        while let Some(ended) = connections.join_next().await {
            reap(ended);
        }
    };
    let in_time = tokio::time::timeout(limits.shutdown_max, finished).await.is_ok();
    let cut = if in_time { 0 } else { connections.len() };
    connections.shutdown().await;
    Ended { cut }
}

/// The next connection, ready for use, once there is a slot for it.
///
/// Safe to drop and call again: nothing that was accepted is lost, since nothing is awaited after it.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    limits: &HttpLimits,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
    loop {
        let (stream, _) = listener.accept().await?;
        match tune(&stream, limits) {
            Ok(()) => return Ok((stream, slot)),
            // The client has already gone.
            Err(error) => tracing::debug!(%error, "a connection could not be set up"),
        }
    }
}

/// What every accepted socket needs. Without `TCP_NODELAY` the kernel holds a token's small write back until the client
/// acknowledged the one before, up to 40 ms.
fn tune(stream: &TcpStream, limits: &HttpLimits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let millis = u32::try_from(limits.write_stall_timeout.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    }
    Ok(())
}

/// Out of descriptors, most likely: they come back when a connection closes.
async fn wait_for_room(connections: &mut JoinSet<()>) {
    let closed = async {
        match connections.join_next().await {
            Some(ended) => reap(ended),
            None => std::future::pending().await,
        }
    };
    let _either = tokio::time::timeout(ACCEPT_RETRY, closed).await;
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
    open: Gauge,
    slots: Arc<Semaphore>,
}

impl Server {
    /// Serves one connection to its end, or to the end of its current answer once `stopping` closes.
    fn connection(
        &self,
        stream: TcpStream,
        slot: OwnedSemaphorePermit,
        mut stopping: watch::Receiver<()>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let service = TowerToHyperService::new(self.router.clone());
        let connection = self.http.serve_connection(TokioIo::new(stream), service);
        let open = Open::new(self.open.clone());
        async move {
            let _until_closed = (slot, open);
            let mut connection = pin!(connection);
            let result = tokio::select! {
                result = &mut connection => result,
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

    async fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn every_accepted_connection_has_nodelay_and_a_stall_limit() {
        let listener = listener().await;
        let slots = Arc::new(Semaphore::new(2));
        let limits = HttpLimits { write_stall_timeout: Duration::from_secs(7), ..HttpLimits::default() };
        for _ in 0..2 {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, _slot) = accept(&listener, &slots, &limits).await.unwrap();
            assert!(stream.nodelay().unwrap());
            #[cfg(target_os = "linux")]
            assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream).unwrap(), 7_000);
        }
    }

    #[tokio::test]
    async fn connections_wait_for_a_slot() {
        let listener = listener().await;
        let slots = Arc::new(Semaphore::new(1));
        let address = listener.local_addr().unwrap();
        let _clients =
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap());
        let (_first, slot) = accept(&listener, &slots, &HttpLimits::default()).await.unwrap();
        let limits = HttpLimits::default();
        let mut second = pin!(accept(&listener, &slots, &limits));
        assert!(futures::poll!(&mut second).is_pending());
        drop(slot);
        let _second = second.await.unwrap();
    }
}
