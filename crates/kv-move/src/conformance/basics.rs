//! What arrives, and what is said about it.

use std::{sync::mpsc::sync_channel, thread};

use super::{Harness, PATIENCE, holds, is_clear, pairs, passed, pools, small, soon, straight, write};
use crate::{
    mover::{MoveError, Options, Outcome},
    plan::{CopyPlan, PlanError},
    region::Layout,
};

/// Every named block arrives where it should, and nothing else changes.
pub fn bytes_arrive(harness: &Harness) {
    let (source, destination) = pools(16, 4096);
    let blocks = [(3, 9), (4, 10), (15, 0), (7, 5), (7, 6), (2, 11)];
    let outcome = harness.end(harness.plan(&source, &destination, &blocks), soon());
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    for at in 0..16 {
        match blocks.iter().find(|(_, to)| *to == at) {
            Some((from, _)) => {
                assert!(
                    holds(&destination, at, *from, 100 + u64::from(*from)),
                    "block {from} is not at {at}"
                );
            }
            None => assert!(is_clear(&destination, at), "block {at} was touched"),
        }
    }
}

/// The report has the plan's blocks, bytes and pieces, and a time.
pub fn report_counts(harness: &Harness) {
    let (source, destination) = pools(16, 4096);
    let plan = harness.plan(&source, &destination, &[(3, 9), (4, 10), (5, 11), (15, 0)]);
    match harness.end(plan, soon()) {
        Outcome::Done(report) => {
            assert_eq!((report.blocks, report.bytes, report.pieces), (4, 4 * 4096, 2));
            assert!(report.seconds >= 0.0 && report.seconds < PATIENCE.as_secs_f64());
        }
        other => panic!("{other:?}"),
    }
}

/// No pairs: done, by the callback as ever.
pub fn an_empty_plan_is_done(harness: &Harness) {
    let (source, destination) = small();
    match harness.end(harness.plan(&source, &destination, &[]), soon()) {
        Outcome::Done(report) => assert_eq!((report.blocks, report.bytes, report.pieces), (0, 0, 0)),
        other => panic!("{other:?}"),
    }
}

/// 10,000 blocks, none next to another.
pub fn ten_thousand_blocks_arrive(harness: &Harness) {
    const BLOCKS: u32 = 10_000;
    let (source, destination) = pools(BLOCKS, 64);
    // 7,919 is prime to 10,000, so this is a permutation.
    let blocks: Vec<_> = (0..BLOCKS).map(|block| (block, block * 7919 % BLOCKS)).collect();
    match harness.end(harness.plan(&source, &destination, &blocks), soon()) {
        Outcome::Done(report) => assert_eq!((report.blocks, report.pieces), (BLOCKS, BLOCKS)),
        other => panic!("{other:?}"),
    }
    for (from, to) in blocks {
        assert!(holds(&destination, to, from, 100 + u64::from(from)), "block {from}");
    }
}

/// The plan refuses them, however the source is reached; so no mover meets one.
pub fn other_block_sizes_are_refused(harness: &Harness) {
    let (source, _) = pools(8, 192);
    let (_, destination) = pools(8, 128);
    let plan =
        CopyPlan::new((harness.reach)(&source), destination.clone(), pairs(&source, &destination, &[(0, 0)]));
    let expected = PlanError::BlockSize { source_bytes: 192, destination_bytes: 128 };
    assert_eq!(plan.expect_err("block sizes differ"), expected);
    assert_eq!((harness.reach)(&source).layout(), Layout { block_bytes: 192, blocks: 8 });
}

/// Done with good published checksums; failed if one is missing, is for other bytes, or went with its generation.
pub fn checksums_are_verified(harness: &Harness) {
    let (source, destination) = small();
    let verified = || Options::verified_until(soon().deadline);
    let end = |block| harness.end(harness.plan(&source, &destination, &[(0, 0), (block, 1)]), verified());
    source.publish_checksum(0);
    assert_eq!(end(1), Outcome::Failed(MoveError::ChecksumMissing { block: 1 }));
    source.publish_checksum(1);
    assert!(matches!(end(1), Outcome::Done(_)));
    source.publish_checksum(2);
    source.words(2, 1)[5].fetch_xor(1 << 40, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(end(2), Outcome::Failed(MoveError::ChecksumMismatch { block: 2 }));
    source.publish_checksum(3);
    write(&source, 3, 1000);
    assert_eq!(end(3), Outcome::Failed(MoveError::ChecksumMissing { block: 3 }));
}

/// Not even for tickets that end at once: the caller may hold locks that its callback takes.
pub fn the_caller_never_runs_the_callback(harness: &Harness) {
    let (source, destination) = small();
    for options in [soon(), passed()] {
        let (sender, receiver) = sync_channel(1);
        let done = Box::new(move |_outcome| {
            let _ = sender.send(thread::current().id());
        });
        let plan = harness.plan(&source, &destination, &straight(2));
        harness.mover.submit(plan, options, done).expect("a mover with room accepts a valid plan");
        let ran_on = receiver.recv_timeout(PATIENCE).expect("every ticket ends");
        assert_ne!(ran_on, thread::current().id(), "submit ran the callback");
    }
}
