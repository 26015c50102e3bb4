//! The fleet: events in, snapshot out.
//!
//! Start at [`Fleet::apply`] and [`Fleet::snapshot`]. A small event costs a binary search and marks its rank; the next
//! snapshot brings the marked ranks up to date, in place unless someone still holds the previous one.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use forebay_perf_model::{LinkModel, LinkPrior};
use forebay_placement::{Links, RankState, Reserved, Snapshot};
use forebay_types::{EngineName, Incarnation, Leaning, RankId, RankLoad, ReservationId, StepObservation};

use crate::{
    breaker::Breaker,
    counters::Counters,
    event::{Applied, EngineFacts, Event, Ignored, LoadSight, Progress},
    pairs::RestingPairs,
    rank::Rank,
    reservation::Reservation,
    settings::{BreakerSettings, FleetSettings},
};

/// No hand-over is quicker, seconds.
const LATENCY_MIN: f64 = 1e-5;

/// What is known of every engine.
#[derive(Debug)]
pub struct Fleet {
    settings: FleetSettings,
    /// The engines that live.
    engines: BTreeMap<Incarnation, EngineName>,
    /// Incarnations that ended, the latest last.
    lost: VecDeque<Incarnation>,
    /// Sorted by id, like the snapshot's ranks.
    pub(crate) ranks: Vec<Rank>,
    reservations: BTreeMap<ReservationId, Reservation>,
    /// When each measured pair was last observed, and the pairs in that order.
    links_at: BTreeMap<(Incarnation, Incarnation), Duration>,
    links_by_age: BTreeSet<(Duration, (Incarnation, Incarnation))>,
    /// Pairs whose hand-overs failed lately.
    pairs: RestingPairs,
    counters: Counters,
    /// Its links are always up to date: here is the only copy, or each change would cost another.
    snapshot: Arc<Snapshot>,
    /// The moment that the snapshot shows; never goes back.
    shown_at: Duration,
    changed: Changed,
}

/// What the snapshot does not show yet.
#[derive(Debug, Default)]
struct Changed {
    /// Ranks came or went: indices do not match.
    members: bool,
    links: bool,
    /// Indices of ranks whose `dirty` is set.
    ranks: Vec<usize>,
}

impl Fleet {
    /// A fleet without engines.
    pub fn new(settings: FleetSettings) -> Self {
        let links = Links::new(LinkModel::new(settings.link_prior));
        Self {
            settings,
            engines: BTreeMap::new(),
            lost: VecDeque::new(),
            ranks: Vec::new(),
            reservations: BTreeMap::new(),
            links_at: BTreeMap::new(),
            links_by_age: BTreeSet::new(),
            pairs: RestingPairs::default(),
            counters: Counters::default(),
            snapshot: Arc::new(Snapshot::new(0, Vec::new(), links)),
            shown_at: Duration::ZERO,
            changed: Changed::default(),
        }
    }

    /// Takes in one event that happened at `now` (time since the caller's origin). Never fails: what cannot be is
    /// ignored and counted, and the answer says which.
    pub fn apply(&mut self, now: Duration, event: Event) -> Applied {
        let applied = match event {
            Event::Joined(facts) => self.join(now, facts),
            Event::Ready(incarnation) => self.set_state(incarnation, RankState::Ready),
            Event::Draining(incarnation) => self.set_state(incarnation, RankState::Draining),
            Event::Silent(incarnation) => self.set_state(incarnation, RankState::Silent),
            Event::Leans(incarnation, leaning) => self.lean(incarnation, leaning),
            Event::Fenced(incarnation) => self.set_state(incarnation, RankState::Fenced),
            Event::TextOnly(incarnation) => self.take_text_alone(incarnation),
            Event::Lost(incarnation) => self.lose(incarnation),
            Event::Load { rank, load, as_of } => self.report(rank, load, as_of),
            Event::Step { rank, step } => self.observe_step(now, rank, &step),
            Event::Reserved { id, rank, amount } => self.reserve(now, id, rank, amount),
            Event::Progress { id, progress } => self.advance(now, id, progress),
            Event::Released(id) => self.release(id),
            Event::LegOk(rank) => self.judge(now, rank, Breaker::succeeded),
            Event::LegFailed(rank) => self.judge(now, rank, Breaker::failed),
            Event::Transferred { from, to, bytes, seconds } => {
                self.observe_transfer(now, from, to, bytes, seconds)
            }
            Event::TransferFailed { from, to } => self.rest_pair(now, from, to),
        };
        if let Applied::Ignored(reason) = applied {
            self.count(reason);
        }
        applied
    }

    /// The fleet as of `now`, to `time_resolution`. The same value as before unless something changed.
    pub fn snapshot(&mut self, now: Duration) -> Arc<Snapshot> {
        let shown_at = self.whole_steps(now).max(self.shown_at);
        let aged = shown_at > self.shown_at;
        if self.pairs.wake(shown_at) {
            self.show_resting(shown_at);
        }
        let Changed { members, links, ranks } = std::mem::take(&mut self.changed);
        if !(aged || members || links || !ranks.is_empty()) {
            return self.snapshot.clone();
        }
        self.shown_at = shown_at;
        let snapshot = Arc::make_mut(&mut self.snapshot);
        snapshot.generation += 1;
        if members {
            snapshot.set_ranks(self.ranks.iter().map(|rank| rank.view(shown_at, &self.settings)).collect());
        } else {
            for &index in &ranks {
                snapshot.update(index, |view| self.ranks[index].update(view, shown_at, &self.settings));
            }
            if aged {
                snapshot.update_all(|index, view| self.ranks[index].age(view, shown_at, &self.settings));
            }
        }
        for &index in &ranks {
            self.ranks[index].dirty = false;
        }
        // Keeps the list's allocation.
        self.changed.ranks = ranks;
        self.changed.ranks.clear();
        self.snapshot.clone()
    }

    /// What was ignored, refused or voided so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Reservations that are held. 0 when no request runs, or one leaked.
    pub fn reservations(&self) -> usize {
        self.reservations.len()
    }

    fn whole_steps(&self, now: Duration) -> Duration {
        let step = self.settings.time_resolution.as_nanos().max(1);
        let nanos = now.as_nanos() / step * step;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn count(&mut self, reason: Ignored) {
        let counter = match reason {
            Ignored::Fenced => &mut self.counters.fenced,
            Ignored::JoinedBefore | Ignored::RanksFull => &mut self.counters.joins_refused,
            Ignored::UnknownReservation => &mut self.counters.reservations_unknown,
            Ignored::DuplicateReservation => &mut self.counters.reservations_duplicate,
            Ignored::ReservationsFull => &mut self.counters.reservations_refused,
        };
        *counter += 1;
    }

    // Lives.

    fn join(&mut self, now: Duration, facts: EngineFacts) -> Applied {
        let incarnation = facts.incarnation;
        if self.engines.contains_key(&incarnation) || self.lost.contains(&incarnation) {
            return Applied::Ignored(Ignored::JoinedBefore);
        }
        let earlier = self.engines.iter().find(|(_, engine)| **engine == facts.engine).map(|(&life, _)| life);
        let leaving = earlier.map_or(0, |life| self.ranks_of(life).len());
        if self.ranks.len() - leaving + usize::from(facts.dp_ranks) > self.settings.ranks_max {
            return Applied::Ignored(Ignored::RanksFull);
        }
        if let Some(earlier) = earlier {
            self.lose(earlier);
        }
        self.forget_changes();
        self.engines.insert(incarnation, facts.engine.clone());
        let facts = Arc::new(facts);
        let at = self.ranks_of(incarnation).start;
        let ranks = (0..facts.dp_ranks)
            .map(|dp_rank| Rank::new(RankId { incarnation, dp_rank }, facts.clone(), now, &self.settings));
        self.ranks.splice(at..at, ranks.collect::<Vec<_>>());
        earlier.map_or(Applied::Changed, Applied::Replaced)
    }

    fn set_state(&mut self, incarnation: Incarnation, state: RankState) -> Applied {
        if !self.engines.contains_key(&incarnation) {
            return Applied::Ignored(Ignored::Fenced);
        }
        let mut applied = Applied::Unchanged;
        for index in self.ranks_of(incarnation) {
            // What it says after a lie is not believed either.
            if self.ranks[index].state != RankState::Fenced && self.ranks[index].state != state {
                self.ranks[index].state = state;
                self.mark(index);
                applied = Applied::Changed;
            }
        }
        applied
    }

    fn take_text_alone(&mut self, incarnation: Incarnation) -> Applied {
        if !self.engines.contains_key(&incarnation) {
            return Applied::Ignored(Ignored::Fenced);
        }
        let mut applied = Applied::Unchanged;
        for index in self.ranks_of(incarnation) {
            if self.ranks[index].take_text_alone() {
                self.changed.members = true;
                applied = Applied::Changed;
            }
        }
        applied
    }

    fn lean(&mut self, incarnation: Incarnation, leaning: Leaning) -> Applied {
        if !self.engines.contains_key(&incarnation) {
            return Applied::Ignored(Ignored::Fenced);
        }
        let mut applied = Applied::Unchanged;
        for index in self.ranks_of(incarnation) {
            if std::mem::replace(&mut self.ranks[index].leaning, leaning) != leaning {
                self.mark(index);
                applied = Applied::Changed;
            }
        }
        applied
    }

    /// Ends a life: its ranks, its links and what was promised to it.
    fn lose(&mut self, incarnation: Incarnation) -> Applied {
        if self.engines.remove(&incarnation).is_none() {
            return Applied::Ignored(Ignored::Fenced);
        }
        self.forget_changes();
        let ranks = self.ranks_of(incarnation);
        self.ranks.drain(ranks);
        let before = self.reservations.len();
        self.reservations.retain(|_, reservation| reservation.rank.incarnation != incarnation);
        self.counters.reservations_voided += (before - self.reservations.len()) as u64;
        self.links_mut().remove_incarnation(incarnation);
        self.pairs.remove_incarnation(incarnation);
        let is_left = |&(from, to): &(Incarnation, Incarnation)| from != incarnation && to != incarnation;
        self.links_at.retain(|pair, _| is_left(pair));
        self.links_by_age.retain(|(_, pair)| is_left(pair));
        self.lost.push_back(incarnation);
        while self.lost.len() > self.settings.lost_remembered_max {
            self.lost.pop_front();
        }
        Applied::Changed
    }

    // Ranks.

    fn ranks_of(&self, incarnation: Incarnation) -> std::ops::Range<usize> {
        let start = self.ranks.partition_point(|rank| rank.id.incarnation < incarnation);
        let end = self.ranks.partition_point(|rank| rank.id.incarnation <= incarnation);
        start..end
    }

    fn index_of(&self, id: RankId) -> Option<usize> {
        self.ranks.binary_search_by_key(&id, |rank| rank.id).ok()
    }

    fn mark(&mut self, index: usize) {
        let rank = &mut self.ranks[index];
        if !rank.dirty && !self.changed.members {
            rank.dirty = true;
            self.changed.ranks.push(index);
        }
    }

    /// Members are about to change: the whole snapshot will be rebuilt and indices kept so far mean nothing.
    fn forget_changes(&mut self) {
        for index in self.changed.ranks.drain(..) {
            self.ranks[index].dirty = false;
        }
        self.changed.members = true;
    }

    /// Takes a leg's outcome; most leave the breaker as it was.
    fn judge(
        &mut self,
        now: Duration,
        id: RankId,
        outcome: fn(&mut Breaker, Duration, &BreakerSettings),
    ) -> Applied {
        let Some(index) = self.index_of(id) else { return Applied::Ignored(Ignored::Fenced) };
        let breaker = &mut self.ranks[index].breaker;
        let before = breaker.view(now);
        outcome(breaker, now, &self.settings.breaker);
        if breaker.view(now) == before {
            return Applied::Unchanged;
        }
        self.mark(index);
        Applied::Changed
    }

    fn observe_step(&mut self, now: Duration, id: RankId, step: &StepObservation) -> Applied {
        let Some(index) = self.index_of(id) else { return Applied::Ignored(Ignored::Fenced) };
        self.ranks[index].observe(now, step, &self.settings);
        self.mark(index);
        Applied::Changed
    }

    /// Takes a load report, and with it the parts of reservations that it shows.
    fn report(&mut self, id: RankId, load: RankLoad, as_of: Duration) -> Applied {
        const HELD: &str = "watched reservations are held";
        let Some(index) = self.index_of(id) else { return Applied::Ignored(Ignored::Fenced) };
        let rank = &mut self.ranks[index];
        let mut watched = std::mem::take(&mut rank.watched);
        rank.report(load, as_of, watched.iter().map(|id| &self.reservations[id]));
        if rank.sight() == LoadSight::EveryStep {
            watched.retain(|id| {
                let reservation = self.reservations.get_mut(id).expect(HELD);
                let before = (reservation.unseen(), reservation.on_rank());
                reservation.reported(as_of);
                rank.leg_changed(before, (reservation.unseen(), reservation.on_rank()));
                reservation.is_pending()
            });
        }
        rank.watched = watched;
        self.mark(index);
        Applied::Changed
    }

    // Reservations.

    fn reserve(&mut self, now: Duration, id: ReservationId, rank: RankId, amount: Reserved) -> Applied {
        let Some(index) = self.index_of(rank) else { return Applied::Ignored(Ignored::Fenced) };
        if self.reservations.contains_key(&id) {
            return Applied::Ignored(Ignored::DuplicateReservation);
        }
        if self.reservations.len() >= self.settings.reservations_max {
            return Applied::Ignored(Ignored::ReservationsFull);
        }
        let holder = &mut self.ranks[index];
        let reservation = Reservation::new(rank, holder.sight(), amount);
        holder.leg_changed(Default::default(), (reservation.unseen(), reservation.on_rank()));
        holder.breaker.reserved(now, id);
        if holder.sight() == LoadSight::Sampled {
            holder.watched.insert(id);
        }
        self.reservations.insert(id, reservation);
        self.mark(index);
        Applied::Changed
    }

    fn advance(&mut self, now: Duration, id: ReservationId, progress: Progress) -> Applied {
        let Some(reservation) = self.reservations.get_mut(&id) else {
            return Applied::Ignored(Ignored::UnknownReservation);
        };
        let before = (reservation.unseen(), reservation.on_rank());
        reservation.advance(now, progress);
        let (after, pending) = ((reservation.unseen(), reservation.on_rank()), reservation.is_pending());
        let index = index_of_holder(&self.ranks, reservation);
        let rank = &mut self.ranks[index];
        if pending {
            rank.watched.insert(id);
        }
        if before == after {
            return Applied::Unchanged;
        }
        rank.leg_changed(before, after);
        self.mark(index);
        Applied::Changed
    }

    fn release(&mut self, id: ReservationId) -> Applied {
        let Some(reservation) = self.reservations.remove(&id) else {
            return Applied::Ignored(Ignored::UnknownReservation);
        };
        let index = index_of_holder(&self.ranks, &reservation);
        let rank = &mut self.ranks[index];
        rank.leg_changed((reservation.unseen(), reservation.on_rank()), Default::default());
        rank.watched.remove(&id);
        rank.breaker.released(id);
        self.mark(index);
        Applied::Changed
    }

    // Links.

    fn observe_transfer(
        &mut self,
        now: Duration,
        from: RankId,
        to: RankId,
        bytes: u64,
        seconds: f64,
    ) -> Applied {
        if self.index_of(from).is_none() || self.index_of(to).is_none() {
            return Applied::Ignored(Ignored::Fenced);
        }
        let pair = (from.incarnation, to.incarnation);
        // The first one that is measured is a short one: what it took is what any takes, not what its bytes took.
        if self.index_of(to).is_some_and(|index| self.ranks[index].needs_warming()) {
            let prior = LinkPrior { latency_seconds: seconds.max(LATENCY_MIN), ..LinkPrior::CONNECTOR };
            self.links_mut().begin(pair.0, pair.1, LinkModel::new(prior));
        }
        if !self.links_at.contains_key(&pair) && self.links_at.len() >= self.settings.links_max {
            let Some((_, oldest)) = self.links_by_age.pop_first() else { return Applied::Unchanged };
            self.links_at.remove(&oldest);
            self.links_mut().remove(oldest.0, oldest.1);
            self.counters.links_evicted += 1;
        }
        if let Some(before) = self.links_at.insert(pair, now) {
            self.links_by_age.remove(&(before, pair));
        }
        self.links_by_age.insert((now, pair));
        if self.pairs.succeeded(pair) {
            self.show_resting(now);
        }
        let links = self.links_mut();
        links.warmed(pair.0, pair.1);
        links.observe(pair.0, pair.1, bytes, seconds);
        Applied::Changed
    }

    fn links_mut(&mut self) -> &mut Links {
        self.changed.links = true;
        &mut Arc::make_mut(&mut self.snapshot).links
    }

    fn show_resting(&mut self, now: Duration) {
        let resting = self.pairs.resting(now).collect::<Vec<_>>();
        self.links_mut().set_resting(resting);
    }
}

impl Fleet {
    fn rest_pair(&mut self, now: Duration, from: RankId, to: RankId) -> Applied {
        if self.index_of(from).is_none() || self.index_of(to).is_none() {
            return Applied::Ignored(Ignored::Fenced);
        }
        let settings = &self.settings;
        self.pairs.failed((from.incarnation, to.incarnation), now, &settings.breaker, settings.links_max);
        self.show_resting(now);
        Applied::Changed
    }

    /// Pairs that could hand over to each other but for never having done so, at most `max`: to be warmed.
    pub fn cold_pairs(&self, max: usize) -> Vec<(RankId, RankId)> {
        let links = &self.snapshot.links;
        let firsts =
            || self.ranks.iter().filter(|rank| rank.id.dp_rank == 0 && rank.state == RankState::Ready);
        let pairs = firsts().flat_map(|from| firsts().map(move |to| (from, to)));
        pairs
            .filter(|(from, to)| from.may_hand_over_to(to) && (from.needs_warming() || to.needs_warming()))
            .map(|(from, to)| (from.id, to.id))
            .filter(|(from, to)| {
                let (from, to) = (from.incarnation, to.incarnation);
                !links.is_warm(from, to) && !links.is_resting(from, to)
            })
            .take(max)
            .collect()
    }
}

fn index_of_holder(ranks: &[Rank], reservation: &Reservation) -> usize {
    ranks
        .binary_search_by_key(&reservation.rank, |rank| rank.id)
        .expect("reservations die with the incarnation of their rank")
}
