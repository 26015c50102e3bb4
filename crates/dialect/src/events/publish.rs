//! The two sockets: PUB for what happens, ROUTER for what was missed.
//!
//! Frames are those of vLLM 0.26 to 0.32: `[topic, sequence, payload]` published; to a replay request `["", first]` come
//! `["", topic, sequence, payload]` for each batch that is kept, and `["", "", -1, ""]`. Sequences are 8 bytes big-endian.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout};
use zeromq::{Endpoint, PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use super::ring::Ring;
use crate::options::EventOptions;

/// Time that one replayed batch may wait for a client that does not read.
const REPLAY_STALL_MAX: Duration = Duration::from_secs(5);
/// Ends a replay.
const END_OF_REPLAY: [u8; 8] = [0xff; 8];

/// The publishing end. One task owns it.
pub(crate) struct Publisher {
    socket: PubSocket,
    topic: Bytes,
    sequence: u64,
    ring: Arc<Mutex<Ring>>,
}

/// Where events come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventPorts {
    pub(crate) publish: u16,
    pub(crate) replay: u16,
}

impl Publisher {
    /// Binds both sockets, and serves replays until `stopping` closes.
    ///
    /// # Errors
    /// If an address cannot be bound.
    pub(crate) async fn bind(
        options: &EventOptions,
        stopping: watch::Receiver<()>,
    ) -> Result<(Self, EventPorts), ZmqError> {
        let mut socket = PubSocket::new();
        let publish = port(&socket.bind(&endpoint(options, options.port)).await?);
        let mut router = RouterSocket::new();
        let replay = port(&router.bind(&endpoint(options, options.replay_port)).await?);
        let topic = Bytes::from(options.topic.clone());
        let ring = Arc::new(Mutex::new(Ring::new(options.buffer_steps, options.buffer_bytes_max)));
        tokio::spawn(serve_replays(router, topic.clone(), ring.clone(), stopping));
        Ok((Self { socket, topic, sequence: 0, ring }, EventPorts { publish, replay }))
    }

    /// Publishes one batch under the next number. Never waits: slow subscribers miss batches, and replay them.
    pub(crate) async fn publish(&mut self, payload: Vec<u8>) {
        let (sequence, payload) = (self.sequence, Bytes::from(payload));
        self.sequence += 1;
        self.ring.lock().push(sequence, payload.clone());
        let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
        if let Err(error) = self.socket.send(message(vec![self.topic.clone(), number, payload])).await {
            tracing::warn!(%error, sequence, "a batch of KV events was not published");
        }
    }
}

fn endpoint(options: &EventOptions, port: u16) -> String {
    format!("tcp://{}", SocketAddr::from((options.bind, port)))
}

fn port(bound: &Endpoint) -> u16 {
    match bound {
        Endpoint::Tcp(_, port) => *port,
        _ => unreachable!("only TCP is bound"),
    }
}

fn message(frames: Vec<Bytes>) -> ZmqMessage {
    ZmqMessage::try_from(frames).expect("there are frames")
}

async fn serve_replays(
    mut router: RouterSocket,
    topic: Bytes,
    ring: Arc<Mutex<Ring>>,
    mut stopping: watch::Receiver<()>,
) {
    loop {
        let request = tokio::select! {
            _ = stopping.changed() => return,
            request = router.recv() => request,
        };
        let frames = match request {
            Ok(request) => request.into_vec(),
            Err(error) => {
                tracing::warn!(%error, "the replay socket failed");
                return;
            }
        };
        // As a ROUTER sees it: who asks, an empty frame, the first number.
        let [who, empty, first] = &frames[..] else { continue };
        let Ok(first) = <[u8; 8]>::try_from(&first[..]) else { continue };
        if !empty.is_empty() {
            continue;
        }
        let kept = ring.lock().since(u64::from_be_bytes(first));
        let answers = kept.into_iter().map(|(sequence, payload)| {
            let sequence = Bytes::copy_from_slice(&sequence.to_be_bytes());
            message(vec![who.clone(), Bytes::new(), topic.clone(), sequence, payload])
        });
        let end = Bytes::from_static(&END_OF_REPLAY);
        let end = message(vec![who.clone(), Bytes::new(), Bytes::new(), end, Bytes::new()]);
        for answer in answers.chain([end]) {
            if !matches!(timeout(REPLAY_STALL_MAX, router.send(answer)).await, Ok(Ok(()))) {
                tracing::debug!("a replay was broken off");
                break;
            }
        }
    }
}
