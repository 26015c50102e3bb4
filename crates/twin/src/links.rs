//! Hand-overs that run at the same time share the links of the ranks between which they run.
//!
//! In: hand-overs, and what each would take at either end if it had that end's link to itself. Out: when each is over, and whose
//! end changes when another begins or ends. Start at [`Links::begin`].
//!
//! A rank has a link out and a link in, as NVLink and InfiniBand have both directions at once; ranks of a group have GPUs, and so
//! links, of their own. Each link is split equally among the hand-overs that move over it, and a hand-over goes on at the pace of
//! the slower of its two ends. What it leaves unused at the other end nobody gets: that is what streams of a window each do
//! which begin together, it is never too hopeful, and a change reaches only hand-overs with an end in common. Max-min fairness
//! would reach all that are connected.
//!
//! Invariants: whole nanoseconds, so the same arguments give the same ends; a hand-over that never shared a link takes what it
//! takes alone; one that did never takes less than that, and a change rounds its end up by less than a nanosecond.

use std::collections::HashMap;

use forebay_types::{LegId, RankId};

use crate::clock::Time;

/// A hand-over, as it would be with both links to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub from: RankId,
    pub to: RankId,
    /// Before anything moves: it has no part of a link until then.
    pub start: Time,
    /// How long the link out of `from` has to do with it.
    pub at_source: Time,
    /// How long the link into `to` has to do with it.
    pub at_target: Time,
}

/// One end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Out(RankId),
    In(RankId),
}

/// A hand-over that goes on.
#[derive(Debug, Clone, Copy)]
struct Moving {
    transfer: Transfer,
    /// What all of its moving takes at the pace of now; `None`: it has not begun to move.
    whole: Option<u64>,
    ends: Time,
}

/// All hand-overs of a run that go on.
#[derive(Debug, Default)]
pub(crate) struct Links {
    all: HashMap<LegId, Moving>,
    /// Those that move, in the order in which they began to.
    busy: HashMap<Side, Vec<LegId>>,
    /// Hand-overs whose end has changed since somebody took them from here, and when each is over now.
    pub(crate) changed: Vec<(LegId, RankId, Time)>,
}

impl Transfer {
    /// How long it takes with both links to itself.
    pub(crate) fn alone(&self) -> Time {
        self.start + self.at_source.max(self.at_target)
    }

    fn sides(&self) -> [Side; 2] {
        [Side::Out(self.from), Side::In(self.to)]
    }
}

impl Links {
    /// A hand-over begins; when it is over if it stays alone. To be told of [`Links::moves`] once its `start` is over.
    pub(crate) fn begin(&mut self, leg: LegId, transfer: Transfer, now: Time) -> Time {
        let ends = now + transfer.alone();
        let before = self.all.insert(leg, Moving { transfer, whole: None, ends });
        debug_assert!(before.is_none(), "a leg takes in one hand-over");
        ends
    }

    /// It begins to move, if it still goes on.
    pub(crate) fn moves(&mut self, leg: LegId, now: Time) {
        let Some(Moving { transfer, whole: None, .. }) = self.all.get(&leg).copied() else { return };
        for side in transfer.sides() {
            self.busy.entry(side).or_default().push(leg);
        }
        self.share(transfer, now);
    }

    /// When it is over as things stand; `None`: it does not go on.
    pub(crate) fn ends(&self, leg: LegId) -> Option<Time> {
        self.all.get(&leg).map(|moving| moving.ends)
    }

    /// It is over, or broken off; others get its part of the links from `now` on.
    pub(crate) fn over(&mut self, leg: LegId, now: Time) {
        if let Some(transfer) = self.take(leg) {
            self.share(transfer, now);
        }
    }

    /// Whether nothing goes on.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.busy.is_empty()
    }

    fn take(&mut self, leg: LegId) -> Option<Transfer> {
        let Moving { transfer, whole, .. } = self.all.remove(&leg)?;
        whole?;
        for side in transfer.sides() {
            let Some(legs) = self.busy.get_mut(&side) else { continue };
            legs.retain(|other| *other != leg);
            if legs.is_empty() {
                self.busy.remove(&side);
            }
        }
        Some(transfer)
    }

    /// Everyone with an end in common with `transfer`, which has just come or gone, goes on at the pace that there is now.
    fn share(&mut self, transfer: Transfer, now: Time) {
        let on = |side| self.busy.get(&side).map_or(0, Vec::len) as u64;
        for side in transfer.sides() {
            for leg in self.busy.get(&side).into_iter().flatten() {
                let Some(moving) = self.all.get_mut(leg) else { continue };
                let Transfer { from, to, at_source, at_target, .. } = moving.transfer;
                let whole = at_source
                    .0
                    .saturating_mul(on(Side::Out(from)))
                    .max(at_target.0.saturating_mul(on(Side::In(to))));
                let before = moving.whole.replace(whole);
                let left = match before {
                    Some(before) => scaled(moving.ends.since(now).0, whole, before),
                    None => whole,
                };
                let ends = now + Time(left);
                if ends != moving.ends {
                    moving.ends = ends;
                    self.changed.push((*leg, to, ends));
                }
            }
        }
    }
}

/// `left × whole / before`, rounded up; what has no length is over.
fn scaled(left: u64, whole: u64, before: u64) -> u64 {
    if whole == before || before == 0 {
        return left;
    }
    (u128::from(left) * u128::from(whole)).div_ceil(u128::from(before)) as u64
}

#[cfg(test)]
mod tests {
    use forebay_types::Incarnation;
    use proptest::prelude::*;

    use super::*;

    fn rank(number: u64) -> RankId {
        RankId { incarnation: Incarnation(number), dp_rank: 0 }
    }

    /// Runs hand-overs that begin at these times to their ends, in whole nanoseconds.
    fn run(transfers: &[(u64, Transfer)]) -> Vec<u64> {
        let mut links = Links::default();
        let mut over = vec![0; transfers.len()];
        let mut to_begin: Vec<usize> = (0..transfers.len()).collect();
        let mut to_move: Vec<(u64, usize)> = Vec::new();
        loop {
            let first = |times: &mut dyn Iterator<Item = (u64, usize)>| times.min();
            let begins = first(&mut to_begin.iter().map(|&number| (transfers[number].0, number)));
            let moves = first(&mut to_move.iter().copied());
            let ends = |links: &Links, number| links.ends(LegId(number as u64)).map(|ends| (ends.0, number));
            let ends = first(&mut (0..transfers.len()).filter_map(|number| ends(&links, number)));
            let at = [begins, moves, ends].into_iter().flatten().map(|(at, _)| at).min();
            let Some(at) = at else { break };
            if let Some((_, number)) = begins.filter(|(begins, _)| *begins == at) {
                to_begin.retain(|other| *other != number);
                let transfer = transfers[number].1;
                links.begin(LegId(number as u64), transfer, Time(at));
                to_move.push((at + transfer.start.0, number));
            } else if let Some((_, number)) = moves.filter(|(moves, _)| *moves == at) {
                to_move.retain(|other| other.1 != number);
                links.moves(LegId(number as u64), Time(at));
            } else if let Some((_, number)) = ends {
                links.over(LegId(number as u64), Time(at));
                over[number] = at;
            }
        }
        assert!(links.is_empty());
        over
    }

    fn transfer(from: u64, to: u64, start: u64, whole: u64) -> Transfer {
        let whole = Time(whole);
        Transfer { from: rank(from), to: rank(to), start: Time(start), at_source: whole, at_target: whole }
    }

    #[test]
    fn links_are_split_among_what_moves_over_them() {
        let check = |name: &str, transfers: &[(u64, Transfer)], expected: &[u64]| {
            assert_eq!(run(transfers), expected, "{name}");
        };
        check("alone", &[(5, transfer(1, 2, 10, 100))], &[115]);
        check("two into one rank", &[(0, transfer(1, 3, 0, 100)), (0, transfer(2, 3, 0, 100))], &[200, 200]);
        check(
            "two out of one rank",
            &[(0, transfer(1, 2, 0, 100)), (0, transfer(1, 3, 0, 100))],
            &[200, 200],
        );
        check("there and back", &[(0, transfer(1, 2, 0, 100)), (0, transfer(2, 1, 0, 100))], &[100, 100]);
        check("strangers", &[(0, transfer(1, 2, 0, 100)), (0, transfer(3, 4, 0, 100))], &[100, 100]);
        check(
            "one starts meanwhile",
            &[(0, transfer(1, 3, 0, 100)), (0, transfer(2, 3, 100, 100))],
            &[100, 200],
        );
        // Half is done; the other half and the short one share; then it goes on alone.
        check("a short one", &[(0, transfer(1, 3, 0, 100)), (50, transfer(2, 3, 0, 20))], &[120, 90]);
        check("between the same two", &[(0, transfer(1, 2, 0, 100)), (0, transfer(1, 2, 0, 30))], &[130, 60]);
        check("nothing to move", &[(0, transfer(1, 2, 7, 0)), (7, transfer(1, 2, 0, 10))], &[7, 17]);
        // The link out of rank 1 is busy with one of them for 100, and carries both at once into faster ones.
        let slow_source = Transfer { at_target: Time(10), ..transfer(1, 2, 0, 100) };
        let other = Transfer { at_target: Time(10), ..transfer(3, 2, 0, 100) };
        check("fast ends wait for slow ones", &[(0, slow_source), (0, other)], &[100, 100]);
    }

    #[test]
    fn one_that_is_broken_off_gives_its_part_back() {
        let mut links = Links::default();
        for (leg, from) in [(1, 1), (2, 2)] {
            links.begin(LegId(leg), transfer(from, 3, 0, 100), Time(0));
            links.moves(LegId(leg), Time(0));
        }
        links.changed.clear();
        links.over(LegId(1), Time(100));
        assert_eq!(links.changed, [(LegId(2), rank(3), Time(150))], "half was done at half the pace");
        assert_eq!((links.ends(LegId(1)), links.ends(LegId(2))), (None, Some(Time(150))));
        links.over(LegId(2), Time(150));
        links.moves(LegId(2), Time(160));
        assert!(links.is_empty(), "what is over does not move again");
    }

    proptest! {
        /// Nobody is done sooner than alone; all are once their one link has done all their work, and never much later.
        #[test]
        fn one_link_is_never_idle_and_does_nothing_twice(
            works in prop::collection::vec((0_u64..50, 1_u64..1_000_000), 1..8),
        ) {
            let transfers: Vec<_> = works.iter().enumerate()
                .map(|(number, &(at, whole))| (at, transfer(10 + number as u64, 1, 0, whole))).collect();
            let over = run(&transfers);
            for (&over, (at, transfer)) in over.iter().zip(&transfers) {
                prop_assert!(over >= at + transfer.alone().0);
            }
            // The fluid bound: from the last beginning of a busy period on, the link does nothing but this work.
            let mut order = works.clone();
            order.sort_unstable();
            let done = order.iter().fold(0, |done: u64, (at, whole)| done.max(*at) + whole);
            let last = over.into_iter().max().unwrap_or(0);
            prop_assert!(last >= done && last <= done + 2 * works.len() as u64 * works.len() as u64, "{last} {done}");
        }
    }
}
