//! Listening on loopback: ports that survive a death, and an HTTP server that can die, hang and refuse.
//!
//! In: a router, and a [`Door`] that may be shut. Out: connections served. Start at [`Port`] and [`Server`].
//!
//! Always holds: while a [`Port`] lives nobody else can take its number, even when nothing listens on it (a socket
//! stays bound there without listening, so that connecting is refused as after a process's death).

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Connections that a server has open at once.
const CONNECTIONS_MAX: usize = 4096;
/// How often ports for several ranks side by side are tried.
const ADJACENT_ATTEMPTS: usize = 64;

/// A port of 127.0.0.1 that is ours.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    /// Bound, never listening.
    _holder: TcpSocket,
}

impl Port {
    /// Takes a port; 0 for any.
    pub(crate) fn take(number: u16) -> io::Result<Self> {
        let holder = bound(number)?;
        Ok(Self { number: holder.local_addr()?.port(), _holder: holder })
    }

    /// Takes `count` ports side by side, from `first` or anywhere if it is 0.
    pub(crate) fn take_adjacent(first: u16, count: usize) -> io::Result<Vec<Self>> {
        let from = |first: u16| (0..count).map(|index| Self::take(offset(first, index)?)).collect();
        if first != 0 {
            return from(first);
        }
        let mut last = io::Error::other("no ports were tried");
        for _ in 0..ADJACENT_ATTEMPTS {
            let any = Self::take(0)?.number;
            match from(any) {
                Ok(ports) => return Ok(ports),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    /// Listens here.
    pub(crate) fn listen(&self) -> io::Result<TcpListener> {
        bound(self.number)?.listen(BACKLOG)
    }

    /// Listens here, for a library that wants the standard type.
    pub(crate) fn listen_std(&self) -> io::Result<std::net::TcpListener> {
        self.listen()?.into_std()
    }
}

fn offset(first: u16, index: usize) -> io::Result<u16> {
    let number = u16::try_from(index).ok().and_then(|index| first.checked_add(index));
    number.ok_or_else(|| io::Error::other("ports end at 65535"))
}

fn bound(number: u16) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, number)))?;
    Ok(socket)
}

/// What happens to connections, and to requests on those that are open already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Door {
    /// They are served.
    #[default]
    Open,
    /// They are accepted and nothing is ever answered.
    Hangs,
    /// They are accepted and closed.
    Slams,
}

/// An HTTP/1 server on one port.
#[derive(Debug)]
pub(crate) struct Server {
    door: Arc<Mutex<Door>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Serves `router` on `listener` until stopped or dropped.
    pub(crate) fn start(listener: TcpListener, router: Router) -> Self {
        let door = Arc::new(Mutex::new(Door::Open));
        let guarded = router.layer(from_fn_with_state(door.clone(), at_the_door));
        let task = tokio::spawn(accept(listener, guarded, door.clone()));
        Self { door, task: Mutex::new(Some(task)) }
    }

    pub(crate) fn set_door(&self, door: Door) {
        *self.door.lock() = door;
    }

    /// Closes the listener and all connections, now.
    pub(crate) fn stop(&self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }

    /// As [`Server::stop`], and waits until the sockets are closed.
    pub(crate) async fn stopped(&self) {
        let task = self.task.lock().take();
        if let Some(task) = task {
            task.abort();
            let _aborted = task.await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn accept(listener: TcpListener, router: Router, door: Arc<Mutex<Door>>) {
    let mut connections = JoinSet::new(); // dropped, and with it every connection, when this task ends
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                if connections.len() >= CONNECTIONS_MAX {
                    continue; // closes it
                }
                match *door.lock() {
                    Door::Open => drop(connections.spawn(serve(stream, router.clone()))),
                    Door::Hangs => drop(connections.spawn(hang(stream))),
                    Door::Slams => drop(stream),
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A request on an open connection meets the same door as a new connection does.
async fn at_the_door(State(door): State<Arc<Mutex<Door>>>, request: Request, next: Next) -> Response {
    let door = *door.lock();
    match door {
        Door::Open => next.run(request).await,
        Door::Hangs | Door::Slams => std::future::pending().await,
    }
}

async fn serve(stream: TcpStream, router: Router) {
    let _nagle_is_a_nicety = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let _client_may_break_off = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Reads nothing and says nothing for as long as the server lives.
async fn hang(stream: TcpStream) {
    std::future::pending::<()>().await;
    drop(stream);
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(port: u16) -> bool {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err()
    }

    #[tokio::test]
    async fn a_port_refuses_connections_between_two_lives() {
        let port = Port::take(0).unwrap();
        assert!(refused(port.number()).await, "nothing listens yet");
        for _ in 0..2 {
            let server = Server::start(port.listen().unwrap(), Router::new());
            assert!(!refused(port.number()).await);
            server.stopped().await;
            assert!(refused(port.number()).await, "the server is gone");
        }
    }

    #[tokio::test]
    async fn ranks_get_ports_side_by_side() {
        let ports = Port::take_adjacent(0, 4).unwrap();
        for pair in ports.windows(2) {
            assert_eq!(pair[0].number() + 1, pair[1].number());
        }
    }
}
