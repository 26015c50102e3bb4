//! Faults as they happen, and how gateways come to know of them.
//!
//! What follows a fault is what the gateway's shells do: a connection that breaks is heard of at once, an engine that is
//! silent after a time, one that comes when the registry tells of it, lost KV events by the next one's number.

use forebay_fleet::LoadSight;
use forebay_kv_index::Applied;
use forebay_types::{KvEventBatch, LegId, RankId};

use super::{
    Run, WAY_BACK_SECONDS,
    agenda::{Event, News, Notice, Word},
    client::Request,
    seats::{LOOK_SECONDS, Power, incarnation},
};
use crate::{
    clock::Time,
    faults::{HANG_SECONDS_MAX, Trouble},
    gateway::{Gateway, GatewaySettings, Turn},
    metrics::Ending,
};

/// From an engine's last word until nothing new goes there, and until it counts as lost: the gateway's.
const SILENT_SECONDS: f64 = 3.0;
const LAPSED_SECONDS: f64 = HANG_SECONDS_MAX;
/// From a refused look until a second one confirms that nobody is there: the gateway's.
const CONFIRM_SECONDS: f64 = 0.2;
/// How late KV events come at most.
const LATE_SECONDS_MAX: f64 = 0.5;
/// From asking for all that a rank caches until it is there.
const RESYNC_SECONDS: f64 = 0.02;
/// How long clients stay that go away before the end, in the mean.
const STAY_SECONDS: f64 = 1.0;

impl Run<'_> {
    pub(super) fn plan_faults(&mut self) {
        for (number, fault) in self.settings.faults.iter().enumerate() {
            self.agenda.add(fault.at, Event::Fault(number as u32, true));
            if let Some(end) = fault.end() {
                self.agenda.add(end, Event::Fault(number as u32, false));
            }
        }
    }

    /// Fault `number` of the plan begins, or ends.
    pub(super) fn fault(&mut self, number: u32, begins: bool) {
        self.interrupt_all();
        let fault = self.settings.faults[number as usize];
        self.say(|| format!("{} {:?}", if begins { "begins:" } else { "ends:" }, fault.trouble));
        let seat = |engine: u32| engine as usize;
        match fault.trouble {
            Trouble::Crash { engine } if begins => self.go_down(engine, false),
            Trouble::Vanish { engine } if begins => self.go_down(engine, true),
            Trouble::Crash { engine } | Trouble::Vanish { engine } => self.start(engine),
            Trouble::Hang { engine } if begins => self.hang(engine),
            Trouble::Hang { engine } => self.hung(engine),
            Trouble::Slow { engine, factor } => {
                self.seats[seat(engine)].slow = if begins { factor } else { 1.0 };
            }
            Trouble::Drain { engine } => self.drain(engine, begins),
            Trouble::Events { engine, .. } => {
                self.seats[seat(engine)].events = begins.then_some(fault.trouble);
            }
            Trouble::StaleLoad { engine } => self.seats[seat(engine)].stale = begins,
            Trouble::Transfers { from, to } => {
                self.broken_pairs.retain(|pair| *pair != (from, to));
                if begins {
                    self.broken_pairs.push((from, to));
                }
            }
            Trouble::GatewayLoss { gateway } if begins => self.lose_gateway(gateway),
            Trouble::GatewayLoss { gateway } => self.begin_gateway(gateway),
            Trouble::RegistryAway if begins => self.registry_away = true,
            Trouble::RegistryAway => {
                self.registry_away = false;
                for news in std::mem::take(&mut self.untold) {
                    self.notice(news);
                }
            }
            Trouble::Skew { engine, seconds } => {
                self.seats[seat(engine)].skew_seconds = if begins { seconds } else { 0.0 };
            }
            Trouble::ClientsLeave { share } => self.leaving_share = if begins { share } else { 0.0 },
        }
    }

    fn is_in_process(&self) -> bool {
        self.settings.gateway.sight == LoadSight::EveryStep
    }

    fn go_down(&mut self, engine: u32, silently: bool) {
        let in_process = self.is_in_process();
        let seat = &mut self.seats[engine as usize];
        // One that starts dies, too.
        seat.starts += 1;
        if matches!(seat.power, Power::Down { .. }) {
            return;
        }
        // An engine in the gateway's own process cannot leave unseen.
        let silently = silently && !in_process;
        let since = match seat.power {
            Power::Hung { since } => since,
            _ => self.now,
        };
        seat.power = Power::Down { silently };
        let life = seat.life;
        let name = incarnation(engine, life, self.seats.len());
        self.forget_pulls(name);
        if silently {
            return self.tell_gateways_of_silence(engine, life, since);
        }
        self.tell_gateways(engine, life, if in_process { 0.0 } else { CONFIRM_SECONDS }, News::Died);
        self.break_legs(engine, life, if in_process { 0.0 } else { WAY_BACK_SECONDS });
    }

    /// Every leg on a life of an engine breaks.
    fn break_legs(&mut self, engine: u32, life: u32, after: f64) {
        for leg in self.legs_on(engine, life) {
            self.later(after, Event::Heard(leg, Word::Broken));
        }
    }

    fn legs_on(&self, engine: u32, life: u32) -> Vec<LegId> {
        let lives = self.clients.requests.iter().filter_map(|request| request.live.as_ref());
        let on = |rank: RankId| self.seat_of(rank) == (engine, life);
        lives.flat_map(|live| &live.legs).filter(|leg| on(leg.rank)).map(|leg| leg.id).collect()
    }

    /// A process is started in place of one that died.
    fn start(&mut self, engine: u32) {
        let startup = self.settings.engines[engine as usize].startup;
        if startup == Time::ZERO {
            return self.come_back(engine);
        }
        let seat = &mut self.seats[engine as usize];
        seat.starts += 1;
        let start = seat.starts;
        self.later(startup.seconds(), Event::Started(engine, start));
    }

    pub(super) fn started(&mut self, engine: u32, start: u32) {
        if self.seats[engine as usize].starts == start {
            self.interrupt_all();
            self.come_back(engine);
        }
    }

    fn come_back(&mut self, engine: u32) {
        let seat = &mut self.seats[engine as usize];
        if !matches!(seat.power, Power::Down { .. }) {
            return;
        }
        // Whoever starts it sees that the old process is gone.
        let was = seat.life;
        seat.life += 1;
        let hasher = Gateway::hasher(self.settings.engines[0].kind.scheduler.block_size_tokens);
        let engines = self.seats.len();
        self.seats[engine as usize].begin(
            &self.settings.engines[engine as usize],
            engine as usize,
            engines,
            hasher,
        );
        self.break_legs(engine, was, WAY_BACK_SECONDS);
        let life = self.seats[engine as usize].life;
        self.tell_gateways(engine, life, 0.0, News::Joined);
    }

    fn hang(&mut self, engine: u32) {
        let now = self.now;
        let seat = &mut self.seats[engine as usize];
        if seat.is_up() {
            seat.power = Power::Hung { since: now };
            let life = seat.life;
            self.tell_gateways_of_silence(engine, life, now);
        }
    }

    fn hung(&mut self, engine: u32) {
        let Power::Hung { since } = self.seats[engine as usize].power else {
            // It was killed meanwhile: its keeper starts another.
            return self.start(engine);
        };
        let life = self.seats[engine as usize].life;
        if self.now.since(since).seconds() > SILENT_SECONDS {
            self.tell_gateways(engine, life, LOOK_SECONDS / 2.0, News::Heard);
        }
        self.open_inbox(engine);
    }

    /// Of an engine in another process that answers nobody. One in the gateway's own is waited for.
    fn tell_gateways_of_silence(&mut self, engine: u32, life: u32, since: Time) {
        if self.is_in_process() {
            return;
        }
        let so_far = self.now.since(since).seconds();
        self.tell_gateways(engine, life, (SILENT_SECONDS - so_far).max(0.0), News::Silent { since });
        self.tell_gateways(engine, life, (LAPSED_SECONDS - so_far).max(0.0), News::Lapsed { since });
    }

    fn tell_gateways(&mut self, engine: u32, life: u32, after: f64, what: News) {
        for gateway in 0..self.gateways.len() as u32 {
            // Each looks on its own time, but for what happens in its own process.
            let apart = if after > 0.0 { self.trouble.unit() * LOOK_SECONDS } else { 0.0 };
            self.later(after + apart, Event::Notice(Box::new(Notice { gateway, engine, life, what })));
        }
    }

    /// A gateway hears of an engine.
    pub(super) fn notice(&mut self, notice: Notice) {
        self.catch_up_all();
        let Notice { gateway, engine, life, what } = notice;
        let (now, name) = (self.now, incarnation(engine, life, self.seats.len()));
        let power = self.seats[engine as usize].power;
        let is_this_life = self.seats[engine as usize].life == life;
        let Some(open) = &mut self.gateways[gateway as usize] else { return };
        match what {
            News::Joined if self.registry_away => return self.untold.push(notice),
            News::Joined => {
                if is_this_life && !open.knows(name) {
                    self.follow(gateway, engine);
                }
                return;
            }
            News::Died if open.knows(name) => open.lost(now, name, true),
            News::Silent { since } if open.knows(name) && is_silent_since(power, since, is_this_life) => {
                open.turned(now, Turn::Silent, name);
            }
            News::Lapsed { since } if open.knows(name) && is_silent_since(power, since, is_this_life) => {
                open.lost(now, name, false);
                self.lapsed(gateway, engine, life);
            }
            News::Heard if open.knows(name) && is_this_life && power == Power::Up => {
                let turn = if self.seats[engine as usize].draining { Turn::Draining } else { Turn::Ready };
                open.turned(now, turn, name);
            }
            _ => return,
        }
        self.say(|| format!("gateway {gateway} hears of engine {engine}, life {life}: {what:?}"));
    }

    /// An engine that was not heard of for too long: a gateway gives up its legs there, and its keeper kills it.
    fn lapsed(&mut self, gateway: u32, engine: u32, life: u32) {
        for leg in self.legs_on(engine, life) {
            let with =
                self.clients.requests[Request::of(leg) as usize].live.as_ref().map(|live| live.gateway);
            if with == Some(gateway) {
                self.later(0.0, Event::Heard(leg, Word::Broken));
            }
        }
        if matches!(self.seats[engine as usize].power, Power::Hung { .. }) {
            self.seats[engine as usize].power = Power::Down { silently: true };
            let name = incarnation(engine, life, self.seats.len());
            self.forget_pulls(name);
        }
    }

    /// A gateway takes an engine's current life into its fleet.
    fn follow(&mut self, gateway: u32, engine: u32) {
        let (now, seat) = (self.now, &self.seats[engine as usize]);
        let name = incarnation(engine, seat.life, self.seats.len());
        let Some(open) = &mut self.gateways[gateway as usize] else { return };
        let spec = &self.settings.engines[engine as usize];
        // Its earlier life, if it is still known, ends with that.
        let before = (0..seat.life).map(|life| incarnation(engine, life, self.seats.len()));
        let before: Vec<_> = before.filter(|before| open.knows(*before)).collect();
        for before in before {
            open.lost(now, before, true);
        }
        open.join(now, spec, engine as usize, name);
        if seat.draining {
            open.turned(now, Turn::Draining, name);
        }
        for dp_rank in 0..spec.dp_ranks {
            self.later(0.0, Event::Resync(gateway, RankId { incarnation: name, dp_rank }));
        }
        self.say(|| format!("gateway {gateway} follows engine {engine} as {name}"));
    }

    fn drain(&mut self, engine: u32, begins: bool) {
        let (now, seat) = (self.now, &mut self.seats[engine as usize]);
        seat.draining = begins;
        let name = incarnation(engine, seat.life, self.seats.len());
        let turn = if begins { Turn::Draining } else { Turn::Ready };
        for gateway in self.gateways.iter_mut().flatten().filter(|gateway| gateway.knows(name)) {
            gateway.turned(now, turn, name);
        }
    }

    /// A gateway dies: its clients see their connections break, its engines that nobody listens.
    fn lose_gateway(&mut self, number: u32) {
        if self.gateways[number as usize].take().is_none() {
            return;
        }
        let open = self.clients.requests.iter().enumerate();
        let with = |live: &super::request::Live| live.gateway == number;
        let gone: Vec<u32> = open
            .filter(|(_, request)| request.live.as_deref().is_some_and(with))
            .map(|(request, _)| request as u32)
            .collect();
        for request in gone {
            let live = self.clients.requests[request as usize].live.take().expect("it was looked for");
            for leg in &live.legs {
                self.later(WAY_BACK_SECONDS, Event::Cancel(leg.id, leg.rank));
                if let Some((held, rank)) = leg.source {
                    self.later(WAY_BACK_SECONDS, Event::Cancel(held, rank));
                }
            }
            self.over(request, Ending::Failed);
        }
    }

    /// Another gateway takes the place of one that died. It knows nothing but who serves.
    fn begin_gateway(&mut self, number: u32) {
        if self.gateways[number as usize].is_some() {
            return;
        }
        let settings = GatewaySettings { seed: self.trouble.bits(), ..self.settings.gateway.clone() };
        self.gateways[number as usize] = Some(Gateway::empty(settings, &self.settings.engines));
        for engine in 0..self.seats.len() as u32 {
            let life = self.seats[engine as usize].life;
            if matches!(self.seats[engine as usize].power, Power::Down { .. }) {
                continue;
            }
            let notice = Notice { gateway: number, engine, life, what: News::Joined };
            self.later(0.0, Event::Notice(Box::new(notice)));
        }
    }

    /// A client that sends while clients leave may do so before the end.
    pub(super) fn client_may_leave(&mut self, request: u32) {
        if self.leaving_share > 0.0 && self.trouble.unit() <= self.leaving_share {
            let stays = self.trouble.exponential(STAY_SECONDS);
            self.later(stays, Event::Gone(request));
        }
    }

    /// A batch of KV events on a bad way: lost, twice or late, to each gateway on its own.
    pub(super) fn disturb(&mut self, trouble: Trouble, batch: &KvEventBatch) {
        let Trouble::Events { lost, doubled, late, .. } = trouble else { return };
        for gateway in 0..self.gateways.len() as u32 {
            if self.trouble.unit() <= lost {
                self.say(|| format!("gateway {gateway} misses batch {} of {}", batch.sequence, batch.rank));
                continue;
            }
            let times = if self.trouble.unit() <= doubled { 2 } else { 1 };
            for _ in 0..times {
                let is_late = self.trouble.unit() <= late;
                let delay = if is_late { self.trouble.unit() * LATE_SECONDS_MAX } else { 0.0 };
                self.later(delay, Event::Batch(gateway, Box::new(batch.clone())));
            }
        }
    }

    /// A rank's cache changed, as a gateway hears it. What it missed it asks for.
    pub(super) fn cache_changed(&mut self, gateway: u32, batch: &KvEventBatch) {
        let Some(open) = &self.gateways[gateway as usize] else { return };
        if !open.knows(batch.rank.incarnation) {
            return;
        }
        if let Applied::Gap { .. } = open.cache_changed(batch) {
            self.say(|| {
                format!("gateway {gateway} lacks events of {} before {}", batch.rank, batch.sequence)
            });
            self.later(RESYNC_SECONDS, Event::Resync(gateway, batch.rank));
        }
    }

    /// A rank tells a gateway all that it caches.
    pub(super) fn tell_all(&mut self, gateway: u32, engine: u32, rank: RankId) {
        let report = self.seats[engine as usize].group.report(rank.dp_rank);
        self.happened.reports.push(report);
        self.pass_reports(engine);
        let (sequence_next, contents) = self.seats[engine as usize].group.cached(rank.dp_rank);
        let Some(open) = &self.gateways[gateway as usize] else { return };
        if !open.knows(rank.incarnation) {
            return;
        }
        let told = open.cache_told(rank, sequence_next, contents);
        self.say(|| format!("{rank} tells gateway {gateway} all, up to {sequence_next}: {told:?}"));
    }
}

/// Whether an engine has been silent since then.
fn is_silent_since(power: Power, since: Time, is_this_life: bool) -> bool {
    match power {
        _ if !is_this_life => false,
        Power::Up => false,
        Power::Hung { since: hung } => hung == since,
        Power::Down { .. } => true,
    }
}
