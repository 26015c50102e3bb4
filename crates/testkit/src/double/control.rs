//! The handle by which a test makes a double misbehave.

use std::io;
use std::sync::{Arc, Weak};

use super::fault::Fault;
use super::{Body, Species, begin_life};

/// Garbage on the event socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventGarbage {
    /// Three frames whose payload is no msgpack.
    NotMsgpack,
    /// A sequence number of three bytes.
    ShortSequence,
    /// Topic and sequence, no payload.
    TwoFrames,
    /// A payload that is msgpack of another shape: the number 7.
    OtherShape,
    /// A payload that claims an array of four billion events.
    HugeLength,
}

impl EventGarbage {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::NotMsgpack, Self::ShortSequence, Self::TwoFrames, Self::OtherShape, Self::HugeLength];

    fn frames(self, topic: &str) -> Vec<Vec<u8>> {
        let topic = topic.as_bytes().to_vec();
        let sequence = u64::from(u32::MAX).to_be_bytes().to_vec();
        match self {
            Self::NotMsgpack => vec![topic, sequence, vec![0xC1; 64]],
            Self::ShortSequence => vec![topic, vec![1, 2, 3], vec![0x90]],
            Self::TwoFrames => vec![topic, sequence],
            Self::OtherShape => vec![topic, sequence, vec![7]],
            Self::HugeLength => {
                vec![topic, sequence, vec![0x93, 0xCB, 0, 0, 0, 0, 0, 0, 0, 0, 0xDD, 0xFF, 0xFF, 0xFF, 0xFF]]
            }
        }
    }
}

/// Controls a double; outlives it without effect.
#[derive(Clone, Debug)]
pub struct Control {
    species: Weak<dyn Species>,
}

impl Control {
    pub(super) fn new(species: &Arc<dyn Species>) -> Self {
        Self { species: Arc::downgrade(species) }
    }

    fn body(&self) -> Option<Arc<Body>> {
        self.species.upgrade().map(|species| species.body().clone())
    }

    /// From now on, `fault`; it replaces an earlier one.
    pub fn inject(&self, fault: Fault) {
        if let Some(body) = self.body() {
            body.set_fault(Some(fault));
        }
    }

    /// No fault any more. Connections that hang stay as they are.
    pub fn heal(&self) {
        if let Some(body) = self.body() {
            body.set_fault(None);
        }
    }

    /// Kills the process: every connection breaks, connecting is refused, event sockets and side channels close.
    /// Returns when that is so.
    pub async fn die(&self) {
        if let Some(body) = self.body() {
            body.kill().await;
        }
    }

    /// Kills the engine core alone, as a failed assertion in it does: vLLM's requests end with 500 `EngineDeadError`,
    /// `/health` says 503, and after `death_linger` the server closes.
    pub fn kill_engine_core(&self) {
        if let Some(body) = self.body() {
            body.engine_died(body.death_linger);
        }
    }

    /// A new life on the same ports: empty cache, other engine ids and hashes, event sequence from 0.
    ///
    /// # Errors
    /// If listening fails.
    pub async fn restart(&self) -> io::Result<()> {
        let Some(species) = self.species.upgrade() else { return Ok(()) };
        species.body().kill().await;
        begin_life(species).await
    }

    /// No rank takes a step until [`Control::resume`]; requests are accepted and wait.
    pub fn pause(&self) {
        if let Some(body) = self.body() {
            body.set_paused(true);
        }
    }

    /// Ends [`Control::pause`].
    pub fn resume(&self) {
        if let Some(body) = self.body() {
            body.set_paused(false);
        }
    }

    /// The next `batches` event batches are counted and kept for replay, but never sent: a gap.
    pub fn lose_events(&self, batches: usize) {
        if let Some(body) = self.body() {
            body.lies.lock().batches_to_lose = batches;
        }
    }

    /// Sends garbage on a rank's event socket.
    pub async fn send_garbage(&self, rank: usize, garbage: EventGarbage) {
        let Some(body) = self.body() else { return };
        let rank = body.life().and_then(|life| life.ranks.get(rank).cloned());
        if let Some(rank) = rank {
            rank.publish_raw(garbage.frames(&body.topic)).await;
        }
    }
}
