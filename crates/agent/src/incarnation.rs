//! Numbers for the lives of an engine.
//!
//! In: the time and some random bits. Out: an [`Incarnation`] above every earlier one of the same engine. Start at
//! [`Minter::next`].
//!
//! The time makes a number larger than those of earlier agents whose state is lost; the random bits keep two hosts that
//! were given one engine name by mistake from meeting in one number.

use forebay_types::Incarnation;

/// Low bits that are random.
const RANDOM_BITS: u32 = 20;

/// Mints incarnations of one engine.
#[derive(Debug, Clone, Default)]
pub struct Minter {
    last: u64,
}

impl Minter {
    /// Goes on after `last`, the highest number that is known to have been used; 0 for none.
    pub fn after(last: Incarnation) -> Self {
        Self { last: last.0 }
    }

    /// The next number: `unix_ms` and twenty of the `random` bits, or one above the last if the clock stood or went back.
    /// Never 0.
    pub fn next(&mut self, unix_ms: u64, random: u64) -> Incarnation {
        let drawn = (unix_ms << RANDOM_BITS) | (random & ((1 << RANDOM_BITS) - 1));
        self.last = drawn.max(self.last.saturating_add(1));
        Incarnation(self.last)
    }

    /// The highest number so far; 0 for none.
    pub fn last(&self) -> Incarnation {
        Incarnation(self.last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_hold_time_and_chance() {
        let mut minter = Minter::default();
        assert_eq!(
            minter.next(1_700_000_000_000, u64::MAX),
            Incarnation((1_700_000_000_000 << 20) | 0xF_FFFF)
        );
        assert_eq!(minter.next(1_700_000_000_001, 5), Incarnation((1_700_000_000_001 << 20) | 5));
    }

    proptest! {
        #[test]
        fn numbers_rise_whatever_the_clock_does(draws in proptest::collection::vec((0u64..1 << 43, any::<u64>()), 1..50), last in 0u64..1 << 62) {
            let mut minter = Minter::after(Incarnation(last));
            let mut before = last;
            for (unix_ms, random) in draws {
                let next = minter.next(unix_ms, random).0;
                prop_assert!(next > before, "{next} after {before}");
                before = next;
            }
        }
    }
}
