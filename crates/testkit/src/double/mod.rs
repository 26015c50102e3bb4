//! What all doubles have in common: ports, lives, faults, and the handle that a test holds.
//!
//! In: a [`Species`], which knows how to start a life and what to route. Out: [`Running`], which every double derefs
//! to, and [`Control`]. A [`Body`] lives as long as the double; a [`Life`] as long as the process it plays.

pub(crate) mod control;
pub(crate) mod fault;
pub(crate) mod net;
pub(crate) mod ports;
pub(crate) mod seen;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engine::rank::{Lies, Pace, Rank};
use crate::engine::request::{Outlet, Work};
use crate::engine::{Counts, Gauges};
use crate::kv::mix;
use control::Control;
use fault::Fault;
use net::{Port, Server};
use ports::RankPorts;
use seen::{Seen, SeenRequest};

/// What lives as long as a double, over all its lives.
#[derive(Debug)]
pub(crate) struct Body {
    /// Differs between doubles: engine ids, hash roots and random ids come from it.
    pub(crate) identity: u64,
    pub(crate) port: Port,
    pub(crate) ports: Vec<RankPorts>,
    pub(crate) block_size: usize,
    pub(crate) topic: String,
    pub(crate) death_linger: Duration,
    pub(crate) pace: Arc<Pace>,
    pub(crate) lies: Arc<Mutex<Lies>>,
    pub(crate) seen: Seen,
    pub(crate) stepped: Arc<Notify>,
    /// Requests that are being answered.
    pub(crate) answering: AtomicU64,
    fault: Mutex<Option<Fault>>,
    life: Mutex<Option<Arc<Life>>>,
    server: Mutex<Option<Server>>,
    lives: AtomicU64,
    ids: AtomicU64,
}

/// What a [`Body`] is made of.
#[derive(Debug)]
pub(crate) struct BodyOptions {
    pub(crate) port: u16,
    pub(crate) ports: Vec<RankPorts>,
    pub(crate) block_size: usize,
    pub(crate) topic: String,
    pub(crate) death_linger: Duration,
    pub(crate) step: Duration,
    pub(crate) prompt_token: Duration,
}

impl Body {
    pub(crate) fn new(options: BodyOptions) -> io::Result<Self> {
        let port = Port::take(options.port)?;
        Ok(Self {
            identity: mix(u64::from(port.number()), u64::from(std::process::id())),
            port,
            ports: options.ports,
            block_size: options.block_size,
            topic: options.topic,
            death_linger: options.death_linger,
            pace: Arc::new(Pace::new(options.step, options.prompt_token)),
            lies: Arc::default(),
            seen: Seen::default(),
            stepped: Arc::default(),
            answering: AtomicU64::new(0),
            fault: Mutex::new(None),
            life: Mutex::new(None),
            server: Mutex::new(None),
            lives: AtomicU64::new(0),
            ids: AtomicU64::new(0),
        })
    }

    /// The engine that lives now, alive or (for a while) dead.
    pub(crate) fn life(&self) -> Option<Arc<Life>> {
        self.life.lock().clone()
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault.lock().clone()
    }

    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock() = fault;
        self.apply_fault();
    }

    /// A new number, different each time and in each double.
    pub(crate) fn unique(&self) -> u64 {
        mix(self.identity, self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// Puts the fault to the places that act on it.
    fn apply_fault(&self) {
        let fault = self.fault();
        let fault = fault.as_ref();
        if let Some(server) = &*self.server.lock() {
            server.set_door(Fault::door(fault));
        }
        self.pace.set_factor(Fault::slowness(fault));
        let mut lies = self.lies.lock();
        (lies.block_size, lies.unknown_parents) = Fault::event_lies(fault);
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.pace.set_paused(paused);
        for rank in self.life().iter().flat_map(|life| &life.ranks) {
            rank.wake.notify_one();
        }
    }

    /// The process is gone: connections break, ports refuse.
    pub(crate) async fn kill(&self) {
        let server = self.server.lock().take();
        if let Some(server) = server {
            server.stopped().await;
        }
        let life = self.life.lock().take();
        if let Some(life) = life {
            life.end().await;
        }
    }

    /// As [`Body::kill`], without waiting.
    fn abandon(&self) {
        if let Some(server) = self.server.lock().take() {
            server.stop();
        }
        if let Some(life) = self.life.lock().take() {
            life.abandon();
        }
    }

    /// The engine died of itself: requests fail, and after `linger` the server closes.
    pub(crate) fn engine_died(self: &Arc<Self>, linger: Duration) {
        let Some(life) = self.life() else { return };
        if life.dead() {
            return;
        }
        if linger.is_zero()
            && let Some(server) = &*self.server.lock()
        {
            server.stop(); // before anybody can be told of the failure
        }
        life.die();
        self.stepped.notify_waiters();
        let until = Instant::now() + linger;
        let body = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            let Some(body) = body.upgrade() else { return };
            let still_this_one = body.life().is_some_and(|now| Arc::ptr_eq(&now, &life));
            drop(life);
            if still_this_one {
                body.kill().await;
            }
        });
    }
}

/// A kind of double.
pub(crate) trait Species: fmt::Debug + Send + Sync + 'static {
    fn body(&self) -> &Arc<Body>;
    /// Starts ranks and sockets for the `number`th life.
    fn start_life(self: Arc<Self>, number: u64) -> BoxFuture<'static, io::Result<Life>>;
    /// What the HTTP server serves.
    fn router(self: Arc<Self>) -> Router;
}

/// Begins a life of a double whose ports are free.
pub(crate) async fn begin_life(species: Arc<dyn Species>) -> io::Result<()> {
    let body = species.body().clone();
    let number = body.lives.fetch_add(1, Ordering::Relaxed);
    let life = species.clone().start_life(number).await?;
    *body.life.lock() = Some(Arc::new(life));
    *body.server.lock() = Some(Server::start(body.port.listen()?, species.router()));
    body.apply_fault();
    Ok(())
}

/// One life of an engine.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) ranks: Vec<Arc<Rank>>,
    /// NIXL's engine id of each rank.
    pub(crate) engine_ids: Vec<String>,
    pub(crate) born: SystemTime,
    dead: AtomicBool,
    tasks: Mutex<JoinSet<()>>,
    side_channels: Vec<Server>,
}

impl Life {
    pub(crate) fn new(
        ranks: Vec<Arc<Rank>>,
        engine_ids: Vec<String>,
        tasks: JoinSet<()>,
        side_channels: Vec<Server>,
    ) -> Self {
        let (dead, born) = (AtomicBool::new(false), SystemTime::now());
        Self { ranks, engine_ids, born, dead, tasks: Mutex::new(tasks), side_channels }
    }

    /// Gives a request to a rank: the one asked for, or the one with the fewest requests.
    pub(crate) fn submit(&self, rank: Option<usize>, work: Work, outlet: Arc<Outlet>) -> Arc<Rank> {
        let load = |rank: &&Arc<Rank>| {
            let gauges = rank.core.lock().gauges();
            gauges.waiting * 4 + gauges.running // vLLM's internal balancing weighs the two like this
        };
        let rank = match rank {
            Some(index) => &self.ranks[index],
            None => self.ranks.iter().min_by_key(load).expect("there is at least one rank"),
        };
        rank.core.lock().submit(work, outlet);
        rank.wake.notify_one();
        rank.clone()
    }

    /// Aborts the requests whose engine id is `asked` for; how many there were.
    pub(crate) fn abort(&self, asked: impl Fn(&str) -> bool) -> usize {
        let mut aborted = 0;
        for rank in &self.ranks {
            let mut core = rank.core.lock();
            for id in core.ids() {
                aborted += usize::from(asked(&id) && core.abort(&id, false));
            }
            rank.wake.notify_one();
        }
        aborted
    }

    /// Forgets all cached blocks; false if a rank refused, because requests have blocks.
    pub(crate) fn reset_prefix_cache(&self) -> bool {
        let resets: Vec<bool> = self.ranks.iter().map(|rank| rank.core.lock().reset_prefix_cache()).collect();
        resets.into_iter().all(|reset| reset)
    }

    pub(crate) fn dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// The engine core is dead: all ranks, all requests. The HTTP server may live on for a while.
    fn die(&self) {
        self.dead.store(true, Ordering::Release);
        for rank in &self.ranks {
            rank.core.lock().die();
            rank.wake.notify_one();
        }
        self.side_channels.iter().for_each(Server::stop);
    }

    /// Ends every task and closes every socket.
    async fn end(&self) {
        self.dead.store(true, Ordering::Release);
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        tasks.shutdown().await;
        for side_channel in &self.side_channels {
            side_channel.stopped().await;
        }
        for rank in &self.ranks {
            rank.core.lock().die();
            for publisher in rank.publishers() {
                publisher.close().await;
            }
        }
    }

    fn abandon(&self) {
        self.dead.store(true, Ordering::Release);
        self.tasks.lock().abort_all();
        self.side_channels.iter().for_each(Server::stop);
        self.ranks.iter().for_each(|rank| rank.core.lock().die());
    }
}

/// Where a rank's KV events are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventEndpoints {
    /// `tcp://127.0.0.1:PORT` of the PUB socket.
    pub events: String,
    /// The same of the ROUTER socket, if there is one.
    pub replay: Option<String>,
}

/// A double that runs. Every kind of double derefs to it. Stops when dropped.
#[derive(Debug)]
pub struct Running {
    species: Arc<dyn Species>,
}

/// How often [`Running::wait_until`] looks if nothing steps.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

impl Running {
    pub(crate) async fn start(species: Arc<dyn Species>) -> io::Result<Self> {
        begin_life(species.clone()).await?;
        Ok(Self { species })
    }

    fn body(&self) -> &Arc<Body> {
        self.species.body()
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// The port of the HTTP server. It stays over restarts.
    pub fn port(&self) -> u16 {
        self.body().port.number()
    }

    /// The handle by which it is made to misbehave.
    pub fn control(&self) -> Control {
        Control::new(&self.species)
    }

    /// Where each rank's KV events are; empty if it publishes none.
    pub fn event_endpoints(&self) -> Vec<EventEndpoints> {
        let tcp = |port: &Port| format!("tcp://127.0.0.1:{}", port.number());
        let endpoints = |ports: &RankPorts| {
            let events = ports.events.as_ref().map(tcp)?;
            Some(EventEndpoints { events, replay: ports.replay.as_ref().map(tcp) })
        };
        self.body().ports.iter().filter_map(endpoints).collect()
    }

    /// A rank's sums since the engine started; zeros while it is down.
    pub fn counts(&self, rank: usize) -> Counts {
        self.rank(rank).map(|rank| rank.core.lock().counts()).unwrap_or_default()
    }

    /// What a rank does now; zeros while the engine is down.
    pub fn gauges(&self, rank: usize) -> Gauges {
        self.rank(rank).map(|rank| rank.core.lock().gauges()).unwrap_or_default()
    }

    /// The engine's own hashes of the blocks that a rank has cached, in ascending order, each once.
    pub fn cached_hashes(&self, rank: usize) -> Vec<u64> {
        self.rank(rank).map(|rank| rank.core.lock().cached_hashes()).unwrap_or_default()
    }

    /// Whether it answers requests with tokens.
    pub fn alive(&self) -> bool {
        self.body().life().is_some_and(|life| !life.dead())
    }

    /// The newest requests with a body that arrived, oldest first; at most 1,024.
    pub fn seen(&self) -> Vec<SeenRequest> {
        self.body().seen.list()
    }

    /// Waits until `state` holds, looking again after every step and at least every few milliseconds.
    ///
    /// # Panics
    /// If it does not within `timeout`.
    pub async fn wait_until(&self, timeout: Duration, mut state: impl FnMut(&Self) -> bool) {
        let holds = async {
            while !state(self) {
                let stepped = self.body().stepped.notified();
                let _look_again = tokio::time::timeout(LOOK_AGAIN, stepped).await;
            }
        };
        tokio::time::timeout(timeout, holds).await.expect("the double reaches the state in time");
    }

    fn rank(&self, rank: usize) -> Option<Arc<Rank>> {
        self.body().life()?.ranks.get(rank).cloned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.body().abandon();
    }
}

/// An id in the form of a random UUID.
pub(crate) fn uuid(seed: u64) -> String {
    let (a, b) = (mix(seed, 1), mix(seed, 2));
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        a >> 32,
        (a >> 16) & 0xFFFF,
        a & 0xFFF,
        0x8000 | (b >> 50 & 0x3FFF),
        b & 0xFFFF_FFFF_FFFF
    )
}
