use std::sync::mpsc::{Receiver, sync_channel};

use super::*;
use crate::{
    conformance::{Harness, pairs, passed, pools, small, soon, straight},
    region::Layout,
};

fn mover(threads: usize, queue_tickets_max: usize, slice_bytes_max: u64) -> SharedMemoryMover {
    SharedMemoryMover::new(SharedMemorySettings { threads, queue_tickets_max, slice_bytes_max }).unwrap()
}

fn harness(threads: usize, slice_bytes_max: u64) -> Harness {
    Harness::mapped(Arc::new(mover(threads, 64, slice_bytes_max)), threads)
}

mod one_thread {
    crate::conformance_tests!(super::harness(1, 1 << 20));
}

mod three_threads_one_block_a_slice {
    crate::conformance_tests!(super::harness(3, 1));
}

fn plan(blocks: u32, block_bytes: u64) -> CopyPlan {
    let (source, destination) = pools(blocks, block_bytes);
    let pairs = pairs(&source, &destination, &straight(blocks));
    CopyPlan::new(source, destination, pairs).unwrap()
}

fn outcome() -> (Callback, Receiver<Outcome>) {
    let (sender, receiver) = sync_channel(1);
    (Box::new(move |outcome| sender.send(outcome).unwrap()), receiver)
}

/// Holds the mover's (only) thread in a callback until the sender goes.
fn occupy(mover: &SharedMemoryMover) -> std::sync::mpsc::SyncSender<()> {
    let (release, held) = sync_channel::<()>(0);
    let (began, begun) = sync_channel(1);
    let done = Box::new(move |_outcome| {
        began.send(()).unwrap();
        let _ = held.recv();
    });
    mover.submit(plan(1, 64), soon(), done).unwrap();
    begun.recv().unwrap();
    release
}

#[test]
fn the_queue_is_bounded_and_counted() {
    let mover = mover(1, 2, 1 << 20);
    let busy = occupy(&mover);
    let endings: Vec<_> = (0..2)
        .map(|_| {
            let (done, ending) = outcome();
            mover.submit(plan(2, 64), soon(), done).unwrap();
            ending
        })
        .collect();
    let (done, refused) = outcome();
    let error = mover.submit(plan(2, 64), soon(), done).unwrap_err();
    assert_eq!(error, SubmitError::QueueFull { queue_tickets_max: 2 });
    assert!(refused.recv().is_err(), "a refused plan's callback is dropped unused");
    assert_eq!(mover.stats().queued, 2);
    drop(busy);
    assert!(endings.iter().all(|ending| matches!(ending.recv(), Ok(Outcome::Done(_)))));
    let expected =
        MoverStats { done: 3, refused: 1, blocks: 5, bytes: 320, pieces: 3, ..MoverStats::default() };
    assert_eq!(mover.stats(), expected);
}

#[test]
fn a_pool_that_is_not_mapped_is_unreachable() {
    let (source, destination) = small();
    let (key, layout) = (source.key(), Layout { block_bytes: 192, blocks: 8 });
    let plan = CopyPlan::new(Source::Remote { key, layout }, destination, Vec::new()).unwrap();
    let (done, _ending) = outcome();
    let error = mover(1, 2, 1 << 20).submit(plan, soon(), done).unwrap_err();
    assert_eq!(error, SubmitError::Unreachable { key });
}

#[test]
fn dropping_the_mover_cancels_what_waits_and_lets_go_of_the_regions() {
    let mover = mover(1, 8, 1 << 20);
    let busy = occupy(&mover);
    let endings: Vec<_> = (0..3)
        .map(|_| {
            let (done, ending) = outcome();
            mover.submit(plan(2, 64), soon(), done).unwrap();
            ending
        })
        .collect();
    thread::scope(|scope| {
        scope.spawn(move || drop(mover));
        // They end while the only thread is still in its callback.
        assert!(endings.iter().all(|ending| ending.recv() == Ok(Outcome::Cancelled)));
        drop(busy);
    });
}

#[test]
fn closing_ends_a_running_copy_and_refuses_the_next() {
    let mover = mover(1, 8, 1);
    let (done, ending) = outcome();
    mover.submit(plan(4096, 4096), soon(), done).unwrap();
    mover.close();
    let outcome_then = ending.try_recv().expect("ended before close returned");
    assert!(matches!(outcome_then, Outcome::Cancelled | Outcome::Done(_)), "{outcome_then:?}");
    let (done, _ending) = outcome();
    assert_eq!(mover.submit(plan(1, 64), soon(), done).unwrap_err(), SubmitError::Closed);
    mover.close();
}

#[test]
fn a_callback_may_hold_the_last_reference_to_its_mover() {
    let mover = Arc::new(mover(2, 8, 1 << 20));
    let (let_go, go) = sync_channel::<()>(0);
    let (sender, ended) = sync_channel(1);
    let last = Arc::clone(&mover);
    let done = Box::new(move |_outcome| {
        let _ = go.recv();
        assert_eq!(Arc::strong_count(&last), 1);
        drop(last);
        sender.send(()).unwrap();
    });
    mover.submit(plan(1, 64), soon(), done).unwrap();
    drop(mover);
    drop(let_go);
    ended.recv().expect("dropped on its own thread without waiting for itself");
}

/// Without the sweep between slices, tickets behind a long one would end only after it.
#[test]
fn tickets_behind_a_long_copy_end_before_it_does() {
    let mover = mover(1, 8, 1);
    let (sender, order) = sync_channel(8);
    let submit = |plan, options| {
        let sender = sender.clone();
        mover.submit(plan, options, Box::new(move |outcome| sender.send(outcome).unwrap())).unwrap()
    };
    let busy = occupy(&mover);
    submit(plan(16, 64), soon());
    submit(plan(1, 64), passed());
    submit(plan(1, 64), soon()).cancel();
    submit(plan(1, 64), soon());
    drop(busy);
    let outcomes: Vec<_> = order.iter().take(4).collect();
    assert_eq!(outcomes[..2], [Outcome::TimedOut, Outcome::Cancelled]);
    assert!(
        matches!(outcomes[2..], [Outcome::Done(long), Outcome::Done(short)] if long.blocks > short.blocks)
    );
}

#[test]
fn callbacks_that_panic_are_counted_once_and_keep_nothing_from_the_others() {
    let mover = mover(1, 8, 1 << 20);
    let busy = occupy(&mover);
    let submit = |options| {
        mover.submit(plan(1, 64), options, Box::new(|_outcome| panic!("a test's own panic"))).unwrap()
    };
    submit(soon());
    submit(passed());
    drop(busy);
    let (done, ending) = outcome();
    mover.submit(plan(1, 64), soon(), done).unwrap();
    assert!(matches!(ending.recv(), Ok(Outcome::Done(_))));
    let busy = occupy(&mover);
    submit(soon());
    let (done, ending) = outcome();
    mover.submit(plan(1, 64), soon(), done).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| mover.close());
        assert_eq!(ending.recv(), Ok(Outcome::Cancelled));
        drop(busy);
    });
    let MoverStats { queued, running, done, failed, timed_out, cancelled, .. } = mover.stats();
    assert_eq!((queued, running, done, failed, timed_out, cancelled), (0, 0, 4, 0, 1, 2));
}
