//! What must hold whoever is faster.

use std::{
    collections::VecDeque,
    hint::spin_loop,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use super::{
    EMPTY, Ending, Harness, PATIENCE, clear, holds, is_clear, pairs, passed, pools, small, soon, straight,
    write,
};
use crate::{
    mover::{MoveError, Options, Outcome, SubmitError},
    plan::CopyPlan,
    region::Region,
};

/// 16 MiB: some milliseconds of copying, long against the time that another thread needs to notice its beginning.
const BLOCKS: u32 = 256;
const BLOCK_BYTES: u64 = 64 << 10;
/// Single blocks far apart, in the copy's order from destination block 0 on: tens of milliseconds in little memory.
const SCATTERED: u32 = 100_000;

/// Numbers rounds from 0 until [`PATIENCE`] is over: if a race did not once go the wanted way by then, it cannot.
fn rounds() -> impl Iterator<Item = u64> {
    let began = Instant::now();
    (0..).take_while(move |_round| began.elapsed() < PATIENCE)
}

fn scattered() -> (Region, Region, Vec<(u32, u32)>) {
    let (source, destination) = pools(SCATTERED, 64);
    (source, destination, (0..SCATTERED).map(|block| (SCATTERED - 1 - block, block)).collect())
}

/// Waits until the first word arrives, or the end of the ticket.
fn watch_begin(destination: &Region, ending: &Ending) -> Option<Outcome> {
    let began = Instant::now();
    while destination.words(0, 1)[0].load(Relaxed) == EMPTY {
        assert!(began.elapsed() < PATIENCE, "the copy never began");
        if let Some(outcome) = ending.try_wait() {
            return Some(outcome);
        }
        // Not a yield: on a busy machine that gives away the moment that is waited for.
        spin_loop();
    }
    None
}

/// The owner rewrites the last block once the first has arrived. Done means that every block is the old one, whole;
/// else the ticket fails as stale, which must happen at least once.
pub fn a_block_rewritten_during_the_copy_is_never_done(harness: &Harness) {
    rewritten_during_the_copy(harness, BLOCKS, BLOCK_BYTES);
}

/// The same within one huge block, whose last bytes change while its first are copied: the generation was right when
/// the mover looked first, so only a second look can tell.
pub fn a_block_torn_during_its_own_copy_is_never_done(harness: &Harness) {
    rewritten_during_the_copy(harness, 1, u64::from(BLOCKS) * BLOCK_BYTES);
}

fn rewritten_during_the_copy(harness: &Harness, blocks: u32, block_bytes: u64) {
    let last = blocks - 1;
    let (source, destination) = pools(blocks, block_bytes);
    for round in rounds() {
        (0..blocks).for_each(|block| clear(&destination, block));
        let promised = source.generation(last);
        let plan = harness.plan(&source, &destination, &straight(blocks));
        let (_ticket, ending) = harness.submit(plan, soon());
        let early = watch_begin(&destination, &ending);
        source.set_generation(last, promised + 1);
        // The end of the block, where the copy has not been yet.
        let words = source.words(last, 1);
        words[words.len() - 64..].iter().for_each(|word| word.store(EMPTY, Relaxed));
        let outcome = early.unwrap_or_else(|| ending.wait());
        if matches!(outcome, Outcome::Done(_)) {
            for block in 0..blocks {
                let generation = if block == last { promised } else { 100 + u64::from(block) };
                assert!(
                    holds(&destination, block, block, generation),
                    "round {round}: block {block} is torn"
                );
            }
            write(&source, last, promised + 1);
        } else {
            let expected = MoveError::Stale { block: last, expected: promised, found: promised + 1 };
            assert_eq!(outcome, Outcome::Failed(expected));
            return;
        }
    }
    panic!("no copy was under way when its last block was rewritten, in {PATIENCE:?}");
}

/// Cancelled in the middle; as soon as the callback ran, the owner reuses the blocks, and no late write hits them.
pub fn nothing_is_written_after_the_callback(harness: &Harness) {
    let (source, destination, blocks) = scattered();
    for _round in rounds() {
        (0..SCATTERED).for_each(|block| clear(&destination, block));
        let (ticket, ending) = harness.submit(harness.plan(&source, &destination, &blocks), soon());
        let early = watch_begin(&destination, &ending);
        ticket.cancel();
        let outcome = early.unwrap_or_else(|| ending.wait());
        (0..SCATTERED).for_each(|block| clear(&destination, block));
        harness.flush();
        assert!((0..SCATTERED).all(|block| is_clear(&destination, block)), "written after {outcome:?}");
        match outcome {
            Outcome::Cancelled => return,
            Outcome::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }
    panic!("no copy was under way when it was cancelled, in {PATIENCE:?}");
}

/// Deadlines from too short on, later each round: timed out soon after it, in the middle of the copy at least once; or
/// done, with all bytes.
pub fn a_deadline_during_the_copy_is_kept(harness: &Harness) {
    let (source, destination, blocks) = scattered();
    for round in rounds() {
        clear(&destination, 0);
        let plan = harness.plan(&source, &destination, &blocks);
        let deadline = Instant::now() + Duration::from_micros(round % 100 * 100);
        match harness.end(plan, Options::until(deadline)) {
            Outcome::TimedOut => {
                assert!(deadline.elapsed() < PATIENCE, "ended {:?} late", deadline.elapsed());
                if !is_clear(&destination, 0) {
                    return;
                }
            }
            Outcome::Done(_) => {
                let arrived =
                    |(from, to): &(u32, u32)| holds(&destination, *to, *from, 100 + u64::from(*from));
                assert!(blocks.iter().all(arrived), "done without all bytes");
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("no deadline ended a copy that was under way, in {PATIENCE:?}");
}

/// A thousand tickets of all kinds, more than the queue takes, some cancelled, some late, some stale.
pub fn every_ticket_ends_once(harness: &Harness) {
    let (source, destination) = small();
    let mut open = VecDeque::new();
    let mut ended = [0; 4];
    let mut close = |(kind, ending): (usize, Ending)| {
        let outcome = ending.wait();
        let expected = match kind {
            0 => matches!(outcome, Outcome::Done(_)),
            1 => matches!(outcome, Outcome::Done(_) | Outcome::Cancelled),
            2 => matches!(outcome, Outcome::TimedOut),
            _ => matches!(outcome, Outcome::Failed(MoveError::Stale { block: 7, .. })),
        };
        assert!(expected, "kind {kind} ended as {outcome:?}");
        ended[kind] += 1;
    };
    for index in 0..1000 {
        let kind = index % 4;
        let options = if kind == 2 { passed() } else { soon() };
        loop {
            // Written by several tickets at once, which is why nobody looks at the bytes here.
            let plan = match kind {
                3 => stale_plan(harness, &source, &destination),
                _ => harness.plan(&source, &destination, &straight(8)),
            };
            match harness.try_submit(plan, options) {
                Ok((ticket, ending)) => {
                    if kind == 1 {
                        ticket.cancel();
                    }
                    open.push_back((kind, ending));
                    break;
                }
                Err(SubmitError::QueueFull { .. }) => {
                    close(open.pop_front().expect("a full queue has tickets"))
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    open.into_iter().for_each(&mut close);
    assert_eq!(ended, [250; 4]);
}

/// A plan that means an earlier content of block 7.
fn stale_plan(harness: &Harness, source: &Region, destination: &Region) -> CopyPlan {
    let mut pairs = pairs(source, destination, &straight(8));
    pairs[7].source.generation -= 1;
    CopyPlan::new((harness.reach)(source), destination.clone(), pairs).expect("valid but for its age")
}
