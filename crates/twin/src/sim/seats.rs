//! The engines of a run: each in its seat, one life after another.

use forebay_fleet::{LoadSight, Progress};
use forebay_kv_hash::BlockHasher;
use forebay_types::{Incarnation, LegId, RankId, StepObservation};

use super::{
    Run, WAY_BACK_SECONDS,
    agenda::{Event, Sent, Word},
    client::Request,
};
use crate::{
    clock::Time,
    engine::{Begun, EngineSpec, Group, Quiet, Report},
    faults::Trouble,
};

/// Seconds between two looks at an engine whose load is sampled: the gateway's.
pub(super) const LOOK_SECONDS: f64 = 1.0;

/// Whether an engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    Up,
    /// It does nothing, since then.
    Hung {
        since: Time,
    },
    /// It is gone. `silently`: nobody is told, connections stay open.
    Down {
        silently: bool,
    },
}

/// One engine.
pub(super) struct Seat {
    pub(super) group: Group,
    /// Which life this is, from 0.
    pub(super) life: u32,
    pub(super) power: Power,
    /// Processes that were started, or died while they started.
    pub(super) starts: u32,
    /// What reached it while it hung.
    inbox: Vec<Inbound>,
    /// A step was over while it hung.
    step_is_over: bool,
    /// Of the step that runs; a step's end with another one is of a step that was called off.
    pub(super) ticket: u32,
    /// Steps that are left for later.
    pub(super) quiet: Quiet,
    pub(super) draining: bool,
    /// Faults that disturb it now.
    pub(super) slow: f64,
    pub(super) events: Option<Trouble>,
    pub(super) stale: bool,
    pub(super) skew_seconds: f64,
}

/// What reaches an engine.
enum Inbound {
    Queue(Box<Sent>),
    Cancel(LegId, RankId),
    Release(LegId, RankId),
    Pulled(LegId, RankId),
    Resync(u32, RankId),
}

impl Seat {
    pub(super) fn new(engine: &EngineSpec, number: usize, engines: usize, hasher: BlockHasher) -> Self {
        let mut seat = Self {
            group: Group::new(engine.kind.clone(), std::iter::empty(), hasher),
            life: 0,
            power: Power::Up,
            starts: 0,
            inbox: Vec::new(),
            step_is_over: false,
            ticket: 0,
            quiet: Quiet::default(),
            draining: false,
            slow: 1.0,
            events: None,
            stale: false,
            skew_seconds: 0.0,
        };
        seat.begin(engine, number, engines, hasher);
        seat
    }

    /// A life begins, with empty caches.
    pub(super) fn begin(&mut self, engine: &EngineSpec, number: usize, engines: usize, hasher: BlockHasher) {
        let incarnation = incarnation(number as u32, self.life, engines);
        let ranks = (0..engine.dp_ranks).map(|dp_rank| RankId { incarnation, dp_rank });
        self.group = Group::new(engine.kind.clone(), ranks, hasher).after(&self.group);
        self.power = Power::Up;
        self.inbox.clear();
        self.quiet.clear();
        self.ticket += 1;
        (self.step_is_over, self.draining) = (false, false);
    }

    pub(super) fn is_up(&self) -> bool {
        self.power == Power::Up
    }
}

/// The name of a life of an engine.
pub(super) fn incarnation(engine: u32, life: u32, engines: usize) -> Incarnation {
    Incarnation(u64::from(life) * engines as u64 + u64::from(engine) + 1)
}

impl Run<'_> {
    /// Which engine, and which life of it, a rank is of.
    pub(super) fn seat_of(&self, rank: RankId) -> (u32, u32) {
        let (number, engines) = (rank.incarnation.0 - 1, self.seats.len() as u64);
        ((number % engines) as u32, (number / engines) as u32)
    }

    /// The engine of a rank, if that life goes on; what it hung through is kept for it.
    fn reach(&mut self, rank: RankId, inbound: Inbound) -> Option<(u32, Inbound)> {
        let (engine, life) = self.seat_of(rank);
        let seat = &mut self.seats[engine as usize];
        if seat.life != life {
            return None;
        }
        match seat.power {
            Power::Up => Some((engine, inbound)),
            Power::Hung { .. } => {
                seat.inbox.push(inbound);
                None
            }
            Power::Down { .. } => None,
        }
    }

    /// What reached an engine while it hung.
    pub(super) fn open_inbox(&mut self, engine: u32) {
        let seat = &mut self.seats[engine as usize];
        seat.power = Power::Up;
        if std::mem::take(&mut seat.step_is_over) {
            let ticket = seat.ticket;
            self.end_step(engine, ticket);
        }
        for inbound in std::mem::take(&mut self.seats[engine as usize].inbox) {
            self.take_in(engine, inbound);
        }
        self.wake(engine);
    }

    fn take_in(&mut self, engine: u32, inbound: Inbound) {
        self.interrupt(engine);
        let group = &mut self.seats[engine as usize].group;
        match inbound {
            Inbound::Queue(sent) => return self.submit(engine, *sent),
            Inbound::Cancel(leg, rank) => group.cancel(rank.dp_rank, leg),
            Inbound::Release(leg, rank) => group.release_held(rank.dp_rank, leg),
            Inbound::Pulled(leg, rank) => {
                let arrived = self.pull_succeeded(leg, rank);
                self.seats[engine as usize].group.arrived(rank.dp_rank, leg, arrived);
            }
            Inbound::Resync(gateway, rank) => return self.tell_all(gateway, engine, rank),
        }
        self.agenda.add(self.now, Event::Wake(engine));
    }

    /// A leg reaches its engine, or finds nobody there.
    pub(super) fn queue(&mut self, sent: Box<Sent>) {
        let (leg, rank) = (sent.job.leg, sent.rank);
        let live = self.clients.requests[Request::of(leg) as usize].live.as_mut();
        if live.and_then(|live| live.leg(leg)).is_none() {
            return; // it was given up on the way
        }
        let (engine, life) = self.seat_of(rank);
        let seat = &self.seats[engine as usize];
        let is_refused = seat.life != life || matches!(seat.power, Power::Down { silently: false });
        if is_refused {
            return self.later(WAY_BACK_SECONDS, Event::Heard(leg, Word::Gone));
        }
        if let Some((engine, inbound)) = self.reach(rank, Inbound::Queue(sent)) {
            self.take_in(engine, inbound);
        }
    }

    fn submit(&mut self, engine: u32, sent: Sent) {
        let leg = sent.job.leg;
        let live = self.clients.requests[Request::of(leg) as usize].live.as_mut();
        if live.and_then(|live| live.leg(leg)).is_none() {
            return; // it was given up while the engine hung
        }
        if self.seats[engine as usize].group.submit(sent.rank.dp_rank, sent.job).is_err() {
            return self.later(WAY_BACK_SECONDS, Event::Heard(leg, Word::Full));
        }
        self.wake(engine);
    }

    pub(super) fn cancel(&mut self, leg: LegId, rank: RankId) {
        if let Some((engine, inbound)) = self.reach(rank, Inbound::Cancel(leg, rank)) {
            self.take_in(engine, inbound);
        }
    }

    pub(super) fn release_held(&mut self, leg: LegId, rank: RankId) {
        if let Some((engine, inbound)) = self.reach(rank, Inbound::Release(leg, rank)) {
            self.take_in(engine, inbound);
        }
    }

    /// The end of a hand-over reaches the engine that takes it in.
    pub(super) fn tell_pulled(&mut self, leg: LegId, rank: RankId) {
        if let Some((engine, inbound)) = self.reach(rank, Inbound::Pulled(leg, rank)) {
            self.take_in(engine, inbound);
            self.wake(engine);
        }
    }

    pub(super) fn resync(&mut self, gateway: u32, rank: RankId) {
        if let Some((engine, inbound)) = self.reach(rank, Inbound::Resync(gateway, rank)) {
            self.take_in(engine, inbound);
        }
    }

    pub(super) fn wake(&mut self, engine: u32) {
        let seat = &self.seats[engine as usize];
        if seat.is_up() && !seat.group.is_stepping() && !seat.quiet.is_on() {
            self.happened.clear();
            self.turn(engine);
        }
    }

    pub(super) fn end_step(&mut self, engine: u32, ticket: u32) {
        let seat = &mut self.seats[engine as usize];
        if seat.ticket != ticket {
            return;
        }
        match seat.power {
            Power::Up => {}
            Power::Hung { .. } => return seat.step_is_over = true,
            Power::Down { .. } => return,
        }
        if !seat.group.is_stepping() {
            // The last of its quiet steps is over.
            self.catch_up(engine);
            self.seats[engine as usize].quiet.clear();
            return self.wake(engine);
        }
        self.happened.clear();
        let clients = &self.clients;
        let token_of = |leg, position| clients.requests[Request::of(leg) as usize].token(position);
        seat.group.finish(token_of, &mut self.happened);
        let outputs = std::mem::take(&mut self.happened.outputs);
        let began = self.turn(engine);
        let delay = self.settings.delivery.seconds(began);
        for output in &outputs {
            self.deliver(output, delay);
        }
        self.answered();
        self.happened.outputs = outputs;
    }

    /// Begins the next step, and tells everyone what has happened since the buffer was cleared.
    fn turn(&mut self, engine: u32) -> Option<Begun> {
        // A quiet step has no prefill, which is what the answer is asked for.
        let began = if self.go_quiet(engine) { None } else { self.begin_step(engine) };
        let mut started = std::mem::take(&mut self.happened.started);
        for (leg, cached_tokens) in started.drain(..) {
            let live = self.clients.requests[Request::of(leg) as usize].live.as_ref();
            if live.is_none() {
                continue;
            }
            self.tell(Request::of(leg), forebay_lifecycle::Event::LegStarted { leg, cached_tokens });
            if self.settings.gateway.sight == LoadSight::EveryStep {
                self.progress(leg, Progress::Started);
            }
        }
        self.happened.started = started;
        for pull in std::mem::take(&mut self.happened.pulls) {
            self.begin_pull(pull);
        }
        for (leg, arrived) in std::mem::take(&mut self.happened.imported) {
            self.imported(leg, arrived);
        }
        self.pass_reports(engine);
        self.settle();
        began
    }

    fn begin_step(&mut self, engine: u32) -> Option<Begun> {
        let seat = &mut self.seats[engine as usize];
        let begun = seat.group.turn(seat.slow, &mut self.happened)?;
        seat.ticket += 1;
        let ticket = seat.ticket;
        if let Some(record) = &mut self.record {
            record.step(engine, self.now, begun.seconds, begun.prefill_tokens, begun.decodes);
        }
        self.later(begun.seconds, Event::StepEnd(engine, ticket));
        Some(begun)
    }

    pub(super) fn pass_reports(&mut self, engine: u32) {
        let mut reports = std::mem::take(&mut self.happened.reports);
        let (as_of, events) = (self.as_of(engine), self.seats[engine as usize].events);
        for mut report in reports.drain(..) {
            if let Some(checks) = &mut self.checks {
                checks.announced(&report);
            }
            if let Some(trouble) = events
                && let Some(batch) = report.kv.take()
            {
                self.disturb(trouble, &batch);
            }
            match self.settings.report_delay_seconds {
                0.0 => self.report(as_of, &report),
                delay => self.later(delay, Event::Reported(Box::new(report), as_of)),
            }
        }
        self.happened.reports = reports;
    }

    /// What time an engine's clock shows.
    pub(super) fn as_of(&self, engine: u32) -> Time {
        match self.seats[engine as usize].skew_seconds {
            0.0 => self.now,
            skew => Time::from_seconds((self.now.seconds() + skew).max(0.0)),
        }
    }

    /// What a step took reaches every gateway that knows its rank.
    pub(super) fn observed(&mut self, end: Time, rank: RankId, step: StepObservation) {
        for gateway in self.gateways.iter_mut().flatten() {
            if !self.troubled || gateway.knows(rank.incarnation) {
                gateway.observed(end, rank, step);
            }
        }
    }

    /// A rank's report reaches every gateway that knows it.
    pub(super) fn report(&mut self, as_of: Time, report: &Report) {
        let (engine, _) = self.seat_of(report.rank);
        let is_stale = self.seats[engine as usize].stale;
        for number in 0..self.gateways.len() {
            let Some(gateway) = &mut self.gateways[number] else { continue };
            if self.troubled && !gateway.knows(report.rank.incarnation) {
                continue;
            }
            if !is_stale {
                gateway.report(self.now, as_of, report);
            }
            if let Some(batch) = &report.kv {
                self.cache_changed(number as u32, batch);
            }
        }
    }

    /// A gateway asks an engine for its metrics.
    pub(super) fn look(&mut self, look: u32) {
        let (gateway, engine) = (look as usize / self.seats.len(), look as usize % self.seats.len());
        self.interrupt(engine as u32); // its pool shows the step that runs
        let seat = &self.seats[engine];
        if let Some(gateway) = &mut self.gateways[gateway]
            && seat.is_up()
            && !seat.stale
        {
            for (rank, load) in seat.group.samples() {
                gateway.sample(self.now, rank, load);
            }
        }
        if self.goes_on() {
            self.later(LOOK_SECONDS, Event::Look(look));
        }
    }
}
