//! One request: performs what the lifecycle core says and tells it what happened.
//!
//! A [`RequestRun`] is driven by the polls of whoever reads the response. It owns every leg's stream, every reservation
//! and every held KV of its request; however it ends, dropping included, all of them are given back.

mod legs;
mod placing;

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use forebay_engines::{KvHandle, Leg, LegEvent, LegStream, LegUsage, Prompt, StartError, Work};
use forebay_fleet::{Event as FleetEvent, Progress};
use forebay_lifecycle::{
    Action, Event, Failure, Form, Health, LegOrder, Lifecycle, Purpose, Refusal, Start, Work as WorkOrder,
};
use forebay_placement::PlaceError;
use forebay_types::{FinishReason, LegId, RankId, ReservationId, Sampling};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    Shared,
    api::{GenerateRequest, PromptUnit, ResponseEvent, ResponseSource, RouteError, Usage},
    trail::Trail,
};
use crate::arrivals::Ended;

/// From sending a leg until the queue of an engine elsewhere has it: what vLLM takes for some thousand tokens. Load that
/// an engine reports before is taken not to show the leg.
const WAY_TO_ENGINE: Duration = Duration::from_millis(10);

pub(super) struct RequestRun {
    shared: Arc<Shared>,
    request: GenerateRequest,
    prompt: Prompt,
    began: Duration,
    /// `None` once the request is over.
    live: Option<Live>,
    out: Vec<ResponseEvent>,
    /// Legs lost so far.
    losses: u32,
    timer: Option<(Duration, Pin<Box<Sleep>>)>,
}

/// Everything that is given back at the end.
struct Live {
    lifecycle: Lifecycle,
    legs: Vec<LiveLeg>,
    held: HashMap<LegId, KvHandle>,
    /// Of placed legs: ordered ones, and decode legs that wait for their prefill.
    reservations: HashMap<LegId, ReservationId>,
    events: VecDeque<Event>,
    /// A choice ended at the request's own limit.
    cut_off: bool,
    /// Why the latest placement found no rank.
    unplaced: Option<PlaceError>,
    /// What an engine said of the request itself.
    rejected: Option<RouteError>,
    /// An engine's own count, of an answer that is passed on.
    usage: Option<LegUsage>,
    /// Prompt tokens that a leg's engine had cached, where it said so at the leg's end.
    cached_tokens: u32,
    trail: Trail,
    /// Its number in the record of arrivals.
    arrival: Option<u64>,
    scratch: Vec<LegEvent>,
    /// It is not placed yet.
    waits: Option<placing::Waits>,
}

struct LiveLeg {
    id: LegId,
    rank: RankId,
    stream: LegStream,
    /// Where a decode leg's KV comes from.
    source: Option<(LegId, RankId)>,
    generated: u64,
}

impl RequestRun {
    /// Places the request and starts its first leg.
    ///
    /// # Errors
    /// If it can have no place; then nothing is left of it.
    pub(super) fn start(shared: Arc<Shared>, request: GenerateRequest) -> Result<Self, RouteError> {
        let began = shared.now();
        if let Some(error) = quarantined(&shared, began, &request) {
            shared.request_ended();
            return Err(error);
        }
        let prompt = shared.prompt(&request);
        let start = Start {
            prompt_tokens: request.prompt.len() as u32,
            choices: if request.body.is_some() { 1 } else { request.choices },
            output_tokens_max: request.sampling.output_tokens_max,
            stop_tokens: request.sampling.stop_tokens.clone(),
            form: if request.body.is_some() { Form::Opaque } else { Form::Tokens },
        };
        let (lifecycle, actions) = Lifecycle::start(began, start, shared.settings.limits);
        let arrived_unix_ms = shared.settings.unix_ms + began.as_millis() as u64;
        let live = Live {
            lifecycle,
            legs: Vec::new(),
            held: HashMap::new(),
            reservations: HashMap::new(),
            events: VecDeque::new(),
            cut_off: false,
            unplaced: None,
            rejected: None,
            usage: None,
            cached_tokens: 0,
            trail: Trail::new(&request, arrived_unix_ms),
            arrival: shared.settings.arrivals.as_ref().map(|record| record.arrived(arrived_unix_ms)),
            scratch: Vec::new(),
            waits: None,
        };
        let mut run = Self {
            shared,
            request,
            prompt,
            began,
            live: Some(live),
            out: Vec::new(),
            losses: 0,
            timer: None,
        };
        run.perform(actions);
        run.settle();
        match run.out.pop() {
            Some(ResponseEvent::Failed(error)) => Err(error),
            Some(other) => {
                run.out.push(other);
                Ok(run)
            }
            None => Ok(run),
        }
    }

    /// Since the request arrived.
    fn age(&self) -> Duration {
        self.shared.now().saturating_sub(self.began)
    }

    /// Tells the lifecycle everything that is waiting and performs what it answers, until nothing is left.
    fn settle(&mut self) {
        while let Some(live) = &mut self.live
            && let Some(event) = live.events.pop_front()
        {
            let actions = live.lifecycle.step(self.shared.now(), event);
            self.perform(actions);
        }
    }

    fn tell(&mut self, event: Event) {
        if let Some(live) = &mut self.live {
            live.events.push_back(event);
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Place { placement, purpose, exclude } => self.place(placement, purpose, &exclude),
                Action::Start(order) => self.start_leg(order),
                Action::CancelLeg { leg, rank: _ } => self.drop_leg(leg, "cancelled"),
                Action::StopChoice { leg, rank: _, choice } => self.stop_leg_choice(leg, choice),
                Action::ReleaseHeld { leg, rank } => self.release_held(leg, rank),
                Action::Report { rank, health } => {
                    let event = match health {
                        Health::Ok => FleetEvent::LegOk(rank),
                        Health::Failed => FleetEvent::LegFailed(rank),
                    };
                    self.note(event);
                }
                Action::FinishChoice { choice, reason } => {
                    if let Some(live) = &mut self.live {
                        live.cut_off |= reason == FinishReason::Length;
                    }
                    self.out.push(ResponseEvent::Finished { choice, reason });
                }
                Action::Finish => self.finish("finished", None),
                Action::Fail(Failure::ClientGone) => self.finish("cancelled", None),
                Action::Fail(failure) => {
                    let error = self.route_error(&failure);
                    self.finish(&error.to_string(), Some(error));
                }
            }
        }
    }

    fn note(&self, event: FleetEvent) {
        let now = self.shared.now();
        self.shared.core.lock().note(now, event);
    }

    /// The prompt that a purpose means, and how many tokens may follow it.
    fn prompt_for(&self, live: &Live, purpose: Purpose) -> Prompt {
        match purpose {
            Purpose::Prompt => self.prompt.clone(),
            Purpose::Continue { choice, generated_tokens } => {
                let generated = &live.lifecycle.generated(choice)[..generated_tokens as usize];
                let tokens: Arc<[_]> = self.prompt.tokens.iter().chain(generated).copied().collect();
                let hashes = self.shared.caches.hashes(self.prompt.root, &tokens);
                Prompt { hashes, tokens, ..self.prompt.clone() }
            }
        }
    }

    fn start_leg(&mut self, order: LegOrder) {
        let Some(live) = &self.live else { return };
        let prompt = self.prompt_for(live, order.prompt);
        let age = self.age();
        let shared = self.shared.clone();
        let Some(live) = &mut self.live else { return };
        let Some(driver) = shared.driver(order.rank.incarnation) else {
            self.release(order.leg);
            return self.tell(Event::LegRefused { leg: order.leg, why: Refusal::Gone });
        };
        live.trail.leg_ordered(age, &order, driver.facts().engine.clone());
        let mut source = None;
        let work = match order.work {
            WorkOrder::Aggregated => Work::Aggregated,
            WorkOrder::Prefill => Work::Prefill,
            WorkOrder::Decode { from, from_rank, first } => {
                source = Some((from, from_rank));
                match live.held.get(&from) {
                    Some(kv) => Work::Decode { kv: kv.clone(), first },
                    None => {
                        self.release(order.leg);
                        return self.tell(Event::LegRefused { leg: order.leg, why: Refusal::Unfit });
                    }
                }
            }
        };
        let sampling = Arc::new(Sampling {
            output_tokens_max: order.output_tokens_max,
            ..self.request.sampling.clone()
        });
        let hashes = prompt.hashes.clone();
        let leg = Leg {
            id: order.leg,
            request: self.request.id.clone(),
            dp_rank: order.rank.dp_rank,
            prompt,
            choices: order.choices,
            sampling,
            work,
            body: self.request.body.clone(),
            deadline: shared.deadline(self.began),
        };
        let sent = shared.now();
        match driver.start(leg) {
            Ok(stream) => {
                let now = shared.now();
                let mut core = shared.core.lock();
                if let Some(&id) = live.reservations.get(&order.leg) {
                    let at = if driver.is_in_process() { sent } else { sent + WAY_TO_ENGINE };
                    core.note(now, FleetEvent::Progress { id, progress: Progress::Accepted { at } });
                }
                if let Some(batch) = core.note_routed(now, order.rank, self.request.unit, &hashes) {
                    // Under the lock, which keeps batches in order.
                    shared.caches.note_routed(&batch);
                }
                drop(core);
                if let Some(words) = self.request.audit.take() {
                    super::engines::audit(&shared, &*driver, &words, self.request.prompt.clone());
                }
                let (id, rank) = (order.leg, order.rank);
                live.legs.push(LiveLeg { id, rank, stream, source, generated: 0 });
            }
            Err(error) => {
                tracing::debug!(request = %self.request.id, leg = %order.leg, %error, "leg refused");
                live.trail.leg_ended(age, order.leg, 0, "refused");
                self.release(order.leg);
                let why = self.refused(&error);
                self.tell(Event::LegRefused { leg: order.leg, why });
            }
        }
    }

    /// Gives a leg's reservation back.
    fn release(&mut self, leg: LegId) {
        if let Some(id) = self.live.as_mut().and_then(|live| live.reservations.remove(&leg)) {
            self.note(FleetEvent::Released(id));
        }
    }

    /// Forgets a leg; if it still runs, dropping its stream cancels it.
    fn drop_leg(&mut self, leg: LegId, outcome: &str) {
        let age = self.age();
        if let Some(live) = &mut self.live {
            let gone =
                live.legs.iter().position(|live| live.id == leg).map(|index| live.legs.swap_remove(index));
            live.trail.leg_ended(age, leg, gone.as_ref().map_or(0, |gone| gone.generated), outcome);
        }
        self.release(leg);
    }

    fn stop_leg_choice(&mut self, leg: LegId, choice: u32) {
        let legs = self.live.iter().flat_map(|live| &live.legs);
        for live in legs.filter(|live| live.id == leg) {
            live.stream.stop_choice(choice);
        }
    }

    fn release_held(&mut self, leg: LegId, rank: RankId) {
        if let Some(live) = &mut self.live {
            live.held.remove(&leg);
        }
        if let Some(driver) = self.shared.driver(rank.incarnation) {
            driver.release_kv(leg);
        }
    }

    /// The end, good or bad: everything that the request holds is given back, its record is kept.
    fn finish(&mut self, outcome: &str, error: Option<RouteError>) {
        let age = self.age();
        let Some(live) = self.live.take() else { return };
        let Live {
            lifecycle, legs, held, reservations, cut_off, trail, usage, cached_tokens, arrival, ..
        } = live;
        drop(legs);
        for (leg, kv) in held {
            if let Some(driver) = self.shared.driver(kv.from.incarnation) {
                driver.release_kv(leg);
            }
        }
        let usage = Usage {
            prompt_tokens: usage.map_or(self.prompt.tokens.len() as u32, |usage| usage.prompt_tokens),
            cached_tokens: usage
                .map_or(lifecycle.cached_tokens().max(cached_tokens), |usage| usage.cached_tokens),
            output_tokens: usage.map_or(lifecycle.tokens_sent() as u32, |usage| usage.output_tokens),
        };
        {
            let now = self.shared.now();
            let mut core = self.shared.core.lock();
            for id in reservations.into_values() {
                core.note(now, FleetEvent::Released(id));
            }
            if error.is_none() && outcome == "finished" {
                let tokens = f64::from(usage.output_tokens) / f64::from(self.request.choices);
                core.learn_output(&self.request.model, &self.request.tenant, tokens, cut_off);
                if self.losses > 0 {
                    core.quarantine.answered(fingerprint(&self.request));
                }
            }
        }
        let output_tokens = u64::from(usage.output_tokens);
        let record = trail.finish(age, usage.cached_tokens, output_tokens, outcome);
        if let Some((arrivals, number)) = self.shared.settings.arrivals.as_ref().zip(arrival) {
            let by_tokens = self.request.unit == PromptUnit::Tokens;
            let ended = Ended {
                tenant: &self.request.tenant,
                prompt_tokens: usage.prompt_tokens,
                output_tokens: usage.output_tokens,
                blocks: if by_tokens { &self.prompt.hashes[..] } else { &[] },
                ttft_seconds: record.ttft_seconds,
                e2e_seconds: age.as_secs_f64(),
                cached_tokens: usage.cached_tokens,
            };
            arrivals.ended(number, &ended);
        }
        if let Some(prediction) = record.prediction().filter(|_| outcome == "finished") {
            self.shared.metrics.note_prediction(&self.request.model, &prediction);
        }
        self.shared.log.put(record);
        if let Some(sink) = &self.shared.settings.decisions {
            self.shared.metrics.decisions_unwritten.set(sink.lost() as i64);
        }
        self.out.push(match error {
            Some(error) => ResponseEvent::Failed(error),
            None => ResponseEvent::Done(usage),
        });
        self.timer = None;
        self.shared.request_ended();
    }

    fn route_error(&mut self, failure: &Failure) -> RouteError {
        let unplaced = self.live.as_mut().and_then(|live| live.unplaced.take());
        let rejected = self.live.as_mut().and_then(|live| live.rejected.take());
        match failure {
            Failure::Rejected => {
                rejected.unwrap_or_else(|| RouteError::Internal { detail: failure.to_string() })
            }
            Failure::NotPlaced | Failure::Refused { .. } => unplaced.map_or_else(
                || RouteError::NoEngine { model: self.request.model.clone(), detail: failure.to_string() },
                |error| unplaced_error(&self.request.model, &error),
            ),
            Failure::LostUnanswered { attempts } => RouteError::LostUnanswered { attempts: *attempts },
            Failure::LostMidStream { tokens_sent } => {
                RouteError::LostMidStream { tokens_sent: *tokens_sent as u32 }
            }
            Failure::DeadlineExceeded { limit, .. } => {
                RouteError::DeadlineExceeded { limit_seconds: limit.as_secs_f64() }
            }
            Failure::ClientGone => RouteError::Internal { detail: failure.to_string() },
        }
    }

    /// Arms the timer for the lifecycle's next deadline; whether that has come.
    fn deadline_passed(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(due) = self.live.as_ref().and_then(|live| live.lifecycle.deadline()) else { return false };
        if self.timer.as_ref().is_none_or(|(armed, _)| *armed != due) {
            let at = Instant::from_std(self.shared.origin) + due;
            self.timer = Some((due, Box::pin(sleep_until(at))));
        }
        self.timer.as_mut().is_some_and(|(_, timer)| timer.as_mut().poll(cx).is_ready())
    }
}

/// What a request is told that finds no place.
pub(super) fn unplaced_error(model: &Arc<str>, error: &PlaceError) -> RouteError {
    match *error {
        PlaceError::Saturated { serving, retry_after_seconds } => {
            RouteError::Saturated { serving: serving as usize, retry_after_seconds }
        }
        PlaceError::TooLong { prompt_tokens, context_tokens_max } => {
            RouteError::TooLong { prompt_tokens, context_tokens_max }
        }
        PlaceError::NoModel { .. } | PlaceError::NoRank { .. } => {
            RouteError::NoEngine { model: model.clone(), detail: error.to_string() }
        }
    }
}

impl ResponseSource for RequestRun {
    fn poll_batch(&mut self, cx: &mut Context<'_>, batch: &mut Vec<ResponseEvent>) -> Poll<bool> {
        loop {
            self.settle();
            let mut read = false;
            let mut index = 0;
            while let Some(live) = &self.live
                && let Some(leg) = live.legs.get(index)
            {
                let id = leg.id;
                let answer = self.read_leg(index, cx);
                read |= answer.is_some();
                if answer == Some(false) {
                    self.drop_leg(id, "ended"); // normally gone with its last event
                }
                let same =
                    self.live.as_ref().and_then(|live| live.legs.get(index)).is_some_and(|leg| leg.id == id);
                index += usize::from(same);
            }
            self.settle();
            if !self.out.is_empty() {
                batch.append(&mut self.out);
                return Poll::Ready(true);
            }
            if self.live.is_none() {
                return Poll::Ready(false);
            }
            if read || self.waited(cx) {
                continue;
            }
            if self.deadline_passed(cx) {
                self.timer = None;
                self.tell(Event::Tick);
                continue;
            }
            return Poll::Pending;
        }
    }

    fn stop_choice(&mut self, choice: u32) {
        self.tell(Event::StopMatched { choice });
        self.settle();
    }
}

impl Drop for RequestRun {
    fn drop(&mut self) {
        let Some(live) = &mut self.live else { return };
        live.events.clear();
        let actions = live.lifecycle.step(self.shared.now(), Event::ClientGone);
        self.perform(actions);
        debug_assert!(self.live.is_none(), "a request whose client is gone has ended");
    }
}

impl RequestRun {
    /// What the lifecycle is told of a refusal. An engine's own words are kept for the client.
    fn refused(&mut self, error: &StartError) -> Refusal {
        match error {
            StartError::Gone | StartError::Failed { .. } => Refusal::Gone,
            StartError::Rejected { status, message } => {
                if let Some(live) = &mut self.live {
                    live.rejected = Some(RouteError::Rejected { status: *status, message: message.clone() });
                }
                Refusal::Rejected
            }
            StartError::QueueFull { .. }
            | StartError::TooLong { .. }
            | StartError::Malformed { .. }
            | StartError::WrongForm
            | StartError::ForeignKv => Refusal::Unfit,
        }
    }
}

fn quarantined(shared: &Shared, now: Duration, request: &GenerateRequest) -> Option<RouteError> {
    let core = shared.core.lock();
    if core.quarantine.is_empty() {
        return None;
    }
    let (deaths, left) = core.quarantine.refusal(now, fingerprint(request))?;
    Some(RouteError::Quarantined { deaths, retry_after_seconds: left.as_secs_f64() })
}

/// What a repeated request is recognised by: FNV-1a over its prompt.
fn fingerprint(request: &GenerateRequest) -> u64 {
    let unit = u32::from(request.unit == PromptUnit::Text);
    request.prompt.iter().chain([&unit]).fold(0xcbf2_9ce4_8422_2325, |hash, &number| {
        (hash ^ u64::from(number)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
