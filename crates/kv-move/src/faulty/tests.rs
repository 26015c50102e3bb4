use std::sync::mpsc::{Receiver, sync_channel};

use super::*;
use crate::{
    conformance::{Harness, holds, is_clear, pairs, passed, small, soon, straight},
    shm::{SharedMemoryMover, SharedMemorySettings},
};

fn real(queue_tickets_max: usize) -> Arc<dyn Mover> {
    let settings = SharedMemorySettings { threads: 2, queue_tickets_max, ..SharedMemorySettings::default() };
    Arc::new(SharedMemoryMover::new(settings).unwrap())
}

fn faulty(fault: Fault) -> FaultyMover {
    FaultyMover::new(real(64), Arc::new(move |plan| (plan.blocks() > 0).then(|| fault.clone())))
}

mod without_faults {
    use super::*;
    fn harness() -> Harness {
        Harness::mapped(Arc::new(FaultyMover::new(real(64), Arc::new(|_plan| None))), 2)
    }
    crate::conformance_tests!(harness());
}

/// Every ticket takes the way of a held one.
mod through_an_open_gate {
    use super::*;
    fn harness() -> Harness {
        let gate = Gate::new();
        gate.release();
        let mover = FaultyMover::new(real(2000), Arc::new(move |_plan| Some(Fault::Hold(gate.clone()))));
        Harness::mapped(Arc::new(mover), 2)
    }
    crate::conformance_tests!(harness());
}

/// Submits blocks 0 to 7 straight, and gives the ticket, its ending and the destination.
fn submit(mover: &FaultyMover, options: Options) -> (Ticket, Receiver<Outcome>, Region) {
    let (source, destination) = small();
    let pairs = pairs(&source, &destination, &straight(8));
    let plan = CopyPlan::new(source, destination.clone(), pairs).unwrap();
    let (sender, ending) = sync_channel(1);
    let ticket = mover.submit(plan, options, Box::new(move |outcome| sender.send(outcome).unwrap())).unwrap();
    (ticket, ending, destination)
}

/// Which source block each destination block holds; `None` if it was not written.
fn contents(destination: &Region) -> Vec<Option<u32>> {
    let held = |at: u32| (0..8).find(|block| holds(destination, at, *block, 100 + u64::from(*block)));
    (0..8)
        .map(|at| if is_clear(destination, at) { None } else { Some(held(at).unwrap_or(u32::MAX)) })
        .collect()
}

#[test]
fn failures_and_time_outs_copy_nothing() {
    for (fault, expected) in [
        (Fault::Fail(MoveError::PeerGone), Outcome::Failed(MoveError::PeerGone)),
        (Fault::TimeOut, Outcome::TimedOut),
    ] {
        let mover = faulty(fault);
        let (_ticket, ending, destination) = submit(&mover, soon());
        assert_eq!(ending.recv(), Ok(expected));
        assert_eq!(contents(&destination), [None; 8]);
    }
}

#[test]
fn silent_faults_are_called_done() {
    let whole: Vec<_> = (0..8).map(Some).collect();
    let (mut zeroed, mut swapped) = (whole.clone(), whole);
    zeroed[5] = Some(u32::MAX);
    swapped.swap(2, 6);
    for (fault, expected) in [(Fault::ZeroBlock(5), zeroed), (Fault::SwapBlocks(2, 6), swapped)] {
        let mover = faulty(fault);
        let (_ticket, ending, destination) = submit(&mover, soon());
        assert!(matches!(ending.recv(), Ok(Outcome::Done(_))));
        assert_eq!(contents(&destination), expected);
    }
}

#[test]
#[should_panic(expected = "names pair 8 of a plan of 8 pairs")]
fn a_fault_that_would_damage_nothing_is_refused() {
    submit(&faulty(Fault::ZeroBlock(8)), soon());
}

#[test]
fn a_held_ticket_is_copied_only_after_its_release() {
    let gate = Gate::new();
    let mover = faulty(Fault::Hold(gate.clone()));
    let (_ticket, ending, destination) = submit(&mover, soon());
    gate.wait_for_arrivals(1);
    // A ticket that nothing holds passes the held one by.
    let (source, other) = small();
    let empty = CopyPlan::new(source, other, Vec::new()).unwrap();
    assert!(matches!(crate::block_on_move(&mover, empty, soon()), Ok(Outcome::Done(_))));
    assert!(ending.try_recv().is_err());
    assert_eq!(contents(&destination), [None; 8]);
    gate.release();
    assert!(matches!(ending.recv(), Ok(Outcome::Done(_))));
    assert_eq!(contents(&destination), (0..8).map(Some).collect::<Vec<_>>());
}

#[test]
fn a_held_ticket_can_be_cancelled_times_out_and_ends_with_its_mover() {
    let gate = Gate::new();
    let mover = faulty(Fault::Hold(gate.clone()));
    let (ticket, ending, _) = submit(&mover, soon());
    ticket.cancel();
    assert_eq!(ending.recv(), Ok(Outcome::Cancelled));
    let (_ticket, ending, _) = submit(&mover, passed());
    assert_eq!(ending.recv(), Ok(Outcome::TimedOut));
    let (_ticket, ending, destination) = submit(&mover, soon());
    drop(mover);
    assert_eq!(ending.recv(), Ok(Outcome::Cancelled));
    gate.release();
    assert_eq!(contents(&destination), [None; 8]);
}

#[test]
fn a_plan_that_the_inner_mover_refuses_after_its_release_fails() {
    let gate = Gate::new();
    let mover = FaultyMover::new(real(0), {
        let gate = gate.clone();
        Arc::new(move |_plan| Some(Fault::Hold(gate.clone())))
    });
    let (_ticket, ending, _) = submit(&mover, soon());
    gate.release();
    let cause = SubmitError::QueueFull { queue_tickets_max: 0 };
    assert_eq!(ending.recv(), Ok(Outcome::Failed(MoveError::Refused(cause))));
}
