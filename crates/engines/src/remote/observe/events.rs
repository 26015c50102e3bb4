//! Following an engine's KV events and nothing else of it, for those that neither send it requests nor look at its load.
//!
//! Start at [`follow_events`]. There is no other proof of life than the events themselves: a publisher that begins anew
//! ends the life; one that cannot be reached is only said to be so ([`EventsFollowed::Unreachable`]), and how long its
//! blocks are believed is for the caller to decide.

use std::sync::Arc;

use forebay_engine_events::RankSettings;
use forebay_engine_wire::discovery::Dialled;
use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, Incarnation, RankId};
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
};

use super::{EventFigures, RankShared, Shared, feed::Feed, follow::Follower, watch::follower_ended};
use crate::reports::Reports;

#[cfg(doc)]
use super::EventsFollowed;

/// Where one life of an engine publishes its KV events, and how they are read.
#[derive(Debug, Clone)]
pub struct EventPlan {
    /// The life.
    pub incarnation: Incarnation,
    /// The model's name, as prompts are hashed under.
    pub model: String,
    /// Where its ranks publish.
    pub sources: Vec<Dialled>,
    /// Tokens of its own blocks, if they are known. Events with others are then a lie.
    pub block_size_tokens: Option<u32>,
    /// Blocks that are followed for each rank.
    pub blocks_max: usize,
}

/// What is known of one rank's event stream.
#[derive(Debug, Clone, PartialEq)]
pub struct FollowedRank {
    /// Which.
    pub dp_rank: u16,
    /// Its figures.
    pub figures: EventFigures,
    /// Why it is not heard, as a sentence, if it is not.
    pub blind: Option<Arc<str>>,
}

/// Follows the KV events of one life of an engine until it ends or this is dropped.
#[derive(Debug)]
pub struct EventFollower {
    task: JoinHandle<()>,
    incarnation: Incarnation,
    shared: Arc<Shared>,
}

/// Begins to follow. Out come, through `reports`: cache events numbered from 0, snapshots that were asked for, notices;
/// and the life's end, once, when a publisher turns out to be another one than before.
pub fn follow_events(plan: EventPlan, hasher: BlockHasher, reports: Arc<Reports>) -> EventFollower {
    let EventPlan { incarnation, model, sources, block_size_tokens, blocks_max } = plan;
    let ranks = sources.iter().map(|source| (source.dp_rank, RankShared::default())).collect();
    let shared = Arc::new(Shared { reports, ranks, blind: Default::default() });
    let mut followers = JoinSet::new();
    let one_of_many = sources.len() > 1;
    for source in sources {
        let cache = RankSettings {
            hasher,
            model: model.clone(),
            engine_block_size_tokens: block_size_tokens,
            blocks_max,
        };
        let rank = RankId { incarnation, dp_rank: source.dp_rank };
        followers.spawn(Follower::new(source, Feed::new(rank, one_of_many, cache), shared.clone()).run());
    }
    let task = tokio::spawn(until_one_ends(followers, shared.clone()));
    EventFollower { task, incarnation, shared }
}

/// A follower ends only with its engine's life, or by a defect: then nothing that it knew can be believed either.
async fn until_one_ends(mut followers: JoinSet<super::follow::End>, shared: Arc<Shared>) {
    let Some(end) = followers.join_next().await else { return };
    let why = follower_ended(&end, &shared);
    followers.shutdown().await;
    shared.reports.put_death(why.unwrap_or_else(|| "following its KV events failed".into()));
}

impl EventFollower {
    /// The life that is followed.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Asks for all that one rank caches, as a [`KvSnapshot`](crate::KvSnapshot) among the reports.
    pub fn request_snapshot(&self, dp_rank: u16) {
        self.shared.request_snapshot(RankId { incarnation: self.incarnation, dp_rank });
    }

    /// The blocks on the device of one rank, as it stands when its follower next looks up; the reports are not touched.
    /// Nothing comes while a replay is read. `None` if the rank is unknown.
    pub fn cached(&self, dp_rank: u16) -> Option<oneshot::Receiver<Vec<BlockHash>>> {
        let rank = self.shared.ranks.get(&dp_rank)?;
        let (asker, answer) = oneshot::channel();
        let mut wanted = rank.wanted.lock();
        // Those who gave up make room.
        wanted.askers.retain(|asker| !asker.is_closed());
        wanted.askers.push(asker);
        rank.snapshot_wanted.notify_one();
        Some(answer)
    }

    /// What is known of each rank's stream.
    pub fn ranks(&self) -> Vec<FollowedRank> {
        let blind = self.shared.blind.lock().clone();
        let one = |(&dp_rank, shared): (&u16, &RankShared)| FollowedRank {
            dp_rank,
            figures: *shared.figures.lock(),
            blind: blind.get(&dp_rank).cloned(),
        };
        self.shared.ranks.iter().map(one).collect()
    }
}

impl Drop for EventFollower {
    fn drop(&mut self) {
        self.task.abort(); // and with it, the followers
    }
}
