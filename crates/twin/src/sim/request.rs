//! One request, as its gateway keeps it: performs what the lifecycle core says, and tells it what happened. What
//! `forebay-gateway` does with sockets, without them.

use std::sync::Arc;

use forebay_engine_model::{Job, Work};
use forebay_fleet::{LoadSight, Progress};
use forebay_lifecycle::{
    Action, Event as Happening, Failure, Form, LegOrder, Lifecycle, PlacementId, Refusal, Start,
    Work as WorkOrder,
};
use forebay_types::{BlockHash, FinishReason, FirstToken, LegId, RankId, TokenId};

use super::{
    Run,
    agenda::{Event, Sent, Word},
    client::Request,
};
use crate::{clock::Time, gateway::Gateway, metrics::Ending};

/// From sending a leg until the gateway takes a sampled load to have it: the gateway's.
const WAY_TAKEN_SECONDS: f64 = 0.01;
/// From a gateway's giving up a leg until its engine knows.
const CANCEL_SECONDS: f64 = 1e-3;

/// What a request has while it lives.
pub(super) struct Live {
    pub(super) lifecycle: Lifecycle,
    pub(super) gateway: u32,
    pub(super) legs: Vec<LiveLeg>,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) hashes: Arc<[BlockHash]>,
    /// Legs whose reservations are held.
    pub(super) promised: Vec<LegId>,
    pub(super) legs_given: u32,
    /// When its lifecycle will be told that time has passed.
    tick: Option<Time>,
    /// Legs that were lost.
    losses: u32,
    /// It waits for others, to be placed as this.
    pub(super) waits: Option<PlacementId>,
}

/// A leg that an engine works for.
#[derive(Debug, Clone, Copy)]
pub(super) struct LiveLeg {
    pub(super) id: LegId,
    pub(super) rank: RankId,
    /// Where a decode leg's KV comes from.
    pub(super) source: Option<(LegId, RankId)>,
    /// Tokens that were accepted of it.
    pub(super) generated: u32,
    /// A decode leg that draws the first token anew: it is one token behind what its scheduler counts.
    pub(super) is_behind: bool,
    /// A prefill leg whose token is the decode leg's to send.
    pub(super) is_mute: bool,
    /// Why its choice ended.
    pub(super) finished: Option<FinishReason>,
}

impl Live {
    pub(super) fn leg(&mut self, leg: LegId) -> Option<&mut LiveLeg> {
        self.legs.iter_mut().find(|live| live.id == leg)
    }

    /// Whether nothing has been tried for the request yet.
    pub(super) fn is_new(&self) -> bool {
        self.lifecycle.placements() <= 1 && self.lifecycle.tokens_sent() == 0
    }
}

impl Run<'_> {
    /// A session's next turn is sent to a gateway.
    pub(super) fn arrive(&mut self, session: u32) {
        let counts = self.now >= self.settings.warm_up && self.now < self.settings.end;
        let request = self.clients.send(session, self.now, counts);
        self.unanswered.push_back(request);
        let Some(gateway) = self.gateway_for(request) else {
            self.say(|| format!("request {request} finds no gateway"));
            return self.over(request, Ending::Failed);
        };
        let prompt = self.clients.prompt(request);
        let of = &mut self.clients.requests[request as usize];
        let start = Start {
            prompt_tokens: of.prompt_tokens,
            choices: 1,
            output_tokens_max: of.answer.tokens,
            stop_tokens: [].into(),
            form: Form::Tokens,
        };
        let open = self.gateways[gateway as usize].as_ref().expect("it was chosen among those that live");
        let hashes = open.hashes(&prompt);
        if open.router.quarantine.refusal(self.now.duration(), of.answer.name).is_some() {
            return self.over(request, Ending::Rejected);
        }
        let (lifecycle, actions) = Lifecycle::start(self.now.duration(), start, self.settings.limits);
        of.live = Some(Box::new(Live {
            lifecycle,
            gateway,
            legs: Vec::new(),
            prompt,
            hashes,
            promised: Vec::new(),
            legs_given: 0,
            tick: None,
            losses: 0,
            waits: None,
        }));
        self.say(|| format!("request {request} arrives at gateway {gateway}"));
        self.client_may_leave(request);
        self.perform(request, actions);
        self.settle();
    }

    /// Which gateway a request is sent to: one that lives.
    fn gateway_for(&self, request: u32) -> Option<u32> {
        let all = self.gateways.len() as u64;
        let first = crate::draw::mix(u64::from(request)) % all;
        (0..all)
            .map(|next| ((first + next) % all) as u32)
            .find(|&number| self.gateways[number as usize].is_some())
    }

    /// Tells a request's lifecycle what happened, once what happened before it is through.
    pub(super) fn tell(&mut self, request: u32, event: Happening) {
        self.happenings.push_back((request, event));
    }

    /// Takes what waits to be told, until nothing is left.
    pub(super) fn settle(&mut self) {
        while let Some((request, event)) = self.happenings.pop_front() {
            let Some(live) = &mut self.clients.requests[request as usize].live else { continue };
            let actions = live.lifecycle.step(self.now.duration(), event);
            self.perform(request, actions);
            self.arm(request);
        }
    }

    /// Sets the request's alarm to its lifecycle's deadline, if that is earlier than what it is set to.
    pub(super) fn arm(&mut self, request: u32) {
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        let Some(due) = live.lifecycle.deadline().map(|due| Time::of(due).max(self.now)) else { return };
        if live.tick.is_none_or(|armed| due < armed) {
            live.tick = Some(due);
            self.agenda.add(due, Event::Tick(request));
        }
    }

    pub(super) fn tick(&mut self, request: u32) {
        let now = self.now;
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        if live.tick.is_some_and(|armed| armed <= now) {
            live.tick = None;
        }
        if live.lifecycle.deadline().is_some_and(|due| Time::of(due) <= now) {
            self.catch_up_all(); // it may have heard of its tokens
            let live = self.clients.requests[request as usize].live.as_ref();
            if live.and_then(|live| live.lifecycle.deadline()).is_some_and(|due| Time::of(due) <= now) {
                self.tell(request, Happening::Tick);
            }
        }
        self.settle();
        self.arm(request);
    }

    fn perform(&mut self, request: u32, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Place { placement, purpose, exclude } => {
                    self.seek(request, placement, purpose, &exclude)
                }
                Action::Start(order) => self.start_leg(request, order),
                Action::CancelLeg { leg, rank } => {
                    self.say(|| format!("{leg} on {rank} is cancelled"));
                    self.drop_leg(request, leg);
                    self.later(CANCEL_SECONDS, Event::Cancel(leg, rank));
                }
                // A leg has one choice here: it ends with it.
                Action::StopChoice { .. } | Action::FinishChoice { .. } => {}
                Action::ReleaseHeld { leg, rank } => self.release_held(leg, rank),
                Action::Report { rank, health } => {
                    let now = self.now;
                    if let Some(gateway) = self.gateway_of(request) {
                        gateway.ended(now, rank, health);
                    }
                }
                Action::Finish => self.finish(request, Ending::Finished),
                Action::Fail(failure) => {
                    self.say(|| format!("request {request} fails: {failure}"));
                    let ending = match failure {
                        Failure::ClientGone => Ending::Left,
                        Failure::NotPlaced | Failure::Refused { .. } | Failure::Rejected => Ending::Rejected,
                        Failure::LostUnanswered { .. }
                        | Failure::LostMidStream { .. }
                        | Failure::DeadlineExceeded { .. } => Ending::Failed,
                    };
                    self.finish(request, ending);
                }
            }
        }
    }

    fn start_leg(&mut self, request: u32, order: LegOrder) {
        let (prompt, hashes) = self.prompt_for(request, order.prompt);
        let prompt_tokens = prompt.len() as u32;
        let anew = self.settings.gateway.first_token == FirstToken::OfDecode && order.output_tokens_max > 1;
        let of = &self.clients.requests[request as usize];
        let mut leg = LiveLeg {
            id: order.leg,
            rank: order.rank,
            source: None,
            generated: 0,
            is_behind: false,
            is_mute: false,
            finished: None,
        };
        let work = match order.work {
            WorkOrder::Aggregated => Work::Aggregated,
            WorkOrder::Prefill => {
                leg.is_mute = anew;
                Work::Prefill
            }
            WorkOrder::Decode { from, from_rank, first: _ } => {
                leg.source = Some((from, from_rank));
                leg.is_behind = anew;
                Work::Decode { first: vec![(0, of.token(prompt_tokens))] }
            }
        };
        // The time of a hand-over has the prompt's part of the way in it.
        let way = self.way_there(if leg.source.is_some() { 0 } else { prompt_tokens });
        let root = self.gateways[self.live(request).gateway as usize].as_ref().map(Gateway::root);
        let job = Job {
            leg: order.leg,
            prompt,
            hashes,
            root: root.expect("its requests end with it"),
            choices: order.choices,
            output_tokens_max: order.output_tokens_max,
            stop_tokens: [].into(),
            work,
        };
        self.live_mut(request).legs.push(leg);
        self.send(request, Sent { rank: order.rank, job }, way);
    }

    fn send(&mut self, request: u32, sent: Sent, way_seconds: f64) {
        let (now, leg, engine) = (self.now, sent.job.leg, self.seat_of(sent.rank).0);
        self.catch_up(engine);
        let queued = now.after(way_seconds);
        let taken = match self.settings.gateway.sight {
            LoadSight::EveryStep => queued,
            LoadSight::Sampled => now.after(WAY_TAKEN_SECONDS),
        };
        if let Some(gateway) = self.gateway_of(request) {
            gateway.progress(now, leg, Progress::Accepted { at: taken.duration() });
        }
        self.agenda.add(queued, Event::Queue(Box::new(sent)));
    }

    /// The gateway hears of a leg.
    pub(super) fn hear(&mut self, leg: LegId, word: Word) {
        let (now, request) = (self.now, Request::of(leg));
        let first_token = self.settings.gateway.first_token;
        let live = self.clients.requests[request as usize].live.as_mut();
        let Some(rank) = live.and_then(|live| live.leg(leg)).map(|leg| leg.rank) else { return }; // it was given up
        self.catch_up(self.seat_of(rank).0);
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        live.lifecycle.heard(now.duration(), leg);
        match word {
            Word::FirstToken => self.progress(leg, Progress::Decoding),
            Word::Generated(tokens) => self.progress(leg, Progress::Generated { tokens: tokens.into() }),
            Word::Prefilled => {
                self.drop_leg(request, leg);
                self.tell(request, Happening::Prefilled { leg, first: first_token });
            }
            Word::Ended(finished) => {
                self.drop_leg(request, leg);
                if let Some(reason) = finished {
                    self.tell(request, Happening::ChoiceFinished { leg, choice: 0, reason });
                }
                self.tell(request, Happening::LegEnded { leg });
            }
            Word::Gone | Word::Full => {
                self.say(|| format!("{leg} is refused"));
                self.pair_failed(leg);
                self.drop_leg(request, leg);
                let why = if matches!(word, Word::Gone) { Refusal::Gone } else { Refusal::Unfit };
                self.tell(request, Happening::LegRefused { leg, why });
            }
            Word::Broken => self.leg_broke(request, leg),
        }
        self.settle();
        self.arm(request);
    }

    fn leg_broke(&mut self, request: u32, leg: LegId) {
        self.say(|| format!("{leg} is lost"));
        let now = self.now;
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        let Some(rank) = live.leg(leg).map(|leg| leg.rank) else { return };
        if live.lifecycle.tokens_sent() == 0 {
            live.losses += 1;
            let fingerprint = self.clients.requests[request as usize].answer.name;
            if let Some(gateway) = self.gateway_of(request) {
                gateway.router.quarantine.lost(now.duration(), fingerprint, rank.incarnation);
            }
        }
        self.drop_leg(request, leg);
        self.tell(request, Happening::LegLost { leg });
    }

    /// A decode leg has its KV, or will never have it.
    pub(super) fn kv_came(&mut self, leg: LegId, pulled: Option<(u64, f64)>) {
        let (now, request) = (self.now, Request::of(leg));
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        let Some(&mut LiveLeg { rank, source: Some((_, from)), .. }) = live.leg(leg) else { return };
        match pulled {
            Some((bytes, seconds)) => {
                if let Some(gateway) = self.gateway_of(request) {
                    gateway.transferred(now, from, rank, bytes, seconds);
                    gateway.progress(now, leg, Progress::Decoding);
                }
                self.tell(request, Happening::KvArrived { leg });
            }
            None => {
                self.say(|| format!("{leg} on {rank} does not get its KV from {from}"));
                self.pair_failed(leg);
                self.tell(request, Happening::KvFailed { leg });
            }
        }
        self.settle();
    }

    /// A decode leg came to nothing before its KV was there: its pair rests.
    fn pair_failed(&mut self, leg: LegId) {
        let (now, request) = (self.now, Request::of(leg));
        let live = self.clients.requests[request as usize].live.as_mut();
        let ends = live.and_then(|live| live.leg(leg)).and_then(|leg| Some((leg.source?.1, leg.rank)));
        if let Some((from, to)) = ends
            && let Some(gateway) = self.gateway_of(request)
        {
            gateway.transfer_failed(now, from, to);
        }
    }

    pub(super) fn progress(&mut self, leg: LegId, progress: Progress) {
        let now = self.now;
        if let Some(gateway) = self.gateway_of(Request::of(leg)) {
            gateway.progress(now, leg, progress);
        }
    }

    /// Forgets a leg, and what was promised for it.
    fn drop_leg(&mut self, request: u32, leg: LegId) {
        let now = self.now;
        let Some(live) = &mut self.clients.requests[request as usize].live else { return };
        live.legs.retain(|live| live.id != leg);
        let promised = live.promised.len();
        live.promised.retain(|promised| *promised != leg);
        if live.promised.len() < promised
            && let Some(gateway) = self.gateway_of(request)
        {
            gateway.release(now, leg);
        }
    }

    /// The end, good or bad: everything that the request holds is given back.
    fn finish(&mut self, request: u32, ending: Ending) {
        let (now, tenant) = (self.now, self.clients.tenant(request));
        let of = &mut self.clients.requests[request as usize];
        let Some(live) = of.live.take() else { return };
        of.cached_tokens = live.lifecycle.cached_tokens();
        if let Some(checks) = &mut self.checks {
            checks.ended(now, request, of, &live, ending);
        }
        if let Some(gateway) = &mut self.gateways[live.gateway as usize] {
            for leg in &live.promised {
                gateway.release(now, *leg);
            }
            if ending == Ending::Finished {
                gateway.learn_output(&tenant, of.answer.tokens);
                if live.losses > 0 {
                    gateway.router.quarantine.answered(of.answer.name);
                }
            }
        }
        self.over(request, ending);
    }

    /// A request has ended: its session goes on, if it does.
    pub(super) fn over(&mut self, request: u32, ending: Ending) {
        self.say(|| format!("request {request} has ended: {ending:?}"));
        self.waiting.retain(|(_, waits)| *waits != request);
        let session = self.clients.requests[request as usize].session;
        if let Some(think) = self.clients.ended(request, ending) {
            self.agenda.add(self.now + think, Event::Arrive(session));
        }
        self.answered();
    }

    /// The gateway that a request is with, if both live.
    pub(super) fn gateway_of(&mut self, request: u32) -> Option<&mut Gateway> {
        let gateway = self.clients.requests[request as usize].live.as_ref()?.gateway;
        self.gateways[gateway as usize].as_mut()
    }

    pub(super) fn live(&self, request: u32) -> &Live {
        self.clients.requests[request as usize].live.as_ref().expect("it has not ended")
    }

    pub(super) fn live_mut(&mut self, request: u32) -> &mut Live {
        self.clients.requests[request as usize].live.as_mut().expect("it has not ended")
    }
}
