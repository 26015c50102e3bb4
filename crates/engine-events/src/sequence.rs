//! Which batch comes next: numbers of batches in, what to do with each out. Start at [`Sequence::observe`].
//!
//! An engine numbers its batches from 0 without gaps, publishes each once, keeps the last ones for replay, and begins at 0
//! again when it restarts. Replay and publication run beside each other, so a number that was seen before has two
//! readings: the batch came by replay already, or the engine restarted. They are told apart like this:
//! - A publisher's numbers only rise. A *published* number not above the last published one is a restart.
//! - Any other number below the expected one was taken from a replay, if its batch is as old as the batches taken. One
//!   that was published later than all of them comes from a new life of the engine: a restart.
//!
//! What no number shows is an engine that restarts and has published more batches than before when it is first heard
//! again. The connection broke then: call [`Sequence::reset`] (or start anew) when it did and ask for a replay from 0.

/// How a batch came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The engine published it.
    Published,
    /// We asked for it.
    Replay,
}

/// What to do with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "only a batch in order may be applied"]
pub enum Observed {
    /// Apply it.
    InOrder,
    /// Drop it: it was applied.
    Duplicate,
    /// Drop it and ask for a replay from `from`, which brings this batch too. If this batch came by replay, or there is no
    /// replay, those before it are lost: forget what is known of the rank (with [`History::Lost`](crate::History::Lost)),
    /// [`skip_to`](Sequence::skip_to) this batch's number and observe it again.
    Gap {
        /// The first number that is missing.
        from: u64,
    },
    /// The engine restarted: forget what is known of the rank, then observe this batch again. The tracker is as new.
    Restarted,
}

/// The position in one rank's stream of batches.
#[derive(Debug, Clone)]
pub struct Sequence {
    next: u64,
    /// Number and time of the last published batch.
    published: Option<(u64, f64)>,
    /// The newest time of the batches taken.
    newest_seconds: f64,
}

impl Default for Sequence {
    fn default() -> Self {
        Self::new()
    }
}

impl Sequence {
    /// Before an engine's first batch, number 0.
    pub fn new() -> Self {
        Self { next: 0, published: None, newest_seconds: f64::NEG_INFINITY }
    }

    /// The number that is expected next, and so where a replay should begin.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the number and time (see [`EventBatch::time_seconds`](crate::EventBatch::time_seconds)) of the batch that
    /// came. Published batches must be observed in the order in which they came.
    pub fn observe(&mut self, number: u64, time_seconds: f64, via: Via) -> Observed {
        if via == Via::Published {
            if let Some((last, last_seconds)) = self.published
                && (number < last || number == last && time_seconds != last_seconds)
            {
                self.reset();
                return Observed::Restarted;
            }
            self.published = Some((number, time_seconds));
        }
        if number < self.next {
            if time_seconds > self.newest_seconds {
                self.reset();
                return Observed::Restarted;
            }
            return Observed::Duplicate;
        }
        if number > self.next {
            return Observed::Gap { from: self.next };
        }
        self.next = number.saturating_add(1);
        self.newest_seconds = self.newest_seconds.max(time_seconds);
        Observed::InOrder
    }

    /// Gives up what is missing before `number`, which becomes the one expected next.
    pub fn skip_to(&mut self, number: u64) {
        self.next = number;
    }

    /// Forgets everything: the engine restarted.
    pub fn reset(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Observed::{Duplicate, Gap, InOrder, Restarted};
    use Via::{Published, Replay};

    /// Numbers, times and ways of batches, and what is said of each.
    fn check(what: &str, steps: &[(u64, f64, Via, Observed)]) -> Sequence {
        let mut sequence = Sequence::new();
        for (step, &(number, time, via, expected)) in steps.iter().enumerate() {
            assert_eq!(sequence.observe(number, time, via), expected, "{what}, step {step}");
        }
        sequence
    }

    #[test]
    fn batches_are_told_apart() {
        check("from the start", &[(0, 1.0, Published, InOrder), (1, 2.0, Published, InOrder)]);
        check(
            "a gap is healed by replay, and what was published meanwhile came with it",
            &[
                (0, 1.0, Published, InOrder),
                (3, 4.0, Published, Gap { from: 1 }),
                (1, 2.0, Replay, InOrder),
                (2, 3.0, Replay, InOrder),
                (3, 4.0, Replay, InOrder),
                (4, 5.0, Replay, InOrder),
                (4, 5.0, Published, Duplicate),
                (5, 6.0, Published, InOrder),
            ],
        );
        check(
            "who comes late asks for all, and a second replay changes nothing",
            &[
                (7, 8.0, Published, Gap { from: 0 }),
                (0, 1.0, Replay, InOrder),
                (0, 1.0, Replay, Duplicate),
                (2, 3.0, Replay, Gap { from: 1 }),
            ],
        );
        check(
            "the same published frame may be looked at twice",
            &[(5, 6.0, Published, Gap { from: 0 }), (5, 6.0, Published, Gap { from: 0 })],
        );
    }

    #[test]
    fn a_restart_is_seen_in_every_place() {
        let restarted = check(
            "published numbers go back",
            &[(0, 1.0, Published, InOrder), (1, 2.0, Published, InOrder), (0, 9.0, Published, Restarted)],
        );
        assert_eq!(restarted.next(), 0);
        check(
            "the restarted engine's first batches are missed",
            &[
                (0, 1.0, Published, InOrder),
                (9, 2.0, Published, Gap { from: 1 }),
                (4, 9.0, Published, Restarted),
                (4, 9.0, Published, Gap { from: 0 }),
                (0, 8.0, Replay, InOrder),
            ],
        );
        check(
            "it reaches the same number beyond a gap",
            &[
                (0, 1.0, Published, InOrder),
                (9, 2.0, Published, Gap { from: 1 }),
                (9, 9.0, Published, Restarted),
                (9, 9.0, Published, Gap { from: 0 }),
            ],
        );
        check(
            "it reaches the same number",
            &[(0, 1.0, Published, InOrder), (0, 9.0, Published, Restarted), (0, 9.0, Published, InOrder)],
        );
        check(
            "its numbers lie between the last published one and the end of a replay",
            &[
                (0, 1.0, Published, InOrder),
                (1, 2.0, Replay, InOrder),
                (2, 3.0, Replay, InOrder),
                (3, 4.0, Replay, InOrder),
                (2, 9.0, Published, Restarted),
            ],
        );
        check(
            "nothing was published before",
            &[(0, 1.0, Replay, InOrder), (1, 2.0, Replay, InOrder), (0, 9.0, Published, Restarted)],
        );
        check(
            "a replay comes from the new life",
            &[(0, 1.0, Published, InOrder), (1, 2.0, Published, InOrder), (0, 9.0, Replay, Restarted)],
        );
    }

    #[test]
    fn a_loss_is_accepted_by_skipping() {
        let mut sequence = check("no replay", &[(5, 6.0, Published, Gap { from: 0 })]);
        sequence.skip_to(5);
        assert_eq!(sequence.observe(5, 6.0, Published), InOrder);
        assert_eq!(sequence.observe(6, 7.0, Published), InOrder);
        assert_eq!(sequence.next(), 7);
    }

    #[test]
    fn times_that_are_no_numbers_do_no_harm() {
        check(
            "not a number",
            &[
                (0, f64::NAN, Published, InOrder),
                (1, f64::NAN, Published, InOrder),
                (1, f64::NAN, Replay, Duplicate),
                (0, f64::NAN, Published, Restarted),
            ],
        );
        let last = check("the last number of all", &[(u64::MAX, 1.0, Replay, Gap { from: 0 })]);
        assert_eq!(last.next(), 0);
    }
}
