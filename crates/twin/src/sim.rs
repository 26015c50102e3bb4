//! A run: events in order of virtual time, from the first arrival to the last token that counts.
//!
//! In: sessions, engines, a gateway. Out: what became of each request that arrived in the measured window. Start at
//! [`Run::go`].
//!
//! Invariants: the same arguments give the same outcomes; a request's tokens are recorded in order; whatever was promised
//! or held is given back by the end of a run that drains.

mod agenda;
mod checks;
mod client;
mod delivery;
mod placing;
mod pulls;
mod quiet;
mod request;
mod seats;
mod trouble;

use std::collections::{HashMap, VecDeque};

use forebay_fleet::LoadSight;
use forebay_lifecycle::{Event as Happening, Limits};
use forebay_types::{LegId, RankId};

use crate::{
    clock::Time,
    draw::{Draw, mix},
    engine::{Delivery, EngineKind, EngineSpec, Group, Happened},
    faults::Fault,
    gateway::{Gateway, GatewaySettings},
    links::Links,
    metrics::{EngineSide, Outcome},
    record::{Record, RecordSettings, Sample},
    rule::Rule,
    workload::Session,
};
use agenda::{Agenda, Event, Notice, Word};
use checks::Checks;
pub use checks::Violation;
use client::Clients;
use pulls::Pulling;
use seats::{LOOK_SECONDS, Seat, incarnation};

/// The way back of a token, from the engine to the client's eyes. The profile's time of a request has it in it; what is
/// left of that is the way there.
const WAY_BACK_SECONDS: f64 = 2.5e-3;
/// The oldest request without a first token: older than this, and the run will not recover.
const UNANSWERED_SECONDS_MAX: f64 = 30.0;
/// Requests without a first token, a rank.
const UNANSWERED_MAX: usize = 100;
/// How long a run may go on after its last measured arrival.
const DRAIN_SECONDS_MAX: f64 = 120.0;

/// Events between two words about how far a run is.
const EVENTS_PER_PROGRESS: u32 = 1 << 10;

/// Settings of a run.
#[derive(Debug, Clone)]
pub struct RunSettings {
    /// The fleet. Not empty; all of one block size.
    pub engines: Vec<EngineSpec>,
    /// What decides.
    pub gateway: GatewaySettings,
    /// Gateways that clients send to at random; none knows of the others' requests.
    pub gateways: usize,
    /// When tokens leave an engine.
    pub delivery: Delivery,
    /// From a rank's report until the gateway has it.
    pub report_delay_seconds: f64,
    /// Whether a run that falls behind for good is given up: a search for what a fleet can carry need not see it out.
    pub gives_up: bool,
    /// What is kept for pictures.
    pub record: Option<RecordSettings>,
    /// Attempts and time of one request.
    pub limits: Limits,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Whether what must hold is looked at after every event; a run in which it does not stops there.
    pub is_checked: bool,
    /// Whether every step of an engine is an event of its own, also where nothing is decided: slower, and the same.
    pub steps_one_by_one: bool,
    /// Whether a log is kept of what gateways do and what goes wrong.
    pub is_logged: bool,
    /// Requests that arrive from here on count ...
    pub warm_up: Time,
    /// ... until here.
    pub end: Time,
}

impl RunSettings {
    /// One gateway, whose rule chooses among these engines; every request up to `end` counts.
    pub fn new(engines: Vec<EngineSpec>, rule: Rule, seed: u64, end: Time) -> Self {
        Self {
            engines,
            gateway: GatewaySettings::new(rule, seed),
            gateways: 1,
            delivery: Delivery::Asynchronous,
            report_delay_seconds: 0.0,
            gives_up: true,
            record: None,
            limits: Limits::default(),
            faults: Vec::new(),
            is_checked: false,
            steps_one_by_one: false,
            is_logged: false,
            warm_up: Time::ZERO,
            end,
        }
    }
}

/// What came of a run.
pub struct Ran {
    /// Of the requests that count.
    pub outcomes: Vec<Outcome>,
    /// What the engines did.
    pub engines: EngineSide,
    /// Why it was given up, if it was.
    pub given_up: Option<&'static str>,
    /// What was kept, if anything was to be.
    pub record: Option<Record>,
    /// When it was over.
    pub end: Time,
    /// What must hold and did not, of a run that was checked.
    pub violations: Vec<Violation>,
    /// A line for each thing that happened, of a run that was logged.
    pub log: Vec<String>,
}

/// A fleet, its gateways and its clients.
pub struct Run<'a> {
    settings: &'a RunSettings,
    now: Time,
    agenda: Agenda,
    seats: Vec<Seat>,
    /// `None`: it is gone.
    gateways: Vec<Option<Gateway>>,
    clients: Clients<'a>,
    /// What lifecycles are still to be told.
    happenings: VecDeque<(u32, Happening)>,
    /// Requests in order of arrival, of which the first has no first token.
    unanswered: VecDeque<u32>,
    /// Requests that wait to be placed, and in which batch.
    waiting: Vec<(u64, u32)>,
    /// Hand-overs that have begun, and of which their engine does not yet know the end.
    pulls: HashMap<LegId, Pulling>,
    links: Links,
    happened: Happened,
    /// When the next step of each engine that was left for later is over, or sooner; never, where there is none.
    quiet_next: Vec<Time>,
    /// Buffers for quiet steps.
    quiet_happened: Happened,
    quiet_words: Vec<(Time, LegId, Word)>,
    quiet_legs: Vec<(LegId, u32)>,
    transfers: u64,
    transfers_failed: u64,
    transfer_bytes: u64,
    record: Option<Record>,
    checks: Option<Checks>,
    log: Option<Vec<String>>,
    /// What faults are drawn from, as far as the plan leaves them to chance.
    trouble: Draw,
    /// Whether engines or gateways may come and go.
    troubled: bool,
    /// Pairs of engines between which hand-overs break.
    broken_pairs: Vec<(u32, u32)>,
    registry_away: bool,
    /// Engines that came while the registry was away.
    untold: Vec<Notice>,
    leaving_share: f64,
}

impl<'a> Run<'a> {
    /// Nothing has happened yet.
    pub fn new(settings: &'a RunSettings, sessions: &'a [Session]) -> Self {
        let RunSettings { engines, gateway, .. } = settings;
        let gateways = (0..settings.gateways).map(|number| {
            // Each begins its turns elsewhere.
            let seed = mix(gateway.seed ^ number as u64);
            let seed = if number == 0 { gateway.seed } else { seed };
            Some(Gateway::new(GatewaySettings { seed, ..gateway.clone() }, engines))
        });
        let hasher = Gateway::hasher(engines[0].kind.scheduler.block_size_tokens);
        let seats = engines.iter().enumerate();
        let seats = seats.map(|(number, engine)| Seat::new(engine, number, engines.len(), hasher));
        Self {
            settings,
            now: Time::ZERO,
            agenda: Agenda::default(),
            seats: seats.collect(),
            gateways: gateways.collect(),
            clients: Clients::new(sessions),
            happenings: VecDeque::new(),
            unanswered: VecDeque::new(),
            waiting: Vec::new(),
            pulls: HashMap::new(),
            links: Links::default(),
            happened: Happened::default(),
            quiet_next: vec![Time::NEVER; engines.len()],
            quiet_happened: Happened::default(),
            quiet_words: Vec::new(),
            quiet_legs: Vec::new(),
            transfers: 0,
            transfers_failed: 0,
            transfer_bytes: 0,
            record: settings.record.as_ref().map(|record| Record::new(record, engines.len())),
            checks: settings.is_checked.then(|| Checks::new(settings.limits, engines)),
            log: settings.is_logged.then(Vec::new),
            trouble: Draw::new(gateway.seed, "trouble"),
            troubled: !settings.faults.is_empty(),
            broken_pairs: Vec::new(),
            registry_away: false,
            untold: Vec::new(),
            leaving_share: 0.0,
        }
    }

    /// Runs to the end.
    pub fn go(self) -> Ran {
        self.go_with(&mut |_| true)
    }

    /// Runs to the end, and says now and then how much of the time is over, 0 to 1. On `false` it stops there.
    pub fn go_with(mut self, progress: &mut dyn FnMut(f64) -> bool) -> Ran {
        self.begin();
        let given_up = self.run(progress);
        self.interrupt_all();
        if given_up.is_none() {
            self.check_end();
        }
        Ran {
            engines: self.engine_side(),
            outcomes: self.clients.outcomes(self.first_kind()),
            given_up,
            record: self.record.take(),
            end: self.now,
            violations: self.checks.take().map_or(Vec::new(), |checks| checks.violations),
            log: self.log.take().unwrap_or_default(),
        }
    }

    fn begin(&mut self) {
        for engine in 0..self.seats.len() {
            self.seats[engine].group.introduce(&mut self.happened);
            self.pass_reports(engine as u32);
        }
        for (number, session) in self.clients.sessions.iter().enumerate() {
            self.agenda.add(session.at, Event::Arrive(number as u32));
        }
        if self.settings.gateway.sight == LoadSight::Sampled {
            let looks = self.seats.len() * self.gateways.len();
            for look in 0..looks {
                let first = LOOK_SECONDS * look as f64 / looks as f64;
                self.later(first, Event::Look(look as u32));
            }
        }
        if self.record.is_some() {
            self.agenda.add(Time::ZERO, Event::Sample);
        }
        self.plan_faults();
    }

    /// Until nothing is left to happen that counts; why it was given up, if it was.
    fn run(&mut self, progress: &mut dyn FnMut(f64) -> bool) -> Option<&'static str> {
        let mut events = 0_u32;
        while let Some((at, event)) = self.agenda.next() {
            if at > self.settings.end && !self.settings.is_checked {
                if self.clients.open == 0 {
                    return None;
                }
                if self.settings.gives_up && at.since(self.settings.end).seconds() > DRAIN_SECONDS_MAX {
                    return Some("requests left at the end");
                }
            }
            self.now = at;
            events = events.wrapping_add(1);
            if events.is_multiple_of(EVENTS_PER_PROGRESS) {
                let share = at.seconds() / self.settings.end.seconds().max(1e-9);
                if !progress(share.min(1.0)) {
                    return Some("stopped");
                }
            }
            self.take(event);
            self.check();
            if self.checks.as_ref().is_some_and(|checks| !checks.violations.is_empty()) {
                return Some("something did not hold");
            }
            if self.settings.gives_up && self.is_hopeless() {
                return Some("the queue grows");
            }
        }
        None
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrive(session) => self.arrive(session),
            Event::Queue(sent) => self.queue(sent),
            Event::StepEnd(engine, ticket) => self.end_step(engine, ticket),
            Event::Wake(engine) => self.wake(engine),
            Event::Moves(leg) => self.moves(leg),
            Event::Pulled(leg, rank) => self.pulled(leg, rank),
            Event::Heard(leg, word) => self.hear(leg, word),
            Event::Reported(report, as_of) => self.report(as_of, &report),
            Event::Look(look) => self.look(look),
            Event::Sample => self.sample(),
            Event::Leave(request) => self.leave(request),
            Event::Tick(request) => self.tick(request),
            Event::Cancel(leg, rank) => self.cancel(leg, rank),
            Event::Gone(request) => {
                self.catch_up_all();
                self.tell(request, Happening::ClientGone);
                self.settle();
            }
            Event::Fault(number, begins) => self.fault(number, begins),
            Event::Started(engine, start) => self.started(engine, start),
            Event::Batch(gateway, batch) => self.cache_changed(gateway, &batch),
            Event::Resync(gateway, rank) => self.resync(gateway, rank),
            Event::Notice(notice) => self.notice(*notice),
        }
    }

    fn sample(&mut self) {
        self.catch_up_all();
        let Some(record) = &mut self.record else { return };
        for (number, seat) in self.seats.iter().enumerate() {
            let (mut waiting, mut running, mut held, mut blocks) = (0, 0, 0, 0);
            for load in seat.group.loads() {
                waiting += load.waiting;
                running += load.running;
                held += u64::from(load.blocks_total - load.blocks_free);
                blocks += u64::from(load.blocks_total);
            }
            let rank =
                RankId { incarnation: incarnation(number as u32, seat.life, self.seats.len()), dp_rank: 0 };
            let leaning = self.gateways[0].as_mut().map(|gateway| gateway.leaning(self.now, rank));
            let sample = Sample {
                at_seconds: self.now.seconds(),
                waiting,
                running,
                kv_use: held as f64 / blocks.max(1) as f64,
                leaning: leaning.unwrap_or_default(),
            };
            record.sample(number, sample);
        }
        let every = self.settings.record.map_or(1.0, |record| record.sample_seconds.max(1e-6));
        if self.goes_on() {
            self.later(every, Event::Sample);
        }
    }

    /// Whether anything that counts is still to happen.
    fn goes_on(&self) -> bool {
        self.clients.open > 0 || self.now < self.settings.end
    }

    fn later(&mut self, seconds: f64, event: Event) {
        self.agenda.add(self.now.after(seconds), event);
    }

    /// A line of the log.
    fn say(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:12.6} {}", self.now.seconds(), what()));
        }
    }

    /// Seconds from the client's sending a request until an engine's scheduler has it.
    fn way_there(&self, prompt_tokens: u32) -> f64 {
        (self.first_kind().profile.request_seconds(prompt_tokens) - WAY_BACK_SECONDS).max(0.0)
    }

    /// What stands for all engines where a request is seen apart from them: an idle engine's time for it.
    fn first_kind(&self) -> &EngineKind {
        &self.settings.engines[0].kind
    }

    fn is_hopeless(&self) -> bool {
        let Some(&oldest) = self.unanswered.front() else { return false };
        let age = self.now.since(self.clients.requests[oldest as usize].seen.arrived);
        let ranks: usize = self.settings.engines.iter().map(|engine| usize::from(engine.dp_ranks)).sum();
        age.seconds() > UNANSWERED_SECONDS_MAX || self.unanswered.len() > UNANSWERED_MAX * ranks
    }

    fn groups(&self) -> impl Iterator<Item = &Group> {
        self.seats.iter().map(|seat| &seat.group)
    }

    fn engine_side(&self) -> EngineSide {
        let most_over_mean = |values: &[f64]| {
            let mean = crate::metrics::mean(values);
            if mean > 0.0 { values.iter().fold(0.0, |most: f64, &value| most.max(value)) / mean } else { 0.0 }
        };
        let busy: Vec<f64> = self.groups().map(Group::busy_seconds).collect();
        let tokens: Vec<f64> =
            self.groups().flat_map(|group| group.computed_tokens().map(|tokens| tokens as f64)).collect();
        let gpus = || self.settings.engines.iter().map(|engine| f64::from(engine.gpus));
        EngineSide {
            busiest_over_mean: most_over_mean(&busy),
            most_tokens_over_mean: most_over_mean(&tokens),
            busy: crate::metrics::mean(&busy) / self.now.seconds().max(1e-9),
            preemptions: self.groups().map(Group::preemptions).sum(),
            transfers: self.transfers,
            transfers_failed: self.transfers_failed,
            transfer_bytes: self.transfer_bytes,
            gpu_seconds: gpus().sum::<f64>() * self.now.seconds(),
            gpu_seconds_busy: gpus().zip(&busy).map(|(gpus, busy)| gpus * busy).sum(),
        }
    }
}

#[cfg(test)]
mod tests;
