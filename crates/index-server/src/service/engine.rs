//! One registered engine: its lives, and how well it is heard.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use forebay_engines::remote::{EventFollower, EventsFollowed, FollowedRank};
use forebay_types::{EngineName, Incarnation};
use parking_lot::Mutex;

use super::{fed::FedRank, spec::CheckedSpec};

/// Lives of one engine that are remembered to be over, by the names that whoever feeds it gave them.
const PAST_MAX: usize = 64;

/// How well an engine, or a rank of it, is heard. The later in the list, the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Everything that it announced since its start, or since it cleared its cache, is known.
    Following,
    /// The first connection is being made, or what was published before is being asked for.
    Connecting,
    /// Events were lost: it counts as empty, and what it stores from then on is learned.
    Stale,
    /// It cannot be reached. What is known counts until the lease ends.
    Unreachable,
    /// What it said cannot be right. It counts as empty until it restarts.
    Refused,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Following, Self::Connecting, Self::Stale, Self::Unreachable, Self::Refused];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Following => "following",
            Self::Connecting => "connecting",
            Self::Stale => "stale",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
        }
    }
}

/// An engine, as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStatus {
    /// Its name.
    pub name: EngineName,
    /// Its model.
    pub model: String,
    /// The worst of its ranks'.
    pub state: State,
    /// A sentence, if the state needs one.
    pub detail: Option<String>,
    /// Its present life.
    pub incarnation: Incarnation,
    /// Lives that ended.
    pub restarts: u64,
    /// By number.
    pub ranks: Vec<RankStatus>,
}

/// A rank, as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankStatus {
    /// Its number.
    pub dp_rank: u16,
    /// How well it is heard.
    pub state: State,
    /// Blocks on its device, in the index.
    pub blocks: u64,
    /// Batches of this life.
    pub batches: u64,
    /// Batches that were missed for good in this life.
    pub batches_lost: u64,
    /// Since the newest batch came.
    pub last_event: Option<Duration>,
    /// A sentence, if the state needs one.
    pub detail: Option<String>,
}

/// What is registered under one name.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    pub(crate) spec: CheckedSpec,
    /// What it announced before was asked for, once at least: a restart does not make the server unready.
    asked: AtomicBool,
    pub(crate) life: Mutex<Life>,
}

/// Its present life. Whatever changes the index for this engine holds the lock, so that nothing of a life comes after its
/// end.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) incarnation: Incarnation,
    pub(crate) restarts: u64,
    /// It is not registered any more.
    pub(crate) over: bool,
    /// What follows it, if it has addresses.
    pub(crate) follower: Option<Arc<EventFollower>>,
    /// Why its life before ended, until the next is followed.
    pub(crate) ended: Option<Arc<str>>,
    /// By rank, if it is fed by hand.
    pub(crate) fed: BTreeMap<u16, FedRank>,
    /// What whoever feeds it calls this life.
    pub(crate) called: String,
    past: VecDeque<String>,
}

impl Engine {
    pub(crate) fn new(spec: CheckedSpec, incarnation: Incarnation) -> Self {
        let life = Life {
            incarnation,
            restarts: 0,
            over: false,
            follower: None,
            ended: None,
            fed: BTreeMap::new(),
            called: String::new(),
            past: VecDeque::new(),
        };
        Self {
            name: spec.spec.name.as_str().into(),
            asked: AtomicBool::new(spec.sources.is_empty()),
            spec,
            life: Mutex::new(life),
        }
    }

    pub(crate) fn is_followed(&self) -> bool {
        !self.spec.sources.is_empty()
    }

    /// A life of it is over, so it was asked.
    pub(crate) fn has_lived(&self) {
        self.asked.store(true, Relaxed);
    }

    /// Whether what it announced before it was registered is known or was asked for.
    pub(crate) fn was_asked(&self) -> bool {
        if self.asked.load(Relaxed) {
            return true;
        }
        let follower = self.life.lock().follower.clone();
        let asked = follower.is_some_and(|follower| {
            follower.ranks().iter().all(|rank| rank.figures.followed != EventsFollowed::Connecting)
        });
        self.asked.fetch_or(asked, Relaxed);
        asked
    }
}

impl Life {
    /// Whether a life of this name is over.
    pub(crate) fn is_past(&self, called: &str) -> bool {
        self.past.iter().any(|past| past == called)
    }

    /// Whether a life of this name is another one than the present.
    pub(crate) fn is_new(&self, called: &str) -> bool {
        self.called != called && !(self.called.is_empty() && self.fed.is_empty())
    }

    /// The present life is over, and `incarnation` begins. The caller has seen to the index.
    pub(crate) fn next(&mut self, incarnation: Incarnation, why: Option<Arc<str>>) {
        self.incarnation = incarnation;
        self.restarts += 1;
        self.follower = None;
        self.ended = why;
        self.fed.clear();
        let called = std::mem::take(&mut self.called);
        if called.is_empty() {
            return;
        }
        if self.past.len() == PAST_MAX {
            self.past.pop_front();
        }
        self.past.push_back(called);
    }
}

/// How well a followed rank is heard, and why not better.
pub(crate) fn state_of(rank: &FollowedRank) -> (State, Option<String>) {
    let why = |or: &str| Some(rank.blind.as_deref().unwrap_or(or).to_owned());
    match rank.figures.followed {
        EventsFollowed::Connecting => (State::Connecting, rank.blind.as_deref().map(ToOwned::to_owned)),
        EventsFollowed::Unreachable => (State::Unreachable, why("its connection broke")),
        EventsFollowed::Refused => (State::Refused, why("what it says cannot be right")),
        EventsFollowed::Following if rank.figures.history_lost => {
            let sentence = "KV events were lost and cannot be had again: what it cached by then is unknown until it is \
                            stored again";
            (State::Stale, Some(sentence.to_owned()))
        }
        EventsFollowed::Following => (State::Following, None),
    }
}

/// A followed rank's status; `blocks` are those in the index.
pub(crate) fn followed_status(rank: &FollowedRank, now: Instant, blocks: u64) -> RankStatus {
    let (state, detail) = state_of(rank);
    let figures = &rank.figures;
    RankStatus {
        dp_rank: rank.dp_rank,
        state,
        blocks,
        batches: figures.batches,
        batches_lost: figures.batches_lost,
        last_event: figures.heard.map(|heard| now.saturating_duration_since(heard)),
        detail,
    }
}

/// A fed rank's status.
pub(crate) fn fed_status(dp_rank: u16, rank: &FedRank, now: Instant, blocks: u64) -> RankStatus {
    let stale = "batches are missing: it counts as empty until a batch that clears it, or a snapshot";
    RankStatus {
        dp_rank,
        state: if rank.stale { State::Stale } else { State::Following },
        blocks,
        batches: rank.batches,
        batches_lost: rank.batches_lost,
        last_event: rank.heard.map(|heard| now.saturating_duration_since(heard)),
        detail: rank.stale.then(|| stale.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use forebay_engines::remote::EventFigures;

    use super::*;

    #[test]
    fn the_state_of_a_rank_is_the_worst_that_is_true_of_it() {
        let check = |followed: EventsFollowed, history_lost: bool, blind: Option<&str>, expected: State| {
            let figures = EventFigures { followed, history_lost, ..EventFigures::default() };
            let rank = FollowedRank { dp_rank: 0, figures, blind: blind.map(Into::into) };
            let (state, detail) = state_of(&rank);
            assert_eq!(state, expected);
            assert_eq!(
                detail.is_some(),
                !matches!(state, State::Following | State::Connecting),
                "{detail:?}"
            );
        };
        check(EventsFollowed::Connecting, false, None, State::Connecting);
        check(EventsFollowed::Following, false, None, State::Following);
        check(EventsFollowed::Following, true, None, State::Stale);
        check(EventsFollowed::Unreachable, true, Some("refused"), State::Unreachable);
        check(EventsFollowed::Unreachable, false, None, State::Unreachable);
        check(EventsFollowed::Refused, true, Some("lies"), State::Refused);
    }

    #[test]
    fn states_have_the_names_that_json_has() {
        for state in State::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        assert!(State::ALL.is_sorted());
    }
}
