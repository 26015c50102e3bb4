//! Requests that kill what they touch.
//!
//! In: which request lost an engine before its first token, and which engines then turned out to be dead. Out: whether a
//! request is to be refused. A request is known by a fingerprint of its prompt, so that a client's retry is recognised. A
//! broken connection alone says nothing; only deaths count.

use std::{collections::VecDeque, time::Duration};

use forebay_types::Incarnation;

/// Bounds of a [`Quarantine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuarantineLimits {
    /// Deaths after which a request is refused. At least 1.
    pub deaths: u32,
    /// How long it is refused, from the latest death on.
    pub refused_for: Duration,
    /// Within which a death must be known of after a leg was lost, to be put down to it.
    pub death_within: Duration,
    /// Requests that are remembered; the oldest goes.
    pub requests_max: usize,
}

impl Default for QuarantineLimits {
    fn default() -> Self {
        Self {
            deaths: 2,
            refused_for: Duration::from_secs(600),
            death_within: Duration::from_secs(10),
            requests_max: 1024,
        }
    }
}

/// Who was there when engines died.
#[derive(Debug)]
pub struct Quarantine {
    limits: QuarantineLimits,
    suspects: VecDeque<Suspect>,
    /// Deaths whose lost legs may still be told of.
    deaths: VecDeque<(Incarnation, Duration)>,
}

#[derive(Debug)]
struct Suspect {
    fingerprint: u64,
    /// Engines that it lost and of which nothing is known yet.
    lost: Vec<(Incarnation, Duration)>,
    /// Engines that died with it. Requests that are alike count once for each.
    deaths: Vec<Incarnation>,
    latest: Duration,
}

/// Engines remembered of one suspect.
const ENGINES_MAX: usize = 16;

impl Suspect {
    fn add_death(&mut self, engine: Incarnation) {
        if !self.deaths.contains(&engine) && self.deaths.len() < ENGINES_MAX {
            self.deaths.push(engine);
        }
    }
}

impl Quarantine {
    /// Nobody is suspected.
    pub fn new(limits: QuarantineLimits) -> Self {
        Self { limits, suspects: VecDeque::new(), deaths: VecDeque::new() }
    }

    /// A leg of this request was lost on `engine` at `now`, before its first token.
    pub fn lost(&mut self, now: Duration, fingerprint: u64, engine: Incarnation) {
        let is_dead = self.deaths.iter().any(|(dead, _)| *dead == engine);
        let suspect = match self.suspects.iter().position(|suspect| suspect.fingerprint == fingerprint) {
            Some(index) => &mut self.suspects[index],
            None => {
                if self.suspects.len() >= self.limits.requests_max {
                    self.suspects.pop_front();
                }
                self.suspects.push_back(Suspect {
                    fingerprint,
                    lost: Vec::new(),
                    deaths: Vec::new(),
                    latest: now,
                });
                self.suspects.back_mut().expect("it was just pushed")
            }
        };
        suspect.latest = now;
        if is_dead {
            suspect.add_death(engine);
        } else if !suspect.lost.iter().any(|(lost, _)| *lost == engine) && suspect.lost.len() < ENGINES_MAX {
            suspect.lost.push((engine, now));
        }
    }

    /// `engine` is known to be dead since `now`.
    pub fn died(&mut self, now: Duration, engine: Incarnation) {
        let within = self.limits.death_within;
        self.deaths.retain(|(_, at)| now.saturating_sub(*at) <= within);
        if self.deaths.len() >= self.limits.requests_max {
            self.deaths.pop_front();
        }
        self.deaths.push_back((engine, now));
        for suspect in &mut self.suspects {
            let before = suspect.lost.len();
            let is_it =
                |(lost, at): &(Incarnation, Duration)| *lost == engine && now.saturating_sub(*at) <= within;
            suspect.lost.retain(|lost| !is_it(lost));
            if suspect.lost.len() < before {
                suspect.add_death(engine);
                suspect.latest = now;
            }
        }
    }

    /// Deaths put down to this request, and for how long it is still refused; `None` if it may run.
    pub fn refusal(&self, now: Duration, fingerprint: u64) -> Option<(u32, Duration)> {
        let suspect = self.suspects.iter().find(|suspect| suspect.fingerprint == fingerprint)?;
        let until = suspect.latest.saturating_add(self.limits.refused_for);
        let deaths = suspect.deaths.len() as u32;
        (deaths >= self.limits.deaths && now < until).then(|| (deaths, until.saturating_sub(now)))
    }

    /// Whether nobody is suspected.
    pub fn is_empty(&self) -> bool {
        self.suspects.is_empty()
    }

    /// A request like this was answered: it is no killer.
    pub fn answered(&mut self, fingerprint: u64) {
        if !self.suspects.is_empty() {
            self.suspects.retain(|suspect| suspect.fingerprint != fingerprint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn two_deaths_and_it_is_refused_for_a_while() {
        let mut quarantine = Quarantine::new(QuarantineLimits::default());
        quarantine.lost(seconds(1), 7, Incarnation(1));
        quarantine.died(seconds(2), Incarnation(1));
        assert_eq!(quarantine.refusal(seconds(2), 7), None, "it may have been anybody");
        quarantine.died(seconds(3), Incarnation(2));
        quarantine.lost(seconds(4), 7, Incarnation(2));
        assert_eq!(
            quarantine.refusal(seconds(4), 7),
            Some((2, seconds(600))),
            "the death may be known first"
        );
        assert_eq!(quarantine.refusal(seconds(4), 8), None);
        assert_eq!(quarantine.refusal(seconds(604), 7), None);
    }

    #[test]
    fn requests_that_are_alike_count_once_for_each_death() {
        let mut quarantine = Quarantine::new(QuarantineLimits::default());
        quarantine.lost(seconds(1), 7, Incarnation(1));
        quarantine.died(seconds(1), Incarnation(1));
        for _ in 0..10 {
            quarantine.lost(seconds(1), 7, Incarnation(1));
        }
        assert_eq!(quarantine.refusal(seconds(1), 7), None, "one engine died, whoever was there");
    }

    #[test]
    fn a_broken_connection_is_no_death() {
        let mut quarantine = Quarantine::new(QuarantineLimits::default());
        for engine in 1..10 {
            quarantine.lost(seconds(1), 7, Incarnation(engine));
        }
        assert_eq!(quarantine.refusal(seconds(1), 7), None);
        quarantine.died(seconds(20), Incarnation(1));
        quarantine.died(seconds(20), Incarnation(2));
        assert_eq!(quarantine.refusal(seconds(20), 7), None, "they died long after");
    }

    #[test]
    fn an_answer_clears_and_memory_is_bounded() {
        let mut quarantine =
            Quarantine::new(QuarantineLimits { deaths: 1, requests_max: 4, ..Default::default() });
        quarantine.died(seconds(1), Incarnation(1));
        for fingerprint in 0..100 {
            quarantine.lost(seconds(1), fingerprint, Incarnation(1));
        }
        assert_eq!(quarantine.suspects.len(), 4);
        assert!(quarantine.refusal(seconds(1), 99).is_some());
        quarantine.answered(99);
        assert_eq!(quarantine.refusal(seconds(1), 99), None);
    }
}
