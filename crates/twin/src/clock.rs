//! Virtual time: whole nanoseconds since a run began, so that sums do not depend on their order.

use std::time::Duration;

/// A moment, or a length of time, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

impl Time {
    /// The beginning of a run.
    pub const ZERO: Self = Self(0);
    /// After every run.
    pub const NEVER: Self = Self(u64::MAX);

    /// Rounded to a nanosecond. Negative seconds are none.
    pub fn from_seconds(seconds: f64) -> Self {
        Self((seconds * 1e9).round() as u64)
    }

    /// In seconds.
    pub fn seconds(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// The moment `seconds` later.
    pub fn after(self, seconds: f64) -> Self {
        self + Self::from_seconds(seconds)
    }

    /// How long it is since `earlier`; nothing if that lies ahead.
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// Of a time as the cores give it.
    pub fn of(duration: Duration) -> Self {
        Self(duration.as_nanos() as u64)
    }

    /// As the cores take it.
    pub fn duration(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

impl std::ops::Add for Time {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}
