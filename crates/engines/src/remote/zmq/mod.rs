//! ZMQ, as engines publish KV events with it: a [`Subscriber`] to what is published, a [`Replay`] of what was.
//!
//! In: an address. Out: messages, frame by frame, each within [`MESSAGE_BYTES_MAX`]. The protocol is the `zeromq` crate's.
//! It knows no bound, though: a header of nine bytes makes it reserve what the header announces, and the process aborts
//! when there is not as much. So every connection passes a [`gate`] of ours, which also bounds how long connecting and the
//! handshake take. Reconnecting is left to the caller, who must ask for a replay then anyway.

mod gate;
mod screen;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_engine_events::{PAYLOAD_BYTES_MAX, frames};
use forebay_engine_wire::discovery::ZmqAddress;
use futures::{FutureExt as _, StreamExt as _};
use tokio::time::timeout;
use zeromq::{
    DealerSocket, Socket as _, SocketEvent, SocketOptions, SocketRecv, SocketSend as _, SubSocket, ZmqMessage,
};

use gate::Gate;

/// Bytes of one message: the payload and a little.
pub const MESSAGE_BYTES_MAX: u64 = PAYLOAD_BYTES_MAX as u64 + 4096;
/// For the TCP connection.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// For ZMTP's greeting and handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// Before a replay's first message. vLLM looks for requests ten times a second, between batches.
const REPLAY_BEGIN_MAX: Duration = Duration::from_secs(5);
/// Between two messages of a replay, which an engine sends one after the other.
const REPLAY_SILENCE_MAX: Duration = Duration::from_secs(1);

/// Why nothing more comes from a socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZmqError {
    /// No connection.
    #[error("{at} cannot be reached: {detail}")]
    Unreachable {
        /// Where.
        at: ZmqAddress,
        /// The cause.
        detail: Arc<str>,
    },
    /// Something else listens there, or it is of the wrong kind.
    #[error("{at} is not the socket of an engine's KV events: {detail}")]
    NotZmq {
        /// Where.
        at: ZmqAddress,
        /// The cause.
        detail: Arc<str>,
    },
    /// A message passes the limit.
    #[error("{at} announces a message of more than {limit_bytes} bytes")]
    TooLarge {
        /// Where.
        at: ZmqAddress,
        /// The limit.
        limit_bytes: u64,
    },
    /// The connection is over.
    #[error("{at} closed the connection")]
    Closed {
        /// Where.
        at: ZmqAddress,
    },
    /// Nothing came for too long.
    #[error("{at} did not answer in time")]
    TooSlow {
        /// Where.
        at: ZmqAddress,
    },
}

/// A socket of the crate behind a gate.
struct Guarded<S> {
    socket: S,
    gate: Gate,
}

impl<S: SocketRecv> Guarded<S> {
    async fn next(&mut self) -> Result<Vec<Bytes>, ZmqError> {
        loop {
            tokio::select! {
                biased;
                message = self.socket.recv() => match message {
                    Ok(message) => return Ok(message.into_vec()),
                    Err(error) => return Err(self.gate.end(Some(&error))),
                },
                // Comes after the last message: the socket itself says that its peer is gone.
                event = self.gate.events.next() => match event {
                    Some(SocketEvent::Disconnected(_)) | None => return Err(self.gate.end(None)),
                    Some(_) => {}
                },
            }
        }
    }
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    // A busy engine publishes megabytes a second, in messages of a few kilobytes.
    options.read_buffer(4 << 10, 256 << 10, 8);
    options
}

/// A subscription to one publisher, for as long as the connection lasts.
pub(super) struct Subscriber(Guarded<SubSocket>);

impl Subscriber {
    /// Connects and subscribes to messages that begin with `topic`. What was published before is not received.
    ///
    /// # Errors
    /// If there is no such socket, or it does not shake hands in time.
    pub(super) async fn connect(at: &ZmqAddress, topic: &str) -> Result<Self, ZmqError> {
        let mut socket = SubSocket::with_options(options());
        // Kept by the socket, which sends it to the peer to come.
        socket.subscribe(topic).await.map_err(|error| gate::not_zmq(at, &error))?;
        let gate = Gate::open(&mut socket, at).await?;
        Ok(Self(Guarded { socket, gate }))
    }

    /// The next message's frames. Cancel safe.
    ///
    /// # Errors
    /// When the connection is over.
    pub(super) async fn next(&mut self) -> Result<Vec<Bytes>, ZmqError> {
        self.0.next().await
    }

    /// The next message's frames if they are here already.
    pub(super) fn ready(&mut self) -> Option<Vec<Bytes>> {
        match self.0.socket.recv().now_or_never() {
            Some(Ok(message)) => Some(message.into_vec()),
            // `next` meets the error again, or the end that follows it.
            Some(Err(_)) | None => None,
        }
    }
}

/// What an engine published before and still has, from one number on.
pub(super) struct Replay {
    guarded: Guarded<DealerSocket>,
    at: ZmqAddress,
    has_begun: bool,
}

impl Replay {
    /// Connects, and asks for all batches from number `from` on.
    ///
    /// # Errors
    /// If there is no such socket, or it does not shake hands in time.
    pub(super) async fn ask(at: &ZmqAddress, from: u64) -> Result<Self, ZmqError> {
        let mut socket = DealerSocket::with_options(options());
        let gate = Gate::open(&mut socket, at).await?;
        let request = frames::replay_request(from).map(Bytes::from).to_vec();
        let request = ZmqMessage::try_from(request).expect("a request has two frames");
        socket.send(request).await.map_err(|error| gate::not_zmq(at, &error))?;
        Ok(Self { guarded: Guarded { socket, gate }, at: at.clone(), has_begun: false })
    }

    /// The next message's frames; the last one marks the end. `None` if it has begun and nothing more comes: an engine sends
    /// all it has at once, and its socket drops what finds no room there, perhaps the end too.
    ///
    /// # Errors
    /// When the connection is over, or nothing comes at all.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Bytes>>, ZmqError> {
        let patience = if self.has_begun { REPLAY_SILENCE_MAX } else { REPLAY_BEGIN_MAX };
        match timeout(patience, self.guarded.next()).await {
            Ok(message) => {
                self.has_begun = true;
                message.map(Some)
            }
            Err(_) if self.has_begun => Ok(None),
            Err(_) => Err(ZmqError::TooSlow { at: self.at.clone() }),
        }
    }
}

#[cfg(test)]
mod tests;
