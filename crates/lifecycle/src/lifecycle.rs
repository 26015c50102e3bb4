//! The state machine.
//!
//! A request is a set of choices and a set of *runs*. A run seeks a place for its choices and then has one live leg at a
//! time; every unfinished choice belongs to exactly one run. The first run has all choices; when a run fails, either it
//! is replaced by a like one (nothing was sent yet) or by one run for each unfinished choice.
//! Start at [`Lifecycle::step`]; what a failure leads to is in `recovery`, how legs start in `placing`.

mod placing;
mod recovery;

use std::time::Duration;

use forebay_types::{FinishReason, FirstToken, LegId, RankId, TokenId};

use crate::{
    choice::Choice,
    failure::{Deadline, Failure},
    run::{LegAt, Run, State},
    words::{Accepted, Action, Event, Form, Health, Limits, Outcome, Purpose, Refusal, Start, Work},
};

/// What last kept the request from its first token; decides what the client is told.
#[derive(Debug, Clone, Copy)]
enum Setback {
    Lost,
    Refused,
}

/// One request's life.
#[derive(Debug)]
pub struct Lifecycle {
    request: Start,
    limits: Limits,
    began: Duration,
    choices: Vec<Choice>,
    runs: Vec<Run>,
    excluded: Vec<RankId>,
    /// Legs that skipped a token; replaced in the next step.
    broken: Vec<LegId>,
    placements: u32,
    losses: u32,
    placement_next: u32,
    setback: Option<Setback>,
    tokens_sent: u64,
    cached_tokens: u32,
    outcome: Option<Outcome>,
}

impl Lifecycle {
    /// A request that arrived at `now`, and what to do first.
    pub fn start(now: Duration, request: Start, limits: Limits) -> (Self, Vec<Action>) {
        let mut choices = Vec::new();
        choices.resize_with(request.choices.max(1) as usize, Choice::default);
        let mut lifecycle = Self {
            request,
            limits,
            began: now,
            choices,
            runs: Vec::new(),
            excluded: Vec::new(),
            broken: Vec::new(),
            placements: 0,
            losses: 0,
            placement_next: 0,
            setback: None,
            tokens_sent: 0,
            cached_tokens: 0,
            outcome: None,
        };
        let mut actions = Vec::new();
        lifecycle.place_prompt(&mut actions);
        (lifecycle, actions)
    }

    /// Takes a token that `leg` drew at `position` of the whole sequence. Says whether to send it: it must come from the
    /// leg that now works for its choice and be the next one.
    ///
    /// A leg that skips a position is broken; nothing more is accepted from it, [`deadline`](Self::deadline) is now, and
    /// the next step replaces it.
    pub fn token(&mut self, leg: LegId, choice: u32, position: u32, token: TokenId) -> Accepted {
        let Some(known) = self.choices.get_mut(choice as usize) else {
            return Accepted::No;
        };
        if known.owner != Some(leg) || known.tokens.len() >= self.request.output_tokens_max as usize {
            return Accepted::No;
        }
        let expected = u64::from(self.request.prompt_tokens) + known.tokens.len() as u64;
        if u64::from(position) != expected {
            if u64::from(position) > expected {
                self.disown(leg);
                self.broken.push(leg);
            }
            return Accepted::No;
        }
        known.tokens.push(token);
        self.tokens_sent += 1;
        Accepted::Yes
    }

    /// The engine of `leg` sent a piece of its own answer ([`Form::Opaque`]). Says whether to pass it on.
    pub fn passed(&mut self, leg: LegId) -> Accepted {
        let known = &self.choices[0];
        if self.request.form != Form::Opaque || known.owner != Some(leg) {
            return Accepted::No;
        }
        self.tokens_sent = 1;
        Accepted::Yes
    }

    /// `leg` sent something at `now`: it has not stalled. Once for each batch of tokens is enough.
    pub fn heard(&mut self, now: Duration, leg: LegId) {
        if let Some((index, _)) = self.run_of(leg) {
            self.runs[index].heard = Some(now);
        }
    }

    /// Takes one event that happened at `now`; returns what to do, in order.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.outcome.is_some() {
            return actions;
        }
        if let Some(failure) = self.exceeded(now) {
            self.end(failure, &mut actions);
            return actions;
        }
        for leg in std::mem::take(&mut self.broken) {
            if let Some((index, LegAt { rank, .. })) = self.run_of(leg) {
                actions.push(Action::CancelLeg { leg, rank });
                actions.push(Action::Report { rank, health: Health::Failed });
                self.replace(index, rank, Setback::Lost, &mut actions);
            }
        }
        if event == Event::Tick {
            // Only then: what waits to be read of a leg is read, and heard, before a tick.
            self.replace_stalled(now, &mut actions);
        }
        if self.outcome.is_none() {
            self.place_due(now, &mut actions);
        }
        if self.outcome.is_none() {
            self.take(now, event, &mut actions);
        }
        if self.outcome.is_none() && self.runs.is_empty() && self.is_answered() {
            self.outcome = Some(Outcome::Finished);
            actions.push(Action::Finish);
        }
        actions
    }

    /// When [`Event::Tick`] is due if nothing else happens first; `None` once the request has ended.
    pub fn deadline(&self) -> Option<Duration> {
        if self.outcome.is_some() {
            return None;
        }
        if !self.broken.is_empty() {
            return Some(Duration::ZERO);
        }
        let retries = self.runs.iter().filter_map(|run| match run.state {
            State::Waiting { until } => Some(until),
            _ => None,
        });
        let stalls = self.runs.iter().filter_map(Run::stalls_at);
        retries.chain(stalls).chain(self.bounds().map(|(_, limit)| self.began.saturating_add(limit))).min()
    }

    /// How the request ended; `None` while it lives.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// The tokens sent of a choice. Empty for one that does not exist.
    pub fn generated(&self, choice: u32) -> &[TokenId] {
        self.choices.get(choice as usize).map_or(&[], |choice| &choice.tokens)
    }

    /// Tokens sent, of all choices.
    pub fn tokens_sent(&self) -> u64 {
        self.tokens_sent
    }

    /// Prompt tokens that the engine which computed the prompt had cached.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// Placements of the request before its first token.
    pub fn placements(&self) -> u32 {
        self.placements
    }

    /// Placements after it, of all choices.
    pub fn migrations(&self) -> u32 {
        self.choices.iter().map(|choice| choice.migrations).sum()
    }

    fn take(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Placed { placement, plan, legs, terms } => {
                self.placed(placement, plan, legs, terms, actions);
            }
            Event::NotPlaced { placement, why } => self.not_placed(now, placement, why, actions),
            Event::LegStarted { leg, cached_tokens } => {
                let computes_prompt =
                    |run: &Run| run.prompt == Purpose::Prompt && !matches!(run.state, State::Decoding { .. });
                if self.run_of(leg).is_some_and(|(index, _)| computes_prompt(&self.runs[index])) {
                    self.cached_tokens = cached_tokens;
                }
            }
            Event::LegRefused { leg, why } => {
                if let Some((index, LegAt { rank, .. })) = self.run_of(leg) {
                    if why == Refusal::Gone {
                        actions.push(Action::Report { rank, health: Health::Failed });
                    }
                    if why == Refusal::Rejected && self.tokens_sent == 0 {
                        release(self.runs.swap_remove(index).take_held(), actions);
                        return self.end(Failure::Rejected, actions);
                    }
                    self.replace(index, rank, Setback::Refused, actions);
                }
            }
            Event::Prefilled { leg, first } => self.prefilled(leg, first, actions),
            Event::KvArrived { leg } | Event::KvFailed { leg } => {
                if let Some((index, _)) = self.run_of(leg) {
                    release(self.runs[index].take_held(), actions);
                }
            }
            Event::ChoiceFinished { leg, choice, reason } => {
                if self.choices.get(choice as usize).is_some_and(|choice| choice.owner == Some(leg)) {
                    self.finish_choice(choice, reason, actions);
                }
            }
            Event::LegEnded { leg } => self.leg_ended(leg, actions),
            Event::LegLost { leg } => self.leg_lost(leg, actions),
            Event::ClientGone => self.end(Failure::ClientGone, actions),
            Event::StopMatched { choice } => self.stop_matched(choice, actions),
            Event::Tick => {}
        }
    }

    fn prefilled(&mut self, leg: LegId, handed: FirstToken, actions: &mut Vec<Action>) {
        let Some((index, at)) = self.run_of(leg) else {
            return;
        };
        let State::Prefilling { then, .. } = self.runs[index].state else {
            return;
        };
        actions.push(Action::Report { rank: at.rank, health: Health::Ok });
        self.runs[index].state = State::Decoding { leg: then, held: Some(at) };
        self.runs[index].heard = None;
        let unfinished = self.settle(index, actions);
        if unfinished.is_empty() {
            let mut run = self.runs.swap_remove(index);
            release(run.take_held(), actions);
            return;
        }
        let before = match self.runs[index].prompt {
            Purpose::Prompt => 0,
            Purpose::Continue { generated_tokens, .. } => generated_tokens as usize,
        };
        let first: Option<Vec<_>> = match handed {
            FirstToken::OfDecode => Some(Vec::new()),
            FirstToken::Handed => unfinished
                .iter()
                .map(|&choice| self.generated(choice).get(before).map(|&token| (choice, token)))
                .collect(),
        };
        match first {
            Some(first) => {
                let work = Work::Decode { from: leg, from_rank: at.rank, first };
                self.start_leg(index, then, work, actions);
            }
            // It says that it is done and sent no token: not to be trusted with this request again.
            None => self.replace(index, at.rank, Setback::Lost, actions),
        }
    }

    fn leg_ended(&mut self, leg: LegId, actions: &mut Vec<Action>) {
        let Some((index, LegAt { rank, .. })) = self.run_of(leg) else {
            return;
        };
        if self.request.form == Form::Opaque && self.tokens_sent > 0 {
            self.finish_choice(0, FinishReason::Stop, actions);
        }
        if self.settle(index, actions).is_empty() {
            actions.push(Action::Report { rank, health: Health::Ok });
            release(self.runs.swap_remove(index).take_held(), actions);
        } else {
            actions.push(Action::Report { rank, health: Health::Failed });
            self.replace(index, rank, Setback::Lost, actions);
        }
    }

    fn stop_matched(&mut self, choice: u32, actions: &mut Vec<Action>) {
        let unfinished = |choice: &Choice| !choice.finished;
        if !self.choices.get(choice as usize).is_some_and(unfinished) {
            return;
        }
        self.finish_choice(choice, FinishReason::Stop, actions);
        let Some(index) = self.runs.iter().position(|run| run.choices.contains(&choice)) else {
            return;
        };
        if self.unfinished(index).is_empty() {
            abandon(self.runs.swap_remove(index), actions);
        } else if let Some(LegAt { leg, rank }) = self.runs[index].live() {
            actions.push(Action::StopChoice { leg, rank, choice });
        }
    }

    /// Finishes the choices of run `index` whose tokens say that they have ended; returns the others.
    fn settle(&mut self, index: usize, actions: &mut Vec<Action>) -> Vec<u32> {
        for choice in self.unfinished(index) {
            let known = &self.choices[choice as usize];
            if let Some(reason) =
                known.ended_by_its_tokens(&self.request.stop_tokens, self.request.output_tokens_max)
            {
                self.finish_choice(choice, reason, actions);
            }
        }
        self.unfinished(index)
    }

    fn finish_choice(&mut self, choice: u32, reason: FinishReason, actions: &mut Vec<Action>) {
        let known = &mut self.choices[choice as usize];
        known.finished = true;
        known.owner = None;
        actions.push(Action::FinishChoice { choice, reason });
    }

    fn unfinished(&self, index: usize) -> Vec<u32> {
        let unfinished = |choice: &u32| !self.choices[*choice as usize].finished;
        self.runs[index].choices.iter().copied().filter(unfinished).collect()
    }

    fn disown(&mut self, leg: LegId) {
        for choice in self.choices.iter_mut().filter(|choice| choice.owner == Some(leg)) {
            choice.owner = None;
        }
    }

    /// The run that `leg` works for now, and where it does.
    fn run_of(&self, leg: LegId) -> Option<(usize, LegAt)> {
        let live = |(index, run): (usize, &Run)| run.live().map(|live| (index, live));
        self.runs.iter().enumerate().filter_map(live).find(|(_, live)| live.leg == leg)
    }

    fn is_answered(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    fn bounds(&self) -> impl Iterator<Item = (Deadline, Duration)> + use<> {
        let first = (self.tokens_sent == 0).then_some((Deadline::FirstToken, self.limits.first_token_max));
        std::iter::once((Deadline::Total, self.limits.total_max)).chain(first)
    }

    fn exceeded(&self, now: Duration) -> Option<Failure> {
        let spent = now.saturating_sub(self.began);
        let (deadline, limit) = self.bounds().find(|&(_, limit)| spent >= limit)?;
        Some(Failure::DeadlineExceeded { deadline, limit })
    }
}

/// Gives up what works and what is held for a run.
fn abandon(mut run: Run, actions: &mut Vec<Action>) {
    if let Some(LegAt { leg, rank }) = run.live() {
        actions.push(Action::CancelLeg { leg, rank });
    }
    release(run.take_held(), actions);
}

fn release(held: Option<LegAt>, actions: &mut Vec<Action>) {
    actions.extend(held.map(|LegAt { leg, rank }| Action::ReleaseHeld { leg, rank }));
}

#[cfg(test)]
mod tests;
