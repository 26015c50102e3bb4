//! One task an engine that has addresses: it follows life after life and tells the index.
//!
//! Start at [`follow`]. When a life is over is decided in [`Lapse`]: its publisher began anew (the follower says so), it
//! was out of reach for the lease, or its connection broke and there is no replay that could prove it the same as before.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engines::{
    CacheSight, Notice, Report, Reports,
    remote::{EventFollower, EventPlan, EventsFollowed, FollowedRank, follow_events},
};
use forebay_kv_index::Applied;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::service::{Engine, Service};

/// Pause before the next life, doubling up to the second after lives that were short.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A life that lasted as long was none that ends again and again.
const LIFE_LONG: Duration = Duration::from_secs(10);
/// Between two looks at whether an engine is in reach, at most.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(1);

/// Follows an engine until it is not registered any more.
pub(crate) async fn follow(service: Arc<Service>, engine: Arc<Engine>) {
    let mut pause = PAUSE_MIN;
    loop {
        let began = Instant::now();
        let Some(why) = follow_life(&service, &engine).await else { return };
        tracing::info!(engine = %engine.name, %why, "a life of an engine is over: what it cached is forgotten");
        if !service.next_life(&engine, Some(why)) {
            return;
        }
        if began.elapsed() >= LIFE_LONG {
            pause = PAUSE_MIN;
        }
        sleep_until(tokio::time::Instant::now() + pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Follows one life. Says why it is over; `None` if the engine is not registered any more.
async fn follow_life(service: &Arc<Service>, engine: &Engine) -> Option<Arc<str>> {
    let reports = Arc::new(Reports::default());
    let spec = &engine.spec;
    let limits = &service.settings().limits;
    let follower = service.begin_following(engine, |incarnation| {
        let plan = EventPlan {
            incarnation,
            model: spec.spec.model.clone(),
            sources: spec.sources.clone(),
            block_size_tokens: spec.spec.block_size_tokens,
            blocks_max: limits.blocks_max,
        };
        Arc::new(follow_events(plan, service.hasher(), reports.clone()))
    })?;
    let replays: Vec<u16> =
        spec.sources.iter().filter(|source| source.replay.is_some()).map(|source| source.dp_rank).collect();
    let mut lapse = Lapse { lease: limits.lease, replays, since: BTreeMap::new() };
    let mut look = interval((limits.lease / 4).clamp(Duration::from_millis(1), LOOK_EVERY_MAX));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            report = reports.next() => {
                let died = report.died.clone();
                take(service, engine, &follower, report)?;
                if died.is_some() {
                    return died;
                }
                // What is here already takes no waiting, so nobody else would have a turn.
                tokio::task::yield_now().await;
            }
            _ = look.tick() => {
                if let Some(why) = lapse.look(Instant::now(), &follower.ranks()) {
                    return Some(why);
                }
            }
        }
    }
}

/// Tells the index what was reported. `None` if the engine is not registered any more.
fn take(service: &Service, engine: &Engine, follower: &EventFollower, report: Report) -> Option<()> {
    let Report { snapshots, kv, notices, .. } = report;
    for snapshot in snapshots {
        let rank = snapshot.rank;
        if service.reset(engine, snapshot)? == Applied::TooManyRanks {
            tracing::warn!(engine = %engine.name, dp_rank = rank.dp_rank, "the index follows as many ranks as it may");
        }
    }
    for batch in kv {
        if let Applied::Gap { .. } = service.apply(engine, &batch)? {
            // They came faster than they could be applied.
            follower.request_snapshot(batch.rank.dp_rank);
        }
    }
    for notice in notices {
        match notice {
            Notice::Note(note) => tracing::warn!(engine = %engine.name, "{note}"),
            Notice::Fenced { why } => tracing::warn!(engine = %engine.name, %why, "not believed any more"),
            Notice::CacheSight(CacheSight::Approximate { why }) => {
                tracing::warn!(engine = %engine.name, %why, "its KV events are not heard");
            }
            Notice::CacheSight(_) => tracing::info!(engine = %engine.name, "its KV events are followed"),
            Notice::Silent { .. } | Notice::Heard | Notice::Draining => {}
        }
    }
    Some(())
}

/// Decides when an engine that cannot be reached is not believed any more.
#[derive(Debug)]
struct Lapse {
    lease: Duration,
    /// Ranks whose replay shows whether they are the same as before.
    replays: Vec<u16>,
    /// Ranks out of reach, and since when.
    since: BTreeMap<u16, Instant>,
}

impl Lapse {
    /// Why the life is over, if it is.
    fn look(&mut self, now: Instant, ranks: &[FollowedRank]) -> Option<Arc<str>> {
        for rank in ranks {
            let figures = &rank.figures;
            // Of one that was never heard nothing is believed.
            if figures.batches == 0 {
                continue;
            }
            let number = rank.dp_rank;
            if figures.breaks > 0 && !self.replays.contains(&number) {
                let why = format!(
                    "the connection to the events of rank {number} broke, and without a replay address nothing shows what \
                     was missed"
                );
                return Some(why.into());
            }
            if figures.followed != EventsFollowed::Unreachable {
                self.since.remove(&number);
                continue;
            }
            let since = *self.since.entry(number).or_insert(now);
            if now.saturating_duration_since(since) >= self.lease {
                let seconds = self.lease.as_secs_f64();
                return Some(format!("the events of rank {number} were out of reach for {seconds} s").into());
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use forebay_engines::remote::EventFigures;

    use super::*;

    #[test]
    fn a_life_ends_when_nothing_proves_it() {
        let began = Instant::now();
        let mut lapse = Lapse { lease: Duration::from_secs(10), replays: vec![0], since: BTreeMap::new() };
        let mut look = |seconds: u64, dp_rank: u16, followed: EventsFollowed, breaks: u64, batches: u64| {
            let figures = EventFigures { followed, breaks, batches, ..EventFigures::default() };
            let rank = FollowedRank { dp_rank, figures, blind: None };
            lapse.look(began + Duration::from_secs(seconds), &[rank]).is_some()
        };
        use EventsFollowed::{Following, Unreachable};
        assert!(!look(0, 0, Following, 0, 5));
        assert!(!look(1, 0, Unreachable, 1, 5), "the lease begins");
        assert!(!look(10, 0, Unreachable, 1, 5));
        assert!(!look(11, 0, Following, 1, 5), "it came back, and the replay shows that it is the same");
        assert!(!look(12, 0, Unreachable, 2, 5), "another lease begins");
        assert!(look(22, 0, Unreachable, 2, 5));
        assert!(!look(100, 1, Unreachable, 9, 0), "nothing was heard, so nothing is believed");
        assert!(!look(101, 1, Following, 0, 5));
        assert!(look(102, 1, Following, 1, 5), "no replay, so nothing shows that it is the same");
    }
}
