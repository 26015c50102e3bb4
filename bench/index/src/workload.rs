//! The stream of events and the queries, in no contender's shape.
//!
//! Sequences of `depth` blocks; the first `shared` of each come from one of [`GROUPS`] groups, the rest are its own.
//! Ranks take turns. A rank announces a block once, as engines do, so it stores a group's blocks only the first time.
//! Removals take a sequence's own blocks, last first; the groups' stay.
//!
//! Invariant: equal options and seed give an equal workload.

use std::collections::HashSet;

use crate::dynamo::chain;

const GROUPS: usize = 64;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }
}

/// SplitMix64's finalizer: a bijection, so distinct numbers give distinct hashes.
pub fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What a workload is made of.
#[derive(Clone, Copy)]
pub struct Shape {
    pub blocks: usize,
    pub depth: usize,
    pub shared: usize,
    pub ranks: usize,
    pub seed: u64,
}

/// One prompt: every block's own hash, and its hash given all blocks before it.
pub struct Sequence {
    pub local: Vec<u64>,
    pub chained: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// First block first.
    Store,
    /// Last block first.
    Remove,
}

/// Blocks `from..to` of one sequence changed on one rank.
#[derive(Clone, Copy)]
pub struct Event {
    pub change: Change,
    pub rank: u32,
    pub sequence: u32,
    pub from: u32,
    pub to: u32,
}

impl Event {
    pub fn blocks(&self) -> usize {
        (self.to - self.from) as usize
    }
}

/// The first `known` blocks of a sequence, then blocks that nobody has.
#[derive(Clone, Copy)]
pub struct Query {
    sequence: u32,
    known: u32,
    seed: u64,
}

pub struct Workload {
    pub shape: Shape,
    pub sequences: Vec<Sequence>,
    pub stores: Vec<Event>,
    pub removes: Vec<Event>,
}

pub fn blocks_of(events: &[Event]) -> usize {
    events.iter().map(Event::blocks).sum()
}

impl Workload {
    pub fn new(shape: Shape) -> Self {
        let Shape { blocks, depth, shared, ranks, seed } = shape;
        let mut rng = Rng(seed);
        let groups: Vec<Vec<u64>> = (0..GROUPS).map(|_| (0..shared).map(|_| rng.next()).collect()).collect();
        let mut announced = HashSet::new();
        let mut workload = Self { shape, sequences: vec![], stores: vec![], removes: vec![] };
        for number in 0..blocks / depth {
            let (rank, sequence) = ((number % ranks) as u32, number as u32);
            let group = rng.below(GROUPS);
            let mut local = groups[group].clone();
            local.extend((shared..depth).map(|_| rng.next()));
            let chained = chain(&local);
            workload.sequences.push(Sequence { local, chained });
            let from = if announced.insert((rank, group)) { 0 } else { shared as u32 };
            let to = depth as u32;
            workload.stores.push(Event { change: Change::Store, rank, sequence, from, to });
            workload.removes.push(Event { change: Change::Remove, rank, sequence, from: shared as u32, to });
        }
        workload
    }

    /// The same changes, a block each: the shape of decode.
    pub fn one_block_events(&self, events: &[Event]) -> Vec<Event> {
        let single = |event: &Event, at: u32| Event { from: at, to: at + 1, ..*event };
        let mut singles = Vec::with_capacity(blocks_of(events));
        for event in events {
            match event.change {
                Change::Store => singles.extend((event.from..event.to).map(|at| single(event, at))),
                Change::Remove => singles.extend((event.from..event.to).rev().map(|at| single(event, at))),
            }
        }
        singles
    }

    /// `count` queries that know the first `known` blocks of a random sequence.
    pub fn queries(&self, count: usize, known: usize, seed: u64) -> Vec<Query> {
        let mut rng = Rng(seed);
        let mut query = || Query {
            sequence: rng.below(self.sequences.len()) as u32,
            known: known as u32,
            seed: rng.next(),
        };
        (0..count).map(|_| query()).collect()
    }

    /// Every block's own hash.
    pub fn query_local(&self, query: &Query) -> Vec<u64> {
        let sequence = &self.sequences[query.sequence as usize].local;
        let mut rng = Rng(query.seed);
        let unknown = (query.known as usize..sequence.len()).map(|_| rng.next());
        sequence[..query.known as usize].iter().copied().chain(unknown).collect()
    }

    /// Every block's hash given all before it.
    pub fn query_chained(&self, query: &Query) -> Vec<u64> {
        let sequence = &self.sequences[query.sequence as usize];
        if query.known as usize == sequence.chained.len() {
            return sequence.chained.clone();
        }
        chain(&self.query_local(query))
    }
}
