//! The way from an engine to a socket of the `zeromq` crate: everything that comes in is screened first.
//!
//! The crate takes no connection that it did not make or accept itself. So the socket *binds*, on a nameless Unix socket,
//! and a relay connects the two. That costs one more copy of some megabytes a second.

use std::{io, os::unix::net as unix, sync::Arc};

use forebay_engine_wire::discovery::ZmqAddress;
use futures::{FutureExt as _, StreamExt as _, channel::mpsc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use zeromq::{Socket, SocketEvent};

use super::{
    CONNECT_MAX, HANDSHAKE_MAX, MESSAGE_BYTES_MAX, ZmqError,
    screen::{Screen, Stop},
};

/// Read at a time.
const PIECE_BYTES: usize = 64 << 10;

/// One connection. Dropping it closes it.
pub(super) struct Gate {
    pub(super) events: mpsc::Receiver<SocketEvent>,
    at: ZmqAddress,
    /// Why the relay ended.
    ended: oneshot::Receiver<ZmqError>,
    relay: JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

impl Gate {
    /// Connects `socket` to the engine at `at`; returns when they have shaken hands.
    pub(super) async fn open<S: Socket>(socket: &mut S, at: &ZmqAddress) -> Result<Self, ZmqError> {
        let unreachable = |detail: String| ZmqError::Unreachable { at: at.clone(), detail: detail.into() };
        let connecting = TcpStream::connect((at.host.as_str(), at.port));
        let engine = timeout(CONNECT_MAX, connecting)
            .await
            .map_err(|_| unreachable(format!("no connection within {} s", CONNECT_MAX.as_secs())))?
            .map_err(|error| unreachable(error.to_string()))?;
        let events = socket.monitor();
        let inner = inside(socket).await.map_err(|error| unreachable(error.to_string()))?;
        let (end, ended) = oneshot::channel();
        let relay = tokio::spawn(relay(engine, inner, at.clone(), end));
        let mut gate = Self { events, at: at.clone(), ended, relay };
        let shaken = timeout(HANDSHAKE_MAX, gate.shake_hands()).await;
        shaken.unwrap_or_else(|_| Err(ZmqError::TooSlow { at: at.clone() }))?;
        // The listener goes, so nobody else can join. Who was quicker than that is noticed.
        let bound: Vec<_> = socket.binds().keys().cloned().collect();
        for endpoint in bound {
            socket.unbind(endpoint).await.map_err(|error| not_zmq(at, &error))?;
        }
        while let Some(event) = gate.events.next().now_or_never() {
            if let Some(SocketEvent::Accepted(..)) = event {
                return Err(unreachable("another process connected to our end of it".to_owned()));
            }
        }
        Ok(gate)
    }

    async fn shake_hands(&mut self) -> Result<(), ZmqError> {
        loop {
            match self.events.next().await {
                Some(SocketEvent::Accepted(..)) => return Ok(()),
                Some(SocketEvent::AcceptFailed(error)) => return Err(self.end(Some(&error))),
                Some(_) => {}
                None => return Err(ZmqError::Closed { at: self.at.clone() }),
            }
        }
    }

    /// Why nothing more comes: what the relay says or, if it runs, what the socket says.
    pub(super) fn end(&mut self, error: Option<&zeromq::ZmqError>) -> ZmqError {
        match (self.ended.try_recv(), error) {
            (Ok(end), _) => end,
            (Err(_), Some(error)) => not_zmq(&self.at, error),
            (Err(_), None) => ZmqError::Closed { at: self.at.clone() },
        }
    }
}

pub(super) fn not_zmq(at: &ZmqAddress, error: &zeromq::ZmqError) -> ZmqError {
    ZmqError::NotZmq { at: at.clone(), detail: error.to_string().into() }
}

/// Binds `socket` to a nameless Unix socket and connects to it.
async fn inside<S: Socket>(socket: &mut S) -> io::Result<UnixStream> {
    // Without a name Linux makes one up, outside of the file system.
    let listener = unix::UnixListener::bind("")?;
    let address = listener.local_addr()?;
    socket.bind_listener(zeromq::Listener::Ipc(listener)).await.map_err(io::Error::other)?;
    let stream = unix::UnixStream::connect_addr(&address)?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn relay(mut engine: TcpStream, mut inner: UnixStream, at: ZmqAddress, end: oneshot::Sender<ZmqError>) {
    let (mut from_engine, mut to_engine) = engine.split();
    let (mut from_inner, mut to_inner) = inner.split();
    let down = async {
        let mut screen = Screen::new(MESSAGE_BYTES_MAX);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let read = match from_engine.read(&mut piece).await {
                Ok(0) | Err(_) => return ZmqError::Closed { at: at.clone() },
                Ok(read) => &piece[..read],
            };
            match screen.read(read) {
                Ok(()) => {}
                Err(Stop::TooLarge) => {
                    return ZmqError::TooLarge { at: at.clone(), limit_bytes: MESSAGE_BYTES_MAX };
                }
                Err(Stop::NotZmtp) => {
                    let detail: Arc<str> = "it does not speak ZMTP 3".into();
                    return ZmqError::NotZmq { at: at.clone(), detail };
                }
            }
            if to_inner.write_all(read).await.is_err() {
                return ZmqError::Closed { at: at.clone() };
            }
        }
    };
    let up = async {
        // What goes out is ours: a greeting, a subscription, a request.
        let _over_either_way = tokio::io::copy(&mut from_inner, &mut to_engine).await;
        ZmqError::Closed { at: at.clone() }
    };
    let why = tokio::select! { why = down => why, why = up => why };
    // Before the streams are dropped: whoever sees them closed asks for it.
    let _nobody_asks = end.send(why);
}
