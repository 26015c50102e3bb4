//! The process's clock and entropy, for the crates that take them as arguments.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use forebay_gateway::http::{Clock, Seeds};

/// Milliseconds since the Unix epoch.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A number that nobody can guess; the time where the system gives none.
pub(crate) fn entropy() -> u64 {
    getrandom::u64().unwrap_or_else(|_| unix_ms())
}

/// The system's clock.
pub(super) struct SystemClock(Instant);

impl SystemClock {
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn unix_seconds(&self) -> u64 {
        unix_ms() / 1000
    }
}

/// A stream of numbers from one drawn seed: SplitMix64 over a counter.
pub(super) struct EntropySeeds(AtomicU64);

impl EntropySeeds {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(entropy()))
    }
}

impl Seeds for EntropySeeds {
    fn draw(&self) -> u64 {
        let number = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ number >> 31
    }
}
