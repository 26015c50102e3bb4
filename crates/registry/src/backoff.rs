//! Pauses between attempts: doubling, with jitter from a seed.

use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_millis(100);

/// Pauses that double from 100 ms to a bound. Each is between half and all of its step, so that many who lost the same
/// server do not come back together. Same seed, same pauses.
#[derive(Debug)]
pub(crate) struct Backoff {
    longest: Duration,
    step: Duration,
    random: u64,
}

impl Backoff {
    pub(crate) fn new(seed: u64, longest: Duration) -> Self {
        Self { longest, step: FIRST.min(longest), random: seed }
    }

    /// The next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let step = self.step;
        self.step = (2 * step).min(self.longest);
        step / 2 + (step / 2).mul_f64(self.fraction())
    }

    /// All is well: the next pause is a short one.
    pub(crate) fn reset(&mut self) {
        self.step = FIRST.min(self.longest);
    }

    /// From 0 to below 1, by SplitMix64.
    fn fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_their_bound_within_their_jitter_and_start_again() {
        let longest = Duration::from_millis(1_000);
        let mut backoff = Backoff::new(7, longest);
        for step in [100, 200, 400, 800, 1_000, 1_000] {
            let (pause, step) = (backoff.pause(), Duration::from_millis(step));
            assert!(pause >= step / 2 && pause <= step, "{pause:?} of {step:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }

    #[test]
    fn a_seed_gives_its_pauses() {
        let pauses = |seed| {
            let mut backoff = Backoff::new(seed, Duration::from_secs(5));
            (0..6).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        assert_eq!(pauses(1), pauses(1));
        assert_ne!(pauses(1), pauses(2));
    }
}
