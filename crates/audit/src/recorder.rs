//! What is recorded of a fleet, rank by rank, as it comes.

use forebay_engine_events::EventBatch;

use crate::{
    chains::Chains,
    infer::{Inferred, TooLittle},
    meter::{Meter, Reading},
};

/// Bounds of a recording's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// KV blocks by which a rank's next ones are known; those not heard of for longest are forgotten. More than it caches.
    pub rank_blocks_max: usize,
    /// KV blocks that are remembered of all together, likewise.
    pub blocks_max: usize,
    /// Requests that are recorded; further ones are left out.
    pub requests_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Eight million tokens of each rank in some 15 MB; 64 million of all in 200 MB; requests of 48 bytes.
        Self { rank_blocks_max: 1 << 19, blocks_max: 1 << 22, requests_max: 1 << 20 }
    }
}

/// What a recording lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// Batches of KV events that were missed.
    pub batches: u64,
    /// Requests beyond the limit.
    pub requests: u64,
    /// Blocks that were forgotten for want of room.
    pub blocks: u64,
    /// Events that contradict themselves.
    pub malformed: u64,
}

/// Takes what engines show. A *seat* is one rank of one engine; seats are numbered from 0.
pub struct Recorder {
    pub(crate) chains: Chains,
    pub(crate) meters: Vec<Meter>,
    /// Seats of which KV events were heard.
    pub(crate) heard: Vec<bool>,
    batches_missed: u64,
}

impl Recorder {
    /// Of so many ranks.
    pub fn new(seats: usize, limits: Limits) -> Self {
        Self {
            chains: Chains::new(seats, limits),
            meters: (0..seats).map(|_| Meter::default()).collect(),
            heard: vec![false; seats],
            batches_missed: 0,
        }
    }

    /// A rank's metrics were read.
    pub fn read(&mut self, seat: usize, reading: Reading) {
        if let Some(itl_seconds) = self.meters[seat].read(reading) {
            self.chains.pace(seat, itl_seconds);
        }
    }

    /// A rank's KV events can be heard from here on, even if there are none yet.
    pub fn listening(&mut self, seat: usize) {
        self.heard[seat] = true;
    }

    /// A rank's KV events came. `is_history`: they happened before the recording began.
    pub fn heard(&mut self, seat: usize, at_seconds: f64, is_history: bool, batch: &EventBatch) {
        self.heard[seat] = true;
        self.chains.take(seat, at_seconds, is_history, batch);
    }

    /// So many batches of a rank's events were missed.
    pub fn missed(&mut self, batches: u64) {
        self.batches_missed += batches;
    }

    /// A rank's engine began anew: it caches nothing.
    pub fn restarted(&mut self, seat: usize) {
        self.chains.forget(seat);
    }

    /// What is not in the recording.
    pub fn lost(&self) -> Lost {
        Lost {
            batches: self.batches_missed,
            requests: self.chains.requests_left_out,
            blocks: self.chains.forgotten(),
            malformed: self.chains.malformed,
        }
    }

    /// Requests that had their first token so far, by the engines' own counters.
    pub fn requests(&self) -> f64 {
        self.meters.iter().flat_map(|meter| &meter.intervals).map(|interval| interval.begun).sum()
    }

    /// Makes requests of what was recorded.
    ///
    /// # Errors
    /// If it is too little to say anything.
    pub fn infer(&self) -> Result<Inferred, TooLittle> {
        Inferred::of(self)
    }
}
