//! What a request's legs produce, passed on: tokens to the client, turns to the lifecycle and fleet cores.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use forebay_engines::{LegEvent, Reply, TransferOutcome, TransferReport};
use forebay_fleet::{Event as FleetEvent, Progress};
use forebay_lifecycle::{Accepted, Event, Refusal};
use forebay_types::{LegId, RankId};

use super::{RequestRun, fingerprint};
use crate::{
    metrics::{ModelLabel, TransferLabels, TransferOutcome as Transferred},
    orchestrator::{api::ResponseEvent, trail::engine_name},
};

/// Tokens of a leg between two reports of its progress to the fleet core, which takes a lock.
const PROGRESS_TOKENS: u64 = 32;

impl RequestRun {
    /// Reads what one leg has produced. `None` if nothing has come since; else whether more can follow.
    pub(super) fn read_leg(&mut self, index: usize, cx: &mut Context<'_>) -> Option<bool> {
        let live = self.live.as_mut()?;
        let mut events = std::mem::take(&mut live.scratch);
        let leg = &mut live.legs[index];
        let (id, polled) = (leg.id, leg.stream.poll_batch(cx, &mut events));
        let answer = match polled {
            Poll::Pending => None,
            Poll::Ready(more) => Some(more),
        };
        if !events.is_empty() {
            live.lifecycle.heard(self.shared.now(), id);
        }
        for event in events.drain(..) {
            self.take_leg_event(id, event);
        }
        if let Some(live) = &mut self.live {
            live.scratch = events;
        }
        answer
    }

    fn take_leg_event(&mut self, leg: LegId, event: LegEvent) {
        let age = self.age();
        let Some(live) = &mut self.live else { return };
        match event {
            LegEvent::Token(token) => {
                let accepted = live.lifecycle.token(leg, token.choice, token.position, token.token);
                if accepted == Accepted::Yes {
                    if live.lifecycle.tokens_sent() == 1 {
                        live.trail.first_token(age);
                    }
                    self.out.push(ResponseEvent::Token(token));
                    self.count_token(leg);
                }
            }
            LegEvent::Started { cached_tokens } => {
                if let Some(waited) = live.trail.leg_started(age, leg, cached_tokens) {
                    let label = ModelLabel { model: self.request.model.clone() };
                    self.shared.metrics.queue.get_or_create(&label).observe(waited);
                }
                self.progress(leg, Progress::Started);
                self.tell(Event::LegStarted { leg, cached_tokens });
            }
            LegEvent::Finished { choice, reason } => self.tell(Event::ChoiceFinished { leg, choice, reason }),
            LegEvent::Prefilled(kv) => {
                let first = kv.first;
                live.held.insert(leg, kv);
                self.tell(Event::Prefilled { leg, first });
            }
            LegEvent::Reply(reply) => self.pass_on(leg, reply),
            LegEvent::Usage(usage) => {
                // Attached engines say only at the end what they had cached.
                live.cached_tokens = live.cached_tokens.max(usage.cached_tokens);
                live.trail.leg_cached(leg, usage.cached_tokens);
                if self.request.body.is_some() {
                    live.usage = Some(usage);
                }
            }
            LegEvent::KvArrived(report) => self.transferred(leg, report),
            LegEvent::KvFailed { outcome } => self.transfer_failed(leg, &outcome),
            LegEvent::Ended => {
                self.drop_leg(leg, "ended");
                self.tell(Event::LegEnded { leg });
            }
            LegEvent::Refused(error) => {
                tracing::debug!(request = %self.request.id, %leg, %error, "leg refused");
                let why = self.refused(&error);
                if why != Refusal::Rejected {
                    self.pair_failed(leg);
                }
                self.drop_leg(leg, "refused");
                self.tell(Event::LegRefused { leg, why });
            }
            LegEvent::Lost { reason } => {
                tracing::warn!(request = %self.request.id, %leg, %reason, "leg lost");
                self.note_loss(leg);
                self.drop_leg(leg, "lost");
                self.tell(Event::LegLost { leg });
            }
        }
    }

    fn transferred(&mut self, leg: LegId, report: TransferReport) {
        if let Some((from, to)) = self.ends_of_transfer(leg)
            && let Some(live) = &mut self.live
        {
            let [source, target] = [from, to].map(|(leg, rank)| engine_name(live.trail.engine_of(leg), rank));
            live.trail.transferred(source, target, report);
            let (from, to, seconds) = (from.1, to.1, report.seconds);
            let block_bytes = self
                .shared
                .driver(to.incarnation)
                .map_or(0, |driver| driver.facts().block_bytes_or_nominal());
            let bytes = if report.bytes == 0 { u64::from(report.blocks) * block_bytes } else { report.bytes };
            // A document comes whole: the time to its first byte is that of the answer, and says nothing of the pair.
            if self.request.body.as_ref().is_none_or(|body| body.streams) {
                self.note(FleetEvent::Transferred { from, to, bytes, seconds });
            }
        }
        let metrics = &self.shared.metrics;
        metrics.transfers.get_or_create(&TransferLabels { outcome: Transferred::Done }).inc();
        metrics.transfer_bytes.inc_by(report.bytes);
        metrics.transfer.observe(Duration::from_secs_f64(report.seconds));
        self.progress(leg, Progress::Decoding);
        self.tell(Event::KvArrived { leg });
    }

    fn transfer_failed(&mut self, leg: LegId, outcome: &TransferOutcome) {
        tracing::warn!(request = %self.request.id, %leg, %outcome, "KV did not arrive; it is computed again");
        if let Some((from, to)) = self.ends_of_transfer(leg)
            && let Some(live) = &mut self.live
        {
            let [source, target] = [from, to].map(|(leg, rank)| engine_name(live.trail.engine_of(leg), rank));
            live.trail.transfer_failed(source, target, outcome);
        }
        let label = match outcome {
            TransferOutcome::Failed(_) => Transferred::Failed,
            TransferOutcome::TimedOut => Transferred::TimedOut,
            TransferOutcome::Cancelled => Transferred::Cancelled,
        };
        self.shared.metrics.transfers.get_or_create(&TransferLabels { outcome: label }).inc();
        if !matches!(outcome, TransferOutcome::Cancelled) {
            self.pair_failed(leg);
        }
        self.tell(Event::KvFailed { leg });
    }

    /// A decode leg came to nothing before its KV was there: its pair rests.
    fn pair_failed(&mut self, leg: LegId) {
        if let Some(((_, from), (_, to))) = self.ends_of_transfer(leg) {
            self.note(FleetEvent::TransferFailed { from, to });
        }
    }

    /// Remembers who lost an engine before its first token, in case the engine turns out to be dead.
    fn note_loss(&mut self, leg: LegId) {
        let Some(live) = &self.live else { return };
        let lost = live.legs.iter().find(|live| live.id == leg).map(|live| live.rank.incarnation);
        if let Some(engine) = lost.filter(|_| live.lifecycle.tokens_sent() == 0) {
            self.losses += 1;
            let now = self.shared.now();
            self.shared.core.lock().quarantine.lost(now, fingerprint(&self.request), engine);
        }
    }

    /// A piece of an engine's own answer.
    fn pass_on(&mut self, leg: LegId, reply: Reply) {
        let age = self.age();
        let Some(live) = &mut self.live else { return };
        if live.lifecycle.passed(leg) == Accepted::No {
            return;
        }
        let is_first_data = matches!(reply, Reply::Data(_)) && live.trail.first_token(age);
        self.out.push(ResponseEvent::Reply(reply));
        if is_first_data {
            self.progress(leg, Progress::Decoding);
        }
    }

    /// Both ends of a decode leg's transfer: leg and rank that held the KV, leg and rank that took it in.
    fn ends_of_transfer(&self, leg: LegId) -> Option<((LegId, RankId), (LegId, RankId))> {
        let live = self.live.as_ref()?.legs.iter().find(|live| live.id == leg)?;
        Some((live.source?, (leg, live.rank)))
    }

    fn progress(&mut self, leg: LegId, progress: Progress) {
        if let Some(&id) = self.live.as_ref().and_then(|live| live.reservations.get(&leg)) {
            self.note(FleetEvent::Progress { id, progress });
        }
    }

    fn count_token(&mut self, leg: LegId) {
        let legs = self.live.iter_mut().flat_map(|live| &mut live.legs);
        let Some(tokens) = legs.into_iter().find(|live| live.id == leg).map(|live| {
            live.generated += 1;
            live.generated
        }) else {
            return;
        };
        if tokens == 1 {
            self.progress(leg, Progress::Decoding);
        } else if tokens.is_multiple_of(PROGRESS_TOKENS) {
            self.progress(leg, Progress::Generated { tokens });
        }
    }
}
