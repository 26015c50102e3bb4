use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;

fn group(window: u32, step: u32) -> KvGroup {
    KvGroup { window_blocks: NonZeroU32::new(window), step_blocks: NonZeroU32::new(step).expect("above 0") }
}

/// Group and tier, and which of 200 blocks are held there.
type Span = (usize, usize, Vec<bool>);

/// What is held, and where it is parted into runs.
fn held() -> impl Strategy<Value = (Vec<Span>, Vec<u8>)> {
    let long = prop_oneof![9 => Just(true), 1 => Just(false)];
    let span = (0usize..3, 0usize..TIERS, prop::collection::vec(long, 200));
    (prop::collection::vec(span, 0..5), prop::collection::vec(1u8..=64, 1..8))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Against the definition, one length after the other.
    #[test]
    fn the_longest_prefix_is_found(
        groups in prop::collection::vec((0u32..80, 1u32..9), 0..4),
        (held, runs) in held(),
    ) {
        let groups: Vec<KvGroup> = groups.into_iter().map(|(window, step)| group(window, step)).collect();
        let mut notes = Notes::default();
        let mut depth = 0;
        for &run in &runs {
            for (group, tier, blocks) in &held {
                let bit = |i: usize| u64::from(blocks.get(depth + i).is_some_and(|&held| held)) << i;
                let mask = (0..usize::from(run)).fold(0, |mask, i| mask | bit(i));
                if mask != 0 {
                    let tier = crate::segment::ALL_TIERS[*tier];
                    let plane = Plane::new(tier, *group as u8).expect("a group that there can be");
                    // Another rank's notes are between them.
                    notes.add(Holder { slot: 9, plane }, depth as u32, run, 1);
                    notes.add(Holder { slot: 3, plane }, depth as u32, run, mask);
                }
            }
            depth += usize::from(run);
        }
        let mut served = Served::default();
        served.begin(groups.iter().copied());
        if let Some(&rank) = notes.ranks.iter().find(|rank| rank.slot == 3) {
            served.go_through(notes.of(rank));
        }
        let all = if groups.is_empty() { vec![KvGroup::FULL] } else { groups };
        for farthest in 0..TIERS {
            let holds = |group: usize, block: usize| {
                held.iter().any(|(of, tier, blocks)| (*of, *tier <= farthest) == (group, true) && blocks.get(block) == Some(&true))
            };
            let serves = |len: usize| all.iter().enumerate().all(|(number, group)| {
                let first = group.window_blocks.map_or(0, |window| len.saturating_sub(window.get() as usize));
                len.is_multiple_of(group.step_blocks.get() as usize) && (first..len).all(|block| holds(number, block))
            });
            let longest = (1..=depth).rev().find(|&len| serves(len)).unwrap_or(0);
            prop_assert_eq!(served.longest[farthest] as usize, longest);
        }
    }
}
