use std::num::NonZeroU32;

use forebay_types::{KvGroup, Tier};

use super::*;
use crate::TierBlocks;

mod forged;
mod model;

fn rank(incarnation: u64, dp_rank: u16) -> RankId {
    RankId { incarnation: Incarnation(incarnation), dp_rank }
}

fn stored(hashes: &[u64]) -> KvEvent {
    KvEvent::Stored { parent: None, hashes: blocks(hashes), tier: Tier::Device, group: 0 }
}

fn removed(hashes: &[u64]) -> KvEvent {
    KvEvent::Removed { hashes: blocks(hashes), tier: Tier::Device, group: 0 }
}

fn blocks(hashes: &[u64]) -> Vec<BlockHash> {
    hashes.iter().copied().map(BlockHash).collect()
}

fn batch(rank: RankId, sequence: u64, events: Vec<KvEvent>) -> KvEventBatch {
    KvEventBatch { rank, sequence, events }
}

fn overlaps(index: &KvIndex, chain: &[u64]) -> Vec<(RankId, u32)> {
    let mut out = Overlaps::default();
    out.extend([(rank(9, 9), 9)]);
    index.overlaps(&blocks(chain), &mut out);
    sorted(&out)
}

fn sorted(out: &Overlaps) -> Vec<(RankId, u32)> {
    let mut all = out.as_slice().to_vec();
    all.sort_unstable();
    all
}

fn tidy(index: &KvIndex) {
    while index.tidy() {}
}

const A: u64 = 1;
const B: u64 = 2;

#[test]
fn an_overlap_is_what_leads_and_is_held() {
    let index = KvIndex::new(IndexLimits::default());
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&[10, 11, 12])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(B, 0), 0, vec![stored(&[10, 21]), stored(&[12])])), Applied::Ok);
    //    chain                       overlaps
    for (chain, expected) in [
        (&[10, 11, 12, 13][..], vec![(rank(A, 0), 3), (rank(B, 0), 1)]),
        (&[10, 21, 22], vec![(rank(A, 0), 1), (rank(B, 0), 2)]),
        (&[99, 10], vec![]),
        (&[], vec![]),
    ] {
        assert_eq!(overlaps(&index, chain), expected, "{chain:?}");
    }
    let mut out = Overlaps::default();
    index.overlaps(&blocks(&[10]), &mut out);
    assert_eq!((out.get(rank(A, 0)), out.get(rank(A, 1))), (1, 0));
    assert_eq!(out.iter().count(), 2);
}

#[test]
fn a_hole_cuts_the_overlap() {
    let index = KvIndex::new(IndexLimits::default());
    let events = vec![stored(&[1, 2, 3, 4]), removed(&[3])];
    assert_eq!(index.apply(&batch(rank(A, 0), 0, events)), Applied::Ok);
    assert_eq!(overlaps(&index, &[1, 2, 3, 4]), [(rank(A, 0), 2)]);
    assert_eq!(index.apply(&batch(rank(A, 0), 1, vec![stored(&[3])])), Applied::Ok);
    assert_eq!(overlaps(&index, &[1, 2, 3, 4]), [(rank(A, 0), 4)]);
}

#[test]
fn tiers_count_up_to_where_a_block_must_be_fetched_from() {
    let index = KvIndex::new(IndexLimits::default());
    let on = |tier, hashes: &[u64]| KvEvent::Stored { parent: None, hashes: blocks(hashes), tier, group: 0 };
    let gone = KvEvent::Removed { hashes: blocks(&[1]), tier: Tier::Disk, group: 0 };
    let events = vec![on(Tier::Host, &[1, 2, 3]), stored(&[1]), on(Tier::Remote, &[4]), gone];
    assert_eq!(index.apply(&batch(rank(A, 0), 0, events)), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(B, 0), 0, vec![on(Tier::Host, &[1, 2])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(B, 1), 0, vec![stored(&[1, 2])])), Applied::Ok);
    let mut out = Overlaps::default();
    index.overlaps(&blocks(&[1, 2, 3, 4, 5]), &mut out);
    assert_eq!(sorted(&out), [(rank(A, 0), 1), (rank(B, 1), 2)], "only the device is an overlap");
    assert_eq!(out.tiers(rank(A, 0)), TierBlocks { device: 1, host: 3, disk: 3, remote: 4 });
    assert_eq!(out.tiers(rank(B, 0)), TierBlocks { device: 0, host: 2, disk: 2, remote: 2 });
    assert_eq!(out.tiers(rank(B, 1)), TierBlocks { device: 2, host: 2, disk: 2, remote: 2 });
    assert_eq!(out.iter_tiers().count(), 2);
}

#[test]
fn a_repeated_batch_changes_nothing() {
    let index = KvIndex::new(IndexLimits::default());
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&[1])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(A, 0), 1, vec![removed(&[1])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&[1])])), Applied::Duplicate);
    assert_eq!(overlaps(&index, &[1]), []);
    assert_eq!(index.stats().duplicates, 1);
}

#[test]
fn a_gap_voids_the_rank_until_a_snapshot() {
    let index = KvIndex::new(IndexLimits::default());
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&[1, 2])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(B, 0), 0, vec![stored(&[1])])), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(A, 0), 2, vec![stored(&[3])])), Applied::Gap { expected: 1 });
    assert_eq!(index.apply(&batch(rank(A, 0), 3, vec![stored(&[1])])), Applied::Gap { expected: 1 });
    assert_eq!(overlaps(&index, &[1, 2]), [(rank(B, 0), 1)]);
    assert_eq!(index.stale_ranks(), [rank(A, 0)]);
    assert_eq!(
        (index.stats().gaps, index.stats().ranks_stale),
        (1, 1),
        "one gap, however many batches follow it"
    );

    assert_eq!(index.reset(rank(A, 0), 4, [stored(&[2]), stored(&[1])]), Applied::Ok);
    assert_eq!(overlaps(&index, &[1, 2, 3]), [(rank(A, 0), 2), (rank(B, 0), 1)]);
    assert_eq!(index.apply(&batch(rank(A, 0), 3, vec![removed(&[1])])), Applied::Duplicate);
    assert_eq!(index.apply(&batch(rank(A, 0), 4, vec![stored(&[3])])), Applied::Ok);
    assert_eq!(overlaps(&index, &[1, 2, 3])[0], (rank(A, 0), 3));
    assert_eq!(index.rank(rank(A, 0)), Some(RankStats { sequence_next: 5, blocks: 3, stale: false }));
}

#[test]
fn a_late_batch_of_a_removed_rank_leaves_no_trace() {
    let index = KvIndex::new(IndexLimits::default());
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&[1])])), Applied::Ok);
    index.remove_incarnation(Incarnation(A));
    assert_eq!(index.apply(&batch(rank(A, 0), 1, vec![stored(&[1, 2])])), Applied::Gap { expected: 0 });
    assert_eq!((index.stats().ranks, index.stats().entries), (0, 0));
}

/// Numbers that look like hashes.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

#[test]
fn removing_a_rank_gives_its_memory_back() {
    let index = KvIndex::new(IndexLimits::default());
    let chain: Vec<u64> = (0..100_000).map(mix).collect();
    for slot in 0..100 {
        assert_eq!(index.apply(&batch(rank(A, slot), 0, vec![stored(&chain[..10])])), Applied::Ok);
    }
    let small = index.stats().bytes;
    assert_eq!(index.apply(&batch(rank(A, 99), 1, vec![stored(&chain)])), Applied::Ok);
    let stats = index.stats();
    assert_eq!(stats.blocks, 100_000);
    assert!((18..=28).contains(&(stats.bytes / stats.blocks)), "{stats:?}");
    index.remove_rank(rank(A, 99));
    assert_eq!(overlaps(&index, &chain).len(), 99, "at once");
    tidy(&index);
    assert_eq!((index.stats().blocks, index.stats().entries), (10, 990));
    // The links of 1,600 segments and what is left of a directory stay.
    assert!(index.stats().bytes <= small + 40_000, "{} of {small}", index.stats().bytes);
}

#[test]
fn beyond_its_budget_the_coldest_tails_go() {
    let index = KvIndex::new(IndexLimits { bytes_max: BYTES_MIN, ranks_max: 2 });
    let prompt: Vec<u64> = (0..64).map(mix).collect();
    let turns = |turn: u64| -> Vec<u64> {
        prompt.iter().copied().chain((0..100).map(|block| mix((turn + 1) << 20 | block))).collect()
    };
    assert_eq!(index.apply(&batch(rank(A, 1), 0, vec![stored(&prompt)])), Applied::Ok);
    for turn in 0..1000 {
        assert_eq!(index.apply(&batch(rank(A, 0), turn, vec![stored(&turns(turn))])), Applied::Ok);
        assert!(index.stats().bytes <= BYTES_MIN as u64, "{:?}", index.stats());
        // The first conversation is looked up again and again.
        assert_eq!(overlaps(&index, &turns(0))[0], (rank(A, 0), 164), "after {turn}");
    }
    let stats = index.stats();
    assert!(stats.evicted > 50_000 && stats.refused == 0, "{stats:?}");
    assert_eq!(stats.blocks + stats.evicted, 64 + 1000 * 100);
    assert_eq!(overlaps(&index, &turns(999)), [(rank(A, 0), 164), (rank(A, 1), 64)], "the newest is there");
    assert_eq!(overlaps(&index, &turns(1)), [(rank(A, 0), 64), (rank(A, 1), 64)], "what all use is, too");
    // An engine that removes what the index dropped does no harm.
    assert_eq!(index.apply(&batch(rank(A, 0), 1000, vec![removed(&turns(1)[64..])])), Applied::Ok);
    assert_eq!(index.stats().removals_unknown, 100);
    assert_eq!(index.apply(&batch(rank(A, 2), 0, vec![])), Applied::TooManyRanks);
    assert_eq!(index.reset(rank(A, 2), 0, []), Applied::TooManyRanks);
}

#[test]
fn a_chain_longer_than_the_budget_keeps_its_front() {
    let index = KvIndex::new(IndexLimits { bytes_max: BYTES_MIN, ranks_max: 2 });
    let chain: Vec<u64> = (0..100_000).map(mix).collect();
    assert_eq!(index.apply(&batch(rank(A, 0), 0, vec![stored(&chain)])), Applied::Ok);
    let stats = index.stats();
    assert_eq!(stats.blocks + stats.refused + stats.evicted, 100_000, "{stats:?}");
    assert!(stats.blocks > 5_000, "{stats:?}");
    assert_eq!(overlaps(&index, &chain), [(rank(A, 0), stats.blocks as u32)]);
}

#[test]
fn what_one_index_says_of_a_rank_another_takes() {
    let index = KvIndex::new(IndexLimits::default());
    let prompt: Vec<u64> = (0..100).map(mix).collect();
    let branch: Vec<u64> = prompt[..40].iter().copied().chain((1000..1100).map(mix)).collect();
    let in_group = |group, hashes: &[u64]| KvEvent::Stored {
        parent: None,
        hashes: blocks(hashes),
        tier: Tier::Host,
        group,
    };
    let groups = KvEvent::Groups(vec![KvGroup::FULL, window(3, 1)]);
    let events = vec![
        groups,
        stored(&prompt),
        stored(&branch),
        in_group(0, &branch[130..]),
        in_group(1, &prompt[90..]),
        removed(&[branch[139], prompt[50]]),
    ];
    assert_eq!(index.apply(&batch(rank(A, 0), 0, events)), Applied::Ok);
    assert_eq!(index.apply(&batch(rank(B, 0), 0, vec![stored(&prompt[..10])])), Applied::Ok);
    let all = index.contents(rank(A, 0)).expect("followed");
    assert_eq!(index.contents(rank(9, 9)), None);
    let other = KvIndex::new(IndexLimits::default());
    assert_eq!(other.reset(rank(A, 0), 1, all.clone()), Applied::Ok);
    let (mut one, mut two) = (Overlaps::default(), Overlaps::default());
    for chain in [&prompt, &branch] {
        index.overlaps(&blocks(chain), &mut one);
        other.overlaps(&blocks(chain), &mut two);
        assert_eq!(one.tiers(rank(A, 0)), two.tiers(rank(A, 0)));
    }
    assert_eq!(other.contents(rank(A, 0)), Some(all));
    // The chains lie together: the prompt's two segments and the branch's two.
    assert_eq!((other.stats().segments, other.stats().entries), (4, 198 + 10 + 10));
    // Not those of the rank's life before.
    assert_eq!(other.reset(rank(A, 0), 1, [stored(&prompt)]), Applied::Ok);
    assert_eq!(overlaps(&other, &prompt), [(rank(A, 0), 100)]);
}

fn window(blocks: u32, step: u32) -> KvGroup {
    let step_blocks = NonZeroU32::new(step).expect("above 0");
    KvGroup { window_blocks: NonZeroU32::new(blocks), step_blocks }
}

/// One line a rank: its groups, what it holds in each as spans of the chain 0..200, and what it can reuse of that.
#[test]
fn a_prefix_is_as_long_as_every_group_can_serve() {
    let chain: Vec<u64> = (0..200).map(mix).collect();
    let full = |step| KvGroup { window_blocks: None, ..window(0, step) };
    let state = |step| window(1, step);
    let all = (0, 200);
    type Spans<'a> = &'a [(usize, usize)];
    let rows: [(&[KvGroup], &[Spans<'_>], u32); 15] = [
        (&[KvGroup::FULL], &[&[(0, 100)]], 100),
        (&[full(16)], &[&[(0, 100)]], 96),
        // A window has what came before it dropped.
        (&[full(1), window(4, 1)], &[&[all], &[(100, 150)]], 150),
        (&[full(1), window(4, 1)], &[&[(0, 120)], &[(100, 150)]], 120),
        (&[full(1), window(4, 1)], &[&[(0, 102)], &[(100, 150)]], 0),
        (&[full(1), window(4, 1)], &[&[(0, 102)], &[(0, 90), (100, 150)]], 90),
        (&[full(1), window(4, 1)], &[&[(0, 3)], &[(0, 3)]], 3),
        (&[full(1), window(70, 1)], &[&[all], &[(40, 130)]], 130),
        (&[full(1), window(91, 1)], &[&[all], &[(40, 130)]], 0),
        // Where no group needs the beginning, nobody has to hold it.
        (&[window(4, 1)], &[&[(190, 195)]], 195),
        // States are at their blocks' ends.
        (&[full(1), state(32)], &[&[(0, 180)], &[(96, 128), (160, 192)]], 128),
        (&[state(32), full(16)], &[&[(96, 128)], &[(0, 127)]], 0),
        (&[full(16), state(33)], &[&[all], &[all]], 0),
        (&[full(3), state(33), window(2, 2)], &[&[all], &[all], &[(130, 133)]], 132),
        // A group that nothing was stored in serves nothing.
        (&[full(1), full(1)], &[&[all]], 0),
    ];
    let index = KvIndex::new(IndexLimits::default());
    for (number, (groups, held, _)) in (0..).zip(&rows) {
        let mut events = vec![KvEvent::Groups(groups.to_vec())];
        for (group, spans) in (0..).zip(*held) {
            for &(from, to) in *spans {
                let parent = from.checked_sub(1).map(|before| BlockHash(chain[before]));
                let hashes = blocks(&chain[from..to]);
                events.push(KvEvent::Stored { parent, hashes, tier: Tier::Device, group });
            }
        }
        // Alone, and beside the others.
        let alone = KvIndex::new(IndexLimits::default());
        for index in [&alone, &index] {
            assert_eq!(index.apply(&batch(rank(A, number), 0, events.clone())), Applied::Ok);
        }
        let mut out = Overlaps::default();
        alone.overlaps(&blocks(&chain), &mut out);
        assert_eq!(out.get(rank(A, number)), rows[usize::from(number)].2, "row {number}");
    }
    let mut out = Overlaps::default();
    index.overlaps(&blocks(&chain), &mut out);
    for (number, (_, _, expected)) in (0..).zip(rows) {
        assert_eq!(out.get(rank(A, number)), expected, "row {number}");
        assert_eq!(out.tiers(rank(A, number)).remote, expected, "row {number}");
    }
    assert_eq!(out.iter().count(), 10, "ranks with nothing to reuse are left out");
    // A clearing empties all groups and keeps what they are.
    let again = vec![KvEvent::Cleared, stored(&chain)];
    assert_eq!(index.apply(&batch(rank(A, 2), 1, again)), Applied::Ok);
    index.overlaps(&blocks(&chain), &mut out);
    assert_eq!(out.get(rank(A, 2)), 0);
    // An event of a group that there cannot be changes nothing.
    let nowhere = KvEvent::Stored { parent: None, hashes: blocks(&chain), tier: Tier::Device, group: 16 };
    let before = index.stats();
    assert_eq!(index.apply(&batch(rank(A, 2), 2, vec![nowhere])), Applied::Ok);
    assert_eq!(index.stats(), IndexStats { refused: before.refused + 200, ..before });
}

#[test]
fn ranks_may_come_and_go_for_ever() {
    let index = KvIndex::new(IndexLimits { ranks_max: 4, ..IndexLimits::default() });
    for life in 0..200_000 {
        assert_eq!(index.apply(&batch(rank(life, 0), 0, vec![stored(&[life, life + 1])])), Applied::Ok);
        index.remove_rank(rank(life, 0));
    }
    tidy(&index);
    assert_eq!(index.stats().blocks, 0);
    assert!(index.stats().bytes < 2 << 20, "{:?}", index.stats());
}

/// `cargo test --release -p forebay-kv-index -- --ignored --nocapture`
#[test]
#[ignore = "a timing: release build, quiet machine"]
fn a_full_hit_of_64_blocks_takes_a_few_microseconds_in_a_million() {
    let index = KvIndex::new(IndexLimits::default());
    let chains: Vec<Vec<u64>> = (0..15_625).map(|c| (0..64).map(|b| mix(c * 64 + b + 1)).collect()).collect();
    let batches: Vec<_> = chains
        .iter()
        .enumerate()
        .map(|(i, chain)| batch(rank(A, i as u16 % 8), i as u64 / 8, vec![stored(chain)]))
        .collect();
    let start = std::time::Instant::now();
    for batch in &batches {
        assert_eq!(index.apply(batch), Applied::Ok);
    }
    let store = start.elapsed().as_nanos() / 1_000_000;
    let queries: Vec<_> = chains.iter().map(|chain| blocks(chain)).collect();
    let mut out = Overlaps::default();
    let start = std::time::Instant::now();
    for query in &queries {
        index.overlaps(query, &mut out);
        assert_eq!(out.as_slice().len(), 1);
    }
    let hit = start.elapsed().as_nanos() / queries.len() as u128;
    println!(
        "store {store} ns a block, full hit {hit} ns, {} B a block",
        index.stats().bytes / index.stats().blocks
    );
    assert!(store < 500 && hit < 20_000);
}
