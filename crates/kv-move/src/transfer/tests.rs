//! A transfer's four steps, with an owner that acts between any two of them. Memory and time are driven by one thread,
//! so each case repeats exactly; the same with real threads is in `conformance::races`.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{
    conformance::{clear, holds, is_clear, pairs, pools, write},
    lease::LeaseTable,
};

const BLOCKS: u32 = 6;
const BLOCK_BYTES: u64 = 64;

/// Runs a transfer with `pause` called after each step, four times a slice (and once before the first).
fn run(transfer: &mut Transfer<'_>, mut pause: impl FnMut()) -> Result<(), MoveError> {
    pause();
    while let Some(slice) = transfer.next_slice() {
        transfer.copy_slice_pausing(slice, &mut pause)?;
        pause();
    }
    Ok(())
}

/// What the source's owner does in breach of the lease.
#[derive(Debug, Clone)]
enum Breach {
    Nothing,
    /// New generation, new bytes.
    Rewrite(u32),
    /// New generation, half of the bytes so far.
    BeginRewrite(u32),
    /// Another byte under the old generation: a bug, or broken memory. Only a checksum can tell.
    Damage(u32),
    /// New generation, new bytes, new checksum.
    RewriteAndPublish(u32),
}

impl Breach {
    fn commit(&self, region: &Region) {
        match *self {
            Breach::Nothing => {}
            Breach::Rewrite(block) => write(region, block, region.generation(block) + 1),
            Breach::RewriteAndPublish(block) => {
                write(region, block, region.generation(block) + 1);
                region.publish_checksum(block);
            }
            Breach::BeginRewrite(block) => {
                region.set_generation(block, region.generation(block) + 1);
                let words = region.words(block, 1);
                words[..4].iter().for_each(|word| word.store(1, Relaxed));
            }
            Breach::Damage(block) => {
                region.words(block, 1)[3].fetch_xor(1 << 17, Relaxed);
            }
        }
    }
}

fn breaches(damage: bool) -> impl Strategy<Value = Vec<Breach>> {
    let one = prop_oneof![
        12 => Just(Breach::Nothing),
        2 => (0..BLOCKS).prop_map(Breach::Rewrite),
        2 => (0..BLOCKS).prop_map(Breach::BeginRewrite),
        2 => (0..BLOCKS).prop_map(Breach::RewriteAndPublish),
        2 => (0..BLOCKS).prop_map(move |block| if damage { Breach::Damage(block) } else { Breach::Nothing }),
    ];
    prop::collection::vec(one, 0..30)
}

/// Some source blocks, each to another destination block.
fn blocks() -> impl Strategy<Value = Vec<(u32, u32)>> {
    (prop::collection::vec(0..BLOCKS, 6), Just((0..BLOCKS).collect::<Vec<_>>()).prop_shuffle(), 0..=6usize)
        .prop_map(|(sources, destinations, count)| {
            sources.into_iter().zip(destinations).take(count).collect()
        })
}

fn check_breaches(
    blocks: &[(u32, u32)],
    breaches: Vec<Breach>,
    checksum: Checksum,
    slice_bytes_max: u64,
) -> Result<(), TestCaseError> {
    let (source, destination) = pools(BLOCKS, BLOCK_BYTES);
    (0..BLOCKS).for_each(|block| source.publish_checksum(block));
    let plan =
        CopyPlan::new(source.clone(), destination.clone(), pairs(&source, &destination, blocks)).unwrap();
    let untouched = breaches.iter().all(|breach| matches!(breach, Breach::Nothing));
    let mut breaches = breaches.into_iter();
    let result = run(&mut Transfer::new(&plan, &source, checksum, slice_bytes_max), || {
        if let Some(breach) = breaches.next() {
            breach.commit(&source);
        }
    });
    prop_assert!(result.is_ok() || !untouched, "failed without a cause: {:?}", result);
    if result.is_ok() {
        for pair in plan.pairs() {
            let promised = pair.source;
            prop_assert!(
                holds(&destination, pair.destination.block, promised.block, promised.generation),
                "done, but {:?} is not what was promised",
                pair
            );
        }
    }
    for block in 0..BLOCKS {
        let named = blocks.iter().any(|(_, to)| *to == block);
        prop_assert!(named || is_clear(&destination, block), "block {} was touched", block);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn done_means_the_promised_generation(
        blocks in blocks(), breaches in breaches(false), slice_bytes_max in 0..300u64,
    ) {
        check_breaches(&blocks, breaches, Checksum::Skip, slice_bytes_max)?;
    }

    #[test]
    fn with_checksums_done_means_the_promised_bytes_whatever_the_owner_does(
        blocks in blocks(), breaches in breaches(true), slice_bytes_max in 0..300u64,
    ) {
        check_breaches(&blocks, breaches, Checksum::Published, slice_bytes_max)?;
    }

    /// An owner that rewrites each block the moment its lease is over, and a reader whose deadline is the lease's end:
    /// before that end nothing is ever stale; after it, whatever was under way ends without wrong bytes.
    #[test]
    fn a_live_lease_keeps_blocks_and_an_ended_one_cannot_harm(
        blocks in blocks(), waits in prop::collection::vec(0..4u64, 40), ttl in 0..60u64, renewed_by in 0..20u64,
    ) {
        let (source, destination) = pools(BLOCKS, BLOCK_BYTES);
        let plan =
            CopyPlan::new(source.clone(), destination.clone(), pairs(&source, &destination, &blocks)).unwrap();
        let mut leases = LeaseTable::new(1);
        let millis = Duration::from_millis;
        let lease = leases.grant(1, millis(0), millis(ttl)).unwrap();
        let renewal = leases.renew(lease, millis(0), millis(ttl + renewed_by));
        prop_assert_eq!(renewal.is_ok(), ttl > 0, "a lease of no length is over at once");
        let deadline = leases.end(lease).unwrap();

        let (mut now, mut waits) = (millis(0), waits.into_iter());
        let mut transfer = Transfer::new(&plan, &source, Checksum::Skip, BLOCK_BYTES);
        let mut pass = |leases: &mut LeaseTable| {
            now += millis(waits.next().unwrap_or(1));
            for _the_lease in leases.expired(now) {
                (0..BLOCKS).for_each(|block| write(&source, block, source.generation(block) + 1));
            }
            now
        };
        let mut at = pass(&mut leases);
        let result = loop {
            if at >= deadline {
                break None; // timed out between two slices, as `shm` would
            }
            let Some(slice) = transfer.next_slice() else { break Some(Ok(())) };
            let result = transfer.copy_slice_pausing(slice, || at = pass(&mut leases));
            if result.is_err() {
                break Some(result);
            }
        };
        match result {
            Some(Err(error)) => {
                let stale = matches!(error, MoveError::Stale { .. });
                prop_assert!(stale && !leases.is_live(lease, at), "{:?} at {:?} under a live lease", error, at);
            }
            Some(Ok(())) => for pair in plan.pairs() {
                let promised = pair.source;
                prop_assert!(holds(&destination, pair.destination.block, promised.block, promised.generation));
            },
            None => prop_assert!(!leases.is_live(lease, at)),
        }
    }

    /// The destination's owner breaks quarantine: it gives blocks away while the transfer is under way. The transfer
    /// fails, unless it had finished with the block; and a block that was given away before its turn is not written.
    #[test]
    fn a_broken_quarantine_is_an_error_and_spares_blocks_not_yet_begun(
        blocks in blocks(), given_away in prop::collection::vec((0..30usize, 0..BLOCKS), 0..4),
    ) {
        let (source, destination) = pools(BLOCKS, BLOCK_BYTES);
        let plan =
            CopyPlan::new(source.clone(), destination.clone(), pairs(&source, &destination, &blocks)).unwrap();
        let mut step = 0;
        let mut away = Vec::new();
        // One block a slice, five pauses: pause 4 * i is the one before the i-th slice's first check.
        let result = run(&mut Transfer::new(&plan, &source, Checksum::Skip, BLOCK_BYTES), || {
            for (_, block) in given_away.iter().filter(|(at, _)| *at == step) {
                let generation = destination.generation(*block) + 1;
                write(&destination, *block, generation);
                away.push((step, *block, generation));
            }
            step += 1;
        });
        let mut turns: Vec<u32> = blocks.iter().map(|(_, to)| *to).collect();
        turns.sort_unstable();
        let turn = |block: u32| turns.iter().position(|to| *to == block).map(|turn| 4 * turn);
        let expect_failure = away.iter().any(|(at, block, _)| turn(*block).is_some_and(|turn| *at < turn + 4));
        prop_assert_eq!(result.is_err(), expect_failure, "{:?} of {:?}", away, turns);
        if let Err(error) = result {
            let reallocated = matches!(error, MoveError::DestinationReallocated { .. });
            prop_assert!(reallocated, "{:?}", error);
        }
        for (at, block, _) in &away {
            let latest = destination.generation(*block);
            let spared = turn(*block).is_none_or(|turn| *at <= turn || *at > turn + 1);
            prop_assert!(!spared || holds(&destination, *block, *block, latest), "block {} was overwritten", block);
        }
    }
}

#[test]
fn slices_are_whole_blocks_within_the_bound_and_cover_the_plan() {
    fn check(what: &str, slice_bytes_max: u64, blocks: &[(u32, u32)], expected: &[usize]) {
        let (source, destination) = pools(BLOCKS, BLOCK_BYTES);
        let plan =
            CopyPlan::new(source.clone(), destination.clone(), pairs(&source, &destination, blocks)).unwrap();
        let mut transfer = Transfer::new(&plan, &source, Checksum::Skip, slice_bytes_max);
        let mut slices = Vec::new();
        while let Some(slice) = transfer.next_slice() {
            slices.push(slice.pairs.len());
        }
        assert_eq!(slices, expected, "{what}");
    }
    let run = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)];
    check("nothing", 128, &[], &[]);
    check("a run in twos", 128, &run, &[2, 2, 1]);
    check("a bound below one block", 1, &run, &[1; 5]);
    check("a bound above all", u64::MAX, &run, &[5]);
    check("never over a piece's end", 256, &[(0, 0), (1, 1), (4, 2)], &[2, 1]);
}

#[test]
fn words_are_copied_at_every_length() {
    for length in 0..40 {
        let source: Vec<AtomicU64> = (1..=length).map(AtomicU64::new).collect();
        let destination: Vec<AtomicU64> = (0..length).map(|_| AtomicU64::new(0)).collect();
        copy_words(&source, &destination);
        assert!((1..=length).zip(&destination).all(|(value, word)| word.load(Relaxed) == value), "{length}");
    }
}

#[test]
fn a_cleared_block_is_seen_as_cleared() {
    let (source, _) = pools(1, BLOCK_BYTES);
    assert!(!is_clear(&source, 0) && holds(&source, 0, 0, 100) && !holds(&source, 0, 0, 101));
    clear(&source, 0);
    assert!(is_clear(&source, 0) && !holds(&source, 0, 0, 100));
}
