//! What is to happen, in order.

use std::{cmp::Reverse, collections::BinaryHeap};

use forebay_engine_model::Job;
use forebay_types::{FinishReason, KvEventBatch, LegId, RankId};

use crate::{clock::Time, engine::Report};

/// One thing to happen.
pub(super) enum Event {
    /// A session's next turn is sent.
    Arrive(u32),
    /// A leg reaches its engine.
    Queue(Box<Sent>),
    /// A step of an engine is over, if it has this ticket.
    StepEnd(u32, u32),
    /// An engine may have something to compute.
    Wake(u32),
    /// A hand-over begins to take its part of the links.
    Moves(LegId),
    /// A hand-over to this rank is done, or has failed, unless its end is another one meanwhile.
    Pulled(LegId, RankId),
    /// The gateway hears of a leg.
    Heard(LegId, Word),
    /// A rank's report arrives, and when it was made.
    Reported(Box<Report>, Time),
    /// A gateway looks at an engine: their numbers in one.
    Look(u32),
    /// Engines are sampled for the record.
    Sample,
    /// A request has waited long enough.
    Leave(u32),
    /// A request's lifecycle asked for it.
    Tick(u32),
    /// An engine hears that nobody waits for a leg.
    Cancel(LegId, RankId),
    /// A client is gone.
    Gone(u32),
    /// A fault of the plan begins, or ends.
    Fault(u32, bool),
    /// An engine's new process serves, if this still is the last that was started.
    Started(u32, u32),
    /// Disturbed KV events reach a gateway.
    Batch(u32, Box<KvEventBatch>),
    /// A gateway's wish for all that a rank caches reaches it.
    Resync(u32, RankId),
    /// A gateway hears of an engine.
    Notice(Box<Notice>),
}

/// A leg on its way to an engine.
pub(super) struct Sent {
    pub(super) rank: RankId,
    pub(super) job: Job,
}

/// What the gateway hears of a leg.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    FirstToken,
    Generated(u32),
    Prefilled,
    /// And why its choice did, if the engine said so.
    Ended(Option<FinishReason>),
    /// The engine did not take it: nobody is there.
    Gone,
    /// The engine's queue is full.
    Full,
    /// Its connection broke.
    Broken,
}

/// What a gateway hears of an engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Notice {
    pub(super) gateway: u32,
    pub(super) engine: u32,
    /// Which life of it.
    pub(super) life: u32,
    pub(super) what: News,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It serves.
    Joined,
    /// Its process is gone.
    Died,
    /// It has not answered since then.
    Silent { since: Time },
    /// It has not answered for so long that it counts as lost.
    Lapsed { since: Time },
    /// It answers again.
    Heard,
}

/// Events by time; those of equal times in the order in which they were added.
#[derive(Default)]
pub(super) struct Agenda {
    events: BinaryHeap<Reverse<Due>>,
    added: u64,
}

struct Due {
    at: Time,
    order: u64,
    event: Event,
}

impl Agenda {
    pub(super) fn add(&mut self, at: Time, event: Event) {
        self.added += 1;
        self.events.push(Reverse(Due { at, order: self.added, event }));
    }

    pub(super) fn next(&mut self) -> Option<(Time, Event)> {
        self.events.pop().map(|Reverse(Due { at, order: _, event })| (at, event))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_times_keep_their_order() {
        let mut agenda = Agenda::default();
        for (at, group) in [(5, 0), (3, 1), (5, 2), (3, 3)] {
            agenda.add(Time(at), Event::Wake(group));
        }
        let groups: Vec<u32> = std::iter::from_fn(|| match agenda.next()?.1 {
            Event::Wake(group) => Some(group),
            _ => None,
        })
        .collect();
        assert_eq!(groups, [1, 3, 0, 2]);
    }
}
