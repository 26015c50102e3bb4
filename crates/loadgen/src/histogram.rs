//! Quantiles of very many times in a fixed space.

use serde::Serialize;

/// The shortest time told apart: what a clock and a scheduler cannot see anyway.
const FLOOR_SECONDS: f64 = 1e-6;
/// Each bucket is so much wider than the one before: a quantile is off by half a percent at most.
const GROWTH: f64 = 1.01;
/// Up to some three hours; what is longer counts as that.
const BUCKETS: usize = 2_320;

/// Times, by how many there are of each.
#[derive(Debug, Clone, Default)]
pub struct Histogram {
    /// Empty until the first time comes: most slices have some that stay so.
    counts: Vec<u64>,
    count: u64,
    max_seconds: f64,
}

/// What matters of a distribution, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half are shorter.
    pub p50: f64,
    /// Nine tenths are.
    pub p90: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// The longest, exactly.
    pub max: f64,
}

impl Histogram {
    /// Takes a time.
    pub fn add(&mut self, seconds: f64) {
        if self.counts.is_empty() {
            self.counts.resize(BUCKETS, 0);
        }
        self.counts[bucket(seconds)] += 1;
        self.count += 1;
        self.max_seconds = self.max_seconds.max(seconds);
    }

    /// Takes those of another.
    pub fn merge(&mut self, other: &Histogram) {
        if self.counts.is_empty() {
            self.counts.clone_from(&other.counts);
        } else {
            self.counts.iter_mut().zip(&other.counts).for_each(|(mine, others)| *mine += others);
        }
        self.count += other.count;
        self.max_seconds = self.max_seconds.max(other.max_seconds);
    }

    /// The time that a share of all does not exceed, by nearest rank; `None` of nothing.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = ((share * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut below = 0;
        let index = self.counts.iter().position(|count| {
            below += count;
            below >= rank
        })?;
        // The middle of the bucket, by ratio.
        let middle = FLOOR_SECONDS * GROWTH.powf(index as f64 - 0.5);
        Some(if index == 0 { 0.0 } else { middle.min(self.max_seconds) })
    }

    /// The usual ones; `None` of nothing.
    pub fn quantiles(&self) -> Option<Quantiles> {
        let quantile = |share| self.quantile(share);
        Some(Quantiles {
            p50: quantile(0.5)?,
            p90: quantile(0.9)?,
            p99: quantile(0.99)?,
            max: self.max_seconds,
        })
    }
}

fn bucket(seconds: f64) -> usize {
    if seconds <= FLOOR_SECONDS {
        return 0;
    }
    (((seconds / FLOOR_SECONDS).ln() / GROWTH.ln()).ceil() as usize).clamp(1, BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_quantiles() {
        assert_eq!(Histogram::default().quantiles(), None);
    }

    proptest! {
        #[test]
        fn quantiles_are_those_of_a_sorted_list(
            exponents in proptest::collection::vec(-5.5..3.5_f64, 1..400),
            share in 0.0..=1.0_f64,
            cut in 0..400_usize,
        ) {
            let mut times: Vec<f64> = exponents.iter().map(|exponent| 10_f64.powf(*exponent)).collect();
            let (mut one, mut other) = (Histogram::default(), Histogram::default());
            for (index, time) in times.iter().enumerate() {
                if index < cut { one.add(*time) } else { other.add(*time) }
            }
            one.merge(&other);
            times.sort_by(f64::total_cmp);
            let rank = ((share * times.len() as f64).ceil() as usize).max(1);
            let (exact, found) = (times[rank - 1], one.quantile(share).expect("there are some"));
            prop_assert!((found / exact - 1.0).abs() < 0.006, "{} for {}", found, exact);
            prop_assert_eq!(one.quantiles().expect("some").max, times[times.len() - 1]);
        }
    }
}
