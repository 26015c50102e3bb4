//! Hand-overs of a run, from the step that begins them until the engine that takes them in knows that they are over.

use forebay_types::{Incarnation, LegId, RankId};

use super::{Run, agenda::Event, client::Request, seats::Power};
use crate::{clock::Time, engine::Pull, links::Transfer};

/// A hand-over of which its engine does not yet know the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pulling {
    from: RankId,
    pub(super) to: RankId,
    blocks: u32,
    began: Time,
    /// What it takes alone, and once it is over, what it took.
    seconds: f64,
}

impl Run<'_> {
    /// A step of an engine begins a hand-over.
    pub(super) fn begin_pull(&mut self, pull: Pull) {
        let Pull { leg, rank, blocks, cost } = pull;
        let live = self.clients.requests[Request::of(leg) as usize].live.as_mut();
        let known = live.and_then(|live| live.leg(leg)).and_then(|leg| Some(leg.source?.1));
        // One that was given up is cancelled in a moment; its transfer must end all the same.
        let from = known.unwrap_or(rank);
        self.pulls.insert(leg, Pulling { from, to: rank, blocks, began: self.now, seconds: cost.seconds });
        let part = if self.pull_succeeded(leg, rank) { 1.0 } else { 0.5 };
        let moving = Time::from_seconds(cost.moving_seconds * part);
        // An engine that nobody gave a link is as fast as whoever pulls from it.
        let source = &self.settings.engines[self.seat_of(from).0 as usize].kind;
        let of_source = source.link.map(|_| source.handover(blocks).moving_seconds * part);
        let transfer = Transfer {
            from,
            to: rank,
            start: Time::from_seconds(cost.seconds * part).since(moving),
            at_source: of_source.map_or(moving, Time::from_seconds),
            at_target: moving,
        };
        let ends = self.links.begin(leg, transfer, self.now);
        self.agenda.add(ends, Event::Pulled(leg, rank));
        self.agenda.add(self.now + transfer.start, Event::Moves(leg));
    }

    /// A hand-over begins to take its part of the links.
    pub(super) fn moves(&mut self, leg: LegId) {
        self.links.moves(leg, self.now);
        self.pass_ends();
    }

    /// A hand-over may be over.
    pub(super) fn pulled(&mut self, leg: LegId, rank: RankId) {
        if self.links.ends(leg) != Some(self.now) {
            return; // it shares its links with others, or its engine is gone
        }
        self.links.over(leg, self.now);
        self.pass_ends();
        if let Some(pull) = self.pulls.get_mut(&leg)
            && pull.began.after(pull.seconds) != self.now
        {
            pull.seconds = self.now.since(pull.began).seconds();
        }
        self.tell_pulled(leg, rank);
    }

    /// What has come or gone on a link changes when others are over.
    fn pass_ends(&mut self) {
        for (leg, rank, ends) in self.links.changed.drain(..) {
            self.agenda.add(ends, Event::Pulled(leg, rank));
        }
    }

    /// Nobody takes in what is on the way to a life of an engine.
    pub(super) fn forget_pulls(&mut self, to: Incarnation) {
        let of = |(leg, pull): (&LegId, &Pulling)| (pull.to.incarnation == to).then_some(*leg);
        let mut legs: Vec<LegId> = self.pulls.iter().filter_map(of).collect();
        legs.sort_unstable_by_key(|leg| leg.0); // the map's order is nobody's
        for leg in legs {
            self.pulls.remove(&leg);
            self.links.over(leg, self.now);
        }
        self.pass_ends();
    }

    /// Whether the KV that a leg pulls is there: both ends live on, and nothing between them broke.
    pub(super) fn pull_succeeded(&self, leg: LegId, rank: RankId) -> bool {
        let Some(source) = self.pulls.get(&leg).map(|pull| pull.from) else { return false };
        let (engine, life) = self.seat_of(source);
        let seat = &self.seats[engine as usize];
        let lives = seat.life == life && !matches!(seat.power, Power::Down { .. });
        lives && !self.broken_pairs.contains(&(engine, self.seat_of(rank).0))
    }

    /// The engine of a decode leg knows that its KV is there, or will not come: the one that held it may forget it.
    pub(super) fn imported(&mut self, leg: LegId, arrived: bool) {
        let Some(pull) = self.pulls.remove(&leg) else { return };
        let source = &self.settings.engines[self.seat_of(pull.from).0 as usize].kind;
        let bytes = u64::from(pull.blocks) * source.block_bytes();
        if arrived {
            self.transfers += 1;
            self.transfer_bytes += bytes;
        } else {
            self.transfers_failed += 1;
        }
        self.kv_came(leg, arrived.then_some((bytes, pull.seconds)));
    }
}
