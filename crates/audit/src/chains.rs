//! Requests, from chains of KV blocks: what was stored after what, and when.
//!
//! In: KV events of each rank (a *seat*), in order. Out: [`Seen`] requests: when their first blocks were stored, what they
//! share with which earlier request, how many tokens of blocks their prompts and answers added. Start at [`Chains::take`].
//!
//! A block is known by a hash of its tokens and all before it, made here: engines' own hashes mean something to one rank
//! alone. Blocks after a parent that was stored before anybody listened have that parent for a beginning, a *root* whose
//! length nobody knows; roots of two ranks are one if the same prompt goes on from both.
//!
//! Invariants: memory is bounded by [`Limits`]; nothing an engine says makes it panic.

use std::collections::HashMap;

use forebay_engine_events::{EngineEvent, EventBatch, ExtraKey, Stored};
use forebay_twin::mix;
use forebay_types::{Tier, TokenId};

use crate::{forgetful::Forgetful, recorder::Limits};

/// A prompt's next piece comes with the next step; a longer pause means another prompt.
const CHUNK_SECONDS_MAX: f64 = 1.5;
/// An answer's next block comes within so many times the time that its tokens take ...
const GROWTH_SLACK: f64 = 4.0;
/// ... and so many seconds, in which other prompts may have been computed; but no later than the second.
const GROWTH_SECONDS_MIN: f64 = 1.0;
const GROWTH_SECONDS_MAX: f64 = 15.0;
/// Tokens that an answer grows by between two events, at least; engines with smaller blocks say several at once.
const GROWTH_TOKENS: u32 = 16;
/// Seconds between two tokens before any were measured.
const ITL_SECONDS_PRIOR: f64 = 0.05;
/// Sequences that ran when the recording began store their next block within as many seconds; one block after an unknown one
/// is taken for theirs until then.
const RUNNING_SECONDS: f64 = GROWTH_SECONDS_MAX;
/// Tokens by which a prompt on two ranks is known to be the same, whatever came before: too many to be equal by chance, and
/// more than templates put in front of every question.
const SAME_TOKENS: usize = 48;
/// Ends of sequences that a rank's events may go on from; more are looked through for old ones.
const TAILS_MAX: usize = 1 << 14;

const START: u64 = 0x5eed_0001;
const ROOT: u64 = 0x5eed_0002;
const SAME: u64 = 0x5eed_0003;

/// What a request's sequence begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nothing that is known.
    Start,
    /// A beginning that was cached before the recording, all of it.
    Root(u32),
    /// The beginning of an earlier request's sequence.
    Request(u32),
}

/// One request, as KV events show it. Tokens are those of full blocks, counted behind its root if it has one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seen {
    pub(crate) seat: u16,
    /// When its first block was stored.
    pub(crate) at_seconds: f64,
    /// It came before the recording began.
    pub(crate) is_history: bool,
    pub(crate) origin: Origin,
    /// The root that its sequence goes back to.
    pub(crate) root: Option<u32>,
    /// Tokens that its origin gives it.
    pub(crate) shared_tokens: u32,
    /// Tokens that its rank had when it came.
    pub(crate) cached_tokens: u32,
    /// Tokens of its prompt that nobody had before.
    pub(crate) own_tokens: u32,
    /// Tokens by which its answer made the sequence longer.
    pub(crate) grown_tokens: u32,
}

impl Seen {
    /// Tokens of its prompt's full blocks.
    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.shared_tokens + self.own_tokens
    }
}

/// Where a block stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    owner: Origin,
    root: Option<u32>,
    /// Tokens of the sequence up to its end.
    tokens: u32,
}

/// The end of a sequence that may go on.
#[derive(Debug, Clone, Copy)]
struct Tail {
    request: u32,
    /// By the engine's clock.
    seconds: f64,
    has_grown: bool,
}

struct Seat {
    /// Engine hashes and what they are here.
    known: Forgetful<u64, u64>,
    /// By the last block. Several sequences may end with the same one.
    tails: HashMap<u64, Vec<Tail>>,
    itl_seconds: f64,
}

/// See the module.
pub(crate) struct Chains {
    seats: Vec<Seat>,
    places: Forgetful<u64, Place>,
    /// Roots, by the tokens that were stored right after them, and the rank that did.
    firsts: Forgetful<u64, (u64, usize)>,
    limits: Limits,
    pub(crate) requests: Vec<Seen>,
    /// Names of roots.
    pub(crate) roots: Vec<u64>,
    /// The largest block that was met on the device.
    pub(crate) block_tokens: u32,
    /// Requests beyond the limit.
    pub(crate) requests_left_out: u64,
    /// Events whose lengths contradict each other.
    pub(crate) malformed: u64,
}

impl Chains {
    pub(crate) fn new(seats: usize, limits: Limits) -> Self {
        let seat = || Seat {
            known: Forgetful::new(limits.rank_blocks_max),
            tails: HashMap::new(),
            itl_seconds: ITL_SECONDS_PRIOR,
        };
        Self {
            seats: (0..seats).map(|_| seat()).collect(),
            places: Forgetful::new(limits.blocks_max),
            firsts: Forgetful::new(limits.requests_max),
            limits,
            requests: Vec::new(),
            roots: Vec::new(),
            block_tokens: 0,
            requests_left_out: 0,
            malformed: 0,
        }
    }

    /// How long a rank takes between two tokens of late.
    pub(crate) fn pace(&mut self, seat: usize, itl_seconds: f64) {
        self.seats[seat].itl_seconds = itl_seconds;
    }

    /// All that a rank cached is gone, or unknown.
    pub(crate) fn forget(&mut self, seat: usize) {
        let seat = &mut self.seats[seat];
        seat.known.clear();
        seat.tails.clear();
    }

    /// Blocks that were forgotten for want of room.
    pub(crate) fn forgotten(&self) -> u64 {
        self.places.forgotten + self.seats.iter().map(|seat| seat.known.forgotten).sum::<u64>()
    }

    /// Takes the events of one step of a rank.
    pub(crate) fn take(&mut self, seat: usize, at_seconds: f64, is_history: bool, batch: &EventBatch) {
        let seconds = if batch.time_seconds.is_finite() { batch.time_seconds } else { at_seconds };
        for event in &batch.events {
            match event {
                EngineEvent::Stored(stored) => {
                    let moment = Moment { seat, at_seconds, seconds, is_history };
                    self.store(moment, stored);
                }
                EngineEvent::Cleared => self.forget(seat),
                // What is evicted may be stored again; it is the same block then.
                EngineEvent::Removed(_) | EngineEvent::Unknown { .. } => {}
            }
        }
    }

    fn store(&mut self, moment: Moment, stored: &Stored) {
        // Other tiers repeat what was on the device, other groups of layers what the first one says.
        if stored.tier != Tier::Device || stored.group.unwrap_or(0) != 0 || stored.tokens.is_empty() {
            return;
        }
        let block = stored.block_size_tokens as usize;
        if block == 0 || stored.tokens.len() != stored.hashes.len() * block {
            self.malformed += 1;
            return;
        }
        self.block_tokens = self.block_tokens.max(stored.block_size_tokens);
        let (parent, place) = self.parent(moment.seat, stored);
        let mut id = parent;
        let seat = &mut self.seats[moment.seat];
        let pieces = stored.hashes.iter().zip(stored.tokens.chunks_exact(block)).enumerate();
        let ids: Vec<u64> = pieces
            .map(|(nth, (hash, tokens))| {
                let keys = stored.extra_keys.as_ref().and_then(|keys| keys.get(nth));
                id = tokens.iter().fold(mix(id ^ extra(keys)), |id, &token| mix(id ^ u64::from(token)));
                seat.known.insert(hash.0, id);
                id
            })
            .collect();
        let Some(&last) = ids.last() else { return };
        let tokens = stored.tokens.len() as u32;
        let (request, has_grown) = match self.continued(moment, parent, tokens) {
            Some((request, is_growth)) => {
                self.extend(request, &ids, stored.block_size_tokens, is_growth);
                (request, is_growth)
            }
            None => {
                if self.requests.len() >= self.limits.requests_max {
                    self.requests_left_out += 1;
                    return;
                }
                let request = self.requests.len() as u32;
                let ran_before = place.tokens == 0
                    && place.root.is_some()
                    && tokens <= self.block_tokens.max(GROWTH_TOKENS)
                    && moment.at_seconds < RUNNING_SECONDS;
                self.requests.push(Seen {
                    seat: moment.seat as u16,
                    at_seconds: moment.at_seconds,
                    is_history: moment.is_history || ran_before,
                    origin: place.owner,
                    root: place.root,
                    shared_tokens: place.tokens,
                    cached_tokens: place.tokens,
                    own_tokens: 0,
                    grown_tokens: 0,
                });
                self.extend(request, &ids, stored.block_size_tokens, false);
                (request, false)
            }
        };
        let tail = Tail { request, seconds: moment.seconds, has_grown };
        let tails = &mut self.seats[moment.seat].tails;
        tails.entry(last).or_default().push(tail);
        if tails.len() > TAILS_MAX {
            let oldest = moment.seconds - GROWTH_SECONDS_MAX;
            tails.retain(|_, tails| tails.iter().any(|tail| tail.seconds >= oldest));
        }
    }

    /// The block before those that were stored, and where it stands.
    fn parent(&mut self, seat: usize, stored: &Stored) -> (u64, Place) {
        let start = Place { owner: Origin::Start, root: None, tokens: 0 };
        let apart = [stored.lora_name.as_deref(), stored.salt.as_deref()];
        let Some(parent) = stored.parent else {
            return (
                apart.into_iter().flatten().fold(mix(START), |id, text| mix(id ^ number_of(text))),
                start,
            );
        };
        let id = self.seats[seat].known.get(parent.0);
        if let Some(id) = id
            && let Some(place) = self.places.get(id)
            && !matches!(place.owner, Origin::Root(_))
        {
            return (id, place);
        }
        let mut id = id.unwrap_or_else(|| mix(mix(ROOT) ^ parent.0));
        if let Some(tokens) = stored.tokens.get(..SAME_TOKENS) {
            id = self.same_root(seat, id, tokens);
        }
        self.seats[seat].known.insert(parent.0, id);
        let place = match self.places.get(id) {
            Some(place) => place,
            None => {
                let root = self.roots.len() as u32;
                self.roots.push(id);
                let place = Place { owner: Origin::Root(root), root: Some(root), tokens: 0 };
                self.places.insert(id, place);
                place
            }
        };
        (id, place)
    }

    /// Ranks hash alike or not, so what two of them had cached before may be the same under two names. It is where the same
    /// prompt goes on from it.
    fn same_root(&mut self, seat: usize, root: u64, tokens: &[TokenId]) -> u64 {
        let first = tokens.iter().fold(mix(SAME), |state, &token| mix(state ^ u64::from(token)));
        match self.firsts.get(first) {
            Some((same, elsewhere)) if elsewhere != seat => same,
            Some(_) => root,
            None => {
                self.firsts.insert(first, (root, seat));
                root
            }
        }
    }

    /// The request that these blocks continue, if they continue one, and whether as its answer.
    fn continued(&mut self, moment: Moment, parent: u64, tokens: u32) -> Option<(u32, bool)> {
        let block = self.block_tokens;
        let seat = &mut self.seats[moment.seat];
        let step = block.max(GROWTH_TOKENS);
        let growth_seconds = GROWTH_SLACK * f64::from(step) * seat.itl_seconds + GROWTH_SECONDS_MIN;
        let growth_seconds = growth_seconds.min(GROWTH_SECONDS_MAX);
        let tails = seat.tails.get_mut(&parent)?;
        let way = |tail: &Tail| {
            let gap = moment.seconds - tail.seconds;
            let grows = tokens <= step && gap <= growth_seconds;
            let goes_on = !tail.has_grown && gap <= CHUNK_SECONDS_MAX;
            (grows || goes_on).then_some(grows)
        };
        let found = tails.iter().enumerate().find_map(|(nth, tail)| Some((nth, way(tail)?)));
        let (nth, is_growth) = found?;
        let tail = tails.swap_remove(nth);
        if tails.is_empty() {
            seat.tails.remove(&parent);
        }
        Some((tail.request, is_growth))
    }

    fn extend(&mut self, number: u32, ids: &[u64], block_tokens: u32, is_growth: bool) {
        for &id in ids {
            let known = self.places.get(id);
            let request = &mut self.requests[number as usize];
            let is_shared_so_far = request.own_tokens == 0 && request.grown_tokens == 0 && !is_growth;
            match known {
                Some(place) if is_shared_so_far => {
                    request.origin = place.owner;
                    request.shared_tokens = place.tokens;
                    continue;
                }
                _ if is_growth => request.grown_tokens += block_tokens,
                _ => request.own_tokens += block_tokens,
            }
            if known.is_none() {
                let tokens = request.prompt_tokens() + request.grown_tokens;
                let place = Place { owner: Origin::Request(number), root: request.root, tokens };
                self.places.insert(id, place);
            }
        }
    }
}

/// When and where something was stored.
#[derive(Debug, Clone, Copy)]
struct Moment {
    seat: usize,
    /// By our clock.
    at_seconds: f64,
    /// By the engine's.
    seconds: f64,
    is_history: bool,
}

fn extra(keys: Option<&Vec<ExtraKey>>) -> u64 {
    keys.into_iter().flatten().fold(0, |state, key| {
        mix(state
            ^ match key {
                ExtraKey::Text(text) => number_of(text),
                ExtraKey::Other(bytes) => number(bytes),
            })
    })
}

fn number_of(text: &str) -> u64 {
    number(text.as_bytes())
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(bytes.len() as u64, |state, &byte| mix(state ^ u64::from(byte).rotate_left(32)))
}
