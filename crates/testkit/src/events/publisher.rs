//! The sockets on which a rank publishes its events: ZMQ PUB, and ROUTER for replays.
//!
//! In: batches by [`Publisher::publish`]. Out: frames on the sockets. A publisher is one life of an engine: its
//! sequence starts at 0 and its ring of old batches empty; the ports stay.
//!
//! Evidence: three PUB frames (topic, sequence as 8 bytes big-endian, payload) as captured in
//! `fixtures/vllm/kv_events/stream.jsonl`; replay answers and their end mark from vLLM 0.32's `kv_events.py`, without
//! the topic frame up to vLLM 0.25.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Batches that wait to be sent; the engine's step waits beyond it.
const QUEUE_BATCHES_MAX: usize = 1024;
/// The mark that ends a replay: -1.
const END_OF_REPLAY: [u8; 8] = [0xFF; 8];

/// How a publisher behaves.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) topic: String,
    /// Old batches kept for replay.
    pub(crate) buffer_steps: usize,
    /// Replay answers carry the topic frame.
    pub(crate) replay_topic: bool,
}

/// What goes out.
enum Message {
    Payload(Vec<u8>),
    /// As `Payload`, but it never reaches a subscriber: only a replay has it.
    Lost(Vec<u8>),
    /// These frames as they are, outside of the sequence: a lie.
    Raw(Vec<Bytes>),
    /// Answers when everything before it has been handed to the socket.
    Flush(oneshot::Sender<()>),
}

type Ring = Arc<Mutex<VecDeque<(u64, Bytes)>>>;

/// A rank's two sockets, open until dropped.
#[derive(Debug)]
pub(crate) struct Publisher {
    sender: mpsc::Sender<Message>,
    stop: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Publisher {
    /// Publishes on `events` and answers replays on `replay`, if given.
    pub(crate) async fn start(
        events: TcpListener,
        replay: Option<TcpListener>,
        options: Options,
    ) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel(QUEUE_BATCHES_MAX);
        let ring: Ring = Ring::default();
        let mut publisher = PubSocket::new();
        publisher.bind_listener(events).await.map_err(io::Error::other)?;
        let (stop, stopped) = watch::channel(false);
        let mut tasks =
            vec![tokio::spawn(send(publisher, receiver, ring.clone(), options.clone(), stopped.clone()))];
        if let Some(listener) = replay {
            let mut router = RouterSocket::new();
            router.bind_listener(listener).await.map_err(io::Error::other)?;
            tasks.push(tokio::spawn(answer(router, ring, options, stopped)));
        }
        Ok(Self { sender, stop, tasks: Mutex::new(tasks) })
    }

    /// Sends a payload under the next sequence number.
    pub(crate) async fn publish(&self, payload: Vec<u8>) {
        let _closed_with_the_engine = self.sender.send(Message::Payload(payload)).await;
    }

    /// Counts a payload and keeps it for replay without sending it.
    pub(crate) async fn lose(&self, payload: Vec<u8>) {
        let _closed_with_the_engine = self.sender.send(Message::Lost(payload)).await;
    }

    /// Sends these frames.
    pub(crate) async fn publish_raw(&self, frames: Vec<Bytes>) {
        let _closed_with_the_engine = self.sender.send(Message::Raw(frames)).await;
    }

    /// Closes the sockets; returns when their ports are free to listen on again.
    pub(crate) async fn close(&self) {
        self.stop.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            let _ended = task.await;
        }
    }

    /// Waits until everything before it was given to the socket.
    pub(crate) async fn flush(&self) {
        let (sender, receiver) = oneshot::channel();
        let _closed_with_the_engine = self.sender.send(Message::Flush(sender)).await;
        let _closed_with_the_engine = receiver.await;
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.lock().iter().for_each(JoinHandle::abort);
    }
}

async fn send(
    mut socket: PubSocket,
    mut receiver: mpsc::Receiver<Message>,
    ring: Ring,
    options: Options,
    mut stopped: watch::Receiver<bool>,
) {
    let topic = Bytes::from(options.topic.into_bytes());
    let mut sequence: u64 = 0;
    loop {
        let message = tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(message) = receiver.recv() => message,
            else => break,
        };
        let lost = matches!(message, Message::Lost(_));
        let frames = match message {
            Message::Payload(payload) | Message::Lost(payload) => {
                let payload = Bytes::from(payload);
                let mut old = ring.lock();
                old.push_back((sequence, payload.clone()));
                if old.len() > options.buffer_steps {
                    old.pop_front();
                }
                let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
                sequence += 1;
                vec![topic.clone(), number, payload]
            }
            Message::Raw(frames) => frames,
            Message::Flush(done) => {
                let _asker_gave_up = done.send(());
                continue;
            }
        };
        if lost {
            continue;
        }
        if let Ok(message) = ZmqMessage::try_from(frames) {
            let _subscribers_may_be_gone = socket.send(message).await;
        }
    }
    let _best_effort = socket.close().await;
}

async fn answer(mut socket: RouterSocket, ring: Ring, options: Options, mut stopped: watch::Receiver<bool>) {
    let topic = Bytes::from(options.topic.into_bytes());
    loop {
        let request = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Ok(request) = socket.recv() => request,
            else => break,
        };
        let frames = request.into_vec();
        let [client, _, start] = frames.as_slice() else { continue };
        // As int.from_bytes does it: any length; what exceeds u64 asks for nothing that exists.
        let start =
            start.iter().fold(0u128, |number, byte| (number << 8 | u128::from(*byte)) & (u128::MAX >> 8));
        let kept: Vec<(u64, Bytes)> =
            ring.lock().iter().filter(|(number, _)| u128::from(*number) >= start).cloned().collect();
        let end = (Bytes::new(), Bytes::copy_from_slice(&END_OF_REPLAY), Bytes::new());
        let replies = kept
            .into_iter()
            .map(|(number, payload)| (topic.clone(), Bytes::copy_from_slice(&number.to_be_bytes()), payload));
        for (topic, number, payload) in replies.chain([end]) {
            let mut frames = vec![client.clone(), Bytes::new()];
            if options.replay_topic {
                frames.push(topic);
            }
            frames.extend([number, payload]);
            let Ok(message) = ZmqMessage::try_from(frames) else { break };
            if socket.send(message).await.is_err() {
                break; // the asker is gone
            }
        }
    }
    let _best_effort = socket.close().await;
}
