//! The shell around one rank: a task that takes steps, paces them, and publishes what they did.
//!
//! In: requests put into [`Rank::core`] (then [`Rank::wake`]), faults set on [`Pace`] and [`Lies`]. Out: tokens in the
//! requests' outlets, events on the rank's sockets. Start at [`Rank::run`]; what reaches other engines goes through
//! [`Neighbours`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::nixl::Arrived;
use super::{Core, Gauges, Load, Offer, Step};
use crate::events::publisher::Publisher;
use crate::events::wire::{HashFormat, Shape, encode, encode_load};
use crate::events::{Batch, KvEvent};
use crate::kv::mix;

/// How long an idle rank sleeps if nothing wakes it.
const IDLE: Duration = Duration::from_secs(3600);

/// What a rank needs of the world outside of its engine.
pub(crate) trait Neighbours: Send + Sync + 'static {
    /// Brings the KV of `load`; an error is what the request fails with.
    fn fetch(&self, load: Load) -> BoxFuture<'static, Result<Arrived, String>>;
    /// SGLang: a room's prompt is computed.
    fn offer(&self, offer: Offer);
    /// The rank died of an assertion; the whole engine goes with it.
    fn died(&self);
}

/// How long steps take. Shared by an engine's ranks and lives.
#[derive(Debug)]
pub(crate) struct Pace {
    step: Duration,
    prompt_token: Duration,
    state: Mutex<PaceState>,
}

#[derive(Debug)]
struct PaceState {
    factor: f64,
    paused: bool,
}

impl Pace {
    pub(crate) fn new(step: Duration, prompt_token: Duration) -> Self {
        Self { step, prompt_token, state: Mutex::new(PaceState { factor: 1.0, paused: false }) }
    }

    pub(crate) fn set_factor(&self, factor: f64) {
        self.state.lock().factor = factor;
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.state.lock().paused = paused;
    }

    pub(crate) fn paused(&self) -> bool {
        self.state.lock().paused
    }

    async fn wait(&self, started: Instant, prefilled: usize) {
        let time = self.step + self.prompt_token * prefilled as u32;
        let time = time.mul_f64(self.state.lock().factor);
        if time.is_zero() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep_until(started + time).await;
        }
    }
}

/// What a rank's events say that is not so.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lies {
    /// `block_size` in stored events.
    pub(crate) block_size: Option<usize>,
    /// Parents are hashes that were never stored.
    pub(crate) unknown_parents: bool,
    /// This many batches are counted but not sent.
    pub(crate) batches_to_lose: usize,
}

impl Lies {
    fn apply(&self, events: &mut [KvEvent]) {
        for event in events {
            let KvEvent::Stored(stored) = event else { continue };
            stored.block_size = self.block_size.unwrap_or(stored.block_size);
            if self.unknown_parents {
                stored.parent = Some(mix(stored.hashes[0], 0x6c69_6573));
            }
        }
    }
}

/// How a rank writes its events.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EventFormat {
    pub(crate) shape: Shape,
    pub(crate) hashes: HashFormat,
}

/// One rank of one life of an engine.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) index: u32,
    pub(crate) core: Mutex<Core>,
    pub(crate) wake: Notify,
    pub(crate) pace: Arc<Pace>,
    pub(crate) lies: Arc<Mutex<Lies>>,
    pub(crate) publisher: Option<Publisher>,
    /// SGLang's load socket.
    pub(crate) load_publisher: Option<Publisher>,
    /// What it said last.
    pub(crate) last_load: Mutex<Option<Gauges>>,
    pub(crate) format: EventFormat,
    /// Told after every step, for those who wait for a state.
    pub(crate) stepped: Arc<Notify>,
}

impl Rank {
    /// Steps until the task is aborted or the engine dies.
    pub(crate) async fn run(self: Arc<Self>, neighbours: Arc<dyn Neighbours>) {
        let mut loads = JoinSet::new();
        loop {
            let until = {
                let mut core = self.core.lock();
                core.expire(Instant::now());
                let idle = core.dead() || self.pace.paused() || !core.busy();
                idle.then(|| core.next_expiry().unwrap_or_else(|| Instant::now() + IDLE))
            };
            self.publish_load().await;
            if let Some(until) = until {
                self.stepped.notify_waiters();
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = tokio::time::sleep_until(until) => {}
                    Some(_) = loads.join_next() => {}
                }
                continue;
            }
            let started = Instant::now();
            let step = self.core.lock().step(started);
            if step.died {
                neighbours.died();
                return;
            }
            self.clone().reach_out(&step, &neighbours, &mut loads);
            self.pace.wait(started, step.prefilled).await;
            self.give_out(step, &neighbours).await;
            self.stepped.notify_waiters();
        }
    }

    fn reach_out(self: Arc<Self>, step: &Step, neighbours: &Arc<dyn Neighbours>, loads: &mut JoinSet<()>) {
        for load in &step.loads {
            let (Load::Remote { request, .. } | Load::Room { request, .. }) = load;
            let (rank, request) = (self.clone(), request.clone());
            let fetched = neighbours.fetch(load.clone());
            loads.spawn(async move {
                let result = fetched.await;
                rank.core.lock().loaded(&request, result);
                rank.wake.notify_one();
            });
        }
    }

    async fn give_out(&self, step: Step, neighbours: &Arc<dyn Neighbours>) {
        for offer in step.offers {
            neighbours.offer(offer);
        }
        if !step.events.is_empty() {
            self.publish(step.events).await;
        }
        step.deliveries.into_iter().for_each(super::Delivery::perform);
    }

    async fn publish(&self, mut events: Vec<KvEvent>) {
        let Some(publisher) = &self.publisher else { return };
        let lost = {
            let mut lies = self.lies.lock();
            lies.apply(&mut events);
            let lost = lies.batches_to_lose > 0;
            lies.batches_to_lose = lies.batches_to_lose.saturating_sub(1);
            lost
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let batch = Batch { time: now.as_secs_f64(), events, rank: self.index };
        let payload = encode(&batch, self.format.shape, self.format.hashes);
        if lost {
            publisher.lose(payload).await;
        } else {
            publisher.publish(payload).await;
        }
    }

    /// SGLang: what the rank does, if that has changed.
    async fn publish_load(&self) {
        let Some(publisher) = &self.load_publisher else { return };
        let (gauges, counts) = {
            let core = self.core.lock();
            (core.gauges(), core.counts())
        };
        let changed = self.last_load.lock().replace(gauges) != Some(gauges);
        if changed {
            let capacity = gauges.blocks * self.core.lock().settings().block_size;
            publisher.publish(encode_load(self.index, &gauges, &counts, capacity)).await;
        }
    }

    /// The sockets that are open.
    pub(crate) fn publishers(&self) -> impl Iterator<Item = &Publisher> {
        self.publisher.iter().chain(&self.load_publisher)
    }

    /// Publishes frames that no engine would send.
    pub(crate) async fn publish_raw(&self, frames: Vec<Vec<u8>>) {
        if let Some(publisher) = &self.publisher {
            publisher.publish_raw(frames.into_iter().map(Bytes::from).collect()).await;
            publisher.flush().await;
        }
    }
}
