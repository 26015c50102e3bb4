//! The rank under streams that no engine in its right mind sends: repeated, reordered, torn, and under hashes that mean now
//! this and now that. Whatever it makes of them, its words are consistent, and nothing stays behind.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![3 => Just(Tier::Device), 1 => Just(Tier::Host)]
}

/// Few hashes and few tokens: they meet in every way.
fn event() -> impl Strategy<Value = EngineEvent> {
    let hashes = || prop::collection::vec(0..12_u64, 1..9);
    let stored =
        (hashes(), prop::option::of(0..12_u64), any::<u64>(), 1..3_u32, 0..2_u32, tier(), any::<bool>());
    let stored = stored.prop_map(|(hashes, parent, tokens, halves, group, tier, is_named_only)| {
        let size = 2 * halves;
        let stored = stored_as(size, parent, &hashes);
        let tokens = (0..stored.tokens.len()).map(|place| (tokens >> (place / 2 % 64) & 1) as u32);
        let tokens = if is_named_only && tier != Tier::Device { vec![] } else { tokens.collect() };
        let kind = (group > 0).then_some(GroupKind::FullAttention);
        EngineEvent::Stored(Stored { tokens, tier, kind, group: Some(group), ..stored })
    });
    let removed = (hashes(), 0..2_u32, tier())
        .prop_map(|(hashes, group, tier)| Removed { tier, group: Some(group), ..removed(&hashes) }.into());
    prop_oneof![10 => stored, 6 => removed, 1 => Just(EngineEvent::Cleared)]
}

type Index = BTreeSet<(u8, Tier, BlockHash)>;

/// Follows events as an index does, strictly.
fn follow(index: &mut Index, events: &[KvEvent]) {
    for event in events {
        match event {
            KvEvent::Stored { hashes, tier, group, .. } => {
                hashes
                    .iter()
                    .for_each(|&hash| assert!(index.insert((*group, *tier, hash)), "stored though held"));
            }
            KvEvent::Removed { hashes, tier, group } => {
                let mut all = hashes.iter();
                assert!(all.all(|&hash| index.remove(&(*group, *tier, hash))), "removed though not held");
            }
            KvEvent::Cleared => index.clear(),
            KvEvent::Groups(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_it_hears_its_words_are_consistent(
        events in prop::collection::vec(event(), 1..60),
        blocks_max in prop::sample::select(vec![5, 1000]),
    ) {
        let mut cache = cache_of(4, None, blocks_max);
        let mut index = Index::new();
        for event in events {
            follow(&mut index, &cache.says(event).events);
            let mut snapshot = Index::new();
            follow(&mut snapshot, &cache.snapshot());
            prop_assert_eq!(&snapshot, &index);
            let stats = cache.stats();
            let first_group = index.iter().filter(|(group, ..)| *group == 0).count() as u64;
            prop_assert_eq!(stats.blocks_device + stats.blocks_host, first_group);
            prop_assert!(stats.engine_blocks + stats.engine_blocks_other_groups <= blocks_max as u64);
            let mut distinct: Vec<_> = index.iter().map(|&(group, _, hash)| (group, hash)).collect();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(cache.groups.iter().map(|group| group.counts.anywhere).sum::<u64>(), distinct.len() as u64);
        }
        // Each hash is stored some times at most.
        let all: Vec<u64> = (0..12).collect();
        for (group, tier) in [(0, Tier::Device), (0, Tier::Host), (1, Tier::Device), (1, Tier::Host)] {
            for _ in 0..60 * 9 {
                let event = Removed { tier, group: Some(group), ..removed(&all) };
                follow(&mut index, &cache.says(event).events);
            }
        }
        prop_assert!(index.is_empty(), "{:?}", index);
        let stats = cache.stats();
        prop_assert_eq!((stats.engine_blocks, stats.engine_blocks_other_groups), (0, 0));
        prop_assert_eq!((cache.held.runs.len(), cache.held.has_more()), (0, false));
    }
}
