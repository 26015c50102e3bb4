//! The load of a rank between two reports.
//!
//! In: what the rank last said, and what this process knows of its own legs there. Out: the load as a report would say
//! it now. A rank that reports every step is believed. One that is looked at now and then is a second behind, and its
//! figures do not tell which running sequences still compute their prompts; there this process keeps account of its own
//! legs, and of the report it takes only what those do not explain; of that, the queue is taken to return to its mean.

use std::time::Duration;

use forebay_types::RankLoad;

use crate::reservation::{OnRank, Reservation};

/// What is known of a rank's load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadEstimate {
    /// As it was reported.
    reported: RankLoad,
    /// Of that, what is not this process's.
    others: RankLoad,
    /// Of that, what waited, and the mean of reports.
    queue: Queue,
    mean: Queue,
    /// This process's legs, as they are now; nothing where every step is reported.
    own: OnRank,
}

/// How fast a queue that was seen stops saying anything about the queue there is: it is computed within some hundred
/// milliseconds, and another has formed.
const QUEUE_HALF_LIFE: f64 = 0.2;
/// Weight of the newest report in the mean: a memory of some five.
const MEAN_NEWEST_WEIGHT: f64 = 0.2;

/// What others have waiting.
#[derive(Debug, Clone, Copy, Default)]
struct Queue {
    sequences: f64,
    prefill_tokens: f64,
}

impl Queue {
    fn of(load: &RankLoad) -> Self {
        Self { sequences: f64::from(load.waiting), prefill_tokens: load.prefill_tokens as f64 }
    }

    /// This, moved towards `other` by `share` of the way.
    fn towards(self, other: Self, share: f64) -> Self {
        Self {
            sequences: self.sequences + share * (other.sequences - self.sequences),
            prefill_tokens: self.prefill_tokens + share * (other.prefill_tokens - self.prefill_tokens),
        }
    }
}

impl LoadEstimate {
    /// Of a rank that reported `load` and has none of this process's legs.
    pub(crate) fn new(load: RankLoad) -> Self {
        let queue = Queue::of(&load);
        Self { reported: load, others: load, queue, mean: queue, own: OnRank::default() }
    }

    /// The load `age` after the report.
    pub(crate) fn now(&self, age: Duration) -> RankLoad {
        let Self { others, own, .. } = self;
        let gone = 1.0 - (-age.as_secs_f64() / QUEUE_HALF_LIFE).exp2();
        let queue = self.queue.towards(self.mean, gone);
        RankLoad {
            waiting: (queue.sequences.round() as u32).saturating_add(own.waiting),
            running: others.running.saturating_add(own.running),
            decoding: others.decoding.saturating_add(own.decoding),
            prefill_tokens: (queue.prefill_tokens.round() as u64).saturating_add(own.prefill_tokens),
            context_tokens: others.context_tokens.saturating_add(own.context_tokens),
            blocks_free: others.blocks_free.saturating_sub(own.blocks),
            ..self.reported
        }
    }

    /// Sequences that are not this process's.
    pub(crate) fn others(&self) -> u32 {
        self.others.waiting.saturating_add(self.others.running)
    }

    /// A leg got further.
    pub(crate) fn changed(&mut self, before: OnRank, after: OnRank) {
        self.own -= before;
        self.own += after;
    }

    /// A report, and the legs of this process that it can have counted.
    pub(crate) fn report<'a>(&mut self, load: RankLoad, shown: impl Iterator<Item = &'a Reservation>) {
        self.reported = load;
        let (mut queued, mut decoding, mut context_tokens, mut blocks) = (0_u32, 0_u32, 0_u64, 0_u32);
        for leg in shown {
            let OnRank { waiting, running, .. } = leg.on_rank();
            queued += waiting;
            decoding += running;
            let pool = leg.pool();
            context_tokens += pool.0;
            blocks = blocks.saturating_add(pool.1);
        }
        // Which of the queued ones run already is not told: as many as make others the fewest.
        let sequences = (load.waiting.saturating_add(load.running)).saturating_sub(queued + decoding);
        let running = load.running.saturating_sub(decoding).min(sequences);
        let waiting = (sequences - running).min(load.waiting);
        self.others = RankLoad {
            waiting,
            running,
            decoding: load.decoding.min(running),
            prefill_tokens: match load.waiting {
                0 => 0,
                all => load.prefill_tokens / u64::from(all) * u64::from(waiting),
            },
            context_tokens: if running == 0 { 0 } else { load.context_tokens.saturating_sub(context_tokens) },
            blocks_free: load.blocks_free.saturating_add(blocks).min(load.blocks_total),
            ..load
        };
        self.queue = Queue::of(&self.others);
        self.mean = self.mean.towards(self.queue, MEAN_NEWEST_WEIGHT);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forebay_placement::Reserved;

    use super::*;
    use crate::{
        event::{LoadSight, Progress},
        tests::rank,
    };

    const AMOUNT: Reserved = Reserved {
        prefill_tokens: 1000,
        context_tokens: 1600,
        output_tokens: 200,
        sequences: 1,
        decodes: 1,
        blocks: 63,
    };

    fn leg(progress: &[Progress]) -> Reservation {
        let mut leg = Reservation::new(rank(0, 0), LoadSight::Sampled, AMOUNT);
        progress.iter().for_each(|&progress| leg.advance(Duration::ZERO, progress));
        leg
    }

    fn queued() -> Reservation {
        leg(&[Progress::Accepted { at: Duration::ZERO }])
    }

    fn decoding(tokens: u64) -> Reservation {
        leg(&[Progress::Generated { tokens }])
    }

    fn estimate(load: RankLoad, legs: &[Reservation]) -> LoadEstimate {
        let mut estimate = LoadEstimate::new(RankLoad::default());
        for leg in legs {
            estimate.changed(OnRank::default(), leg.on_rank());
        }
        estimate.report(load, legs.iter());
        estimate
    }

    const POOL: RankLoad = RankLoad {
        blocks_total: 1000,
        blocks_free: 1000,
        waiting: 0,
        running: 0,
        decoding: 0,
        prefill_tokens: 0,
        context_tokens: 0,
        preemptions: 0,
        cached_tokens: 0,
        prompt_tokens: 0,
    };

    #[test]
    fn a_report_of_own_legs_alone_leaves_what_is_known_of_them() {
        // One computes its prompt, which such a report calls decoding; one decodes its 11th token.
        let load = RankLoad { running: 2, decoding: 2, context_tokens: 3300, blocks_free: 870, ..POOL };
        let estimate = estimate(load, &[queued(), decoding(10)]);
        let expected = RankLoad {
            waiting: 1,
            running: 1,
            decoding: 1,
            prefill_tokens: 1000,
            context_tokens: 1610,
            blocks_free: 1000 - 4 - 63, // 130 in use, 126 of them explained
            ..POOL
        };
        assert_eq!(estimate.now(Duration::ZERO), expected);
    }

    #[test]
    fn what_own_legs_do_not_explain_is_others() {
        let load = RankLoad {
            waiting: 4,
            running: 5,
            decoding: 5,
            prefill_tokens: 2000,
            context_tokens: 9600,
            blocks_free: 400,
            ..POOL
        };
        let estimate = estimate(load, &[queued(), decoding(0)]);
        let expected = RankLoad {
            waiting: 3 + 1,
            running: 4 + 1,
            decoding: 4 + 1,
            prefill_tokens: 1500 + 1000,
            context_tokens: 9600 - 3200 + 1600,
            blocks_free: 400 + 126 - 63,
            ..POOL
        };
        assert_eq!(estimate.now(Duration::ZERO), expected);
    }

    #[test]
    fn between_reports_legs_move_and_others_stay() {
        let load = RankLoad { running: 3, decoding: 3, context_tokens: 4800, blocks_free: 800, ..POOL };
        let mut estimate = estimate(load, &[decoding(0)]);
        assert_eq!(
            (estimate.now(Duration::ZERO).running, estimate.now(Duration::ZERO).context_tokens),
            (3, 4800)
        );
        estimate.changed(decoding(0).on_rank(), OnRank::default());
        assert_eq!(
            (estimate.now(Duration::ZERO).running, estimate.now(Duration::ZERO).context_tokens),
            (2, 3200)
        );
        assert_eq!(estimate.now(Duration::ZERO).blocks_free, 863);
        estimate.changed(OnRank::default(), queued().on_rank());
        assert_eq!(
            (estimate.now(Duration::ZERO).waiting, estimate.now(Duration::ZERO).prefill_tokens),
            (1, 1000)
        );
    }

    #[test]
    fn the_queue_of_others_returns_to_its_mean() {
        let mut estimate = LoadEstimate::new(POOL);
        estimate.report(RankLoad { waiting: 10, prefill_tokens: 20_000, ..POOL }, [].iter());
        let waiting = |age: u64| estimate.now(Duration::from_millis(age)).waiting;
        assert_eq!(
            [waiting(0), waiting(200), waiting(5000)],
            [10, 6, 2],
            "the mean of it and of none before"
        );
        assert_eq!(estimate.now(Duration::from_secs(5)).prefill_tokens, 4000);
    }

    #[test]
    fn a_report_that_shows_less_than_is_known_takes_nothing_away() {
        let estimate = estimate(POOL, &[queued(), decoding(7)]);
        let now = estimate.now(Duration::ZERO);
        assert_eq!((now.waiting, now.running, now.prefill_tokens, now.context_tokens), (1, 1, 1000, 1607));
    }
}
