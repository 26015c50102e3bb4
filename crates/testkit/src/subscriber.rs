//! A subscriber to a rank's KV events, for the suite and for tests of doubles and of what they are compared with.
//!
//! In: the endpoints of a publisher. Out: batches, live ([`Subscriber::next`]) and from its memory ([`replay`]).

use std::io;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::msgpack;

/// Batches of one replay that are read.
const REPLAY_BATCHES_MAX: usize = 100_000;

/// One message of a publisher.
#[derive(Clone, Debug, PartialEq)]
pub struct EventBatch {
    /// The topic frame; `None` in replies of releases that leave it out.
    pub topic: Option<String>,
    /// The sequence number.
    pub sequence: u64,
    /// The payload as JSON: `[time, events, rank]`. Hashes that are bytes are hexadecimal strings.
    pub payload: Value,
}

impl EventBatch {
    /// The events.
    pub fn events(&self) -> &[Value] {
        self.payload[1].as_array().map_or(&[], Vec::as_slice)
    }
}

/// A subscription to one publisher.
pub struct Subscriber {
    socket: SubSocket,
}

impl std::fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscriber").finish_non_exhaustive()
    }
}

impl Subscriber {
    /// Subscribes to everything at `endpoint` (`tcp://host:port`). What is published right after may still be missed.
    ///
    /// # Errors
    /// If connecting fails.
    pub async fn connect(endpoint: &str) -> io::Result<Self> {
        let mut socket = SubSocket::new();
        socket.connect(endpoint).await.map_err(io::Error::other)?;
        socket.subscribe("").await.map_err(io::Error::other)?;
        Ok(Self { socket })
    }

    /// The next message's frames.
    ///
    /// # Errors
    /// If none comes within `timeout`, or the connection breaks.
    pub async fn frames(&mut self, timeout: Duration) -> io::Result<Vec<Bytes>> {
        let message = tokio::time::timeout(timeout, self.socket.recv()).await?;
        Ok(message.map_err(io::Error::other)?.into_vec())
    }

    /// The next batch.
    ///
    /// # Errors
    /// As [`Subscriber::frames`], and if the message is no batch.
    pub async fn next(&mut self, timeout: Duration) -> io::Result<EventBatch> {
        batch(&self.frames(timeout).await?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Everything that a publisher still has from sequence number `start` on.
///
/// # Errors
/// If the end mark does not come within `timeout`, or a reply is no batch.
pub async fn replay(endpoint: &str, start: u64, timeout: Duration) -> io::Result<Vec<EventBatch>> {
    let whole = async {
        let mut socket = DealerSocket::new();
        socket.connect(endpoint).await.map_err(io::Error::other)?;
        let request = vec![Bytes::new(), Bytes::copy_from_slice(&start.to_be_bytes())];
        socket
            .send(ZmqMessage::try_from(request).map_err(|_| io::ErrorKind::InvalidInput)?)
            .await
            .map_err(io::Error::other)?;
        let mut batches = Vec::new();
        while batches.len() < REPLAY_BATCHES_MAX {
            let frames = socket.recv().await.map_err(io::Error::other)?.into_vec();
            let rest = frames.get(1..).ok_or(io::ErrorKind::InvalidData)?;
            if rest.len() >= 2 && rest[rest.len() - 2].as_ref() == [0xFF; 8] {
                return Ok(batches);
            }
            batches.push(batch(rest).ok_or(io::ErrorKind::InvalidData)?);
        }
        Ok(batches)
    };
    tokio::time::timeout(timeout, whole).await?
}

/// (topic,) sequence, payload.
fn batch(frames: &[Bytes]) -> Option<EventBatch> {
    let (topic, sequence, payload) = match frames {
        [topic, sequence, payload] => (Some(std::str::from_utf8(topic).ok()?.to_owned()), sequence, payload),
        [sequence, payload] => (None, sequence, payload),
        _ => return None,
    };
    let sequence = u64::from_be_bytes(sequence.as_ref().try_into().ok()?);
    let mut rest = payload.as_ref();
    let payload = msgpack::read(&mut rest)?;
    rest.is_empty().then_some(EventBatch { topic, sequence, payload })
}
