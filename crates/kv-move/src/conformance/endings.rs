//! The ways to end that need no race.

use super::{Harness, clear, holds, is_clear, pairs, passed, pools, small, soon, straight, write};
use crate::{
    mover::{MoveError, Outcome},
    plan::CopyPlan,
};

/// A block that was rewritten before the transfer began.
pub fn a_stale_block_fails(harness: &Harness) {
    let (source, destination) = small();
    let plan = harness.plan(&source, &destination, &straight(8));
    write(&source, 5, 200);
    let expected = MoveError::Stale { block: 5, expected: 105, found: 200 };
    assert_eq!(harness.end(plan, soon()), Outcome::Failed(expected));
}

/// A destination block that was given away before the transfer began keeps its new owner's bytes.
pub fn a_reallocated_destination_is_not_written(harness: &Harness) {
    let (source, destination) = small();
    let plan = harness.plan(&source, &destination, &[(1, 5)]);
    write(&destination, 5, 8);
    let expected = MoveError::DestinationReallocated { block: 5, expected: 7, found: 8 };
    assert_eq!(harness.end(plan, soon()), Outcome::Failed(expected));
    assert!(holds(&destination, 5, 5, 8), "the new owner's block was overwritten");
}

/// Too late from the start: timed out, destination untouched.
pub fn a_passed_deadline_copies_nothing(harness: &Harness) {
    let (source, destination) = small();
    let outcome = harness.end(harness.plan(&source, &destination, &straight(8)), passed());
    assert_eq!(outcome, Outcome::TimedOut);
    assert!((0..8).all(|block| is_clear(&destination, block)));
}

/// A deadline that passes while the ticket waits for a busy mover.
pub fn a_waiting_ticket_times_out(harness: &Harness) {
    let (source, destination) = small();
    let busy = harness.occupy();
    let (_ticket, ending) = harness.submit(harness.plan(&source, &destination, &straight(8)), passed());
    drop(busy);
    assert_eq!(ending.wait(), Outcome::TimedOut);
    assert!((0..8).all(|block| is_clear(&destination, block)));
}

/// Cancelled before a thread took it: nothing is copied, and the tickets beside it are not disturbed.
pub fn a_waiting_ticket_is_cancelled(harness: &Harness) {
    let (source, destination) = pools(24, 192);
    let busy = harness.occupy();
    let submit = |range: std::ops::Range<u32>| {
        let blocks: Vec<_> = range.map(|block| (block, block)).collect();
        harness.submit(harness.plan(&source, &destination, &blocks), soon())
    };
    let (_first, before) = submit(0..8);
    let (ticket, ending) = submit(8..16);
    let (_last, after) = submit(16..24);
    ticket.cancel();
    ticket.cancel();
    drop(busy);
    assert_eq!(ending.wait(), Outcome::Cancelled);
    assert!(matches!((before.wait(), after.wait()), (Outcome::Done(_), Outcome::Done(_))));
    for block in 0..24 {
        let copied = holds(&destination, block, block, 100 + u64::from(block));
        assert_eq!(copied, !(8..16).contains(&block), "block {block}");
        assert!(copied || is_clear(&destination, block), "block {block} was touched");
    }
}

/// The outcome stays, and the mover works on.
pub fn cancelling_after_the_end_changes_nothing(harness: &Harness) {
    let (source, destination) = small();
    let (ticket, ending) = harness.submit(harness.plan(&source, &destination, &straight(8)), soon());
    assert!(matches!(ending.wait(), Outcome::Done(_)));
    ticket.cancel();
    assert!((0..8).all(|block| holds(&destination, block, block, 100 + u64::from(block))));
    let outcome = harness.end(harness.plan(&source, &destination, &straight(8)), soon());
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
}

/// Forgetting a ticket is not cancelling it.
pub fn a_dropped_ticket_goes_on(harness: &Harness) {
    let (source, destination) = small();
    let busy = harness.occupy();
    let (ticket, ending) = harness.submit(harness.plan(&source, &destination, &straight(8)), soon());
    drop(ticket);
    drop(busy);
    assert!(matches!(ending.wait(), Outcome::Done(_)));
}

/// Every thread survives its caller's bug.
pub fn a_panicking_callback_stops_nothing(harness: &Harness) {
    let (source, destination) = small();
    for _ in 0..2 * harness.threads {
        let plan =
            CopyPlan::new((harness.reach)(&source), destination.clone(), pairs(&source, &destination, &[]))
                .expect("an empty plan is valid");
        let done = Box::new(|_outcome| panic!("a callback's own bug, made by the conformance suite"));
        harness.mover.submit(plan, soon(), done).expect("a mover with room accepts an empty plan");
    }
    harness.flush();
    clear(&destination, 0);
    let outcome = harness.end(harness.plan(&source, &destination, &[(3, 0)]), soon());
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert!(holds(&destination, 0, 3, 103));
}
