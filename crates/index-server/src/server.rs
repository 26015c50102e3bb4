//! The server: [`Service`] with what runs beside it (followers, tidying, dumps), and its two addresses.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engines::remote::EventFollower;
use forebay_types::{BlockHash, EngineName, Incarnation, RankId};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::AbortHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    follow::follow,
    grpc, http,
    listen::{self, Ended, Limits, Protocol},
    metrics::Metrics,
    service::{Alarm, Engine, EngineSpec, Kind, Refused, Service, ServiceSettings},
};

/// Between two rounds of tidying.
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// Steps of one round, each of some tens of microseconds: what is left waits for the next.
const TIDY_STEPS_MAX: usize = 1000;
/// Hashes in one piece of a dump: 32 KiB.
pub(crate) const DUMP_PIECE_HASHES: usize = 4096;
/// Pieces that wait for a slow reader.
const DUMP_PIECES_MAX: usize = 4;
/// For one rank's hashes. Its follower may be reading a replay.
const CACHED_WITHIN: Duration = Duration::from_secs(10);

/// The index server. Clones share it. Needs a tokio runtime.
#[derive(Clone)]
pub struct IndexServer(Arc<Shared>);

struct Shared {
    service: Arc<Service>,
    metrics: Metrics,
    /// What follows each engine that has addresses.
    followers: Mutex<BTreeMap<EngineName, AbortHandle>>,
    dumps: Arc<Semaphore>,
    tidying: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.tidying.abort();
        self.followers.get_mut().values().for_each(AbortHandle::abort);
    }
}

/// A piece of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DumpItem {
    /// Blocks on the device of one rank.
    Piece {
        engine: EngineName,
        rank: RankId,
        hashes: Vec<BlockHash>,
        /// Why they are missing, if they are.
        missing: Option<String>,
    },
    /// All was said.
    Done { ranks: u64, blocks: u64 },
}

impl IndexServer {
    /// Without engines. Tidies by itself from now on.
    pub fn new(settings: ServiceSettings) -> Self {
        let dumps = Arc::new(Semaphore::new(settings.limits.dumps_max));
        let service = Arc::new(Service::new(settings));
        let tidying = tokio::spawn(tidy(service.clone())).abort_handle();
        Self(Arc::new(Shared {
            service,
            metrics: Metrics::default(),
            followers: Mutex::default(),
            dumps,
            tidying,
        }))
    }

    /// The core.
    pub fn service(&self) -> &Service {
        &self.0.service
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Makes an engine known, and follows it if it has addresses. False if it was known.
    ///
    /// # Errors
    /// Something is wrong with it, its name is taken, or there are too many.
    pub fn register(&self, spec: EngineSpec) -> Result<bool, Refused> {
        let spec = spec.check()?;
        // The lock keeps who unregisters from coming between.
        let mut followers = self.0.followers.lock();
        let Some(engine) = self.0.service.register(spec)? else { return Ok(false) };
        tracing::info!(engine = %engine.name, model = engine.spec.spec.model, "registered");
        if engine.is_followed() {
            let task = tokio::spawn(follow(self.0.service.clone(), engine.clone()));
            followers.insert(engine.name.clone(), task.abort_handle());
        }
        Ok(true)
    }

    /// Forgets an engine and what it cached.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn unregister(&self, name: &str) -> Result<(), Refused> {
        let mut followers = self.0.followers.lock();
        self.0.service.unregister(name)?;
        if let Some(task) = followers.remove(&EngineName::from(name)) {
            task.abort();
        }
        tracing::info!(engine = name, "unregistered");
        Ok(())
    }

    /// All that is cached on devices, rank after rank; of one engine if it is named. At most one rank is held at a time.
    ///
    /// # Errors
    /// No such engine, or too many dumps at a time.
    pub(crate) fn dump(&self, engine: Option<&str>) -> Result<mpsc::Receiver<DumpItem>, Refused> {
        let engines = match engine {
            Some(name) => vec![self.0.service.engine(name)?],
            None => self.0.service.engines(),
        };
        let permit = self.0.dumps.clone().try_acquire_owned().map_err(|_| {
            let max = self.0.service.settings().limits.dumps_max;
            let message =
                format!("{max} dumps are running, which is the limit; try again when one has ended");
            Refused::new(Kind::Full, "too_many_dumps", message)
        })?;
        let (sender, receiver) = mpsc::channel(DUMP_PIECES_MAX);
        tokio::spawn(async move {
            let _until_the_end = permit;
            let _reader_may_be_gone = dump(engines, sender).await;
        });
        Ok(receiver)
    }
}

async fn dump(
    engines: Vec<Arc<Engine>>,
    sender: mpsc::Sender<DumpItem>,
) -> Result<(), mpsc::error::SendError<DumpItem>> {
    let (mut ranks, mut blocks) = (0, 0);
    for engine in engines {
        for (rank, source) in sources(&engine) {
            let (cached, missing) = match source.cached(&engine, rank).await {
                Ok(cached) => (cached, None),
                Err(missing) => (Vec::new(), Some(missing)),
            };
            ranks += 1;
            blocks += cached.len() as u64;
            let name = &engine.name;
            let piece = |hashes: &[BlockHash], missing| DumpItem::Piece {
                engine: name.clone(),
                rank,
                hashes: hashes.to_vec(),
                missing,
            };
            if cached.is_empty() {
                sender.send(piece(&[], missing)).await?;
            }
            for hashes in cached.chunks(DUMP_PIECE_HASHES) {
                sender.send(piece(hashes, None)).await?;
            }
        }
    }
    sender.send(DumpItem::Done { ranks, blocks }).await
}

/// Where the hashes of a rank come from.
enum Source {
    Followed(Arc<EventFollower>),
    Fed,
}

fn sources(engine: &Engine) -> Vec<(RankId, Source)> {
    let life = engine.life.lock();
    let incarnation = life.incarnation;
    let rank = |dp_rank| RankId { incarnation, dp_rank };
    match &life.follower {
        Some(follower) => {
            let ranks = engine.spec.sources.iter().map(|source| source.dp_rank);
            ranks.map(|dp_rank| (rank(dp_rank), Source::Followed(follower.clone()))).collect()
        }
        None => life.fed.keys().map(|dp_rank| (rank(*dp_rank), Source::Fed)).collect(),
    }
}

impl Source {
    async fn cached(&self, engine: &Engine, rank: RankId) -> Result<Vec<BlockHash>, String> {
        let over = || "the engine restarted or was unregistered meanwhile".to_owned();
        match self {
            Source::Fed => {
                let life = engine.life.lock();
                let same = |incarnation: Incarnation| !life.over && incarnation == life.incarnation;
                let rank = life.fed.get(&rank.dp_rank).filter(|_| same(rank.incarnation));
                rank.map(|rank| rank.cached()).ok_or_else(over)
            }
            Source::Followed(follower) => {
                let answer = follower.cached(rank.dp_rank).ok_or_else(over)?;
                match timeout(CACHED_WITHIN, answer).await {
                    Ok(Ok(cached)) => Ok(cached),
                    Ok(Err(_)) => Err(over()),
                    Err(_) => Err("a replay of its events is being read; try again".to_owned()),
                }
            }
        }
    }
}

/// Gives memory back where nothing else does, and says what is left out.
async fn tidy(service: Arc<Service>) {
    let began = Instant::now();
    let mut alarm = Alarm::default();
    let mut every = interval(TIDY_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        for _ in 0..TIDY_STEPS_MAX {
            if !service.index().tidy() {
                break;
            }
            tokio::task::yield_now().await;
        }
        if let Some(risen) = alarm.look(began.elapsed(), &service.index().stats()) {
            tracing::warn!(
                blocks_refused = risen.refused,
                blocks_evicted = risen.evicted,
                removals_unknown = risen.removals_unknown,
                gaps = risen.gaps,
                "the index knows less than it was told; refused and evicted: raise --index-bytes-max"
            );
        }
    }
}

/// Serves HTTP until `shutdown` resolves, then lets running answers finish within [`Limits::shutdown_max`].
pub async fn serve_http(
    listener: TcpListener,
    server: IndexServer,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    let router = http::router(server, &limits);
    listen::serve(listener, router, Protocol::Http1, limits, shutdown).await
}

/// The same for gRPC.
pub async fn serve_grpc(
    listener: TcpListener,
    server: IndexServer,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> Ended {
    let router = grpc::router(server, &limits);
    listen::serve(listener, router, Protocol::Http2, limits, shutdown).await
}
