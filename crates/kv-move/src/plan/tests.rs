use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn region(blocks: u32, block_bytes: u64) -> Region {
    Region::create("kv-test", Layout { block_bytes, blocks }).unwrap()
}

fn pairs(blocks: &[(u32, u32)]) -> Vec<BlockPair> {
    let reference = |block| BlockRef { block, generation: 0 };
    blocks.iter().map(|(s, d)| BlockPair { source: reference(*s), destination: reference(*d) }).collect()
}

#[test]
fn neighbours_on_both_sides_become_one_piece() {
    fn check(what: &str, blocks: &[(u32, u32)], expected: &[(u32, u32, u32)]) {
        let plan = CopyPlan::new(region(8, 8), region(8, 8), pairs(blocks)).unwrap();
        let pieces: Vec<_> = plan.pieces().iter().map(|p| (p.source, p.destination, p.blocks)).collect();
        assert_eq!(pieces, expected, "{what}");
        assert_eq!((plan.blocks() as usize, plan.bytes()), (blocks.len(), 8 * blocks.len() as u64));
    }
    //     what                              (source, destination)            (source, destination, blocks)
    check("nothing", &[], &[]);
    check("one run", &[(2, 4), (3, 5), (4, 6)], &[(2, 4, 3)]);
    check("one run, given backwards", &[(4, 6), (3, 5), (2, 4)], &[(2, 4, 3)]);
    check("neighbours only in the source", &[(2, 4), (3, 6)], &[(2, 4, 1), (3, 6, 1)]);
    check("neighbours only in the target", &[(2, 4), (5, 5)], &[(2, 4, 1), (5, 5, 1)]);
    check("crossed", &[(2, 5), (3, 4)], &[(3, 4, 1), (2, 5, 1)]);
    check("one source block to two places", &[(2, 0), (2, 1)], &[(2, 0, 1), (2, 1, 1)]);
    check("two runs", &[(0, 6), (1, 7), (6, 0), (7, 1)], &[(6, 0, 2), (0, 6, 2)]);
}

#[test]
fn plans_that_cannot_be_are_refused() {
    fn check(what: &str, source: &Region, destination: &Region, blocks: &[(u32, u32)], expected: PlanError) {
        let plan = CopyPlan::new(source.clone(), destination.clone(), pairs(blocks));
        assert_eq!(plan.expect_err(what), expected, "{what}");
    }
    let (eight, four, wide) = (region(8, 8), region(4, 8), region(8, 16));
    let opened = Region::open(four.fd().try_clone_to_owned().unwrap()).unwrap();
    check(
        "block sizes",
        &eight,
        &wide,
        &[(0, 0)],
        PlanError::BlockSize { source_bytes: 8, destination_bytes: 16 },
    );
    check("source index", &four, &eight, &[(4, 0)], PlanError::SourceRange { block: 4, blocks: 4 });
    check("destination index", &eight, &four, &[(0, 4)], PlanError::DestinationRange { block: 4, blocks: 4 });
    check("twice", &eight, &four, &[(0, 1), (1, 0), (2, 1)], PlanError::DestinationTwice { block: 1 });
    check("read and written", &four, &four, &[(0, 1), (1, 2)], PlanError::Overlap { block: 1 });
    check("opened for reading", &eight, &opened, &[], PlanError::ReadOnly);
    assert!(CopyPlan::new(four.clone(), four, pairs(&[(0, 1), (2, 3)])).is_ok(), "within one pool");
    assert!(CopyPlan::new(opened, eight, pairs(&[(3, 7)])).is_ok(), "from a smaller pool");
}

proptest! {
    /// Copying by pieces gives what copying pair by pair gives, with no two pieces that could be one.
    #[test]
    fn pieces_copy_what_pairs_copy(
        sources in prop::collection::vec(0..24u32, 24),
        order in Just((0..24u32).collect::<Vec<_>>()).prop_shuffle(),
        runs in any::<bool>(),
        count in 0..=24usize,
    ) {
        let blocks: Vec<(u32, u32)> = order.into_iter().take(count)
            .map(|d| (if runs { (sources[d as usize / 6] / 2 + d) % 24 } else { sources[d as usize] }, d))
            .collect();
        let plan = CopyPlan::new(region(24, 8), region(24, 8), pairs(&blocks)).unwrap();
        let mut naive = [u32::MAX; 24];
        for (source, destination) in &blocks {
            naive[*destination as usize] = *source;
        }
        let mut merged = [u32::MAX; 24];
        let mut starts = BTreeSet::new();
        for piece in plan.pieces() {
            prop_assert!(starts.insert((piece.source, piece.destination)));
            for (at, pair) in (0..piece.blocks).zip(plan.piece_pairs(*piece)) {
                prop_assert_eq!(pair.source.block, piece.source + at);
                prop_assert_eq!(pair.destination.block, piece.destination + at);
                merged[pair.destination.block as usize] = pair.source.block;
            }
        }
        prop_assert_eq!(merged, naive);
        for piece in plan.pieces() {
            let next = (piece.source + piece.blocks, piece.destination + piece.blocks);
            prop_assert!(!starts.contains(&next), "{:?} could have been longer", piece);
        }
    }
}
