//! Whether an engine lives: answers and failures with their times in, what to say about it out. No clock, no socket.
//!
//! Start at [`Pulse::saw`]. An engine that does not answer for [`ObserveSettings::silent_after`] is silent, and void after
//! [`ObserveSettings::lease`]. One whose process is gone refuses connections: twice in a row is proof.

use std::{sync::Arc, time::Duration};

use super::ObserveSettings;

/// Refusals in a row that prove a death. A listener's full backlog drops connections on Linux, it refuses none; but a
/// server that hands its socket over may refuse one.
const REFUSALS_MAX: u32 = 2;
/// Answers in a row by which an engine says itself that it is dead.
const DEATHS_MAX: u32 = 2;

/// What one look at the engine showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Look {
    /// It answered, and computes.
    Well,
    /// It answered, and does not compute for a while.
    Idle(Arc<str>),
    /// It answered that it is dead.
    Dead(Arc<str>),
    /// Nobody listens.
    Refused(Arc<str>),
    /// No answer.
    Failed(Arc<str>),
}

/// What to say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Same,
    /// It became silent.
    Silent(Arc<str>),
    /// It is heard again.
    Heard,
    /// This life is over.
    Dead(Arc<str>),
}

/// What is known of the engine's life. Times are since any one moment.
#[derive(Debug)]
pub(super) struct Pulse {
    silent_after: Duration,
    lease: Duration,
    heard: Duration,
    silent: bool,
    refusals: u32,
    deaths: u32,
    failed: bool,
}

impl Pulse {
    /// Of an engine that was attached at `now`.
    pub(super) fn new(settings: &ObserveSettings, now: Duration) -> Self {
        Self {
            silent_after: settings.silent_after,
            lease: settings.lease,
            heard: now,
            silent: false,
            refusals: 0,
            deaths: 0,
            failed: false,
        }
    }

    /// When a look that begins `now` must have shown something: at the first deadline that it missed or, beyond that, as
    /// long as one may take.
    pub(super) fn deadline(&self, now: Duration) -> Duration {
        let first = self.heard + self.silent_after;
        let lapse = self.heard + self.lease;
        match (first > now, lapse > now) {
            (true, _) => first,
            (false, true) => lapse.min(now + self.silent_after),
            (false, false) => now + self.silent_after,
        }
    }

    /// Whether the next look should not wait for its turn: the last one left a death to be confirmed, or a connection broke,
    /// as connections of a dead process do.
    pub(super) fn doubts(&self) -> bool {
        self.refusals > 0 || self.deaths > 0 || self.failed
    }

    /// Takes what a look showed.
    pub(super) fn saw(&mut self, now: Duration, look: Look) -> Verdict {
        self.refusals = if matches!(look, Look::Refused(_)) { self.refusals + 1 } else { 0 };
        self.deaths = if matches!(look, Look::Dead(_)) { self.deaths + 1 } else { 0 };
        self.failed = matches!(look, Look::Failed(_));
        let why = match look {
            Look::Well => {
                self.heard = now;
                let was_silent = std::mem::take(&mut self.silent);
                return if was_silent { Verdict::Heard } else { Verdict::Same };
            }
            Look::Idle(why) => {
                self.heard = now;
                return self.silence(why);
            }
            Look::Refused(why) if self.refusals >= REFUSALS_MAX => return Verdict::Dead(why),
            Look::Dead(why) if self.deaths >= DEATHS_MAX => return Verdict::Dead(why),
            Look::Dead(why) | Look::Refused(why) => return self.silence(why),
            Look::Failed(why) => why,
        };
        let silence = now.saturating_sub(self.heard);
        if silence >= self.lease {
            return Verdict::Dead(format!("silent for {:.1} s: {why}", silence.as_secs_f64()).into());
        }
        if silence >= self.silent_after { self.silence(why) } else { Verdict::Same }
    }

    fn silence(&mut self, why: Arc<str>) -> Verdict {
        if std::mem::replace(&mut self.silent, true) { Verdict::Same } else { Verdict::Silent(why) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn failed() -> Look {
        Look::Failed("no answer".into())
    }

    fn refused() -> Look {
        Look::Refused("refused".into())
    }

    /// Looks at their times, in milliseconds after attaching, and what is said of each.
    fn check(what: &str, looks: &[(u64, Look, Verdict)]) -> Pulse {
        let mut pulse = Pulse::new(&ObserveSettings::default(), Duration::ZERO);
        for (at, look, verdict) in looks {
            assert_eq!(pulse.saw(ms(*at), look.clone()), *verdict, "{what}, at {at} ms");
        }
        pulse
    }

    #[test]
    fn silence_is_said_once_and_taken_back() {
        check(
            "a hang of five seconds",
            &[
                (1000, Look::Well, Verdict::Same),
                (2900, failed(), Verdict::Same),
                (3000, failed(), Verdict::Silent("no answer".into())),
                (5000, failed(), Verdict::Same),
                (6000, Look::Well, Verdict::Heard),
                (7000, Look::Well, Verdict::Same),
            ],
        );
    }

    #[test]
    fn a_lapsed_lease_is_death() {
        check(
            "a host that is gone",
            &[
                (2000, failed(), Verdict::Silent("no answer".into())),
                (9999, failed(), Verdict::Same),
                (10_000, failed(), Verdict::Dead("silent for 10.0 s: no answer".into())),
            ],
        );
    }

    #[test]
    fn two_refusals_in_a_row_are_death() {
        let pulse = check("a kill", &[(100, refused(), Verdict::Silent("refused".into()))]);
        assert!(pulse.doubts());
        check(
            "a kill, confirmed",
            &[
                (100, refused(), Verdict::Silent("refused".into())),
                (300, refused(), Verdict::Dead("refused".into())),
            ],
        );
        check(
            "a hiccup",
            &[
                (100, refused(), Verdict::Silent("refused".into())),
                (300, Look::Well, Verdict::Heard),
                (1300, refused(), Verdict::Silent("refused".into())),
            ],
        );
    }

    #[test]
    fn an_engine_is_believed_that_it_is_dead_or_asleep() {
        let dead = || Look::Dead("dead core".into());
        check(
            "vLLM's engine core is gone",
            &[
                (1000, dead(), Verdict::Silent("dead core".into())),
                (1200, dead(), Verdict::Dead("dead core".into())),
            ],
        );
        check(
            "asleep, then awake; its lease goes on",
            &[
                (1000, Look::Idle("asleep".into()), Verdict::Silent("asleep".into())),
                (20_000, Look::Idle("asleep".into()), Verdict::Same),
                (29_000, failed(), Verdict::Same),
                (29_500, Look::Well, Verdict::Heard),
            ],
        );
    }

    #[test]
    fn looks_end_where_something_must_be_said() {
        let mut pulse = Pulse::new(&ObserveSettings::default(), Duration::ZERO);
        assert_eq!(pulse.deadline(ms(1000)), ms(2000));
        assert_eq!(pulse.deadline(ms(2000)), ms(4000));
        assert_eq!(pulse.deadline(ms(9000)), ms(10_000));
        assert_eq!(pulse.deadline(ms(11_000)), ms(13_000));
        let _ = pulse.saw(ms(1500), Look::Well);
        assert_eq!(pulse.deadline(ms(2500)), ms(3500));
    }
}
