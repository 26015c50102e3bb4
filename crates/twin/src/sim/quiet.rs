//! Engines that only decode, left alone: their next steps are known, and are taken when somebody looks.
//!
//! A step of such an engine decides nothing: each sequence gets a token, and the loads and step times that it reports are read at
//! the next placement. So the moments at which steps end are worked out ahead ([`Quiet`]), the agenda has the last of them, and
//! whoever comes near the engine, or near what a gateway knows of it, first has the steps taken that are over by then
//! ([`Run::catch_up`]). What changes the engine also ends that ([`Run::interrupt`]).
//!
//! Invariant: a run in which steps are taken so gives what one gives that takes them one by one
//! ([`RunSettings::steps_one_by_one`](super::RunSettings::steps_one_by_one)), to the byte.

use forebay_types::LegId;

use super::{
    Run, WAY_BACK_SECONDS,
    agenda::{Event, Word},
    client::Request,
    seats::Power,
};
use crate::{clock::Time, engine::Quiet};

/// Steps that are worked out ahead at most: what is lost where something comes.
const STEPS_MAX: u32 = 256;
/// Fewer are not worth it.
const STEPS_MIN: u32 = 2;

impl Run<'_> {
    /// Whether an engine's next steps can be left for later. Pictures want each step as it begins; reports that are late or get
    /// lost are drawn one by one.
    fn may_be_quiet(&self, engine: u32) -> bool {
        let exact = self.settings.steps_one_by_one
            || self.record.is_some()
            || self.settings.report_delay_seconds > 0.0;
        !exact && self.seats[engine as usize].events.is_none()
    }

    /// Leaves an engine to itself, if its next steps decide nothing; whether that is so.
    pub(super) fn go_quiet(&mut self, engine: u32) -> bool {
        if !self.may_be_quiet(engine) {
            return false;
        }
        let seat = &mut self.seats[engine as usize];
        let steps = seat.group.quiet_steps().min(STEPS_MAX);
        if steps < STEPS_MIN {
            return false;
        }
        seat.group.foresee(self.now, steps, seat.slow, &mut seat.quiet);
        seat.ticket += 1;
        let last = *seat.quiet.ends.last().expect("there are some");
        self.quiet_next[engine as usize] = seat.quiet.next();
        self.agenda.add(last, Event::StepEnd(engine, seat.ticket));
        true
    }

    /// Takes the steps of every engine that are over by now.
    pub(super) fn catch_up_all(&mut self) {
        for engine in 0..self.seats.len() {
            // Every placement asks every engine: one list is read, not each engine's own.
            if self.quiet_next[engine] <= self.now {
                self.catch_up(engine as u32);
            }
        }
    }

    /// Takes the steps of an engine that are over by now, as far as they were left for later.
    pub(super) fn catch_up(&mut self, engine: u32) {
        let seat = &mut self.seats[engine as usize];
        let Quiet { ends, taken, .. } = &seat.quiet;
        let from = *taken;
        let over = ends[from..].partition_point(|&end| end <= self.now);
        if over == 0 {
            self.quiet_next[engine as usize] = seat.quiet.next();
            return;
        }
        let mut quiet = std::mem::take(&mut seat.quiet);
        quiet.taken = from + over;
        let mut legs = std::mem::take(&mut self.quiet_legs);
        legs.clear();
        legs.extend(seat.group.decoding());
        let clients = &self.clients;
        let token_of = |leg: LegId, position| clients.requests[Request::of(leg) as usize].token(position);
        let mut happened = std::mem::take(&mut self.quiet_happened);
        happened.clear();
        seat.group.advance(&quiet, from, token_of, &mut happened);
        let steps = &quiet.ends[from..quiet.taken];
        self.deliver_quietly(&legs, steps);
        let (now, last) = (self.now, steps[over - 1]);
        let mut words = std::mem::take(&mut self.quiet_words);
        // Loads show what gateways had heard by then.
        words.sort_by_key(|(at, leg, _)| (*at, *leg));
        let (before, after) = words.split_at(words.partition_point(|(at, ..)| *at <= last));
        self.hear_late(before);
        self.now = last;
        let is_heard = !self.seats[engine as usize].stale;
        for (rank, end, step) in happened.steps.iter().filter(|_| is_heard) {
            self.observed(*end, *rank, *step);
        }
        for report in happened.reports.drain(..) {
            if let Some(checks) = &mut self.checks {
                checks.announced(&report);
            }
            self.report(self.as_of(engine), &report);
        }
        self.now = now;
        self.hear_late(after);
        words.clear();
        // Only now: whoever hears may have asked this engine, too.
        self.quiet_next[engine as usize] = quiet.next();
        self.seats[engine as usize].quiet = quiet;
        (self.quiet_words, self.quiet_happened, self.quiet_legs) = (words, happened, legs);
    }

    /// Sends the tokens of steps with these ends. What gateways hear by now of it is kept, what they hear later is for the agenda.
    fn deliver_quietly(&mut self, legs: &[(LegId, u32)], ends: &[Time]) {
        for &(leg, position) in legs {
            let Some(live) = &mut self.clients.requests[Request::of(leg) as usize].live else { continue };
            let Some(live_leg) = live.leg(leg) else { continue };
            let position = position - u32::from(live_leg.is_behind);
            for (nth, end) in (0_u32..).zip(ends) {
                let at = end.after(WAY_BACK_SECONDS);
                match self.send_token(leg, position + nth, at) {
                    Some(word) if at <= self.now => self.quiet_words.push((at, leg, word)),
                    Some(word) => self.agenda.add(at, Event::Heard(leg, word)),
                    None => {}
                }
            }
        }
    }

    fn hear_late(&mut self, words: &[(Time, LegId, Word)]) {
        let now = self.now;
        for &(at, leg, word) in words {
            self.now = at;
            self.hear(leg, word);
        }
        self.now = now;
    }

    /// Something comes to an engine: the step that it is in goes on, those after it are not known any more.
    pub(super) fn interrupt(&mut self, engine: u32) {
        self.catch_up(engine);
        let seat = &mut self.seats[engine as usize];
        let Some(&end) = seat.quiet.ends.get(seat.quiet.taken) else { return seat.quiet.clear() };
        let began = seat.quiet.taken.checked_sub(1).map_or(seat.quiet.began, |last| seat.quiet.ends[last]);
        seat.quiet.clear();
        let mut happened = std::mem::take(&mut self.quiet_happened);
        happened.clear();
        let begun = seat.group.turn(seat.slow, &mut happened).expect("its sequences decode");
        debug_assert_eq!(began.after(begun.seconds), end);
        debug_assert!(
            happened.reports.is_empty() && happened.started.is_empty() && happened.pulls.is_empty()
        );
        seat.ticket += 1;
        self.agenda.add(end, Event::StepEnd(engine, seat.ticket));
        self.quiet_happened = happened;
    }

    pub(super) fn interrupt_all(&mut self) {
        for engine in 0..self.seats.len() as u32 {
            if self.seats[engine as usize].power == Power::Up {
                self.interrupt(engine);
            }
        }
    }
}
