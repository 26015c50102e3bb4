//! The share of recent wall time that prefills took from the decodes beside them.
//!
//! Decodes go on in a step that also computes a prompt, one token each, but the step takes longer. What counts is the
//! excess over a step of the same decodes alone: with share `s`, a decode that would take `t` a token takes `t/(1−s)`.

use std::time::Duration;

/// An exponentially weighted share of time; without observations it decays towards 0.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PrefillShare {
    value: f64,
    at: Duration,
}

impl PrefillShare {
    /// A step that ended at `now` spent `seconds` on prefill.
    pub(crate) fn observe(&mut self, now: Duration, seconds: f64, half_life: Duration) {
        let now = now.max(self.at);
        let spent = 1.0 - decay(seconds, half_life);
        *self = Self { value: (self.at(now, half_life) + spent).clamp(0.0, 1.0), at: now };
    }

    /// The share as of `now`.
    pub(crate) fn at(&self, now: Duration, half_life: Duration) -> f64 {
        if self.value == 0.0 {
            return 0.0;
        }
        self.value * decay(now.saturating_sub(self.at).as_secs_f64(), half_life)
    }
}

/// What is left of a weight after `seconds`.
fn decay(seconds: f64, half_life: Duration) -> f64 {
    let half_life = half_life.as_secs_f64().max(f64::MIN_POSITIVE);
    (-seconds / half_life).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_LIFE: Duration = Duration::from_secs(2);

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Runs steps of `step` seconds back to back for 20 s, `prefill` of each spent on prefill.
    fn fed(step: f64, prefill: f64) -> PrefillShare {
        let mut share = PrefillShare::default();
        for n in 1..=(20.0 / step) as u32 {
            share.observe(at(f64::from(n) * step), prefill, HALF_LIFE);
        }
        share
    }

    #[test]
    fn steady_work_shows_as_its_share_whatever_the_length_of_steps() {
        for (step, prefill, share) in [(0.01, 0.01, 1.0), (0.1, 0.05, 0.5), (0.2, 0.2, 1.0), (0.02, 0.0, 0.0)]
        {
            let measured = fed(step, prefill).at(at(20.0), HALF_LIFE);
            assert!((measured - share).abs() < 0.02, "steps of {step}, {prefill} of prefill: {measured}");
        }
    }

    #[test]
    fn an_idle_rank_loses_half_its_share_in_each_half_life() {
        let share = fed(0.1, 0.1);
        assert!((share.at(at(22.0), HALF_LIFE) - 0.5).abs() < 0.01);
        assert!((share.at(at(24.0), HALF_LIFE) - 0.25).abs() < 0.01);
        assert!(share.at(at(100.0), HALF_LIFE) < 1e-9);
    }

    #[test]
    fn late_and_bunched_observations_stay_within_bounds() {
        let mut share = PrefillShare::default();
        for now in [5.0, 5.0, 4.0, 5.0, 3.0] {
            share.observe(at(now), 2.0, HALF_LIFE);
            let value = share.at(at(5.0), HALF_LIFE);
            assert!((0.0..=1.0).contains(&value));
        }
    }
}
