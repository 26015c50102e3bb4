//! Engines and their lives, the index of what they cache, and what is asked of it. No socket; the time is an argument.
//!
//! Start at [`Service::register`] and [`Service::query`]. How an engine is described is in [`spec`], how well it is heard
//! in [`engine`], what is fed by hand in [`publish`] and, for one rank, [`fed`].
//!
//! Invariants: what changes the index for an engine happens under the lock of its life, so nothing of a life counts after
//! its end; a look-up takes no such lock.

mod alarm;
mod engine;
mod fed;
mod publish;
mod query;
mod refused;
mod spec;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

pub use forebay_engine_events::BLOCKS_MAX_DEFAULT;
use forebay_engines::{KvSnapshot, remote::EventFollower};
use forebay_kv_hash::{BlockHasher, ChainLimits, ChainStats, HashKey, SessionChains};
use forebay_kv_index::{Applied, IndexLimits, IndexStats, KvIndex};
use forebay_types::{EngineName, Incarnation, KvEventBatch, RankId};
use parking_lot::RwLock;

pub(crate) use alarm::Alarm;
pub(crate) use engine::Engine;
pub use engine::{EngineStatus, RankStatus, State};
pub use fed::{BATCH_TOKENS_MAX, FedBatch, FedEvent, FedLayers, FedStored};
pub use publish::{Published, Recipient};
pub use query::{Answer, Overlap, Prefix};
pub(crate) use refused::clipped;
pub use refused::{Kind, Refused};
pub use spec::{CheckedSpec, EngineSpec};

use engine::{Life, fed_status, followed_status};
use fed::FedRank;

/// Bounds of engines, look-ups and dumps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Engines at a time.
    pub engines_max: usize,
    /// Blocks of one rank. Beyond them its blocks are left out, and the state of the engine counts them.
    pub blocks_max: usize,
    /// Tokens of one look-up: the longest prompts of today.
    pub query_tokens_max: usize,
    /// Hashes of one look-up.
    pub query_hashes_max: usize,
    /// Dumps at a time. Each holds the hashes of one rank, 16 MiB for two million blocks.
    pub dumps_max: usize,
    /// How long an engine that cannot be reached is believed to have what it had. Without an address for replays it is
    /// not believed at all.
    pub lease: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            engines_max: 1024,
            blocks_max: BLOCKS_MAX_DEFAULT,
            query_tokens_max: 1 << 20,
            query_hashes_max: 1 << 17,
            dumps_max: 2,
            lease: Duration::from_secs(10),
        }
    }
}

/// What a service is made of.
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    /// Under which blocks are hashed. Those who ask by hashes must share it.
    pub key: HashKey,
    /// Tokens of a block, at least 1.
    pub block_size_tokens: u32,
    /// Of the index.
    pub index: IndexLimits,
    /// Of the hashes of recent prompts.
    pub chains: ChainLimits,
    /// Everything else.
    pub limits: Limits,
}

impl Default for ServiceSettings {
    /// The published key of tests: give one of your own.
    fn default() -> Self {
        Self {
            key: HashKey::GOLDEN,
            block_size_tokens: 16,
            index: IndexLimits::default(),
            chains: ChainLimits::default(),
            limits: Limits::default(),
        }
    }
}

/// Figures of everything.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// Of the index.
    pub index: IndexStats,
    /// Its bound.
    pub bytes_max: u64,
    /// Of the hashes of recent prompts.
    pub chains: ChainStats,
    /// Registered.
    pub engines: u64,
    /// Tokens of a block.
    pub block_size_tokens: u32,
}

/// The index and the engines that it is of.
pub struct Service {
    settings: ServiceSettings,
    hasher: BlockHasher,
    chains: SessionChains,
    index: KvIndex,
    incarnations: AtomicU64,
    engines: RwLock<Engines>,
}

/// Who is registered. Locked after a life, never before.
#[derive(Debug, Default)]
struct Engines {
    by_name: BTreeMap<EngineName, Arc<Engine>>,
    by_life: HashMap<Incarnation, Arc<Engine>>,
    /// Engines of each model.
    models: BTreeMap<String, usize>,
    ranks: usize,
}

impl Service {
    /// Without engines.
    ///
    /// # Panics
    /// If a block has no tokens.
    pub fn new(settings: ServiceSettings) -> Self {
        let hasher = BlockHasher::new(settings.key, settings.block_size_tokens);
        Self {
            hasher,
            chains: SessionChains::new(hasher, settings.chains),
            index: KvIndex::new(settings.index),
            incarnations: AtomicU64::new(1),
            engines: RwLock::default(),
            settings,
        }
    }

    /// What it was made of.
    pub fn settings(&self) -> &ServiceSettings {
        &self.settings
    }

    pub(crate) fn hasher(&self) -> BlockHasher {
        self.hasher
    }

    pub(crate) fn index(&self) -> &KvIndex {
        &self.index
    }

    fn new_incarnation(&self) -> Incarnation {
        Incarnation(self.incarnations.fetch_add(1, Relaxed))
    }

    /// Makes an engine known. `None` if it is known already, with the same specification.
    ///
    /// # Errors
    /// The name is taken by another one, or there are too many.
    pub(crate) fn register(&self, spec: CheckedSpec) -> Result<Option<Arc<Engine>>, Refused> {
        let mut engines = self.engines.write();
        if let Some(known) = engines.by_name.get(&EngineName::from(spec.spec.name.as_str())) {
            if known.spec == spec {
                return Ok(None);
            }
            let message = format!(
                "an engine `{}` is registered with other addresses or another model; DELETE it first",
                spec.spec.name
            );
            return Err(Refused::new(Kind::Exists, "engine_exists", message).at("name"));
        }
        let engines_max = self.settings.limits.engines_max;
        if engines.by_name.len() >= engines_max {
            let message = format!("{engines_max} engines are registered, which is the limit (`engines_max`)");
            return Err(Refused::new(Kind::Full, "too_many_engines", message));
        }
        let ranks_max = usize::from(self.settings.index.ranks_max);
        let ranks = engines.ranks + usize::from(spec.dp_ranks);
        if ranks > ranks_max {
            let message = format!("{ranks} DP ranks would be registered, and the index takes {ranks_max}");
            return Err(Refused::new(Kind::Full, "too_many_ranks", message).at("dp_ranks"));
        }
        engines.ranks = ranks;
        *engines.models.entry(spec.spec.model.clone()).or_default() += 1;
        let incarnation = self.new_incarnation();
        let engine = Arc::new(Engine::new(spec, incarnation));
        engines.by_life.insert(incarnation, engine.clone());
        engines.by_name.insert(engine.name.clone(), engine.clone());
        Ok(Some(engine))
    }

    /// Forgets an engine and what it cached.
    ///
    /// # Errors
    /// There is none of this name.
    pub(crate) fn unregister(&self, name: &str) -> Result<(), Refused> {
        let engine = {
            let mut engines = self.engines.write();
            let engine = engines.by_name.remove(&EngineName::from(name));
            let engine = engine.ok_or_else(|| Refused::no_engine(name))?;
            engines.ranks -= usize::from(engine.spec.dp_ranks);
            let model = &engine.spec.spec.model;
            let left = engines.models.get_mut(model).map(|count| {
                *count -= 1;
                *count
            });
            if left == Some(0) {
                engines.models.remove(model);
            }
            engine
        };
        let mut life = engine.life.lock();
        life.over = true;
        life.follower = None;
        self.forget(&life);
        Ok(())
    }

    /// Takes a life out of the index, for good: its number is never given again.
    fn forget(&self, life: &Life) {
        self.engines.write().by_life.remove(&life.incarnation);
        self.index.remove_incarnation(life.incarnation);
    }

    /// Begins the next life of an engine. False if it is not registered any more.
    pub(crate) fn next_life(&self, engine: &Arc<Engine>, why: Option<Arc<str>>) -> bool {
        self.next_life_of(engine, &mut engine.life.lock(), why)
    }

    fn next_life_of(&self, engine: &Arc<Engine>, life: &mut Life, why: Option<Arc<str>>) -> bool {
        if life.over {
            return false;
        }
        engine.has_lived();
        self.forget(life);
        let incarnation = self.new_incarnation();
        life.next(incarnation, why);
        self.engines.write().by_life.insert(incarnation, engine.clone());
        true
    }

    /// An engine's present life, if it is registered; `follower` follows it from now on.
    pub(crate) fn begin_following(
        &self,
        engine: &Engine,
        follower: impl FnOnce(Incarnation) -> Arc<EventFollower>,
    ) -> Option<Arc<EventFollower>> {
        let mut life = engine.life.lock();
        if life.over {
            return None;
        }
        let follower = follower(life.incarnation);
        life.ended = None;
        life.follower = Some(follower.clone());
        Some(follower)
    }

    /// Applies what a follower reports. `None` if the life is over.
    pub(crate) fn apply(&self, engine: &Engine, batch: &KvEventBatch) -> Option<Applied> {
        let life = engine.life.lock();
        (!life.over && life.incarnation == batch.rank.incarnation).then(|| self.index.apply(batch))
    }

    /// The same for a snapshot.
    pub(crate) fn reset(&self, engine: &Engine, snapshot: KvSnapshot) -> Option<Applied> {
        let KvSnapshot { rank, sequence_next, contents } = snapshot;
        let life = engine.life.lock();
        (!life.over && life.incarnation == rank.incarnation)
            .then(|| self.index.reset(rank, sequence_next, contents))
    }

    pub(crate) fn engine(&self, name: &str) -> Result<Arc<Engine>, Refused> {
        let known = self.engines.read().by_name.get(&EngineName::from(name)).cloned();
        known.ok_or_else(|| Refused::no_engine(name))
    }

    /// All of them, by name.
    pub(crate) fn engines(&self) -> Vec<Arc<Engine>> {
        self.engines.read().by_name.values().cloned().collect()
    }

    /// Figures of everything.
    pub fn stats(&self) -> Stats {
        Stats {
            index: self.index.stats(),
            bytes_max: self.settings.index.bytes_max as u64,
            chains: self.chains.stats(),
            engines: self.engines.read().by_name.len() as u64,
            block_size_tokens: self.settings.block_size_tokens,
        }
    }

    /// Every engine, as operators see it at `now`.
    pub fn status(&self, now: Instant) -> Vec<EngineStatus> {
        self.engines().iter().map(|engine| self.status_of(engine, now)).collect()
    }

    fn status_of(&self, engine: &Engine, now: Instant) -> EngineStatus {
        let life = engine.life.lock();
        let blocks = |dp_rank| {
            let rank = RankId { incarnation: life.incarnation, dp_rank };
            self.index.rank(rank).map_or(0, |stats| stats.blocks)
        };
        let ranks: Vec<RankStatus> = match &life.follower {
            Some(follower) => {
                let one = |rank| followed_status(rank, now, blocks(rank.dp_rank));
                follower.ranks().iter().map(one).collect()
            }
            None => {
                let one =
                    |(dp_rank, rank): (&u16, &FedRank)| fed_status(*dp_rank, rank, now, blocks(*dp_rank));
                life.fed.iter().map(one).collect()
            }
        };
        let worst = ranks.iter().max_by_key(|rank| rank.state);
        let between_lives = engine.is_followed() && life.follower.is_none();
        let detail = worst.and_then(|rank| rank.detail.clone());
        EngineStatus {
            name: engine.name.clone(),
            model: engine.spec.spec.model.clone(),
            state: match worst {
                _ if between_lives => State::Connecting,
                Some(worst) => worst.state,
                None => State::Following,
            },
            detail: detail.or_else(|| life.ended.as_deref().map(ToOwned::to_owned)),
            incarnation: life.incarnation,
            restarts: life.restarts,
            ranks,
        }
    }

    /// Whether what every engine announced before it was registered is known or was asked for; if not, how many are left.
    pub(crate) fn unasked(&self) -> usize {
        self.engines().iter().filter(|engine| !engine.was_asked()).count()
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("stats", &self.index.stats()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
