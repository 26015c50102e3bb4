//! When to say in the log that something is left out: at most once a minute, and only what is new.

use std::time::Duration;

use forebay_kv_index::IndexStats;

/// Between two lines.
const EVERY: Duration = Duration::from_secs(60);

/// What rose since the last line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Risen {
    /// Blocks that were not recorded for lack of room.
    pub(crate) refused: u64,
    /// Blocks that were dropped for lack of room.
    pub(crate) evicted: u64,
    /// Removals of what was not recorded.
    pub(crate) removals_unknown: u64,
    /// Gaps in event streams.
    pub(crate) gaps: u64,
}

/// Remembers what was said, and when.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    said: Risen,
    at: Option<Duration>,
}

impl Alarm {
    /// What to say at `now`, if anything.
    pub(crate) fn look(&mut self, now: Duration, stats: &IndexStats) -> Option<Risen> {
        let Risen { refused, evicted, removals_unknown, gaps } = self.said;
        let risen = Risen {
            refused: stats.refused.saturating_sub(refused),
            evicted: stats.evicted.saturating_sub(evicted),
            removals_unknown: stats.removals_unknown.saturating_sub(removals_unknown),
            gaps: stats.gaps.saturating_sub(gaps),
        };
        let too_soon = self.at.is_some_and(|at| now.saturating_sub(at) < EVERY);
        if risen == Risen::default() || too_soon {
            return None;
        }
        self.at = Some(now);
        self.said = Risen {
            refused: stats.refused,
            evicted: stats.evicted,
            removals_unknown: stats.removals_unknown,
            gaps: stats.gaps,
        };
        Some(risen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_is_said_once_and_once_a_minute() {
        let mut alarm = Alarm::default();
        let mut look = |seconds: u64, evicted: u64| {
            let stats = IndexStats { evicted, ..IndexStats::default() };
            alarm.look(Duration::from_secs(seconds), &stats).map(|risen| risen.evicted)
        };
        assert_eq!(look(0, 0), None);
        assert_eq!(look(1, 5), Some(5));
        assert_eq!(look(2, 9), None, "too soon");
        assert_eq!(look(60, 10), None, "too soon");
        assert_eq!(look(61, 10), Some(5), "and nothing is forgotten");
        assert_eq!(look(500, 10), None, "nothing new");
        assert_eq!(look(501, 11), Some(1));
    }
}
