//! Watching an engine for one life: whether it lives, what it carries, what it caches.
//!
//! In: what [`attach`](super::attach) found ([`ObservePlan`]) and the engine's [`Endpoint`]. Out: everything through
//! [`Reports`], so that a gateway uses it for engines given by URL and an agent for the engine beside it. Start at
//! [`observe`]; where only its KV events are of interest, at [`follow_events`]; where they are wanted
//! as the engine said them, at [`listen`]. One task looks at the engine about once a second (`watch`; what it makes of what it sees is in `pulse`);
//! one task a rank follows its KV events (`follow`; what it makes of them is in `feed`).
//!
//! Invariants: the tasks end with the [`Observer`] or with the engine's death, which is reported exactly once; every wait
//! has a bound; nothing that an engine sends ends the process.

mod events;
mod feed;
mod follow;
mod listen;
mod pulse;
mod watch;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engine_events::{BLOCKS_MAX_DEFAULT, RankSettings, RankStats};
use forebay_engine_wire::{
    discovery::{Dialled, Server},
    metrics::Pool,
};
use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, Incarnation, RankId};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    task::{JoinHandle, JoinSet},
};

use super::client::Endpoint;
use crate::{
    driver::{CacheSight, EngineFacts},
    reports::{KvSnapshot, Notice, Reports},
};
pub use events::{EventFollower, EventPlan, FollowedRank, follow_events};
use feed::Feed;
use follow::Follower;
pub use listen::{Heard, HeardBatch, Listener, listen};
use watch::Watch;

/// Bounds of watching one engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObserveSettings {
    /// Between two looks.
    pub poll_every: Duration,
    /// Without an answer for so long an engine gets nothing new.
    pub silent_after: Duration,
    /// Without an answer for so long its life is over. At least `silent_after`.
    pub lease: Duration,
    /// Of one answer of `/metrics`. vLLM with two ranks takes 100 kB.
    pub metrics_bytes_max: usize,
    /// Blocks that are followed for each rank.
    pub blocks_max: usize,
}

impl Default for ObserveSettings {
    fn default() -> Self {
        Self {
            poll_every: Duration::from_secs(1),
            silent_after: Duration::from_secs(2),
            lease: Duration::from_secs(10),
            metrics_bytes_max: 8 << 20,
            blocks_max: BLOCKS_MAX_DEFAULT,
        }
    }
}

/// Where to look, as found when the engine was attached.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservePlan {
    /// Whose server it is.
    pub server: Server,
    /// A route that answers while the engine lives and costs it little.
    pub health: &'static str,
    /// It has `/metrics` in a format that is understood.
    pub metrics: bool,
    /// It has SGLang's `/v1/loads`.
    pub loads: bool,
    /// Of each rank.
    pub pool: Pool,
    /// Token budget of one scheduler step.
    pub step_tokens_max: u32,
    /// The number by which its first rank goes in its own figures; ranks are numbered from 0 here.
    pub first_rank: u16,
    /// When its process began, in seconds since 1970. Another one later means that it restarted in between.
    pub started_seconds: Option<f64>,
    /// Tokens of its own blocks, where it says so. Events with others are a lie.
    pub block_size_tokens: Option<u32>,
    /// Where its ranks publish KV events; none if it publishes none.
    pub events: Vec<Dialled>,
}

/// Figures of one rank's event stream.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EventFigures {
    /// What is followed.
    pub cache: RankStats,
    /// Batches taken.
    pub batches: u64,
    /// Whether the rank is heard.
    pub followed: EventsFollowed,
    /// Connections that broke. What was published until the next one is known only by replay.
    pub breaks: u64,
    /// When the newest batch came.
    pub heard: Option<Instant>,
    /// Batches that were missed and could not be had again.
    pub batches_lost: u64,
    /// The rank may cache blocks that are not known, because batches were lost. Ends when the engine says that it has
    /// cleared its cache.
    pub history_lost: bool,
    /// How old the newest batch was when it was taken, in seconds, if both clocks are right.
    pub lag_seconds: f64,
}

/// Whether a rank's events are heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EventsFollowed {
    /// The first connection is being made, or what was published before it is being asked for.
    #[default]
    Connecting,
    /// They are, and what was published before was asked for.
    Following,
    /// There is no connection. Another one is tried again and again.
    Unreachable,
    /// What it said cannot be right: it is not listened to any more.
    Refused,
}

/// Watches one engine until it dies or this is dropped.
#[derive(Debug)]
pub struct Observer {
    task: JoinHandle<()>,
    incarnation: Incarnation,
    shared: Arc<Shared>,
}

/// What the tasks of one observer share.
#[derive(Debug)]
struct Shared {
    reports: Arc<Reports>,
    ranks: BTreeMap<u16, RankShared>,
    /// Ranks whose events cannot be followed at the moment, and why.
    blind: Mutex<BTreeMap<u16, Arc<str>>>,
}

#[derive(Debug, Default)]
struct RankShared {
    /// Something is in `wanted`.
    snapshot_wanted: Notify,
    wanted: Mutex<Wanted>,
    figures: Mutex<EventFigures>,
}

/// Who wants to know all that a rank caches.
#[derive(Debug, Default)]
struct Wanted {
    /// The reader of the reports.
    report: bool,
    askers: Vec<oneshot::Sender<Vec<BlockHash>>>,
}

impl Shared {
    fn request_snapshot(&self, rank: RankId) {
        match self.ranks.get(&rank.dp_rank) {
            Some(shared) => {
                shared.wanted.lock().report = true;
                shared.snapshot_wanted.notify_one();
            }
            // It says nothing, so nothing is known of it.
            None => self.reports.put_snapshot(KvSnapshot { rank, sequence_next: 0, contents: Vec::new() }),
        }
    }

    /// Whether the events of a rank are followed, or why not. The engine's sight is as good as that of its worst rank.
    fn sees(&self, dp_rank: u16, blind: Option<Arc<str>>) {
        let sight = {
            let mut ranks = self.blind.lock();
            let before = ranks.values().next().cloned();
            match blind {
                Some(why) => drop(ranks.insert(dp_rank, why)),
                None => drop(ranks.remove(&dp_rank)),
            }
            let after = ranks.values().next().cloned();
            (before != after).then_some(after)
        };
        let Some(why) = sight else {
            return;
        };
        let sight = why.map_or(CacheSight::Events, |why| CacheSight::Approximate { why });
        self.reports.put_notice(Notice::CacheSight(sight));
    }
}

/// Begins to watch an engine. `trouble` makes it look at once: whoever finds the engine unreachable calls it.
///
/// `hasher` is the fleet's; the engine's model is hashed under its name in `facts`, as requests are.
pub fn observe(
    endpoint: Endpoint,
    plan: ObservePlan,
    facts: &EngineFacts,
    hasher: BlockHasher,
    settings: ObserveSettings,
    reports: Arc<Reports>,
    trouble: Arc<Notify>,
) -> Observer {
    let ranks = plan.events.iter().map(|source| (source.dp_rank, RankShared::default())).collect();
    let shared = Arc::new(Shared { reports: reports.clone(), ranks, blind: Mutex::default() });
    let mut followers = JoinSet::new();
    for source in &plan.events {
        let rank = facts.rank(source.dp_rank);
        let cache = RankSettings {
            hasher,
            model: facts.model.to_string(),
            engine_block_size_tokens: plan.block_size_tokens,
            blocks_max: settings.blocks_max,
        };
        let feed = Feed::new(rank, plan.events.len() > 1, cache);
        followers.spawn(Follower::new(source.clone(), feed, shared.clone()).run());
    }
    let watch = Watch::new(endpoint, plan, facts.dp_ranks, settings, reports, trouble);
    let task = tokio::spawn(watch.run(followers, shared.clone()));
    Observer { task, incarnation: facts.incarnation, shared }
}

impl Observer {
    /// Asks for all that one rank caches, as a [`KvSnapshot`] among the reports.
    pub fn request_snapshot(&self, dp_rank: u16) {
        self.shared.request_snapshot(RankId { incarnation: self.incarnation, dp_rank });
    }

    /// Figures of the event streams, by rank.
    pub fn events(&self) -> Vec<(u16, EventFigures)> {
        self.shared.ranks.iter().map(|(rank, shared)| (*rank, *shared.figures.lock())).collect()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort(); // and with it, the followers
    }
}
