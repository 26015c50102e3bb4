//! What ranks held when, as far as the callers of an index can know: to tell whether an answer can be right.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
};

use forebay_types::{BlockHash, RankId};

/// From when to when a rank held a block. Between the two beginnings, and between the two ends, it may be either.
#[derive(Debug, Clone, Copy)]
struct Span {
    may_from: u64,
    must_from: u64,
    must_to: u64,
    may_to: u64,
}

const NEVER: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Events {
    now: u64,
    spans: BTreeMap<(RankId, u64), Vec<Span>>,
}

/// Outside the index, and no part of what the scheduler interleaves.
#[derive(Debug, Default)]
pub(super) struct History(Mutex<Events>);

impl History {
    fn at_next_tick(&self) -> (MutexGuard<'_, Events>, u64) {
        let mut events = self.0.lock().expect("no test fails while it holds this");
        events.now += 1;
        let now = events.now;
        (events, now)
    }

    /// Some moment.
    pub(super) fn now(&self) -> u64 {
        self.at_next_tick().1
    }

    /// Around a change by which `rank` comes to hold `hashes`.
    pub(super) fn storing(&self, rank: RankId, hashes: &[u64], change: impl FnOnce()) {
        let (mut events, now) = self.at_next_tick();
        for &hash in hashes {
            let spans = events.spans.entry((rank, hash)).or_default();
            if spans.last().is_none_or(|span| span.may_to != NEVER) {
                spans.push(Span { may_from: now, must_from: NEVER, must_to: NEVER, may_to: NEVER });
            }
        }
        drop(events);
        change();
        let (mut events, now) = self.at_next_tick();
        for &hash in hashes {
            let span = events.spans.get_mut(&(rank, hash)).and_then(|spans| spans.last_mut()).expect("above");
            span.must_from = span.must_from.min(now);
        }
    }

    /// Around a change by which `rank` ceases to hold `hashes`.
    pub(super) fn removing(&self, rank: RankId, hashes: &[u64], change: impl FnOnce()) {
        let (mut events, now) = self.at_next_tick();
        let open = |events: &mut Events, close: &dyn Fn(&mut Span)| {
            for &hash in hashes {
                let last = events.spans.get_mut(&(rank, hash)).and_then(|spans| spans.last_mut());
                last.filter(|span| span.may_to == NEVER).into_iter().for_each(close);
            }
        };
        open(&mut events, &|span| span.must_to = now);
        drop(events);
        change();
        let (mut events, now) = self.at_next_tick();
        open(&mut events, &|span| span.may_to = now);
    }

    /// Everything that `rank` holds.
    pub(super) fn held(&self, rank: RankId) -> Vec<u64> {
        let (events, _) = self.at_next_tick();
        let of_rank = events.spans.iter().filter(|((of, _), _)| *of == rank);
        of_rank
            .filter(|(_, spans)| spans.iter().any(|span| span.may_to == NEVER))
            .map(|(key, _)| key.1)
            .collect()
    }

    /// An answer of a look-up between two moments: each rank's depth lies between what it held all the time and what
    /// it held block by block at some time.
    pub(super) fn check(&self, chain: &[BlockHash], answer: &[(RankId, u32)], from: u64, to: u64) {
        let (events, _) = self.at_next_tick();
        let leading = |rank: RankId, in_time: &dyn Fn(&Span) -> bool| {
            let held = |hash: &&BlockHash| {
                events.spans.get(&(rank, hash.0)).is_some_and(|spans| spans.iter().any(in_time))
            };
            chain.iter().take_while(held).count() as u32
        };
        let listed: BTreeMap<RankId, u32> = answer.iter().copied().collect();
        assert_eq!(listed.len(), answer.len(), "a rank is listed once: {answer:?}");
        for rank in events.spans.keys().map(|(rank, _)| *rank).collect::<BTreeSet<_>>() {
            let most = leading(rank, &|span| span.may_from <= to && from <= span.may_to);
            let least = leading(rank, &|span| span.must_from <= from && to <= span.must_to);
            let depth = listed.get(&rank).copied().unwrap_or(0);
            assert!(
                (least..=most).contains(&depth),
                "{depth} of {chain:?} for {rank:?}, which held {least} to {most} of it between {from} and {to}: \
                 {events:?}"
            );
        }
        let known = |(rank, _): &(RankId, u32)| events.spans.keys().any(|(of, _)| of == rank);
        assert!(answer.iter().all(known), "{answer:?} names a rank that never held anything");
    }
}
