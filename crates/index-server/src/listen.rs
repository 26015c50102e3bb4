//! Accepts connections within bounds, serves them, ends them.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

/// Wait after an accept that failed for want of a resource, unless a connection closes first.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Calls of one gRPC connection at a time.
const STREAMS_MAX: u32 = 64;
/// Between two proofs that a gRPC client is still there.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Bounds of connections and bodies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Open connections of one address. Later ones wait in the kernel's backlog.
    pub connections_max: usize,
    /// Bytes of one body, or of one gRPC message.
    pub body_bytes_max: usize,
    /// Bytes of one head.
    pub header_bytes_max: usize,
    /// Time to send a whole head, which is also how long a kept-alive connection may stay idle.
    pub header_read_timeout: Duration,
    /// Time to send a whole body.
    pub body_read_timeout: Duration,
    /// Time that a client may take no byte of its answer.
    pub write_stall_timeout: Duration,
    /// Time that running answers have to finish after shutdown began.
    pub shutdown_max: Duration,
}

impl Default for Limits {
    /// A body of 16 MiB holds a million tokens with room to spare.
    fn default() -> Self {
        Self {
            connections_max: 4096,
            body_bytes_max: 16 << 20,
            header_bytes_max: 32 << 10,
            header_read_timeout: Duration::from_secs(60),
            body_read_timeout: Duration::from_secs(60),
            write_stall_timeout: Duration::from_secs(60),
            shutdown_max: Duration::from_secs(5),
        }
    }
}

/// How a listener ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were still answering when `shutdown_max` was over, and were cut.
    pub cut: usize,
}

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 without an upgrade, as gRPC clients begin it.
    Http2,
}

pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    protocol: Protocol,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    let slots = Arc::new(Semaphore::new(limits.connections_max.clamp(1, Semaphore::MAX_PERMITS)));
    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => reap(ended),
            accepted = accept(&listener, &slots, &limits) => match accepted {
                Ok((stream, slot)) => {
                    let service = TowerToHyperService::new(router.clone());
                    let connection = Connection { stream, slot, stopping: stopping.clone() };
                    match protocol {
                        Protocol::Http1 => connections.spawn(connection.http1(service, &limits)),
                        Protocol::Http2 => connections.spawn(connection.http2(service, &limits)),
                    };
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting failed");
                    let _either = timeout(ACCEPT_RETRY, one_closes(&mut connections)).await;
                }
            },
        }
    }
    drop((listener, stop, stopping)); // every connection finishes its answers and closes
    let finished = async {
        while let Some(ended) = connections.join_next().await {
            reap(ended);
        }
    };
    let in_time = timeout(limits.shutdown_max, finished).await.is_ok();
    let cut = if in_time { 0 } else { connections.len() };
    connections.shutdown().await;
    Ended { cut }
}

/// Safe to drop and call again: nothing is awaited after a connection was accepted.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    limits: &Limits,
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

fn tune(stream: &TcpStream, limits: &Limits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let millis = u32::try_from(limits.write_stall_timeout.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    }
    Ok(())
}

async fn one_closes(connections: &mut JoinSet<()>) {
    match connections.join_next().await {
        Some(ended) => reap(ended),
        None => std::future::pending().await,
    }
}

fn reap(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}

struct Connection {
    stream: TcpStream,
    slot: OwnedSemaphorePermit,
    stopping: watch::Receiver<()>,
}

/// Serves a connection to its end, or to the end of its running answers once `stopping` closes.
macro_rules! serve_to_its_end {
    ($connection:expr, $stopping:expr) => {{
        let mut connection = pin!($connection);
        let result = tokio::select! {
            result = &mut connection => result,
            _ = $stopping.changed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a connection ended early");
        }
    }};
}

impl Connection {
    fn http1(
        self,
        service: TowerToHyperService<Router>,
        limits: &Limits,
    ) -> impl Future<Output = ()> + Send + 'static {
        let mut protocol = http1::Builder::new();
        protocol
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_read_timeout)
            .max_header_size(limits.header_bytes_max);
        let Self { stream, slot, mut stopping } = self;
        async move {
            let _until_closed = slot;
            serve_to_its_end!(protocol.serve_connection(TokioIo::new(stream), service), stopping);
        }
    }

    fn http2(
        self,
        service: TowerToHyperService<Router>,
        limits: &Limits,
    ) -> impl Future<Output = ()> + Send + 'static {
        let mut protocol = http2::Builder::new(TokioExecutor::new());
        protocol
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE);
        let Self { stream, slot, mut stopping } = self;
        async move {
            let _until_closed = slot;
            serve_to_its_end!(protocol.serve_connection(TokioIo::new(stream), service), stopping);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn connections_wait_for_a_slot_and_have_their_limits() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let slots = Arc::new(Semaphore::new(1));
        let limits = Limits { write_stall_timeout: Duration::from_secs(7), ..Limits::default() };
        let _clients =
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap());
        let (stream, slot) = accept(&listener, &slots, &limits).await.unwrap();
        assert!(stream.nodelay().unwrap());
        #[cfg(target_os = "linux")]
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream).unwrap(), 7_000);
        let mut second = pin!(accept(&listener, &slots, &limits));
        assert!(futures::poll!(&mut second).is_pending());
        drop(slot);
        let _second = second.await.unwrap();
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits { header_read_timeout: Duration::from_millis(50), ..Limits::default() };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async {
            let _stopped = stopped.await;
        };
        let serving = serve(listener, Router::new(), Protocol::Http1, limits, shutdown);
        let client = async {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
            let mut rest = Vec::new();
            // Closed, with or without a word.
            let _either_way = client.read_to_end(&mut rest).await;
            drop(stop);
        };
        let (ended, ()) = tokio::join!(serving, client);
        assert_eq!(ended, Ended { cut: 0 });
    }
}
