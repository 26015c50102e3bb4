use std::num::NonZeroU32;

use forebay_kv_hash::HashKey;
use forebay_types::{KvGroup, TokenId, device_blocks};

use super::*;
use crate::event::{EngineHash, GroupKind};

mod anything;
mod identity;
mod model;

fn hasher(block_size_tokens: u32) -> BlockHasher {
    BlockHasher::new(HashKey::GOLDEN, block_size_tokens)
}

/// Of a rank with blocks of 4 tokens, as ours are.
fn cache() -> RankCache {
    cache_of(4, Some(4), 100)
}

fn cache_of(own: u32, engine: Option<u32>, blocks_max: usize) -> RankCache {
    RankCache::new(RankSettings {
        hasher: hasher(own),
        model: "m".into(),
        engine_block_size_tokens: engine,
        blocks_max,
    })
}

/// Engine blocks of 4 tokens: a block's tokens are its hash's number, four times.
fn stored(parent: Option<u64>, hashes: &[u64]) -> Stored {
    stored_as(4, parent, hashes)
}

fn stored_as(block_size_tokens: u32, parent: Option<u64>, hashes: &[u64]) -> Stored {
    let tokens = hashes.iter().flat_map(|&hash| std::iter::repeat_n(hash as u32, block_size_tokens as usize));
    Stored::plain(
        parent.map(EngineHash),
        hashes.iter().copied().map(EngineHash).collect(),
        tokens.collect(),
        block_size_tokens,
    )
}

fn removed(hashes: &[u64]) -> Removed {
    let hashes = hashes.iter().copied().map(EngineHash).collect();
    Removed { hashes, tier: Tier::Device, group: None }
}

fn batch(events: impl IntoIterator<Item = EngineEvent>) -> EventBatch {
    EventBatch { time_seconds: 0.0, events: events.into_iter().collect(), dp_rank: None }
}

fn cached(cache: &RankCache) -> Vec<BlockHash> {
    device_blocks(&cache.snapshot()).collect()
}

impl RankCache {
    fn says(&mut self, event: impl Into<EngineEvent>) -> Applied {
        self.apply(&batch([event.into()]))
    }
}

impl From<Stored> for EngineEvent {
    fn from(stored: Stored) -> Self {
        Self::Stored(stored)
    }
}

impl From<Removed> for EngineEvent {
    fn from(removed: Removed) -> Self {
        Self::Removed(removed)
    }
}

/// Our chain over engine blocks of 4 tokens.
fn own(root: BlockHash, hashes: &[u64]) -> Vec<BlockHash> {
    hasher(4).chain(root, &stored(None, hashes).tokens)
}

fn plain(hashes: &[u64]) -> Vec<BlockHash> {
    own(hasher(4).root("m", ""), hashes)
}

fn in_tier(tier: Tier, parent: Option<BlockHash>, hashes: &[BlockHash]) -> KvEvent {
    KvEvent::Stored { parent, hashes: hashes.to_vec(), tier, group: 0 }
}

fn on_device(parent: Option<BlockHash>, hashes: &[BlockHash]) -> KvEvent {
    in_tier(Tier::Device, parent, hashes)
}

fn gone(hashes: &[BlockHash]) -> KvEvent {
    KvEvent::Removed { hashes: hashes.to_vec(), tier: Tier::Device, group: 0 }
}

fn only(events: impl Into<Vec<KvEvent>>) -> Applied {
    Applied { events: events.into(), faults: vec![] }
}

fn faults(applied: &Applied) -> Vec<String> {
    applied.faults.iter().map(ToString::to_string).collect()
}

#[test]
fn a_hash_stored_twice_goes_with_its_second_removal() {
    let mut cache = cache();
    let chain = plain(&[1, 2]);
    assert_eq!(cache.says(stored(None, &[1, 2])), only([on_device(None, &chain)]));
    assert_eq!(cache.says(stored(Some(1), &[2])), only([]));
    assert_eq!(cache.says(removed(&[2, 1])), only([gone(&chain[..1])]));
    assert_eq!(cache.says(removed(&[2])), only([gone(&chain[1..])]));
    assert_eq!((cached(&cache), cache.stats().engine_blocks), (vec![], 0));
}

#[test]
fn events_of_one_batch_are_joined_into_chains() {
    let mut cache = cache();
    let chain = plain(&[1, 2, 3]);
    let other = plain(&[9]);
    // A batch as SGLang sent it before it joined events: one event a page.
    let events = [stored(None, &[1]), stored(Some(1), &[2]), stored(None, &[9]), stored(Some(2), &[3])];
    let applied = cache.apply(&batch(events.map(Into::into)));
    let expected =
        [on_device(None, &chain[..2]), on_device(None, &other), on_device(Some(chain[1]), &chain[2..])];
    assert_eq!(applied, only(expected));
    let events = [removed(&[3]), removed(&[9]), removed(&[2])];
    let applied = cache.apply(&batch(events.map(Into::into)));
    assert_eq!(applied, only([gone(&[chain[2], other[0], chain[1]])]));
}

#[test]
fn a_chain_is_said_only_where_it_is_new() {
    let mut cache = cache();
    let chain = plain(&[1, 2, 3, 4]);
    assert_eq!(cache.says(stored(None, &[1, 2, 3, 4])).events, [on_device(None, &chain)]);
    assert_eq!(cache.says(removed(&[2, 4])).events, [gone(&[chain[1], chain[3]])]);
    let again = cache.says(stored(None, &[1, 2, 3, 4]));
    assert_eq!(again, only([on_device(Some(chain[0]), &[chain[1]]), on_device(Some(chain[2]), &[chain[3]])]));
}

#[test]
fn tiers_are_counted_apart_and_blocks_may_only_be_named() {
    let mut cache = cache();
    let chain = plain(&[1, 2]);
    // As vLLM offloads: no parent, no tokens, another block size.
    let offloaded = |hashes: &[u64]| Stored {
        tokens: vec![],
        tier: Tier::Host,
        block_size_tokens: 64,
        ..stored(None, hashes)
    };
    let from_host = |hashes: &[u64]| Removed { tier: Tier::Host, ..removed(hashes) };
    assert_eq!(cache.says(stored(None, &[1, 2])), only([on_device(None, &chain)]));
    assert_eq!(cache.says(offloaded(&[1, 2])), only([in_tier(Tier::Host, None, &chain)]));
    assert_eq!(cache.says(removed(&[1, 2])), only([gone(&chain)]));
    let stats = cache.stats();
    assert_eq!((stats.blocks_device, stats.blocks_host, stats.engine_blocks), (0, 2, 2));
    assert_eq!(cached(&cache), []);
    // What is known on any tier has a place in its chain.
    let third = plain(&[1, 2, 3])[2];
    assert_eq!(cache.says(stored(Some(2), &[3])), only([on_device(Some(chain[1]), &[third])]));
    let went = KvEvent::Removed { hashes: vec![chain[1]], tier: Tier::Host, group: 0 };
    assert_eq!(cache.says(from_host(&[2])), only([went]));
    // One whose tokens nobody said stands for nothing, and its removal is no mistake.
    assert_eq!(cache.says(offloaded(&[77])), only([]));
    assert_eq!(cache.stats().left_out, 1);
    assert_eq!(cache.says(from_host(&[77])), only([]));
    assert_eq!((cache.stats().left_out, cache.stats().removals_unknown), (0, 0));
    assert_eq!(cache.stats().engine_block_size_tokens, 4, "the device's, not the host's");
    // Not stored on that tier, though on another.
    assert_eq!(
        faults(&cache.says(from_host(&[3]))),
        ["1 blocks were removed that were not stored, 0000000000000003 among them"]
    );
}

#[test]
fn what_follows_an_unknown_parent_is_left_out_until_it_is_known_again() {
    let mut cache = cache();
    let lost = cache.says(stored(Some(50), &[51, 52]));
    assert_eq!(lost.events, []);
    let fault =
        |parent, blocks, explained| Fault::UnknownParent { parent: EngineHash(parent), blocks, explained };
    assert_eq!(lost.faults, [fault(50, 2, false)]);
    assert_eq!(faults(&lost), ["2 blocks follow block 0000000000000032, which was never announced"]);
    assert_eq!(cache.says(stored(Some(52), &[53])).faults, [fault(52, 1, true)], "a descendant");
    assert_eq!((cache.stats().left_out, cache.stats().orphans), (3, 3));
    assert_eq!(cache.says(removed(&[53, 51, 52])), only([]));
    assert_eq!(
        faults(&cache.says(removed(&[53, 54]))),
        ["2 blocks were removed that were not stored, 0000000000000035 among them"]
    );
    // A known hash stands for its prefix, so what follows it is found again.
    let chain = plain(&[1, 2, 3]);
    assert_eq!(cache.says(stored(None, &[1, 2])).events, [on_device(None, &chain[..2])]);
    let applied = cache.says(stored(Some(60), &[61, 2, 3]));
    assert_eq!(applied.events, [on_device(Some(chain[1]), &chain[2..])]);
    assert_eq!(applied.faults, [fault(60, 1, false)]);
    assert_eq!(cache.says(removed(&[2])), only([]), "it was stored twice");
}

#[test]
fn a_cleared_rank_holds_nothing() {
    let mut cache = cache();
    let on_host = Stored { tier: Tier::Host, ..stored(None, &[1]) };
    cache.apply(&batch([stored(None, &[1, 2]).into(), on_host.into()]));
    let chain = plain(&[1, 2]);
    let applied = cache.apply(&batch([EngineEvent::Cleared, stored(None, &[1, 2]).into()]));
    assert_eq!(applied, only([KvEvent::Cleared, on_device(None, &chain)]));
    assert_eq!((cache.stats().blocks_host, cache.stats().blocks_device), (0, 2));
    // Some engines clear only their own pool.
    assert_eq!(cache.says(Removed { tier: Tier::Host, ..removed(&[1]) }), only([]));
    assert_eq!(faults(&cache.says(Removed { tier: Tier::Host, ..removed(&[1]) })).len(), 1);
    cache.reset(History::Whole);
    assert_eq!(cache.stats(), RankStats { removals_unknown: 1, groups: 1, ..RankStats::default() });
    assert_eq!(cached(&cache), []);
}

#[test]
fn where_the_beginning_is_lost_the_unknown_is_no_fault() {
    let mut cache = cache();
    cache.reset(History::Lost);
    assert_eq!(cache.says(removed(&[50])), only([]));
    let orphan = Fault::UnknownParent { parent: EngineHash(50), blocks: 1, explained: true };
    assert_eq!(cache.says(stored(Some(50), &[51])).faults, [orphan]);
    assert_eq!(cache.says(stored(None, &[1])), only([on_device(None, &plain(&[1]))]));
    assert_eq!(cache.says(removed(&[51, 52, 1])), only([gone(&plain(&[1]))]));
    assert_eq!(cache.stats().removals_unknown, 0);
    cache.says(EngineEvent::Cleared);
    assert_eq!(faults(&cache.says(removed(&[52]))).len(), 1, "from here on all is known");
    let orphan = Fault::UnknownParent { parent: EngineHash(50), blocks: 1, explained: false };
    assert_eq!(cache.says(stored(Some(50), &[51])).faults, [orphan]);
}

#[test]
fn malformed_events_are_left_out_with_a_sentence() {
    let keys = |blocks: usize| Stored { extra_keys: Some(vec![vec![]; blocks]), ..stored(None, &[1, 2]) };
    let short = Stored { tokens: vec![1; 7], ..stored(None, &[1, 2]) };
    let endless = Stored { block_size_tokens: u32::MAX, tokens: vec![1; 4], ..stored(None, &[1, 2]) };
    let sizeless = Stored { block_size_tokens: 0, tokens: vec![1; 4], ..stored(None, &[1]) };
    let nothing = Stored { tokens: vec![1; 4], ..stored(None, &[]) };
    for (declared, event, said) in [
        (
            Some(4),
            stored_as(8, None, &[1, 2]),
            "its events have blocks of 8 tokens, but it was declared with 4; 2 left out",
        ),
        (None, short, "an event of 2 blocks of 4 tokens has 7 tokens; 2 left out"),
        (None, endless, "an event of 2 blocks of 4294967295 tokens has 4 tokens; 2 left out"),
        (None, sizeless, "an event of 1 blocks of 0 tokens has 4 tokens; 1 left out"),
        (None, nothing, "an event of 0 blocks of 4 tokens has 4 tokens; 0 left out"),
        (None, keys(1), "an event of 2 blocks has extra keys of 1 blocks; 2 left out"),
        (None, keys(3), "an event of 2 blocks has extra keys of 3 blocks; 2 left out"),
    ] {
        let mut cache = cache_of(4, declared, 100);
        let blocks = event.hashes.len() as u64;
        let hashes: Vec<u64> = event.hashes.iter().map(|hash| hash.0).collect();
        let applied = cache.apply(&batch([event.clone().into(), event.into()]));
        let both = said.replace(&format!("{blocks} left out"), &format!("{} left out", 2 * blocks));
        assert_eq!((&applied.events[..], faults(&applied)), (&[][..], vec![both]));
        assert_eq!((cache.stats().malformed, cache.stats().left_out), (2 * blocks, 2 * blocks));
        assert_eq!(cache.says(removed(&hashes)), only([]), "removing what was left out is no mistake");
        // The parent may be what was left out, so a replay is not worth asking for.
        if let Some(&last) = hashes.last() {
            let child = cache.says(Stored { block_size_tokens: 4, ..stored(Some(last), &[99]) });
            assert!(matches!(child.faults[..], [Fault::UnknownParent { explained: true, .. }]), "{child:?}");
        }
    }
    let mut cache = cache_of(4, None, 100);
    assert_eq!(cache.says(keys(2)).events.len(), 1);
    let unknown = || EngineEvent::Unknown { tag: "Block\nMoved".into() };
    let applied = cache.apply(&batch([unknown(), unknown()]));
    assert_eq!(
        faults(&applied),
        ["2 events of unknown types, \"Block\\nMoved\" among them, were passed over"]
    );
}

#[test]
fn a_hash_with_two_prefixes_stands_for_nothing() {
    let mut cache = cache();
    let chain = plain(&[1, 2]);
    let on_host = Stored { tier: Tier::Host, ..stored(None, &[1]) };
    cache.apply(&batch([stored(None, &[1, 2]).into(), on_host.into()]));
    // As SGLang's default does with two salts.
    let salted = || Stored { salt: Some("s".into()), ..stored(None, &[1]) };
    let applied = cache.says(salted());
    let from_host = KvEvent::Removed { hashes: vec![chain[0]], tier: Tier::Host, group: 0 };
    assert_eq!(applied.events, [gone(&chain[..1]), from_host]);
    assert_eq!(
        faults(&applied),
        ["1 hashes, 0000000000000001 among them, were announced with two different prefixes each; left out"]
    );
    assert_eq!(cache.says(salted()), only([]), "said once");
    assert_eq!(faults(&cache.says(stored(Some(1), &[7]))).len(), 1, "nothing can follow it");
    assert_eq!(cache.says(removed(&[1, 1, 1])), only([]), "its removals are counted all the same");
    assert_eq!(cache.says(Removed { tier: Tier::Host, ..removed(&[1]) }), only([]));
    assert_eq!(cache.says(stored(None, &[1])), only([on_device(None, &chain[..1])]), "and it may come back");
    assert_eq!(cache.stats().ambiguous, 1);
}

#[test]
fn other_tokens_under_a_known_hash_are_noticed_whatever_the_block_sizes() {
    for (own, engine) in [(4, 4), (4, 8), (4, 6), (16, 4)] {
        let mut cache = cache_of(own, None, 100);
        cache.says(stored_as(engine, None, &[1]));
        assert_eq!(cache.says(stored_as(engine, None, &[1])), only([]));
        for size in [engine - 1, engine + 1, 2 * engine] {
            let mut cache = cache_of(own, None, 100);
            cache.says(stored_as(engine, None, &[1]));
            assert!(
                matches!(cache.says(stored_as(size, None, &[1])).faults[..], [Fault::AmbiguousHash { .. }]),
                "{own} {engine}"
            );
        }
        let other = Stored { tokens: vec![9; engine as usize], ..stored_as(engine, None, &[1]) };
        assert!(matches!(cache.says(other).faults[..], [Fault::AmbiguousHash { .. }]), "{own} {engine}");
    }
}

#[test]
fn beyond_its_bound_a_rank_takes_no_more() {
    let mut cache = cache_of(4, None, 3);
    let chain = plain(&[1, 2, 3]);
    let applied = cache.says(stored(None, &[1, 2, 3, 4, 5]));
    assert_eq!(applied.events, [on_device(None, &chain)]);
    assert_eq!(
        faults(&applied),
        ["2 blocks left out: 3 are followed already, the most that is allowed for one rank"]
    );
    assert_eq!((cache.stats().refused, cache.stats().left_out), (2, 2));
    assert_eq!(cache.says(stored(Some(2), &[3])), only([]), "what is known needs no room");
    assert_eq!(cache.says(removed(&[5, 4])), only([]));
    assert_eq!(cache.says(removed(&[1])), only([gone(&chain[..1])]));
    assert_eq!(cache.says(stored(None, &[1])), only([on_device(None, &chain[..1])]));
    // One engine block with more of ours than there is room for.
    let mut cache = cache_of(4, None, 3);
    assert!(matches!(cache.says(stored_as(16, None, &[1])).faults[..], [Fault::NoRoom { .. }]));
    assert_eq!(cache.says(stored_as(12, None, &[2])).events.len(), 1);
    assert_eq!(cache.stats().blocks_device, 3);
}

fn needs(window_blocks: u32, step_blocks: u32) -> KvGroup {
    let step_blocks = NonZeroU32::new(step_blocks).expect("above 0");
    KvGroup { window_blocks: NonZeroU32::new(window_blocks), step_blocks }
}

/// Blocks of ours have 4 tokens.
#[test]
fn a_group_needs_what_its_layers_look_at() {
    use GroupKind::{
        ChunkedLocalAttention, CrossAttention, EncoderOnlyAttention, FullAttention, Mamba, MlaAttention,
        Other, SlidingWindow, Unknown,
    };
    //   group, kind, window in tokens, engine's block size: blocks of ours needed (0: all), and where a prefix may end
    for (number, kind, window, engine, expected) in [
        (0, Some(FullAttention), None, 4, Some((0, 1))),
        (1, Some(MlaAttention), None, 8, Some((0, 2))),
        (1, Some(FullAttention), None, 6, Some((0, 1))),
        (1, Some(FullAttention), None, 2, Some((0, 1))),
        (0, None, None, 4, Some((0, 1))),
        (0, Some(Unknown), None, 4, Some((0, 1))),
        (1, None, None, 8, Some((2, 2))),
        (0, Some(SlidingWindow), Some(9), 4, Some((2, 1))),
        (0, Some(SlidingWindow), Some(10), 4, Some((3, 1))),
        (1, Some(SlidingWindow), Some(10), 8, Some((4, 2))),
        (1, Some(SlidingWindow), Some(10), 2, Some((3, 1))),
        (1, Some(SlidingWindow), Some(10), 6, Some((3, 3))),
        (1, Some(SlidingWindow), Some(u32::MAX), 4, Some((1 << 30, 1))),
        (1, Some(SlidingWindow), Some(0), 4, Some((1, 1))),
        (1, Some(SlidingWindow), None, 4, Some((1, 1))),
        (1, Some(Mamba), None, 12, Some((1, 3))),
        (1, Some(Mamba), None, 6, Some((1, 3))),
        (1, Some(ChunkedLocalAttention), None, 4, Some((1, 1))),
        (1, Some(Other), None, 4, Some((1, 1))),
        (1, Some(EncoderOnlyAttention), None, 4, None),
        (1, Some(CrossAttention), None, 4, None),
    ] {
        let event =
            Stored { group: Some(number), kind, window_tokens: window, ..stored_as(engine, None, &[1]) };
        let expected = expected.map(|(window, step)| needs(window, step));
        assert_eq!(group::needs(&event, 4), expected, "{number} {kind:?} {window:?} {engine}");
    }
}

#[test]
fn groups_are_announced_and_counted_apart() {
    use GroupKind::{EncoderOnlyAttention, FullAttention, Mamba, SlidingWindow};
    let of = |group, kind, parent, hashes: &[u64]| Stored {
        group: Some(group),
        kind: Some(kind),
        window_tokens: (kind == SlidingWindow).then_some(5),
        ..stored(parent, hashes)
    };
    let from = |group, hashes: &[u64]| Removed { group: Some(group), ..removed(hashes) };
    let chain = plain(&[1, 2, 3]);
    let in_group = |group, parent: Option<BlockHash>, hashes: &[BlockHash]| KvEvent::Stored {
        parent,
        hashes: hashes.to_vec(),
        tier: Tier::Device,
        group,
    };
    let mut cache = cache();
    // One group with full attention goes without saying, whatever its number.
    assert_eq!(cache.says(of(7, FullAttention, None, &[1, 2])), only([on_device(None, &chain[..2])]));
    let groups = KvEvent::Groups(vec![KvGroup::FULL, needs(1, 1)]);
    let applied = cache.says(of(2, SlidingWindow, None, &[1, 2]));
    assert_eq!(applied, only([groups, in_group(1, None, &chain[..2])]));
    // What the window has passed goes; what follows has a place all the same.
    let gone_of_1 = KvEvent::Removed { hashes: vec![chain[0]], tier: Tier::Device, group: 1 };
    assert_eq!(cache.says(from(2, &[1])), only([gone_of_1]));
    assert_eq!(
        cache.says(of(2, SlidingWindow, Some(2), &[3])),
        only([in_group(1, Some(chain[1]), &chain[2..])])
    );
    // A state is stored without those before it, which another group has announced.
    let groups = KvEvent::Groups(vec![KvGroup::FULL, needs(1, 1), needs(1, 2)]);
    let state = Stored { tokens: vec![9; 8], block_size_tokens: 8, ..of(4, Mamba, Some(2), &[9]) };
    let after = hasher(4).chain(chain[1], &[9; 8]);
    let applied = cache.says(state);
    assert_eq!(applied, only([groups.clone(), in_group(2, Some(chain[1]), &after)]));
    assert_eq!(
        cache.snapshot(),
        [
            groups,
            in_group(0, None, &chain[..2]),
            in_group(1, Some(chain[0]), &chain[1..]),
            in_group(2, Some(chain[1]), &after)
        ]
    );
    // Encoders take no part, and their removals are no mistake.
    assert_eq!(cache.says(of(5, EncoderOnlyAttention, None, &[50])), only([]));
    assert_eq!(cache.says(from(5, &[50, 51])), only([]));
    let stats = cache.stats();
    assert_eq!((stats.engine_blocks, stats.engine_blocks_other_groups, stats.groups), (2, 3, 3));
    assert_eq!((stats.blocks_device, stats.engine_block_size_tokens), (2, 4), "the first group's");
    assert_eq!(faults(&cache.says(from(6, &[1]))).len(), 1, "no such group");
    // The groups outlive what is cached.
    assert_eq!(cache.says(EngineEvent::Cleared), only([KvEvent::Cleared]));
    assert_eq!(cache.says(of(4, Mamba, None, &[8])).events.len(), 2, "a state of another size is announced");
    assert_eq!(cache.says(of(4, Mamba, None, &[8])), only([]));
}

#[test]
fn beyond_their_bounds_groups_and_their_blocks_are_left_out() {
    let of = |group: u32, hashes: &[u64]| Stored { group: Some(group), ..stored(None, hashes) };
    let mut cache = cache_of(4, None, 3);
    cache.apply(&batch([of(0, &[1, 2]).into(), of(1, &[1, 2]).into()]));
    let stats = cache.stats();
    assert_eq!((stats.engine_blocks, stats.engine_blocks_other_groups, stats.refused), (2, 1, 1));
    let mut cache = cache_of(4, None, 1000);
    for group in 0..16 {
        assert_eq!(cache.says(of(group, &[1])).faults, []);
    }
    let applied = cache.says(of(16, &[1, 2]));
    assert_eq!(
        faults(&applied),
        ["2 blocks are of groups of layers beyond the 16 that are followed; left out"]
    );
    assert_eq!(cache.says(Removed { group: Some(16), ..removed(&[1, 2]) }), only([]));
    assert_eq!((applied.events, cache.stats().groups), (vec![], 16));
}

#[test]
fn blocks_of_other_sizes_are_laid_side_by_side() {
    // (B, E, engine blocks): which of ours each engine block completes.
    for (own, engine, completes) in [
        (16, 32, vec![0..2_usize, 2..4, 4..6]),
        (16, 24, vec![0..1, 1..3, 3..4, 4..6]),
        (16, 16, vec![0..1, 1..2]),
        (16, 8, vec![0..0, 0..1, 1..1, 1..2]),
        (16, 40, vec![0..2, 2..5, 5..7]),
        (16, 5, vec![0..0, 0..0, 0..0, 0..1, 1..1, 1..1, 1..2]),
        (2, 3, vec![0..1, 1..3]),
    ] {
        let mut cache = cache_of(own, Some(engine), 100);
        let hashes: Vec<u64> = (1..=completes.len() as u64).collect();
        let tokens: Vec<TokenId> = stored_as(engine, None, &hashes).tokens;
        let chain = hasher(own).chain(hasher(own).root("m", ""), &tokens);
        for (&hash, completes) in hashes.iter().zip(&completes) {
            let parent = (hash > 1).then_some(hash - 1);
            let applied = cache.says(stored_as(engine, parent, &[hash]));
            let before = completes.start.checked_sub(1).map(|last| chain[last]);
            let expected = if completes.is_empty() {
                vec![]
            } else {
                vec![on_device(before, &chain[completes.clone()])]
            };
            assert_eq!(applied, only(expected), "{own} {engine} {hash}");
        }
        for (&hash, completes) in hashes.iter().zip(&completes) {
            let expected = if completes.is_empty() { vec![] } else { vec![gone(&chain[completes.clone()])] };
            assert_eq!(cache.says(removed(&[hash])), only(expected), "{own} {engine} {hash}");
        }
        assert_eq!(
            cache.stats(),
            RankStats { engine_block_size_tokens: engine, groups: 1, ..RankStats::default() }
        );
    }
}
