//! Pairs of engines whose hand-overs failed: each rests for a while that doubles with every failure in a row.

use std::{collections::BTreeMap, time::Duration};

use forebay_types::Incarnation;

use crate::settings::BreakerSettings;

/// (source, destination).
type EnginePair = (Incarnation, Incarnation);

#[derive(Debug, Default)]
pub(crate) struct RestingPairs(BTreeMap<EnginePair, Rest>);

#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Duration,
    /// Of the next rest.
    back_off: Duration,
    /// The rest is over and nobody was told.
    over: bool,
}

impl RestingPairs {
    /// A hand-over failed. During a rest that is an echo of what began it. Beyond `pairs_max` pairs the one that rests
    /// the shortest is forgotten.
    pub(crate) fn failed(
        &mut self,
        pair: EnginePair,
        now: Duration,
        settings: &BreakerSettings,
        pairs_max: usize,
    ) {
        if !self.0.contains_key(&pair)
            && self.0.len() >= pairs_max
            && let Some(soonest) = self.0.iter().min_by_key(|(_, rest)| rest.until).map(|(pair, _)| *pair)
        {
            self.0.remove(&soonest);
        }
        let rest = self.0.entry(pair).or_insert(Rest {
            until: Duration::ZERO,
            back_off: settings.back_off,
            over: true,
        });
        if now >= rest.until {
            rest.until = now.saturating_add(rest.back_off);
            rest.back_off = rest.back_off.saturating_mul(2).min(settings.back_off_max);
            rest.over = false;
        }
    }

    /// A hand-over succeeded; whether the pair had failed before.
    pub(crate) fn succeeded(&mut self, pair: EnginePair) -> bool {
        self.0.remove(&pair).is_some()
    }

    /// Pairs that rest at `now`.
    pub(crate) fn resting(&self, now: Duration) -> impl Iterator<Item = EnginePair> {
        self.0.iter().filter(move |(_, rest)| now < rest.until).map(|(pair, _)| *pair)
    }

    /// Whether a rest has ended since the last call.
    pub(crate) fn wake(&mut self, now: Duration) -> bool {
        let mut woke = false;
        for rest in self.0.values_mut().filter(|rest| !rest.over && now >= rest.until) {
            rest.over = true;
            woke = true;
        }
        woke
    }

    pub(crate) fn remove_incarnation(&mut self, incarnation: Incarnation) {
        self.0.retain(|pair, _| pair.0 != incarnation && pair.1 != incarnation);
    }
}
