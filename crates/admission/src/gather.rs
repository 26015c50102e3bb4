//! Whether a prompt waits for others to share a step with.
//!
//! In: arrivals, and what a step with prompts costs by now. Out: when each shall reach its engine. Start at
//! [`Gatherer::arrive`]; the formula is in the crate's README.

use std::time::Duration;

use forebay_placement::Sharing;

/// Weight of the newest gap between arrivals in their running mean: a memory of some twenty.
const GAP_NEWEST_WEIGHT: f64 = 0.05;

/// Settings of a [`Gatherer`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatherSettings {
    /// No request waits longer. 0: nobody waits.
    pub wait_max: Duration,
    /// Seconds of a first token's waiting that one second of a decode's stall is worth.
    pub stall_weight: f64,
}

impl GatherSettings {
    /// Checks what the arithmetic relies on.
    ///
    /// # Errors
    /// If the weight is negative or not finite.
    pub fn validate(&self) -> Result<(), NotAWeight> {
        match self.stall_weight {
            value if value.is_finite() && value >= 0.0 => Ok(()),
            value => Err(NotAWeight { value }),
        }
    }
}

/// A weight that none can be.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("the weight of stalls is {value}; give a number from 0 up")]
pub struct NotAWeight {
    /// What was given.
    pub value: f64,
}

impl Default for GatherSettings {
    fn default() -> Self {
        Self { wait_max: Duration::from_millis(500), stall_weight: 1.0 }
    }
}

/// When a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// At once, alone.
    Now,
    /// With the batch of this number: so that it reaches its engine at `at`, or when that is called earlier.
    Wait {
        /// Which batch; a later one has a greater number.
        batch: u64,
        /// When all of it reach their engines, at the latest.
        at: Duration,
    },
    /// With all who wait in this batch, which is complete: so that all reach their engines at `at`.
    Release {
        /// Which batch.
        batch: u64,
        /// The way of the slowest from now.
        at: Duration,
    },
}

/// Arrivals of one kind of request, and the batch that is open.
#[derive(Debug, Clone)]
pub struct Gatherer {
    settings: GatherSettings,
    last_arrival: Option<Duration>,
    mean_gap_seconds: Option<f64>,
    batches: u64,
    open: Option<Batch>,
}

#[derive(Debug, Clone, Copy)]
struct Batch {
    number: u64,
    at: Duration,
    /// The longest way of those that wait.
    way: Duration,
    /// Prompt tokens that wait.
    tokens: u64,
}

impl Gatherer {
    /// One that has seen no arrival.
    pub fn new(settings: GatherSettings) -> Self {
        Self { settings, last_arrival: None, mean_gap_seconds: None, batches: 0, open: None }
    }

    /// A request of so many tokens arrived at `now` (time since the caller's origin, not going back). `sharing`: what it
    /// could share; `None` if there is nothing to be had by waiting.
    pub fn arrive(&mut self, now: Duration, prompt_tokens: u32, sharing: Option<&Sharing>) -> Admit {
        let gap_seconds = self.mean_gap(now);
        let Some(sharing) = sharing else { return Admit::Now };
        let tokens = u64::from(prompt_tokens);
        let way = self.way(sharing);
        // Who cannot be there in time belongs to the next batch.
        if let Some(batch) = self.open.as_mut().filter(|batch| batch.at > now + way) {
            batch.tokens = batch.tokens.saturating_add(tokens);
            batch.way = batch.way.max(way);
            let Batch { number, at, way, tokens } = *batch;
            if is_full(tokens, sharing) {
                self.open = None;
                return Admit::Release { batch: number, at: at.min(now + way) };
            }
            return Admit::Wait { batch: number, at };
        }
        let wait = gap_seconds.map_or(0.0, |gap| self.wait_seconds(gap, sharing));
        if wait == 0.0 || is_full(tokens, sharing) {
            return Admit::Now;
        }
        self.batches += 1;
        let at = now + Duration::from_secs_f64(wait).max(way);
        let batch = Batch { number: self.batches, at, way, tokens };
        self.open = Some(batch);
        Admit::Wait { batch: batch.number, at: batch.at }
    }

    /// From leaving the gateway until the engine has it, if that is believable: nobody waits longer for one far away.
    fn way(&self, sharing: &Sharing) -> Duration {
        let way = Duration::try_from_secs_f64(sharing.way_seconds).unwrap_or_default();
        way.min(self.settings.wait_max)
    }

    /// Takes an arrival into the mean of gaps; `None` after the first.
    fn mean_gap(&mut self, now: Duration) -> Option<f64> {
        let last = self.last_arrival.replace(now)?;
        let gap = now.saturating_sub(last).as_secs_f64();
        let mean = self.mean_gap_seconds.map_or(gap, |mean| mean + GAP_NEWEST_WEIGHT * (gap - mean));
        self.mean_gap_seconds = Some(mean);
        Some(mean)
    }

    /// How long to wait for company; 0 if less than one more request is to be expected by then.
    fn wait_seconds(&self, gap_seconds: f64, sharing: &Sharing) -> f64 {
        let stalls = self.settings.stall_weight * sharing.stall_seconds * sharing.stalled;
        let best = (2.0 * stalls * gap_seconds).sqrt();
        // Not a number counts as 0.
        let wait = best.max(0.0).min(self.settings.wait_max.as_secs_f64());
        if wait > gap_seconds { wait } else { 0.0 }
    }
}

/// Whether so many tokens fill a step of a group: three quarters of what it could take, since prompts of different lengths
/// do not divide evenly over its ranks.
fn is_full(tokens: u64, sharing: &Sharing) -> bool {
    tokens >= sharing.step_tokens / 4 * 3
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const BUSY: Sharing =
        Sharing { stall_seconds: 0.1, stalled: 40.0, step_tokens: 16_000, way_seconds: 0.0 };

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// One that has seen a request every `gap` for a second; the next one comes at a second.
    fn steady(gap: u64) -> Gatherer {
        let mut gatherer = Gatherer::new(GatherSettings { wait_max: ms(250), ..GatherSettings::default() });
        for at in (0..1000).step_by(gap as usize) {
            gatherer.arrive(ms(at), 1000, None);
        }
        gatherer
    }

    #[test]
    fn the_first_waits_for_company_and_a_step_full_of_it_goes_at_once() {
        let mut gatherer = steady(20);
        let Admit::Wait { batch, at } = gatherer.arrive(ms(1000), 1000, Some(&BUSY)) else {
            panic!("it waits")
        };
        assert_eq!(at, ms(1250), "no longer than is allowed");
        for n in 1..11 {
            let joined = gatherer.arrive(ms(1000 + 20 * n), 1000, Some(&BUSY));
            assert_eq!(joined, Admit::Wait { batch, at }, "the {n}. that joins");
        }
        assert_eq!(gatherer.arrive(ms(1220), 1000, Some(&BUSY)), Admit::Release { batch, at: ms(1220) });
        let next = gatherer.arrive(ms(1240), 1000, Some(&BUSY));
        assert!(matches!(next, Admit::Wait { batch: later, .. } if later > batch), "{next:?}");
    }

    #[test]
    fn all_reach_their_engines_together() {
        let mut gatherer = steady(20);
        let away = |milliseconds: u64| Sharing { way_seconds: milliseconds as f64 / 1e3, ..BUSY };
        let first = gatherer.arrive(ms(1000), 1000, Some(&away(5)));
        assert_eq!(first, Admit::Wait { batch: 1, at: ms(1250) });
        let slow = gatherer.arrive(ms(1100), 6000, Some(&away(30)));
        assert_eq!(slow, Admit::Wait { batch: 1, at: ms(1250) });
        let last = gatherer.arrive(ms(1150), 5000, Some(&away(5)));
        assert_eq!(last, Admit::Release { batch: 1, at: ms(1180) }, "the slow one leaves now");

        let mut gatherer = steady(20);
        let first = gatherer.arrive(ms(1000), 1000, Some(&away(5)));
        let late = gatherer.arrive(ms(1240), 6000, Some(&away(30)));
        assert_eq!(first, Admit::Wait { batch: 1, at: ms(1250) });
        assert_eq!(late, Admit::Wait { batch: 2, at: ms(1490) }, "it would not be there by then");
    }

    #[test]
    fn the_wait_is_that_of_the_formula() {
        let sharing = Sharing { stalled: 4.0, ..BUSY };
        let Admit::Wait { at, .. } = steady(20).arrive(ms(1000), 1000, Some(&sharing)) else {
            panic!("it waits")
        };
        // 50 a second: sqrt(2 x 0.1 x 4 / 50).
        assert!((at.as_secs_f64() - 1.0 - 0.016_f64.sqrt()).abs() < 1e-6, "{at:?}");
    }

    #[test]
    fn nobody_waits_for_nobody() {
        let check = |mut gatherer: Gatherer, sharing: Option<Sharing>, why: &str| {
            assert_eq!(gatherer.arrive(ms(1000), 1000, sharing.as_ref()), Admit::Now, "{why}");
        };
        check(steady(20), None, "somebody takes it without harm");
        check(steady(500), Some(BUSY), "the next comes too late");
        check(steady(20), Some(Sharing { stalled: 0.0, ..BUSY }), "nothing stalls");
        check(steady(20), Some(Sharing { step_tokens: 1000, ..BUSY }), "it fills a step alone");
        let never = GatherSettings { wait_max: Duration::ZERO, ..GatherSettings::default() };
        check(Gatherer { settings: never, ..steady(20) }, Some(BUSY), "it is turned off");
        check(Gatherer::new(GatherSettings::default()), Some(BUSY), "nothing is known of arrivals");
    }

    #[test]
    fn a_weight_is_a_number_from_0_up() {
        let weight = |stall_weight| GatherSettings { stall_weight, ..GatherSettings::default() }.validate();
        assert!(weight(0.0).is_ok() && weight(3.0).is_ok());
        assert!(weight(-1.0).is_err() && weight(f64::NAN).is_err() && weight(f64::INFINITY).is_err());
    }

    fn any_sharing() -> impl Strategy<Value = Option<Sharing>> {
        let number = || {
            prop_oneof![
                4 => 0.0..1000.0_f64,
                4 => 0.0..0.1_f64,
                1 => Just(f64::NAN),
                1 => Just(f64::INFINITY),
                1 => Just(-1.0)
            ]
        };
        let sharing = (number(), number(), 0_u64..10_000, number());
        let sharing = sharing.prop_map(|(stall_seconds, stalled, step_tokens, way_seconds)| Sharing {
            stall_seconds,
            stalled,
            step_tokens,
            way_seconds,
        });
        proptest::option::weighted(0.9, sharing)
    }

    proptest! {
        #[test]
        fn nobody_waits_too_long_and_a_batch_never_gets_later(
            arrivals in vec((0_u64..400, 0_u32..2000, any_sharing()), 1..200)
        ) {
            let settings = GatherSettings::default();
            let mut gatherer = Gatherer::new(settings);
            let mut now = Duration::ZERO;
            let mut open: Option<(u64, Duration)> = None;
            for (gap, tokens, sharing) in arrivals {
                now += ms(gap);
                let way = sharing.as_ref().map_or(Duration::ZERO, |sharing| gatherer.way(sharing));
                match gatherer.arrive(now, tokens, sharing.as_ref()) {
                    Admit::Now => {}
                    Admit::Release { batch, at } => {
                        let (number, until) = open.take().expect("it was open");
                        prop_assert_eq!(batch, number);
                        prop_assert!(now <= at && at <= until && at >= now + way.min(until - now));
                    }
                    Admit::Wait { batch, at } => {
                        prop_assert!(at >= now + way && at <= now + settings.wait_max);
                        match open {
                            Some((number, until)) if number == batch => prop_assert_eq!(at, until),
                            _ => open = Some((batch, at)),
                        }
                    }
                }
            }
        }
    }
}
