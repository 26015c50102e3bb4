//! A histogram that many threads add to without a lock, and its thread-local half.
//!
//! The library's own histogram takes a mutex for each observation and cannot take a batch, which is too much for
//! something that happens once a token.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, TypedMetric},
};

/// Most bounds that a histogram may have; keeps [`LocalHistogram`] a flat value.
const BOUNDS_MAX: usize = 15;

/// Durations counted under fixed upper bounds. Clones share their counts.
///
/// Relaxed atomics: each count is right by itself, and a scrape that runs beside an observation may see the count
/// without the sum, which the next scrape mends.
#[derive(Debug, Clone)]
pub struct SecondsHistogram {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bounds: &'static [f64],
    counts: [AtomicU64; BOUNDS_MAX + 1],
    sum_nanoseconds: AtomicU64,
}

/// The same by one owner, to be merged later.
#[derive(Debug, Clone)]
pub struct LocalHistogram {
    bounds: &'static [f64],
    counts: [u32; BOUNDS_MAX + 1],
    sum_nanoseconds: u64,
}

fn bucket(bounds: &[f64], seconds: f64) -> usize {
    bounds.partition_point(|bound| *bound < seconds)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl SecondsHistogram {
    /// Empty, with ascending upper `bounds` in seconds, at most 15; a last bucket takes the rest.
    pub fn new(bounds: &'static [f64]) -> Self {
        assert!(
            bounds.len() <= BOUNDS_MAX && bounds.is_sorted(),
            "bounds are ascending and at most {BOUNDS_MAX}"
        );
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Self { shared: Arc::new(Shared { bounds, counts, sum_nanoseconds: AtomicU64::new(0) }) }
    }

    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let bucket = bucket(self.shared.bounds, duration.as_secs_f64());
        self.shared.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.shared.sum_nanoseconds.fetch_add(nanoseconds(duration), Ordering::Relaxed);
    }

    /// An empty one with the same bounds, for [`SecondsHistogram::merge`].
    pub fn local(&self) -> LocalHistogram {
        LocalHistogram { bounds: self.shared.bounds, counts: [0; BOUNDS_MAX + 1], sum_nanoseconds: 0 }
    }

    /// Adds what `local` counted and empties it. Both must have the same bounds.
    pub fn merge(&self, local: &mut LocalHistogram) {
        debug_assert_eq!(self.shared.bounds, local.bounds);
        for (shared, count) in self.shared.counts.iter().zip(&mut local.counts) {
            if *count > 0 {
                shared.fetch_add(u64::from(std::mem::take(count)), Ordering::Relaxed);
            }
        }
        self.shared.sum_nanoseconds.fetch_add(std::mem::take(&mut local.sum_nanoseconds), Ordering::Relaxed);
    }

    /// Observations so far.
    pub fn count(&self) -> u64 {
        self.shared.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl LocalHistogram {
    /// Counts one duration.
    pub fn observe(&mut self, duration: Duration) {
        self.counts[bucket(self.bounds, duration.as_secs_f64())] += 1;
        self.sum_nanoseconds += nanoseconds(duration);
    }
}

impl TypedMetric for SecondsHistogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for SecondsHistogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = self.shared.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds
            .zip(&self.shared.counts)
            .map(|(bound, count)| (bound, count.load(Ordering::Relaxed)))
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_nanos(self.shared.sum_nanoseconds.load(Ordering::Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}
