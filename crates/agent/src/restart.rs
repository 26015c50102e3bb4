//! When a dead engine is started again.
//!
//! In: how long a life lasted and when it ended. Out: how long to wait, and a sentence if the engine dies again and again.
//! Start at [`History::died`].
//!
//! Waits double from [`RestartPolicy::first`] to [`RestartPolicy::max`] and start over after a good life, one that was
//! ready and lasted [`RestartPolicy::good_life`]. An engine that died [`RestartPolicy::poison_deaths`] times within
//! [`RestartPolicy::poison_window`] waits the longest time at once, good lives or not: something that reaches it kills it.

use std::{collections::VecDeque, time::Duration};

/// How patient an agent is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RestartPolicy {
    /// Wait after a first death.
    pub first: Duration,
    /// Longest wait, before jitter.
    pub max: Duration,
    /// A ready life of this length forgives the deaths before it.
    pub good_life: Duration,
    /// So many deaths within `poison_window` are a pattern. At least 1.
    pub poison_deaths: u32,
    /// See `poison_deaths`.
    pub poison_window: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            max: Duration::from_secs(60),
            good_life: Duration::from_secs(120),
            poison_deaths: 5,
            poison_window: Duration::from_secs(900),
        }
    }
}

/// Share of a wait that jitter may add, so that engines of one rack that died together do not start together.
const JITTER: f64 = 0.25;

/// A life that ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Death {
    /// When, since an origin of the caller's choice.
    pub at: Duration,
    /// From its start.
    pub lived: Duration,
    /// It served.
    pub was_ready: bool,
}

/// What to do after a death.
#[derive(Debug, Clone, PartialEq)]
pub struct Next {
    /// Wait so long, then start again.
    pub wait: Duration,
    /// Deaths since the last good life, this one included.
    pub deaths: u32,
    /// Set if the deaths are a pattern.
    pub poisoned: Option<String>,
}

/// The deaths of one engine.
#[derive(Debug, Clone)]
pub struct History {
    policy: RestartPolicy,
    /// Since the last good life.
    deaths: u32,
    /// Times of death within the window; at most `poison_deaths`.
    recent: VecDeque<Duration>,
}

impl History {
    /// No deaths yet.
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, deaths: 0, recent: VecDeque::new() }
    }

    /// Takes a death. `jitter` is drawn from [0, 1).
    pub fn died(&mut self, death: Death, jitter: f64) -> Next {
        let RestartPolicy { first, max, good_life, poison_deaths, poison_window } = self.policy;
        if death.was_ready && death.lived >= good_life {
            self.deaths = 0;
        }
        self.deaths = self.deaths.saturating_add(1);
        self.recent.push_back(death.at);
        while self.recent.len() > poison_deaths.max(1) as usize
            || self.recent.front().is_some_and(|&at| death.at.saturating_sub(at) > poison_window)
        {
            self.recent.pop_front();
        }
        let poisoned = (self.recent.len() >= poison_deaths.max(1) as usize).then(|| {
            format!(
                "it died {} times within {} s; it is started again every {} s until that ends",
                self.recent.len(),
                poison_window.as_secs(),
                max.as_secs(),
            )
        });
        let doublings = (self.deaths - 1).min(31);
        let wait = if poisoned.is_some() { max } else { first.saturating_mul(1 << doublings).min(max) };
        Next { wait: wait.mul_f64(1.0 + JITTER * jitter.clamp(0.0, 1.0)), deaths: self.deaths, poisoned }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RestartPolicy = RestartPolicy {
        first: Duration::from_secs(1),
        max: Duration::from_secs(10),
        good_life: Duration::from_secs(100),
        poison_deaths: 6,
        poison_window: Duration::from_secs(1_000),
    };

    fn seconds(lives: &[(u64, u64, bool)]) -> Vec<(u64, bool)> {
        let mut history = History::new(POLICY);
        let died = |&(at, lived, was_ready): &(u64, u64, bool)| {
            let (at, lived) = (Duration::from_secs(at), Duration::from_secs(lived));
            let next = history.died(Death { at, lived, was_ready }, 0.0);
            (next.wait.as_secs(), next.poisoned.is_some())
        };
        lives.iter().map(died).collect()
    }

    #[test]
    fn waits_double_to_a_bound_and_start_over_after_a_good_life() {
        //    (died at, lived, ready)                    (wait, poisoned)
        type Row<'a> = (&'a str, &'a [(u64, u64, bool)], &'a [(u64, bool)]);
        let rows: [Row<'_>; 4] = [
            (
                "doubling",
                &[(0, 0, false), (1, 0, false), (3, 0, false), (7, 0, false), (15, 0, false)],
                &[(1, false), (2, false), (4, false), (8, false), (10, false)],
            ),
            (
                "a good life forgives",
                &[(0, 0, false), (1, 0, false), (200, 150, true)],
                &[(1, false), (2, false), (1, false)],
            ),
            ("a long start is no life", &[(0, 0, false), (500, 400, false)], &[(1, false), (2, false)]),
            ("a short life is not good", &[(0, 0, false), (60, 50, true)], &[(1, false), (2, false)]),
        ];
        for (what, lives, waits) in rows {
            assert_eq!(seconds(lives), waits, "{what}");
        }
    }

    #[test]
    fn many_deaths_within_the_window_are_a_pattern_even_after_good_lives() {
        let lives: Vec<_> = (1..=7).map(|n| (n * 120, 110, true)).collect();
        let waits = seconds(&lives);
        assert_eq!(waits[..5], [(1, false); 5]);
        assert_eq!(waits[5..], [(10, true); 2]);
        let slow: Vec<_> = (1..=7).map(|n| (n * 300, 110, true)).collect();
        assert_eq!(seconds(&slow), [(1, false); 7], "seven deaths, but never six within the window");
    }

    #[test]
    fn jitter_adds_at_most_a_quarter() {
        let death = Death { at: Duration::ZERO, lived: Duration::ZERO, was_ready: false };
        let wait = |jitter| History::new(POLICY).died(death, jitter).wait;
        assert_eq!(wait(0.0), Duration::from_secs(1));
        assert_eq!(wait(1.0), Duration::from_millis(1_250));
        assert!(wait(0.5) > wait(0.1));
    }
}
