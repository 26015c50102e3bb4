//! What every gateway is to know of the engine, and for each stream what it was told already.
//!
//! In: what happens to the engine, once. Out: for any number of streams, the next message, chosen at the moment when there
//! is room for it. Start at [`Board::next`]; [`Told`] is one stream's place.
//!
//! Nothing is queued for a stream: states (progress, load, sight) are told as they are when their turn comes, so a slow
//! gateway skips what is old; cache changes come from [`Feed`], notices and steps from short logs of which it may miss the
//! oldest.
//!
//! Invariants: a rank is named only after the facts that count the ranks; a cache only to a gateway that names blocks as
//! it was watched; nothing follows a death; the pieces of a rank's snapshot are not parted by its deltas.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use forebay_proto::{
    CacheSight, DataPlane, EngineFacts, EngineState, HashKey, LoadReport, Notice, Progress, Ready,
    StepsReport, died, pack_deltas, snapshot_chunks,
    v1::{self, from_agent::Body},
};
use forebay_types::{Incarnation, KvEventBatch, RankId, RankLoad, StepObservation};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::feed::{Cursor, Feed, FeedLimits, Next, Taken};

/// Notices kept for slow streams.
const NOTICES_MAX: usize = 64;
/// Step observations kept for slow streams.
const STEPS_MAX: usize = 1_024;
/// Hashes of deltas in one message.
const DELTA_HASHES_MAX: usize = 32_768;

/// Things with numbers of which the oldest go.
#[derive(Debug)]
struct Log<T> {
    entries: VecDeque<T>,
    /// Number of the first entry.
    first: u64,
    entries_max: usize,
}

impl<T: Clone> Log<T> {
    fn new(entries_max: usize) -> Self {
        Self { entries: VecDeque::new(), first: 0, entries_max }
    }

    fn push(&mut self, entry: T) {
        if self.entries.len() == self.entries_max {
            self.entries.pop_front();
            self.first += 1;
        }
        self.entries.push_back(entry);
    }

    fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// The entries from number `from` on that are still there.
    fn since(&self, from: u64) -> impl Iterator<Item = &T> {
        self.entries.iter().skip(from.saturating_sub(self.first) as usize)
    }
}

/// One life of the engine, as gateways are told of it.
#[derive(Debug)]
struct Life {
    number: u64,
    incarnation: Incarnation,
    kind: String,
    data_plane: DataPlane,
    progress: Progress,
    progress_version: u64,
    facts: Option<EngineFacts>,
    facts_version: u64,
    sight: CacheSight,
    /// Silent or fenced: what a new stream has to be told.
    standing: Option<Notice>,
    notices: Log<Notice>,
    /// By DP rank.
    loads: Vec<Option<Load>>,
    steps: Log<(u16, StepObservation)>,
    feed: Feed,
    /// By which the blocks in `feed` are named; `None` before a gateway has said the fleet's.
    feed_key: Option<HashKey>,
    /// Rises when all that streams were told of caches is void.
    feed_version: u64,
    drain: Option<String>,
    died: Option<v1::Died>,
}

#[derive(Debug, Clone, Copy)]
struct Load {
    load: RankLoad,
    at: Instant,
    version: u64,
}

/// What a new stream begins with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Opening {
    /// Which life, counted by this agent: messages of a later one are not for this stream.
    pub(crate) life: u64,
    /// The incarnation under which the life began.
    pub(crate) incarnation: Incarnation,
    pub(crate) kind: String,
    pub(crate) data_plane: DataPlane,
    pub(crate) progress: Progress,
    pub(crate) facts: Option<EngineFacts>,
    pub(crate) sight: CacheSight,
}

/// How far one stream is.
#[derive(Debug)]
pub(crate) struct Told {
    life: u64,
    progress: u64,
    facts: u64,
    notice: u64,
    /// What the engine was when the stream began.
    standing: Option<Notice>,
    loads: Vec<u64>,
    step: u64,
    /// By which this gateway names blocks.
    key: Option<HashKey>,
    feed: u64,
    cursor: Cursor,
    /// Pieces of a snapshot, or of deltas, that are on their way.
    pieces: VecDeque<Body>,
    drain: bool,
    died: bool,
}

impl Told {
    /// The gateway has said how its fleet names blocks. Before that it is told nothing of caches.
    pub(crate) fn welcomed(&mut self, key: HashKey) {
        self.key = Some(key);
    }

    /// The gateway lost what it knew of a rank's cache.
    pub(crate) fn forget(&mut self, dp_rank: u16) {
        self.cursor.forget(dp_rank);
    }

    /// Whether the death was told, after which there is nothing more to say.
    pub(crate) fn is_over(&self) -> bool {
        self.died
    }
}

/// What a stream does next.
#[derive(Debug)]
pub(crate) enum NextMessage {
    /// Send this.
    Say(Box<Body>),
    /// Wait for news.
    Nothing,
    /// Another life has begun: end this stream.
    Over,
}

/// Shared by whoever watches the engine and by all streams.
#[derive(Debug)]
pub(crate) struct Board {
    limits: FeedLimits,
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    life: Option<Life>,
    lives: u64,
    version: u64,
}

impl Board {
    pub(crate) fn new(limits: FeedLimits) -> Self {
        Self { limits, inner: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// Changes whenever there may be something to say.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A life begins; streams of the one before end.
    pub(crate) fn begin(
        &self,
        incarnation: Incarnation,
        kind: String,
        data_plane: DataPlane,
        progress: Progress,
    ) {
        let mut inner = self.inner.lock();
        inner.lives += 1;
        let number = inner.lives;
        inner.life = Some(Life {
            number,
            incarnation,
            kind,
            data_plane,
            progress,
            progress_version: 0,
            facts: None,
            facts_version: 0,
            sight: CacheSight::Approximate { why: "the engine starts".to_owned() },
            standing: None,
            notices: Log::new(NOTICES_MAX),
            loads: Vec::new(),
            steps: Log::new(STEPS_MAX),
            feed: Feed::new(0, self.limits),
            feed_key: None,
            feed_version: 0,
            drain: None,
            died: None,
        });
        drop(inner);
        self.announce();
    }

    /// Changes the life and wakes the streams.
    fn change(&self, change: impl FnOnce(&mut Life, u64)) {
        {
            let mut inner = self.inner.lock();
            inner.version += 1;
            let version = inner.version;
            let Some(life) = &mut inner.life else {
                return;
            };
            change(life, version);
        }
        self.announce();
    }

    fn announce(&self) {
        self.changed.send_modify(|changes| *changes += 1);
    }

    /// It moved on in its life. A drain stays one.
    pub(crate) fn progress(&self, progress: Progress) {
        self.change(|life, version| {
            if life.progress.state != EngineState::Draining {
                (life.progress, life.progress_version) = (progress, version);
            }
        });
    }

    /// It serves.
    pub(crate) fn ready(&self, facts: EngineFacts, kind: String, sight: CacheSight) {
        self.change(|life, version| {
            life.loads = vec![None; usize::from(facts.dp_ranks)];
            (life.feed, life.feed_key) = (Feed::new(facts.dp_ranks, self.limits), None);
            life.feed_version = version;
            if life.drain.is_none() {
                life.progress = Progress { state: EngineState::Ready, sentence: String::new() };
                life.progress_version = version;
            }
            (life.facts, life.facts_version, life.kind, life.sight) = (Some(facts), version, kind, sight);
        });
    }

    /// All that is known of its caches is void: it is watched anew, with blocks named by `key`, the fleet's, or by a key
    /// of the agent's own that no gateway knows.
    pub(crate) fn restart_feed(&self, key: Option<HashKey>) {
        self.change(|life, version| {
            let dp_ranks = life.facts.as_ref().map_or(0, |facts| facts.dp_ranks);
            (life.feed, life.feed_version) = (Feed::new(dp_ranks, self.limits), version);
            life.feed_key = key;
        });
    }

    /// Something happened that is no state.
    pub(crate) fn notice(&self, notice: Notice) {
        self.change(|life, version| {
            match &notice {
                Notice::Heard if !matches!(life.standing, Some(Notice::Fenced { .. })) => {
                    life.standing = None
                }
                Notice::Silent { .. } if life.standing.is_none() => life.standing = Some(notice.clone()),
                Notice::Fenced { .. } => life.standing = Some(notice.clone()),
                Notice::CacheSight(sight) => {
                    life.sight = sight.clone();
                    // What streams know of the caches is from before: in sight again, they are told all of it.
                    life.feed_version = version;
                }
                Notice::Heard | Notice::Silent { .. } | Notice::Note(_) => {}
            }
            life.notices.push(notice);
        });
    }

    /// A rank's load.
    pub(crate) fn load(&self, dp_rank: u16, load: RankLoad, at: Instant) {
        self.change(|life, version| {
            if let Some(entry) = life.loads.get_mut(usize::from(dp_rank)) {
                *entry = Some(Load { load, at, version });
            }
        });
    }

    /// Steps of ranks.
    pub(crate) fn steps(&self, steps: impl IntoIterator<Item = (u16, StepObservation)>) {
        self.change(|life, _| steps.into_iter().for_each(|step| life.steps.push(step)));
    }

    /// What changed in the caches; gives the ranks of which batches are missing as of now.
    pub(crate) fn kv(&self, batches: impl IntoIterator<Item = KvEventBatch>) -> Vec<u16> {
        let mut gaps = Vec::new();
        self.change(|life, _| {
            for batch in batches {
                let dp_rank = batch.rank.dp_rank;
                if life.feed.apply(batch) == Taken::Gap {
                    gaps.push(dp_rank);
                }
            }
        });
        gaps
    }

    /// All that a rank caches.
    pub(crate) fn snapshot(&self, snapshot: forebay_engines::KvSnapshot) {
        self.change(|life, _| {
            life.feed.reset(snapshot.rank.dp_rank, snapshot.sequence_next, snapshot.contents);
        });
    }

    /// Ranks of which batches are missing.
    pub(crate) fn gaps(&self) -> Vec<u16> {
        self.inner.lock().life.as_ref().map_or_else(Vec::new, |life| life.feed.gaps().collect())
    }

    /// It takes nothing new from now on.
    pub(crate) fn drain(&self, sentence: String) {
        self.change(|life, version| {
            life.progress = Progress { state: EngineState::Draining, sentence: sentence.clone() };
            (life.progress_version, life.drain) = (version, Some(sentence));
        });
    }

    /// It is dead.
    pub(crate) fn died(&self, last_words: &str, log: Vec<String>) {
        self.change(|life, _| {
            life.died.get_or_insert_with(|| died(last_words, log));
        });
    }

    /// What a stream begins with; `None` while there is no life, or the life is over.
    pub(crate) fn opening(&self) -> Option<(Opening, Told)> {
        let inner = self.inner.lock();
        let life = inner.life.as_ref().filter(|life| life.died.is_none())?;
        let opening = Opening {
            life: life.number,
            incarnation: life.incarnation,
            kind: life.kind.clone(),
            data_plane: life.data_plane.clone(),
            progress: life.progress.clone(),
            facts: life.facts.clone(),
            sight: life.sight.clone(),
        };
        let told = Told {
            life: life.number,
            progress: life.progress_version,
            facts: life.facts_version,
            notice: life.notices.end(),
            standing: life.standing.clone(),
            loads: Vec::new(),
            step: life.steps.end(),
            key: None,
            feed: life.feed_version,
            cursor: Cursor::default(),
            pieces: VecDeque::new(),
            drain: false,
            died: false,
        };
        Some((opening, told))
    }

    /// Sequences that run or wait, over all ranks, if every rank said so after `since`.
    pub(crate) fn busy(&self, since: Instant) -> Option<u64> {
        let inner = self.inner.lock();
        let loads = &inner.life.as_ref()?.loads;
        let busy = |load: &Option<Load>| {
            load.filter(|load| load.at > since)
                .map(|Load { load, .. }| u64::from(load.running) + u64::from(load.waiting))
        };
        if loads.is_empty() { None } else { loads.iter().map(busy).sum() }
    }

    /// Whether the life that a stream speaks of is over.
    pub(crate) fn is_over(&self, told: &Told) -> bool {
        let inner = self.inner.lock();
        inner.life.as_ref().is_none_or(|life| life.number != told.life || life.died.is_some())
    }

    /// The next message of a stream.
    pub(crate) fn next(&self, told: &mut Told, now: Instant) -> NextMessage {
        let inner = self.inner.lock();
        match &inner.life {
            Some(life) if life.number == told.life => match life.next(told, now) {
                Some(body) => NextMessage::Say(Box::new(body)),
                None => NextMessage::Nothing,
            },
            _ => NextMessage::Over,
        }
    }
}

impl Life {
    fn next(&self, told: &mut Told, now: Instant) -> Option<Body> {
        if told.died {
            return None;
        }
        if let Some(died) = &self.died {
            told.died = true;
            return Some(Body::Died(died.clone()));
        }
        self.next_state(told).or_else(|| self.next_of_ranks(told, now))
    }

    /// States of the engine as a whole, the most important first.
    fn next_state(&self, told: &mut Told) -> Option<Body> {
        if let Some(sentence) = self.drain.as_ref().filter(|_| !told.drain) {
            told.drain = true;
            return Some(Body::Drain(v1::Drain { sentence: sentence.clone() }));
        }
        if told.facts != self.facts_version {
            told.facts = self.facts_version;
            told.progress = self.progress_version;
            let facts = self.facts.clone()?;
            return Some(Body::Ready(Ready { facts, cache_sight: self.sight.clone() }.into()));
        }
        if told.progress != self.progress_version {
            told.progress = self.progress_version;
            return Some(Body::Progress(self.progress.clone().into()));
        }
        if let Some(standing) = told.standing.take() {
            return Some(Body::Notice(standing.into()));
        }
        let notice = self.notices.since(told.notice).next()?.clone();
        told.notice = told.notice.max(self.notices.first) + 1;
        Some(Body::Notice(notice.into()))
    }

    /// What names a rank: only for a gateway that knows how many there are.
    fn next_of_ranks(&self, told: &mut Told, now: Instant) -> Option<Body> {
        self.facts.as_ref()?;
        self.next_load(told, now).or_else(|| self.next_kv(told)).or_else(|| self.next_steps(told))
    }

    fn next_load(&self, told: &mut Told, now: Instant) -> Option<Body> {
        told.loads.resize(self.loads.len(), 0);
        let (dp_rank, load) = (0u16..).zip(&self.loads).find_map(|(dp_rank, load)| {
            let load = (*load)?;
            (told.loads[usize::from(dp_rank)] != load.version).then_some((dp_rank, load))
        })?;
        told.loads[usize::from(dp_rank)] = load.version;
        let age = now.saturating_duration_since(load.at);
        Some(Body::Load(LoadReport { rank: self.rank(dp_rank), load: load.load, age }.into()))
    }

    fn next_kv(&self, told: &mut Told) -> Option<Body> {
        if told.feed != self.feed_version {
            (told.feed, told.cursor) = (self.feed_version, Cursor::default());
            told.pieces.clear();
        }
        if self.sight != CacheSight::Events || self.feed_key.is_none() || self.feed_key != told.key {
            return None;
        }
        if told.pieces.is_empty() {
            match self.feed.next(&mut told.cursor, DELTA_HASHES_MAX)? {
                Next::Snapshot { dp_rank, sequence_next, contents } => {
                    let pieces = snapshot_chunks(dp_rank, sequence_next, contents);
                    told.pieces.extend(pieces.into_iter().map(Body::KvSnapshot));
                }
                Next::Deltas(deltas) => {
                    let deltas = deltas.iter().map(|delta| v1::KvDelta::clone(delta));
                    told.pieces.extend(pack_deltas(deltas).into_iter().map(Body::KvDeltas));
                }
            }
        }
        told.pieces.pop_front()
    }

    /// Steps of one rank at a time, as they lie.
    fn next_steps(&self, told: &mut Told) -> Option<Body> {
        let from = told.step.max(self.steps.first);
        let dp_rank = self.steps.since(from).next()?.0;
        let run = self.steps.since(from).take(forebay_proto::limits::STEPS_MAX);
        let steps: Vec<_> = run.take_while(|(rank, _)| *rank == dp_rank).map(|&(_, step)| step).collect();
        told.step = from + steps.len() as u64;
        Some(Body::Steps(StepsReport { rank: self.rank(dp_rank), steps }.into()))
    }

    fn rank(&self, dp_rank: u16) -> RankId {
        RankId { incarnation: self.incarnation, dp_rank }
    }
}

/// How long streams may take for the last words before they are cut, which says as much.
pub(crate) const LAST_WORDS_MAX: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
