//! What can be set, with defaults and bounds.

use std::time::Duration;

use forebay_perf_model::LinkPrior;

/// Settings of a [`Fleet`](crate::Fleet).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FleetSettings {
    /// Time in which a measured prefill share loses half its weight. Two seconds span some ten long prefills: long
    /// enough that a role shows, short enough that a rank whose prefills ended soon decodes again.
    pub prefill_share_half_life: Duration,
    /// Steps in which ages, shares and back-offs move in snapshots. Finer steps only cost rebuilds.
    pub time_resolution: Duration,
    /// When a rank rests.
    pub breaker: BreakerSettings,
    /// What a pair of engines is taken to be like before its first transfer.
    pub link_prior: LinkPrior,
    /// Ranks of all engines together; a join beyond it is refused.
    pub ranks_max: usize,
    /// Reservations at once; one beyond it is refused, and its load shows only when the engine reports it.
    pub reservations_max: usize,
    /// Pairs of engines with a measured link; the one observed longest ago makes room. About 1 KiB each.
    pub links_max: usize,
    /// Lost incarnations that are remembered, so that a late message cannot bring one back.
    pub lost_remembered_max: usize,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self {
            prefill_share_half_life: Duration::from_secs(2),
            time_resolution: Duration::from_millis(10),
            breaker: BreakerSettings::default(),
            link_prior: LinkPrior::SHARED_MEMORY,
            ranks_max: 4096,
            reservations_max: 65_536,
            links_max: 1024,
            lost_remembered_max: 1024,
        }
    }
}

/// When a rank's breaker opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BreakerSettings {
    /// Failures in a row that open it.
    pub failures_consecutive: u32,
    /// Share of failures among the last `outcomes` that opens it.
    pub failure_share: f64,
    /// Outcomes over which that share is taken, once there are as many; at most 64.
    pub outcomes: u32,
    /// First rest; it doubles with each probe that fails.
    pub back_off: Duration,
    /// Longest rest.
    pub back_off_max: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            failures_consecutive: 3,
            failure_share: 0.5,
            outcomes: 20,
            back_off: Duration::from_secs(1),
            back_off_max: Duration::from_secs(30),
        }
    }
}
