//! What every index under test can do, and the list of them.

use std::time::{Duration, Instant};

use crate::{
    dynamo, forebay, machine, opaque,
    workload::{Event, Query, Workload},
};

/// An index, driven from one thread. `prepare` and `prepare_queries` turn a part of the workload into the index's own
/// types and are never timed; `apply` and `look_up` do nothing else than use it.
pub trait Contender {
    /// Queues events, owned.
    fn prepare(&mut self, workload: &Workload, events: &[Event]);
    /// Applies the queued events in order and frees each.
    fn apply(&mut self);
    /// As `apply`, an event at a time; false if that cannot be timed from outside.
    fn apply_timed(&mut self, _times: &mut EventTimes) -> bool {
        false
    }
    /// Replaces the queries.
    fn prepare_queries(&mut self, workload: &Workload, queries: &[Query]);
    /// Answers each prepared query once. Returns how many ranks were found in all, so that nothing is optimised away.
    fn look_up(&mut self) -> u64;
    /// The answer to one query: (rank, leading blocks), sorted, ranks with none left out. `None` from a floor.
    fn overlaps(&mut self, workload: &Workload, query: &Query) -> Option<Vec<(u32, u32)>>;
    /// What the index says about itself.
    fn reported(&self) -> Option<Reported> {
        None
    }
    /// Says what was refused or failed, if anything was.
    fn check(&self) -> Result<(), String>;
}

/// An index's own figures.
pub struct Reported {
    pub bytes: u64,
    /// Those of them that a table takes in which changes, but not look-ups, find every block.
    pub bytes_names: u64,
    pub blocks: u64,
}

/// What a contender's figures are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Ours,
    /// Ratios are against the better of these.
    Rival,
    /// Reads and frees events and queries of one shape, without an index: what the others cannot go below.
    Floor,
    /// Shown beside the others; runs only when asked for.
    Extra,
}

#[derive(Clone, Copy)]
pub struct Entry {
    pub name: &'static str,
    pub role: Role,
    pub new: fn() -> Box<dyn Contender>,
}

/// Ours with sixteen events in a batch: what an engine's step sends while it decodes. For small events alone.
pub const STEPS: &str = "forebay-steps";

/// Ours behind engines' own hashes, with the map from them for each rank. Hashes tokens as well, which the rivals do not:
/// for bytes alone.
pub const OPAQUE: &str = "forebay-opaque";

pub const CONTENDERS: &[Entry] = &[
    Entry { name: "radix-tree", role: Role::Rival, new: || Box::new(dynamo::Radix::default()) },
    Entry { name: "crtc", role: Role::Rival, new: || Box::new(dynamo::Compressed::new()) },
    Entry { name: "forebay", role: Role::Ours, new: || Box::new(forebay::Forebay::new()) },
    Entry { name: STEPS, role: Role::Ours, new: || Box::new(forebay::Forebay::with_steps(16)) },
    Entry { name: OPAQUE, role: Role::Ours, new: || Box::new(opaque::Opaque::new()) },
    Entry { name: "floor-dynamo", role: Role::Floor, new: || Box::new(dynamo::Floor::default()) },
    Entry { name: "floor-forebay", role: Role::Floor, new: || Box::new(forebay::Floor::default()) },
    Entry { name: "crtc-pool", role: Role::Extra, new: || Box::new(dynamo::Pooled::new()) },
];

/// How long single events took.
#[derive(Default)]
pub struct EventTimes {
    pub wall_ns: Vec<u64>,
    /// Longest by this thread's CPU clock, which leaves out what other processes took.
    pub cpu_longest: Duration,
}

impl EventTimes {
    pub fn time(&mut self, event: impl FnOnce()) {
        let (cpu, began) = (machine::thread_cpu(), Instant::now());
        event();
        self.wall_ns.push(began.elapsed().as_nanos() as u64);
        self.cpu_longest = self.cpu_longest.max(machine::thread_cpu() - cpu);
    }
}
