//! A run: events in order of virtual time, from the first arrival to the last token that counts.
//!
//! In: sessions, engines, a gateway. Out: what became of each request that arrived in the measured window. Start at
//! [`Run::go`].
//!
//! Invariants: the same arguments give the same outcomes; a request's tokens are recorded in order; whatever was promised
//! or held is given back by the end of a run that drains.

mod agenda;
mod client;
mod delivery;

use std::collections::VecDeque;

use forebay_admission::Admit;
use forebay_engine_model::{Job, Work};
use forebay_fleet::{LoadSight, Progress};
use forebay_types::{LegId, RankId};

use crate::{
    clock::Time,
    draw::mix,
    engine::{Begun, Delivery, EngineKind, EngineSpec, Group, Happened, Report},
    gateway::{Gateway, GatewaySettings},
    metrics::{EngineSide, Outcome},
    record::{Record, RecordSettings, Sample},
    rule::Rule,
    workload::Session,
};
use agenda::{Agenda, Event, Word};
use client::{Clients, Request};

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

/// Seconds between two looks at an engine whose load is sampled: the gateway's.
const LOOK_SECONDS: f64 = 1.0;
/// From sending a leg until the gateway takes a sampled load to have it: the gateway's.
const WAY_TAKEN_SECONDS: f64 = 0.01;

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
}

/// A fleet, its gateways and its clients.
pub struct Run<'a> {
    settings: &'a RunSettings,
    now: Time,
    agenda: Agenda,
    groups: Vec<Group>,
    gateways: Vec<Gateway>,
    clients: Clients<'a>,
    /// Requests in order of arrival, of which the first has no first token.
    unanswered: VecDeque<u32>,
    /// Requests that wait to be placed, and in which batch.
    waiting: Vec<(u64, u32)>,
    happened: Happened,
    transfers: u64,
    transfer_bytes: u64,
    record: Option<Record>,
}

impl<'a> Run<'a> {
    /// Nothing has happened yet.
    pub fn new(settings: &'a RunSettings, sessions: &'a [Session]) -> Self {
        let RunSettings { engines, gateway, .. } = settings;
        let gateways = (0..settings.gateways).map(|number| {
            // Each begins its turns elsewhere.
            let seed = mix(gateway.seed ^ number as u64);
            let seed = if number == 0 { gateway.seed } else { seed };
            Gateway::new(GatewaySettings { seed, ..gateway.clone() }, engines)
        });
        let hasher = Gateway::hasher(engines[0].kind.scheduler.block_size_tokens);
        let groups = engines.iter().zip(1..).map(|(engine, number)| {
            let incarnation = forebay_types::Incarnation(number);
            let ranks = (0..engine.dp_ranks).map(|dp_rank| RankId { incarnation, dp_rank });
            Group::new(engine.kind.clone(), ranks, hasher)
        });
        Self {
            settings,
            now: Time::ZERO,
            agenda: Agenda::default(),
            groups: groups.collect(),
            gateways: gateways.collect(),
            clients: Clients::new(sessions),
            unanswered: VecDeque::new(),
            waiting: Vec::new(),
            happened: Happened::default(),
            transfers: 0,
            transfer_bytes: 0,
            record: settings.record.as_ref().map(|record| Record::new(record, engines.len())),
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
        Ran {
            engines: self.engine_side(),
            outcomes: self.clients.outcomes(self.first_kind()),
            given_up,
            record: self.record.take(),
            end: self.now,
        }
    }

    fn begin(&mut self) {
        for group in &mut self.groups {
            group.introduce(&mut self.happened);
        }
        self.pass_reports();
        for (number, session) in self.clients.sessions.iter().enumerate() {
            self.agenda.add(session.at, Event::Arrive(number as u32));
        }
        if self.settings.gateway.sight == LoadSight::Sampled {
            let looks = self.groups.len() * self.gateways.len();
            for look in 0..looks {
                let first = LOOK_SECONDS * look as f64 / looks as f64;
                self.later(first, Event::Look(look as u32));
            }
        }
        if self.record.is_some() {
            self.agenda.add(Time::ZERO, Event::Sample);
        }
    }

    /// Until nothing is left to happen that counts; why it was given up, if it was.
    fn run(&mut self, progress: &mut dyn FnMut(f64) -> bool) -> Option<&'static str> {
        let mut events = 0_u32;
        while let Some((at, event)) = self.agenda.next() {
            self.now = at;
            if at > self.settings.end {
                if self.clients.open == 0 {
                    return None;
                }
                if self.settings.gives_up && at.since(self.settings.end).seconds() > DRAIN_SECONDS_MAX {
                    return Some("requests left at the end");
                }
            }
            events = events.wrapping_add(1);
            if events.is_multiple_of(EVENTS_PER_PROGRESS) {
                let share = at.seconds() / self.settings.end.seconds().max(1e-9);
                if !progress(share.min(1.0)) {
                    return Some("stopped");
                }
            }
            self.take(event);
            if self.settings.gives_up && self.is_hopeless() {
                return Some("the queue grows");
            }
        }
        None
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrive(session) => self.arrive(session),
            Event::Queue(leg) => self.queue(leg),
            Event::StepEnd(group) => self.end_step(group),
            Event::Wake(group) => self.wake(group),
            Event::Pulled(leg) => self.pulled(leg),
            Event::Heard(leg, word) => self.hear(leg, word),
            Event::Reported(report, as_of) => self.report(as_of, *report),
            Event::Look(look) => self.look(look),
            Event::Sample => self.sample(),
            Event::Leave(request) => self.leave(request),
        }
    }

    fn sample(&mut self) {
        let Some(record) = &mut self.record else { return };
        for (number, group) in self.groups.iter().enumerate() {
            let (mut waiting, mut running, mut held, mut blocks) = (0, 0, 0, 0);
            for load in group.loads() {
                waiting += load.waiting;
                running += load.running;
                held += u64::from(load.blocks_total - load.blocks_free);
                blocks += u64::from(load.blocks_total);
            }
            let rank = RankId { incarnation: forebay_types::Incarnation(number as u64 + 1), dp_rank: 0 };
            let sample = Sample {
                at_seconds: self.now.seconds(),
                waiting,
                running,
                kv_use: held as f64 / blocks.max(1) as f64,
                leaning: self.gateways[0].leaning(self.now, rank),
            };
            record.sample(number, sample);
        }
        let every = self.settings.record.map_or(1.0, |record| record.sample_seconds.max(1e-6));
        if self.clients.open > 0 || self.now < self.settings.end {
            self.later(every, Event::Sample);
        }
    }

    fn later(&mut self, seconds: f64, event: Event) {
        self.agenda.add(self.now.after(seconds), event);
    }

    // The gateway's side.

    fn arrive(&mut self, session: u32) {
        let counts = self.now >= self.settings.warm_up && self.now < self.settings.end;
        let request = self.clients.send(session, self.now, counts, &self.gateways[0]);
        self.unanswered.push_back(request);
        let gateway = self.gateway_of(request);
        let of_gateway = |batch: u64| (batch << 16) | gateway as u64;
        match self.gateways[gateway].admit(self.now, &self.clients.ask(request)) {
            Admit::Now => self.place(request),
            Admit::Wait { batch, at } => self.wait(request, of_gateway(batch), Time::of(at)),
            Admit::Release { batch, at } => {
                let (batch, at) = (of_gateway(batch), Time::of(at));
                let others: Vec<u32> =
                    self.waiting.iter().filter(|(waits, _)| *waits == batch).map(|it| it.1).collect();
                for request in others {
                    self.wait(request, batch, at);
                }
                self.wait(request, batch, at);
            }
        }
    }

    /// A request leaves so that it reaches its engine at `at`.
    fn wait(&mut self, request: u32, batch: u64, at: Time) {
        if !self.waiting.contains(&(batch, request)) {
            self.waiting.push((batch, request));
        }
        let way = self.way_there(self.clients.requests[request as usize].prompt_tokens);
        let leaves = at.since(Time::from_seconds(way)).max(self.now);
        self.agenda.add(leaves, Event::Leave(request));
    }

    /// It leaves, unless it has left before.
    fn leave(&mut self, request: u32) {
        let waited = self.waiting.len();
        self.waiting.retain(|(_, waits)| *waits != request);
        if self.waiting.len() < waited {
            self.place(request);
        }
    }

    fn place(&mut self, request: u32) {
        let gateway = self.gateway_of(request);
        let placed = self.gateways[gateway].place(self.now, &self.clients.ask(request));
        let Some(placed) = placed else { return self.clients.refused(request) };
        self.clients.requests[request as usize].placed = Some(placed);
        let leg = Request::legs(request)[0];
        let prompt_tokens = self.clients.requests[request as usize].prompt_tokens;
        self.send(leg, self.way_there(prompt_tokens));
    }

    fn send(&mut self, leg: LegId, way_seconds: f64) {
        let now = self.now;
        let queued = now.after(way_seconds);
        let taken = match self.settings.gateway.sight {
            LoadSight::EveryStep => queued,
            LoadSight::Sampled => self.now.after(WAY_TAKEN_SECONDS),
        };
        self.heard_by(leg).progress(now, leg, Progress::Accepted { at: taken.duration() });
        self.agenda.add(queued, Event::Queue(leg));
    }

    /// A gateway asks an engine for its metrics.
    fn look(&mut self, look: u32) {
        let (gateway, group) = (look as usize / self.groups.len(), look as usize % self.groups.len());
        for (rank, load) in self.groups[group].samples() {
            self.gateways[gateway].sample(self.now, rank, load);
        }
        if self.clients.open > 0 || self.now < self.settings.end {
            self.later(LOOK_SECONDS, Event::Look(look));
        }
    }

    fn report(&mut self, as_of: Time, report: Report) {
        let now = self.now;
        let (first, others) = self.gateways.split_first_mut().expect("there is one");
        others.iter_mut().for_each(|gateway| gateway.report(now, as_of, report.clone()));
        first.report(now, as_of, report);
    }

    /// Which gateway a request was sent to.
    fn gateway_of(&self, request: u32) -> usize {
        (mix(u64::from(request)) % self.gateways.len() as u64) as usize
    }

    /// The gateway that hears of a leg.
    fn heard_by(&mut self, leg: LegId) -> &mut Gateway {
        let gateway = self.gateway_of(Request::of(leg));
        &mut self.gateways[gateway]
    }

    /// Seconds from the client's sending a request until an engine's scheduler has it.
    fn way_there(&self, prompt_tokens: u32) -> f64 {
        (self.first_kind().profile.request_seconds(prompt_tokens) - WAY_BACK_SECONDS).max(0.0)
    }

    fn hear(&mut self, leg: LegId, word: Word) {
        let (now, rank) = (self.now, self.clients.rank_of(leg));
        match word {
            Word::FirstToken => self.heard_by(leg).progress(now, leg, Progress::Decoding),
            Word::Generated(tokens) => {
                self.heard_by(leg).progress(now, leg, Progress::Generated { tokens: tokens.into() })
            }
            Word::Prefilled => {
                self.heard_by(leg).ended(now, leg, rank);
                let decode = Request::legs(Request::of(leg))[1];
                if self.clients.requests[Request::of(leg) as usize].answer.tokens < 2 {
                    return self.end_at_prefill(leg, decode);
                }
                // The time of a hand-over has the prompt's part of the way in it.
                self.send(decode, self.way_there(0));
            }
            Word::Ended => {
                self.heard_by(leg).ended(now, leg, rank);
                let tokens = self.clients.requests[Request::of(leg) as usize].answer.tokens;
                self.heard_by(leg).learn_output(tokens);
            }
        }
    }

    /// An answer of one token: there is nothing to continue.
    fn end_at_prefill(&mut self, prefill: LegId, decode: LegId) {
        let (from, to) = (self.clients.rank_of(prefill), self.clients.rank_of(decode));
        let now = self.now;
        self.heard_by(decode).ended(now, decode, to);
        self.groups[Self::group_of(from) as usize].release_held(from.dp_rank, prefill);
        self.agenda.add(self.now, Event::Wake(Self::group_of(from)));
        if let Some((session, think)) = self.clients.finished(prefill) {
            self.agenda.add(self.now + think, Event::Arrive(session));
        }
    }

    // The engines' side.

    fn group_of(rank: RankId) -> u32 {
        (rank.incarnation.0 - 1) as u32
    }

    fn queue(&mut self, leg: LegId) {
        let rank = self.clients.rank_of(leg);
        let request = &self.clients.requests[Request::of(leg) as usize];
        let is_decode = leg == Request::legs(Request::of(leg))[1];
        let work = match (request.is_split(), is_decode) {
            (false, _) => Work::Aggregated,
            (true, false) => Work::Prefill,
            (true, true) => Work::Decode { first: vec![(0, request.token(request.prompt_tokens))] },
        };
        let job = Job {
            leg,
            prompt: request.prompt.clone(),
            hashes: request.hashes.clone(),
            root: self.gateways[0].root(),
            choices: vec![0],
            output_tokens_max: request.answer.tokens,
            stop_tokens: [].into(),
            work,
        };
        let group = Self::group_of(rank);
        // Placement keeps to the ranks' limits; a queue that fills on the way is a run that has failed anyway.
        if self.groups[group as usize].submit(rank.dp_rank, job).is_err() {
            let now = self.now;
            self.heard_by(leg).ended(now, leg, rank);
            return self.clients.refused(Request::of(leg));
        }
        self.wake(group);
    }

    fn wake(&mut self, group: u32) {
        if !self.groups[group as usize].is_stepping() {
            self.happened.clear();
            self.turn(group);
        }
    }

    fn end_step(&mut self, group: u32) {
        self.happened.clear();
        let clients = &self.clients;
        let token_of = |leg, position| clients.requests[Request::of(leg) as usize].token(position);
        self.groups[group as usize].finish(token_of, &mut self.happened);
        let outputs = std::mem::take(&mut self.happened.outputs);
        let began = self.turn(group);
        let delay = self.settings.delivery.seconds(began);
        for output in &outputs {
            self.deliver(output, delay);
        }
        self.happened.outputs = outputs;
    }

    /// Begins the next step, and tells everyone what has happened since the buffer was cleared.
    fn turn(&mut self, group: u32) -> Option<Begun> {
        let began = self.groups[group as usize].turn(&mut self.happened);
        if let Some(begun) = began {
            if let Some(record) = &mut self.record {
                record.step(group, self.now, begun.seconds, begun.prefill_tokens, begun.decodes);
            }
            self.later(begun.seconds, Event::StepEnd(group));
        }
        for (leg, cached_tokens) in std::mem::take(&mut self.happened.started) {
            self.clients.started(leg, cached_tokens);
            if self.settings.gateway.sight == LoadSight::EveryStep {
                let now = self.now;
                self.heard_by(leg).progress(now, leg, Progress::Started);
            }
        }
        for pull in std::mem::take(&mut self.happened.pulls) {
            self.clients.requests[Request::of(pull.leg) as usize].pulled = Some(pull);
            self.later(pull.seconds, Event::Pulled(pull.leg));
        }
        for leg in std::mem::take(&mut self.happened.imported) {
            self.imported(leg);
        }
        self.pass_reports();
        began
    }

    fn pass_reports(&mut self) {
        let mut reports = std::mem::take(&mut self.happened.reports);
        for report in reports.drain(..) {
            match self.settings.report_delay_seconds {
                0.0 => self.report(self.now, report),
                delay => self.later(delay, Event::Reported(Box::new(report), self.now)),
            }
        }
        self.happened.reports = reports;
    }

    fn pulled(&mut self, leg: LegId) {
        let rank = self.clients.rank_of(leg);
        let group = Self::group_of(rank);
        self.groups[group as usize].arrived(rank.dp_rank, leg);
        self.wake(group);
    }

    /// A decode leg has its KV: the engine that held it may forget it.
    fn imported(&mut self, leg: LegId) {
        let [prefill, _] = Request::legs(Request::of(leg));
        let (from, to) = (self.clients.rank_of(prefill), self.clients.rank_of(leg));
        let request = &self.clients.requests[Request::of(leg) as usize];
        let pull = request.pulled.expect("it was pulled before it arrived");
        let source = &self.settings.engines[Self::group_of(from) as usize].kind;
        let (bytes, seconds) = (u64::from(pull.blocks) * source.block_bytes(), pull.seconds);
        self.transfers += 1;
        self.transfer_bytes += bytes;
        let now = self.now;
        let gateway = self.heard_by(leg);
        gateway.transferred(now, from, to, bytes, seconds);
        gateway.progress(now, leg, Progress::Decoding);
        let group = Self::group_of(from);
        self.groups[group as usize].release_held(from.dp_rank, prefill);
        self.agenda.add(self.now, Event::Wake(group));
    }

    // The run's side.

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

    fn engine_side(&self) -> EngineSide {
        let most_over_mean = |values: &[f64]| {
            let mean = crate::metrics::mean(values);
            if mean > 0.0 { values.iter().fold(0.0, |most: f64, &value| most.max(value)) / mean } else { 0.0 }
        };
        let busy: Vec<f64> = self.groups.iter().map(Group::busy_seconds).collect();
        let tokens: Vec<f64> = self
            .groups
            .iter()
            .flat_map(|group| group.computed_tokens().map(|tokens| tokens as f64))
            .collect();
        let gpus = || self.settings.engines.iter().map(|engine| f64::from(engine.gpus));
        EngineSide {
            busiest_over_mean: most_over_mean(&busy),
            most_tokens_over_mean: most_over_mean(&tokens),
            busy: crate::metrics::mean(&busy) / self.now.seconds().max(1e-9),
            preemptions: self.groups.iter().map(Group::preemptions).sum(),
            transfers: self.transfers,
            transfer_bytes: self.transfer_bytes,
            gpu_seconds: gpus().sum::<f64>() * self.now.seconds(),
            gpu_seconds_busy: gpus().zip(&busy).map(|(gpus, busy)| gpus * busy).sum(),
        }
    }
}

#[cfg(test)]
mod tests;
