//! Words by number, for numbers that grow: runs, each twice as long as the one before, so that no word ever moves.

use std::sync::OnceLock;

use crate::{reclaim::block_bytes, sync::AtomicU64};

/// Words in the first run.
const FIRST: usize = 64;

/// Up to 64 x (2^`RUNS` - 1) words.
#[derive(Debug)]
pub(crate) struct Runs<const RUNS: usize>([OnceLock<Box<[AtomicU64]>>; RUNS]);

impl<const RUNS: usize> Default for Runs<RUNS> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl<const RUNS: usize> Runs<RUNS> {
    /// Words there can be.
    pub(crate) const WORDS_MAX: usize = FIRST * ((1 << RUNS) - 1);

    /// The word, if its run is there.
    #[inline]
    pub(crate) fn get(&self, number: usize) -> Option<&AtomicU64> {
        let (run, place) = run_of(number);
        self.0.get(run)?.get()?.get(place)
    }

    /// The word; its run is made if it is not there. Adds the bytes of a new run to `bytes`.
    ///
    /// # Panics
    /// If `number` is not below `WORDS_MAX`.
    pub(crate) fn get_or_make(&self, number: usize, bytes: &mut usize) -> &AtomicU64 {
        let (run, place) = run_of(number);
        let words = self.0[run].get_or_init(|| {
            *bytes += block_bytes(FIRST << run);
            (0..FIRST << run).map(|_| AtomicU64::new(0)).collect()
        });
        &words[place]
    }
}

fn run_of(number: usize) -> (usize, usize) {
    let place = number + FIRST;
    let run = (place.ilog2() - FIRST.ilog2()) as usize;
    (run, place - (FIRST << run))
}
