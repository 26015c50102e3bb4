//! How long the slowest steps take: a decaying histogram of step times.

/// First bucket's upper bound, seconds.
const FIRST_SECONDS: f64 = 1e-4;
/// Upper bound of a bucket over that of the one before.
const GROWTH: f64 = 1.25;
/// Buckets; the last one's lower bound is some 100 s.
const BUCKETS: usize = 64;
/// Weight of all older steps after one more: a memory of some two thousand steps, so that a P99 rests on twenty.
const DECAY: f64 = 1.0 - 1.0 / 2048.0;
/// Weight below which nothing is said.
const WEIGHT_MIN: f64 = 32.0;

/// Step times, the older the lighter.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    weights: [f64; BUCKETS],
    total: f64,
    /// Weight of the next step; growing it is the same as decaying all others.
    next: f64,
}

impl Default for Tail {
    fn default() -> Self {
        Self { weights: [0.0; BUCKETS], total: 0.0, next: 1.0 }
    }
}

impl Tail {
    /// Takes in one step. Times that are no numbers are the caller's to leave out.
    pub(crate) fn observe(&mut self, seconds: f64) {
        let bucket = ((seconds / FIRST_SECONDS).max(1.0).ln() / GROWTH.ln()).ceil() as usize;
        self.weights[bucket.min(BUCKETS - 1)] += self.next;
        self.total += self.next;
        self.next /= DECAY;
        if self.next > 1e12 {
            self.weights.iter_mut().for_each(|weight| *weight /= self.next);
            self.total /= self.next;
            self.next = 1.0;
        }
    }

    /// Upper bound of the bucket that holds the 99th percentile; 0 before some thirty steps.
    pub(crate) fn p99_seconds(&self) -> f64 {
        if self.total < WEIGHT_MIN * self.next {
            return 0.0;
        }
        let mut beyond = self.total * 0.01;
        for (bucket, weight) in self.weights.iter().enumerate().rev() {
            beyond -= weight;
            if beyond < 0.0 {
                return FIRST_SECONDS * GROWTH.powi(bucket as i32);
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_a_hundred_steps_show() {
        let mut tail = Tail::default();
        (0..20).for_each(|_| tail.observe(0.01));
        assert_eq!(tail.p99_seconds(), 0.0, "too few to say");
        (0..1000).for_each(|_| tail.observe(0.01));
        assert!((0.01..0.0126).contains(&tail.p99_seconds()), "{}", tail.p99_seconds());
        (0..30).for_each(|_| tail.observe(0.2));
        assert!((0.2..0.26).contains(&tail.p99_seconds()), "{}", tail.p99_seconds());
        (0..20_000).for_each(|_| tail.observe(0.01));
        assert!(tail.p99_seconds() < 0.0126, "old steps fade");
        (0..100_000).for_each(|_| tail.observe(1e9));
        assert!(tail.p99_seconds() > 100.0, "beyond the last bucket");
    }
}
