//! What placement is given: the fleet at one moment, as values.
//!
//! `fleet` makes a [`Snapshot`]; placement, `status` and the twin read it. Nothing here changes after it was made.

use std::{
    collections::BTreeSet,
    ops::{AddAssign, SubAssign},
    sync::Arc,
    time::Duration,
};

use forebay_perf_model::{LinkModel, RankModel};
use forebay_types::{EngineName, FirstToken, Incarnation, Leaning, RankId, RankLoad, Role};
use serde::{Deserialize, Serialize};

use crate::{group::group_of, pace::Paces, standing::Standing};

/// The fleet at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Rises with every change: two snapshots of one fleet with equal generations are equal.
    pub generation: u64,
    /// Every rank that has joined and is not lost, sorted by id.
    ranks: Vec<RankView>,
    /// Of each rank, as of its last change but for the pace of its kind, which is of the last [`Snapshot::settle`].
    standings: Vec<Standing>,
    paces: Paces,
    /// Of all ranks: sequences, and those of others.
    sequences: u64,
    others: u64,
    /// What moving KV costs, by pair.
    pub links: Links,
    /// Whether any ranks step together.
    has_groups: bool,
}

impl Snapshot {
    /// A snapshot of these ranks, in any order.
    pub fn new(generation: u64, ranks: Vec<RankView>, links: Links) -> Self {
        let mut snapshot = Self {
            generation,
            ranks: Vec::new(),
            standings: Vec::new(),
            paces: Paces::default(),
            sequences: 0,
            others: 0,
            links,
            has_groups: false,
        };
        snapshot.set_ranks(ranks);
        snapshot
    }

    /// Every rank that has joined and is not lost, sorted by id.
    pub fn ranks(&self) -> &[RankView] {
        &self.ranks
    }

    /// Other ranks than before, in any order.
    pub fn set_ranks(&mut self, mut ranks: Vec<RankView>) {
        ranks.sort_by_key(|rank| rank.id);
        self.has_groups = ranks.iter().any(|rank| rank.steps_together);
        self.ranks = ranks;
        self.settle();
    }

    /// Changes one rank, but for its id and whether it steps with others.
    pub fn update(&mut self, index: usize, change: impl FnOnce(&mut RankView)) {
        let rank = &mut self.ranks[index];
        let before = (rank.sequences(), rank.others);
        change(rank);
        self.sequences = self.sequences - u64::from(before.0) + u64::from(rank.sequences());
        self.others = self.others - u64::from(before.1) + u64::from(rank.others);
        let Some((load, ranks)) = group_of(&self.ranks, index) else {
            self.standings[index] = Standing::of(&self.ranks[index], &self.paces, None);
            return;
        };
        for index in ranks {
            self.standings[index] = Standing::of(&self.ranks[index], &self.paces, Some(&load));
        }
    }

    /// Changes all ranks, likewise.
    pub fn update_all(&mut self, mut change: impl FnMut(usize, &mut RankView)) {
        self.ranks.iter_mut().enumerate().for_each(|(index, rank)| change(index, rank));
        self.settle();
    }

    /// Works out what requests have in common of their prices, for all ranks anew.
    fn settle(&mut self) {
        let Self { ranks, standings, paces, sequences, others, .. } = self;
        *sequences = ranks.iter().map(|rank| u64::from(rank.sequences())).sum();
        *others = ranks.iter().map(|rank| u64::from(rank.others)).sum();
        *paces = Paces::of(ranks);
        standings.clear();
        while let Some(rank) = ranks.get(standings.len()) {
            match group_of(ranks, standings.len()) {
                None => standings.push(Standing::of(rank, paces, None)),
                Some((load, group)) => {
                    standings.extend(ranks[group].iter().map(|rank| Standing::of(rank, paces, Some(&load))))
                }
            }
        }
    }

    /// Share of the fleet's sequences that came from elsewhere, 0 to 1.
    pub fn others_share(&self) -> f64 {
        if self.sequences == 0 { 0.0 } else { (self.others as f64 / self.sequences as f64).min(1.0) }
    }

    pub(crate) fn standing(&self, index: usize) -> &Standing {
        &self.standings[index]
    }

    pub(crate) fn has_groups(&self) -> bool {
        self.has_groups
    }

    /// The rank with this id.
    pub fn rank(&self, id: RankId) -> Option<&RankView> {
        self.index_of(id).map(|index| &self.ranks[index])
    }

    pub(crate) fn index_of(&self, id: RankId) -> Option<usize> {
        self.ranks.binary_search_by_key(&id, |rank| rank.id).ok()
    }
}

/// One rank: what it is, what it carries, how fast it is.
#[derive(Debug, Clone)]
pub struct RankView {
    /// Which life of which engine, and which scheduler in it.
    pub id: RankId,
    /// What users call the engine.
    pub engine: EngineName,
    /// The model it serves.
    pub model: Arc<str>,
    /// The work it may be given.
    pub role: Role,
    /// The phase that it is kept for while others can take the other one.
    pub leaning: Leaning,
    /// Whether it takes new work.
    pub state: RankState,
    /// Whether its recent legs succeeded.
    pub breaker: Breaker,
    /// What it last said of itself, brought up to date with what is known of the requests there.
    pub load: RankLoad,
    /// How long ago it said that.
    pub load_age: Duration,
    /// Sequences in `load` that came from elsewhere, such as other gateways: how many more did since it was said, nobody
    /// here knows. 0 where every step is reported.
    pub others: u32,
    /// Work that was promised to it and that `load` does not show yet.
    pub reserved: Reserved,
    /// Share of recent wall time that prefills took from the decodes beside them, 0 to 1.
    pub prefill_share: f64,
    /// Seconds of its steps.
    pub perf: Arc<RankModel>,
    /// Whether all ranks of the engine run each step in common: an expert-parallel group.
    pub steps_together: bool,
    /// Tokens in a KV block.
    pub block_size_tokens: u32,
    /// Bytes of a KV block, all layers.
    pub block_bytes: u64,
    /// Tokens that one step computes at most; decodes come first.
    pub step_tokens_max: u32,
    /// Tokens of prompt and answer that one sequence may have.
    pub context_tokens_max: u32,
    /// Sequences that may wait in the engine's queue.
    pub waiting_max: u32,
    /// Equal values: KV may move between them byte for byte.
    pub kv_layout: u64,
    /// Whether other engines can read its KV.
    pub can_export: bool,
    /// Whether it can take in KV of other engines.
    pub can_import: bool,
    /// Whether the first hand-over of a pair with it is far slower than the next: such a pair carries no requests before
    /// it was warmed ([`Links::warmed`]).
    pub needs_warming: bool,
    /// Which leg of a split sends the first token when this rank prefills.
    pub first_token: FirstToken,
    /// Whether it takes a request as tokens.
    pub takes_tokens: bool,
    /// Whether it takes a request in the client's own words.
    pub takes_body: bool,
    /// Seconds between tokens that 99 of 100 of its steps stay below; 0 before any was seen.
    pub itl_p99_seconds: f64,
}

impl Snapshot {
    /// Whether a request may be computed on `prefill` and continued on `decode` now.
    pub(crate) fn pairs(&self, prefill: &RankView, decode: &RankView) -> bool {
        prefill.can_hand_over_to(decode) && {
            let pair = (prefill.id.incarnation, decode.id.incarnation);
            let cold = (prefill.needs_warming || decode.needs_warming) && !self.links.is_warm(pair.0, pair.1);
            !cold && !self.links.is_resting(pair.0, pair.1)
        }
    }
}

impl RankView {
    /// Whether KV that `self` computed can continue on `decode`.
    pub fn can_hand_over_to(&self, decode: &RankView) -> bool {
        self.id != decode.id
            && self.can_export
            && decode.can_import
            && self.kv_layout == decode.kv_layout
            && self.block_size_tokens == decode.block_size_tokens
    }

    /// Share of its KV pool that is held or promised, what is cached for nobody left out; 0 if its size is unknown.
    pub fn kv_use(&self) -> f64 {
        if self.load.blocks_total == 0 {
            return 0.0;
        }
        let held = self.load.blocks_total.saturating_sub(self.load.blocks_free);
        (f64::from(held) + f64::from(self.reserved.blocks)) / f64::from(self.load.blocks_total)
    }

    /// Sequences that the rank has or was promised: waiting, running and reserved.
    pub fn sequences(&self) -> u32 {
        self.load.waiting.saturating_add(self.load.running).saturating_add(self.reserved.sequences)
    }
}

/// Whether a rank takes new work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankState {
    /// Joined, not serving yet.
    Starting,
    /// Serves.
    Ready,
    /// Finishes what runs and takes nothing new.
    Draining,
    /// It has missed a deadline: takes nothing new until it is heard of again.
    Silent,
    /// It said something that cannot be true: takes nothing more in this life.
    Fenced,
    /// Its lease has lapsed.
    Lost,
}

/// Whether a rank's recent legs succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Breaker {
    /// They did.
    Closed,
    /// They did not: give it nothing until its back-off is over.
    Open,
    /// The back-off is over and no probe is in flight: one request may try.
    HalfOpen,
}

/// Work that was promised to a rank. As an amount of one leg, and as the sum over the legs of a rank that its load does
/// not show yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reserved {
    /// Prompt tokens to compute.
    pub prefill_tokens: u64,
    /// Context that the decodes will read when they begin.
    pub context_tokens: u64,
    /// Output that is expected and not generated yet.
    pub output_tokens: u64,
    /// Sequences in the queue; the choices of a request queue as one.
    pub sequences: u32,
    /// Sequences that will decode here, choices counted.
    pub decodes: u32,
    /// KV blocks of the prompts that the rank does not hold yet.
    pub blocks: u32,
}

impl AddAssign for Reserved {
    fn add_assign(&mut self, other: Self) {
        self.prefill_tokens += other.prefill_tokens;
        self.context_tokens += other.context_tokens;
        self.output_tokens += other.output_tokens;
        self.sequences += other.sequences;
        self.decodes += other.decodes;
        self.blocks += other.blocks;
    }
}

/// Panics in debug builds if more is taken than was added: sums of reservations never go below zero.
impl SubAssign for Reserved {
    fn sub_assign(&mut self, other: Self) {
        self.prefill_tokens -= other.prefill_tokens;
        self.context_tokens -= other.context_tokens;
        self.output_tokens -= other.output_tokens;
        self.sequences -= other.sequences;
        self.decodes -= other.decodes;
        self.blocks -= other.blocks;
    }
}

/// What moving KV costs, by ordered pair of engines. Pairs that were never measured have the prior. Cloning is cheap;
/// changing a shared value copies it.
#[derive(Debug, Clone)]
pub struct Links {
    prior: Arc<LinkModel>,
    /// Sorted by key.
    measured: Arc<Vec<(EnginePair, Arc<LinkModel>)>>,
    /// Pairs that have handed over before: in a fleet of a thousand engines up to a million.
    warm: Arc<BTreeSet<EnginePair>>,
    /// Pairs that failed and rest.
    resting: Arc<BTreeSet<EnginePair>>,
}

/// The links from one engine.
pub(crate) struct LinksFrom<'a> {
    prior: &'a LinkModel,
    measured: &'a [(EnginePair, Arc<LinkModel>)],
}

impl<'a> LinksFrom<'a> {
    pub(crate) fn to(&self, destination: Incarnation) -> &'a LinkModel {
        match self.measured.binary_search_by_key(&destination, |((_, to), _)| *to) {
            Ok(index) => &self.measured[index].1,
            Err(_) => self.prior,
        }
    }
}

/// (source, destination).
type EnginePair = (Incarnation, Incarnation);

impl Links {
    /// No pair measured yet.
    pub fn new(prior: LinkModel) -> Self {
        Self {
            prior: Arc::new(prior),
            measured: Arc::default(),
            warm: Arc::default(),
            resting: Arc::default(),
        }
    }

    /// The model of moving KV from `source` to `destination`.
    pub fn get(&self, source: Incarnation, destination: Incarnation) -> &LinkModel {
        self.leaving(source).to(destination)
    }

    /// The links from `source`: cheaper than [`Links::get`] when several destinations are asked for.
    pub(crate) fn leaving(&self, source: Incarnation) -> LinksFrom<'_> {
        let start = self.measured.partition_point(|((from, _), _)| *from < source);
        let count = self.measured[start..].partition_point(|((from, _), _)| *from == source);
        LinksFrom { prior: &self.prior, measured: &self.measured[start..start + count] }
    }

    /// What an unmeasured pair is taken to cost.
    pub fn prior(&self) -> &LinkModel {
        &self.prior
    }

    /// Every measured pair: source, destination, model; in order of their ids.
    pub fn measured(&self) -> impl ExactSizeIterator<Item = (Incarnation, Incarnation, &LinkModel)> {
        self.measured.iter().map(|((source, destination), model)| (*source, *destination, &**model))
    }

    /// Whether `source` has handed over to `destination` before.
    pub fn is_warm(&self, source: Incarnation, destination: Incarnation) -> bool {
        self.warm.contains(&(source, destination))
    }

    /// Whether hand-overs of this pair failed lately.
    pub fn is_resting(&self, source: Incarnation, destination: Incarnation) -> bool {
        self.resting.contains(&(source, destination))
    }

    /// The pairs that rest, in order of their ids.
    pub fn resting(&self) -> impl ExactSizeIterator<Item = (Incarnation, Incarnation)> {
        self.resting.iter().copied()
    }

    /// A pair has handed over.
    pub fn warmed(&mut self, source: Incarnation, destination: Incarnation) {
        if !self.is_warm(source, destination) {
            Arc::make_mut(&mut self.warm).insert((source, destination));
        }
    }

    /// The pairs that rest, whatever rested before.
    pub fn set_resting(&mut self, pairs: impl IntoIterator<Item = (Incarnation, Incarnation)>) {
        self.resting = Arc::new(pairs.into_iter().collect());
    }

    /// What a pair that was never measured is taken to cost from now on.
    pub fn begin(&mut self, source: Incarnation, destination: Incarnation, model: LinkModel) {
        let pair = (source, destination);
        if let Err(index) = self.measured.binary_search_by_key(&pair, |link| link.0) {
            Arc::make_mut(&mut self.measured).insert(index, (pair, Arc::new(model)));
        }
    }

    /// Learns from one transfer. The pair's model starts from the prior, unless it was begun.
    pub fn observe(&mut self, source: Incarnation, destination: Incarnation, bytes: u64, seconds: f64) {
        let pair = (source, destination);
        let measured = Arc::make_mut(&mut self.measured);
        let index = measured.binary_search_by_key(&pair, |link| link.0).unwrap_or_else(|index| {
            measured.insert(index, (pair, self.prior.clone()));
            index
        });
        Arc::make_mut(&mut measured[index].1).observe(bytes, seconds);
    }

    /// Forgets one pair.
    pub fn remove(&mut self, source: Incarnation, destination: Incarnation) {
        if let Some(index) = self.find((source, destination)) {
            Arc::make_mut(&mut self.measured).remove(index);
        }
    }

    /// Forgets every pair that `incarnation` is part of.
    pub fn remove_incarnation(&mut self, incarnation: Incarnation) {
        let names = |pair: &EnginePair| pair.0 == incarnation || pair.1 == incarnation;
        if self.measured.iter().any(|(pair, _)| names(pair)) {
            Arc::make_mut(&mut self.measured).retain(|(pair, _)| !names(pair));
        }
        for pairs in [&mut self.warm, &mut self.resting] {
            if pairs.iter().any(names) {
                Arc::make_mut(pairs).retain(|pair| !names(pair));
            }
        }
    }

    fn find(&self, pair: EnginePair) -> Option<usize> {
        self.measured.binary_search_by_key(&pair, |link| link.0).ok()
    }
}
