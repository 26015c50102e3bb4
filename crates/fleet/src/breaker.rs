//! When a rank rests after failures.
//!
//! Closed → open after failures in a row or a share of failures; open → half open when the back-off is over, by time
//! alone; half open → closed with a success, → open for twice as long with a failure. While half open one reservation
//! at a time is the probe, and until it ends the breaker shows as open.

use std::time::Duration;

use forebay_placement::Breaker as View;
use forebay_types::ReservationId;

use crate::settings::BreakerSettings;

#[derive(Debug, Clone)]
pub(crate) struct Breaker {
    state: State,
    /// Of the current or next rest.
    back_off: Duration,
    outcomes: Outcomes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    /// Half open from `until` on.
    Open {
        until: Duration,
        probe: Option<ReservationId>,
    },
}

impl Breaker {
    pub(crate) fn new(settings: &BreakerSettings) -> Self {
        Self { state: State::Closed, back_off: settings.back_off, outcomes: Outcomes::default() }
    }

    /// What placement sees at `now`.
    pub(crate) fn view(&self, now: Duration) -> View {
        match self.state {
            State::Closed => View::Closed,
            State::Open { until, probe: None } if now >= until => View::HalfOpen,
            State::Open { .. } => View::Open,
        }
    }

    /// Work was promised: while half open, it is the probe.
    pub(crate) fn reserved(&mut self, now: Duration, id: ReservationId) {
        if self.view(now) == View::HalfOpen
            && let State::Open { probe, .. } = &mut self.state
        {
            *probe = Some(id);
        }
    }

    /// Promised work ended; a probe that ended without an outcome makes room for the next.
    pub(crate) fn released(&mut self, id: ReservationId) {
        if let State::Open { probe, .. } = &mut self.state
            && *probe == Some(id)
        {
            *probe = None;
        }
    }

    /// A leg succeeded. During the rest that says nothing: it began before.
    pub(crate) fn succeeded(&mut self, now: Duration, settings: &BreakerSettings) {
        match self.state {
            State::Closed => self.outcomes.push(false),
            State::Open { until, .. } if now >= until => *self = Self::new(settings),
            State::Open { .. } => {}
        }
    }

    /// A leg failed. During the rest that is an echo of what opened the breaker.
    pub(crate) fn failed(&mut self, now: Duration, settings: &BreakerSettings) {
        match self.state {
            State::Closed => {
                self.outcomes.push(true);
                if self.outcomes.are_bad(settings) {
                    self.open(now);
                }
            }
            State::Open { until, .. } if now >= until => {
                self.back_off = self.back_off.saturating_mul(2).min(settings.back_off_max);
                self.open(now);
            }
            State::Open { .. } => {}
        }
    }

    fn open(&mut self, now: Duration) {
        self.state = State::Open { until: now.saturating_add(self.back_off), probe: None };
        self.outcomes = Outcomes::default();
    }
}

/// The last outcomes, the latest in the lowest bit; a failure is 1.
#[derive(Debug, Clone, Copy, Default)]
struct Outcomes {
    bits: u64,
    count: u32,
}

impl Outcomes {
    fn push(&mut self, failure: bool) {
        self.bits = self.bits << 1 | u64::from(failure);
        self.count = (self.count + 1).min(u64::BITS);
    }

    fn are_bad(&self, settings: &BreakerSettings) -> bool {
        let window = settings.outcomes.clamp(1, u64::BITS);
        let failures = (self.bits & (u64::MAX >> (u64::BITS - window))).count_ones();
        let share_reached =
            self.count >= window && f64::from(failures) >= settings.failure_share * f64::from(window);
        self.bits.trailing_ones() >= settings.failures_consecutive || share_reached
    }
}
